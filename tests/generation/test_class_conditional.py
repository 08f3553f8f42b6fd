"""The class-conditional transformer: its size, its mask, what it learns and how it starts."""

from __future__ import annotations

import math

import pytest
import torch

from tokenflow import TokenFlowModel
from tokenflow.errors import UserError
from tokenflow.generation.class_conditional import (
    ClassPredictor,
    TokenFlowClassToImageConfig,
    TokenFlowForClassToImage,
)
from tokenflow.generation.masks import Segment, block_numbers, dense_mask
from tokenflow.generation.sampler import KnownTokens, SamplingSettings, sample_scales

SIZES = {"codebook_size": 64, "scales": [1, 2, 4], "num_classes": 5}


@pytest.fixture(scope="module")
def tokenizer(small_model_folder):
    return TokenFlowModel.from_pretrained(small_model_folder).eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    """Two layers with open gates and a head that is not nearly zero, so that every part has a say."""
    torch.manual_seed(0)
    model = TokenFlowForClassToImage(TokenFlowClassToImageConfig(depth=2, **SIZES)).eval()
    model.set_codebooks(tokenizer)
    with torch.no_grad():
        for block in model.blocks:
            block.adaptation.bias[: block.adaptation.gate_rows] = 0.7
        model.head.weight.mul_(50)
    return model


