"""The text-to-image language model against the released code's golden values (README: t2i_tiny/README.md)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from goldens import assert_grad_close
from text_to_image_goldens import (
    CASE,
    FEATURE_ATOL,
    FOLDER,
    GRAD_RTOL,
    GUIDED_ATOL,
    LOGIT_ATOL,
    LOSS_ATOL,
    PROBABILITY_ATOL,
    golden_model,
    load,
    released_state,
)
from transformers import PreTrainedTokenizerFast

from tokenflow.checkpoints.text_to_image import released_key
from tokenflow.generation.masks import Segment, block_numbers, dense_mask
from tokenflow.generation.modeling import join_prefixes
from tokenflow.generation.predictor import CachedPredictor, UncachedPredictor
from tokenflow.generation.prompt import add_pad_token, encode_prompts, marker_ids
from tokenflow.generation.sampler import SamplingSettings, likely_codes, sample_scales
from tokenflow.tokenizer.image_processing import TokenFlowImageProcessor

IDS = CASE["ids"]
N = CASE["num_image_tokens"]


@pytest.fixture(scope="module")
def model():
    return golden_model()


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return load("inputs")


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load("golden_train")


def prefixes(inputs, tag: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch's prefixes, padded on the left to one length, out of the released right-padded rows."""
    lengths = CASE["train"][tag]["prefix_len"]
    width = max(lengths)
    ids = torch.full((len(lengths), width), IDS["pad"])
    for row, length in enumerate(lengths):
        ids[row, width - length :] = inputs[f"{tag}.input_ids"][row, :length]
    return ids, (ids != IDS["pad"]).long()


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def test_the_weights_are_the_goldens_weights():
    checks = CASE["weight_checksums"]["values"]
    for key, (total, absolute) in checks.items():
        tensor = released_state()[key].double()
        assert tensor.sum().item() == pytest.approx(total, abs=1e-6)
        assert tensor.abs().sum().item() == pytest.approx(absolute, abs=1e-6)


def test_prompt_layout():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(FOLDER / "tokenizer.json"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    assert add_pad_token(tokenizer) == IDS["pad"]
    opening, closing = marker_ids(tokenizer)
    assert opening == IDS["image_open"]
    assert closing == IDS["image_close"]
    layouts = json.loads((FOLDER / "prompt_layout.json").read_text())
    ids, mask = encode_prompts(tokenizer, [case["text"] for case in layouts], 128, opening)
    assert ids.tolist() == [case["inference_ids"] for case in layouts]
    assert torch.equal(mask.bool(), ids != IDS["pad"])


def test_pixels_to_bytes():
    x, y = (torch.tensor(CASE["to_uint8"][name]) for name in "xy")
    picture = TokenFlowImageProcessor(size=1).postprocess(x.view(1, 1, 1, -1).expand(1, 3, 1, -1))[0]
    assert np.array_equal(np.asarray(picture)[0, :, 0], y)


def test_visual_inputs(model, inputs, golden):
    indices = inputs["train.codes"][:1].long()
    close(model.code_table.all_inputs(indices)[0], golden["features.plain"], FEATURE_ATOL)
    parts, running = indices.split([s * s for s in model.config.scales], dim=1), None
    for position, part in enumerate(parts):
        inputs_here = None if running is None else model.code_table.inputs_of(running, position)
        running = model.code_table.advance(inputs_here, part, position)
        expected = golden.get(f"features.refine_scale{position}")
        if expected is not None:
            close(running[0].flatten(1).T, expected, FEATURE_ATOL)


@pytest.mark.parametrize("tag", ["train", "ragged"])
def test_mask(model, inputs, golden, tag):
    ids, mask = prefixes(inputs, tag)
    width = ids.shape[1]
    after = len(IDS["image_close"]) + 1
    blocks = block_numbers([*model.segments(width), Segment(after, "text")])
    allowed = dense_mask(blocks, F.pad(mask.bool(), (0, N - 1 + after), value=True))[:, 0]
    rows = [0, 1] if tag == "train" else [1]
    for row in rows:
        cut = width - CASE["train"][tag]["prefix_len"][row]
        ours = allowed[row, cut:, cut:]
        bits = np.unpackbits(golden[f"{tag}.row{row}.allowed_bits"].numpy(), axis=1).astype(bool)
        theirs = torch.from_numpy(bits)[: len(ours), : len(ours)]
        real = F.pad(mask[row, cut:].bool(), (0, len(ours) - width + cut), value=True)
        assert torch.equal(ours[real], theirs[real])


@pytest.mark.parametrize("tag", ["train", "ragged"])
def test_training_forward(model, inputs, golden, tag):
    ids, mask = prefixes(inputs, tag)
    width, case = ids.shape[1], CASE["train"][tag]
    seen: dict[str, torch.Tensor] = {}
    layers = [*model.model.layers[:-1], model.model.norm]
    hooks = [
        layer.register_forward_hook(lambda _, __, out, name=f"hidden{i + 1}": seen.update({name: out}))
        for i, layer in enumerate(layers)
    ]
    hooks.append(
        model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.update(inputs_embeds=args[0]))
    )
    with torch.no_grad():
        out = model(ids, mask, inputs[f"{tag}.codes"], text_loss=True)
        seen["logits"] = model.lm_head(seen["hidden2"])
    for hook in hooks:
        hook.remove()

    close(out.loss_vision.item(), case["loss_vision"], LOSS_ATOL)
    close(out.loss_text.item(), case["loss_text_without_bos"], LOSS_ATOL)
    close(out.loss.item(), out.loss_vision.item() + out.loss_text.item(), LOSS_ATOL)
    targets = out.nll.shape[1]
    for row, length in enumerate(case["prefix_len"]):
        theirs = golden[f"{tag}.nll_vision"][row, length - 1 : length - 1 + targets]
        close(out.nll[row], theirs, LOGIT_ATOL)

    first = int((mask.sum(0) > 0).int().argmax())  # the padding that the model cut off
    checked = 0
    for probe in case["probe_positions"]:
        row = probe["row"]
        cut = first - (width - case["prefix_len"][row])
        for i, position in enumerate(probe["positions"]):
            ours = position - cut
            if ours >= seen["hidden1"].shape[1]:
                continue  # the end token, which predicts nothing
            if ours < 0 or (ours + first < width and mask[row, ours + first] == 0):
                continue  # padding, which sees other things here
            checked += 1
            for name in ("inputs_embeds", "hidden1", "hidden2"):
                atol = FEATURE_ATOL if name == "inputs_embeds" else LOGIT_ATOL
                close(seen[name][row, ours], golden[f"{tag}.row{row}.{name}"][i], atol)
            logits = seen["logits"][row, ours][CASE["vocab_subset"]]
            close(logits, golden[f"{tag}.row{row}.logits"][i], LOGIT_ATOL)
    assert checked >= 24 * len(case["probe_positions"])


def test_gradients(model, inputs, golden):
    ids, mask = prefixes(inputs, "train")
    model.zero_grad()
    model(ids, mask, inputs["train.codes"]).loss.backward()
    parameters = {released_key(key): parameter for key, parameter in model.named_parameters()}
    for name, expected in golden.items():
        if not name.startswith("train.grad."):
            continue
        key = name.removeprefix("train.grad.")
        first = IDS["image_token_start"] if key == "lm_head.weight" else 0
        assert_grad_close(parameters[key].grad[first : first + len(expected)], expected, GRAD_RTOL)
    norms = CASE["train"]["train"]["grad_norms_of_loss_vision"]
    assert set(norms) == set(parameters)
    for key, norm in norms.items():
        assert parameters[key].grad.norm().item() == pytest.approx(norm, rel=GRAD_RTOL), key
    model.zero_grad()


# sampling
@pytest.mark.parametrize("case", json.loads((FOLDER / "filter.json").read_text())["small"]["cases"])
def test_filter_by_hand(case):
    logits = torch.tensor(json.loads((FOLDER / "filter.json").read_text())["small"]["logits"])
    values, kept = likely_codes(logits, case["top_k"], case["top_p"])
    assert sorted(kept[values > -torch.inf].tolist()) == case["kept"]


def test_filter():
    goldens = load("golden_filter")
    for case in json.loads((FOLDER / "filter.json").read_text())["cases"]:
        scale = f"s{case['scale_index']}"
        name = f"{scale}.k{case['top_k']}.p{case['top_p']}"
        values, kept = likely_codes(goldens[f"{scale}.logits"], case["top_k"], case["top_p"])
        inside = values > -torch.inf
        order = kept[inside].argsort()
        assert torch.equal(kept[inside][order].int(), goldens[f"{name}.support"])
        close(values[inside].softmax(-1)[order], goldens[f"{name}.probs"], PROBABILITY_ATOL)


class Recorder:
    """A predictor that notes the logits of each pass."""

    def __init__(self, predictor):
        self.predictor, self.seen = predictor, []

    def step(self, position, features, keep):
        logits = self.predictor.step(position, features, keep)
        self.seen.append((position, 0 if keep else self.seen[-1][1] + 1, logits))
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("run", ["1step", "3step"])
@pytest.mark.parametrize("kind", [CachedPredictor, UncachedPredictor])
def test_greedy_sampling(model, run, kind):
    prefix = load("inference_inputs")["prefix_ids"]
    goldens, case = load(f"golden_infer_{run}"), CASE["infer"]["runs"][run]
    ids, real = join_prefixes([(prefix, prefix != IDS["pad"])])
    predictor = Recorder(kind(model, ids, real))
    settings = SamplingSettings(CASE["infer"]["guidance"], case["top_k"], case["top_p"])
    *_, sampled = sample_scales(predictor, model.code_table, settings, [0, 1])
    assert torch.equal(sampled.int(), goldens["codes"])
    assert len(predictor.seen) == len(case["passes"])

    columns = [i - IDS["image_token_start"] for i in CASE["vocab_subset"] if i >= IDS["image_token_start"]]
    for (position, index, logits), expected in zip(predictor.seen, case["passes"], strict=True):
        name = f"s{position}.r{index}"
        assert (position, index) == (expected["scale_index"], expected["refinement"])
        rows = expected["checked_positions"]
        conditional, unconditional = logits.chunk(2)
        close(conditional[:, rows][..., columns], goldens[f"{name}.cond"], LOGIT_ATOL)
        close(unconditional[:, rows][..., columns], goldens[f"{name}.uncond"], LOGIT_ATOL)
        t = expected["t"]
        assert t == settings.guidance_at(position, len(model.config.scales))
        guided = (1 + t) * conditional - t * unconditional
        close(guided[:, rows][..., columns], goldens[f"{name}.guided"], GUIDED_ATOL)
        assert torch.equal(guided.argmax(-1).int(), goldens[f"{name}.codes"])


@pytest.mark.slow
def test_generate_indices_is_that_sampling(model):
    prefix = load("inference_inputs")["prefix_ids"]
    mask = (prefix != IDS["pad"]).long()
    goldens, case = load("golden_infer_1step"), CASE["infer"]["runs"]["1step"]
    sampled = model.generate_indices(
        prefix[:2], mask[:2], prefix[2:], mask[2:], top_k=case["top_k"], top_p=case["top_p"]
    )
    assert torch.equal(sampled.int(), goldens["codes"])