def some(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    return labels, torch.randint(64, (count, 21), generator=generator)


def test_depth_16_has_the_310_million_parameters_of_the_paper():
    with torch.device("meta"):
        model = TokenFlowForClassToImage(TokenFlowClassToImageConfig(depth=16, codebook_size=4096))
        larger = TokenFlowForClassToImage(TokenFlowClassToImageConfig(depth=16))
    count = sum(p.numel() for p in model.parameters())
    assert 310e6 < count < 311e6  # VAR-d16: 310 M with 4,096 codes
    assert sum(p.numel() for p in larger.parameters()) - count == (32768 - 4096) * (1024 + 1)
    assert model.config.hidden_size == 1024
    assert model.blocks[0].attention.heads == 16


def test_a_fresh_model_is_nearly_uniform_and_its_layers_nearly_the_identity(tokenizer):
    torch.manual_seed(0)
    model = TokenFlowForClassToImage(TokenFlowClassToImageConfig(depth=2, **SIZES)).eval()
    model.set_codebooks(tokenizer)
    loss = model(*some(4)).loss.detach()
    assert float(loss) == pytest.approx(math.log(64), abs=0.02)
    condition = model.embed_classes(torch.tensor([1]))
    x = torch.randn(1, 3, 128)
    torch.testing.assert_close(model.blocks[0](x, condition), x, atol=1e-3, rtol=0)


def test_each_scale_sees_the_class_and_the_scales_before_it(model):
    labels, codes = some(1)

    def nll(labels=labels, codes=codes):
        with torch.inference_mode():
            return model(labels, codes).nll

    before = nll()
    last, middle = codes.clone(), codes.clone()
    last[:, 5:] = (last[:, 5:] + 1) % 64
    middle[:, 3] = (middle[:, 3] + 1) % 64
    assert torch.equal(nll(codes=last)[:, :5], before[:, :5])
    changed = nll(codes=middle)
    same = torch.tensor([0, 1, 2, 4])  # the others of its scale are predicted without it
    torch.testing.assert_close(changed[:, same], before[:, same], rtol=0, atol=1e-6)
    assert (changed[:, 5:] != before[:, 5:]).all()
    assert (nll(labels=(labels + 1) % 5) != before).all()
    assert (nll(labels=torch.tensor([5])) != before).all()


def test_rows_do_not_see_each_other(model):
    labels, codes = some(3)
    with torch.inference_mode():
        together, alone = model(labels, codes).nll, model(labels[1:2], codes[1:2]).nll
    torch.testing.assert_close(together[1:2], alone)


def test_it_learns_which_codes_belong_to_a_class(tokenizer):
    torch.manual_seed(0)
    settings = {**SIZES, "class_dropout": 0.0, "drop_path": 0.0}
    model = TokenFlowForClassToImage(TokenFlowClassToImageConfig(depth=1, **settings)).train()
    model.set_codebooks(tokenizer)
    _, codes = some(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(torch.arange(5), codes).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.5
    with torch.inference_mode():
        wrong = model.eval()(torch.arange(5).roll(1), codes)
    assert float(wrong.nll[:, 0].min()) > 1  # later codes can be told from earlier ones


def test_training_hides_labels_and_drops_branches(tokenizer):
    torch.manual_seed(0)
    config = TokenFlowClassToImageConfig(depth=1, class_dropout=0.5, **SIZES)
    model = TokenFlowForClassToImage(config).train()
    model.set_codebooks(tokenizer)
    labels, codes = torch.zeros(64, dtype=torch.int64), some(64)[1]
    model(labels, codes).loss.backward()
    used = model.class_embedding.weight.grad.abs().sum(1) > 0
    assert used.tolist() == [True, False, False, False, False, True]  # class 0 and "no class"
    with torch.device("meta"):
        deep = TokenFlowForClassToImage(TokenFlowClassToImageConfig(depth=24, **SIZES))
    assert [block.drop_path for block in deep.blocks][::23] == pytest.approx([0, 0.1])


def test_it_is_saved_with_its_codes_and_loaded_as_it_was(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = TokenFlowForClassToImage.from_pretrained(tmp_path).eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.config.to_dict()["scales"] == [1, 2, 4]
    assert torch.equal(loaded(*some(2)).nll, model(*some(2)).nll)


def test_mistakes_are_one_line(model, tokenizer):
    with pytest.raises(UserError, match=r"codes must be \[2, 21\] here, got \[2, 20\]"):
        model(torch.tensor([0, 1]), torch.zeros(2, 20, dtype=torch.int64))
    with pytest.raises(UserError, match="labels run from 0 to 6; this model has 0 to 5"):
        model(torch.tensor([0, 6]), torch.zeros(2, 21, dtype=torch.int64))
    fresh = TokenFlowForClassToImage(TokenFlowClassToImageConfig(depth=1, **SIZES))
    with pytest.raises(UserError, match="no code vectors yet"):
        fresh(*some(2))
    with pytest.raises(UserError, match="depth must be at least 1, got 0"):
        TokenFlowClassToImageConfig(depth=0)
    with pytest.raises(UserError, match=r"class_dropout must be in \[0, 1\), got 1.5"):
        TokenFlowClassToImageConfig(class_dropout=1.5)
    other = TokenFlowForClassToImage(TokenFlowClassToImageConfig(depth=1, **{**SIZES, "scales": [1, 4]}))
    with pytest.raises(UserError, match="the tokenizer has scales"):
        other.set_codebooks(tokenizer)


class Uncached:
    """The oracle: every pass computes all scales again, with the mask of training."""

    def __init__(self, model, labels):
        self.model, self.condition, self.kept = model, model.embed_classes(labels), []

    def step(self, position, features, keep):
        x = self.model.embed_start(self.condition)
        if features is not None:
            before = [self.model.embed_scales(f, k) for k, f in enumerate(self.kept[: position - 1], 1)]
            x = torch.cat([x, *before, self.model.embed_scales(features, position)], dim=1)
            self.kept += [features] if keep else []
        blocks = block_numbers([Segment(s * s, "scale") for s in self.model.config.scales[: position + 1]])
        mask = dense_mask(blocks, torch.ones(1, len(blocks), dtype=torch.bool))
        logits = self.model.logits(x, self.condition, mask)
        return logits[:, -(self.model.config.scales[position] ** 2) :]


@pytest.mark.parametrize("passes", [1, 3])
def test_the_cache_changes_no_code(model, passes):
    settings = SamplingSettings(2.0, [5] * passes, [0.9] * passes, temperature=0.0)
    labels = torch.tensor([0, 3, 5, 5])  # with guidance: two labels, then "no class"
    cached = [*sample_scales(ClassPredictor(model, labels), model.code_table, settings, [1, 2])]
    uncached = [*sample_scales(Uncached(model, labels), model.code_table, settings, [1, 2])]
    assert [codes.shape[1] for codes in cached] == [1, 5, 21]
    for a, b in zip(cached, uncached, strict=True):
        assert torch.equal(a, b)
    public = model.generate_indices(
        torch.tensor([0, 3]), guidance_scale=2.0, top_k=[5] * passes, top_p=[0.9] * passes, temperature=0.0
    )
    assert torch.equal(public, cached[-1])


def test_an_image_depends_on_its_label_and_its_seed_alone(model):
    together = model.generate_indices(torch.tensor([0, 1, 1]), seed=[7, 8, 9])
    assert together.shape == (3, 21)
    assert 0 <= int(together.min()) <= int(together.max()) < 64
    assert torch.equal(model.generate_indices(torch.tensor([1]), seed=8), together[1:2])
    assert torch.equal(
        model.generate_indices(torch.tensor([1, 0]), seed=[9, 7], batch_size=2), together[[2, 0]]
    )
    assert not torch.equal(together[1], together[2])
    heard = []
    model.generate_indices(torch.tensor([0, 1]), seed=7, callback=heard.append)
    assert [(list(step.rows), step.position, step.codes.shape[1]) for step in heard] == [
        ([0], 0, 1), ([0], 1, 5), ([0], 2, 21), ([1], 0, 1), ([1], 1, 5), ([1], 2, 21),
    ]  # fmt: skip
    assert torch.equal(heard[2].codes, together[:1])


def test_known_codes_stay(model):
    first = model.generate_indices(torch.tensor([2]), seed=1)
    again = model.generate_indices(torch.tensor([2]), seed=2, known=KnownTokens(first[:, :5]))
    assert torch.equal(again[:, :5], first[:, :5])
    assert not torch.equal(again, first)
    with pytest.raises(UserError, match="known codes must be"):
        model.generate_indices(torch.tensor([2]), known=KnownTokens(first[:, :4]))
