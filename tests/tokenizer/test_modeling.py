"""The whole tokenizer: flows by configuration, saving and loading, precision, features, the LLaVA tower."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from small_model import small_config
from tokenflow import TokenFlowModel
from tokenflow.errors import UserError
from tokenflow.tokenizer.configuration import (
    FEATURE_STRATEGIES,
    ConvSpec,
    PixelDecoderSpec,
    PixelFlow,
    SemanticFlow,
)

CONV = {"width": 32, "multipliers": (1, 1), "blocks": 1, "latent_channels": 32, "patch": 4}


def semantic(name="semantic", dim=32, **changes):
    vision = {**small_config().flows[0]["encoder"], **changes}
    return SemanticFlow(name, dim, encoder=vision, decoder_layers=1, decoder_heads=2, target_dim=24)


def pixel(name="pixel", dim=8):
    return PixelFlow(name, dim, encoder=ConvSpec(**CONV))


def build(seed=0, **overrides):
    torch.manual_seed(seed)
    return TokenFlowModel(small_config(**overrides)).eval()


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_public_shapes_and_types(model, pixels):
    with torch.no_grad():
        encoded = model.encode(pixels)
        decoded = model.decode(encoded.quantized)
    assert encoded.indices.shape == (2, 21)
    assert encoded.indices.dtype == torch.int64
    assert encoded.quantized.shape == (2, 40, 4, 4)
    assert decoded.pixel_values.shape == (2, 3, 32, 32)
    assert decoded.semantic.shape == (2, 16, 24)
    assert decoded.others is None
    assert model.config.scales == [1, 2, 4]


@pytest.mark.parametrize(
    ("flows", "decoder"),
    [
        ([semantic()], None),
        ([pixel()], PixelDecoderSpec(**CONV)),
        ([semantic(), pixel(), pixel("edges", 4)], PixelDecoderSpec(**CONV, flows=("pixel", "edges"))),
        ([semantic(), semantic("dino", 6, num_hidden_layers=1), pixel()], PixelDecoderSpec(**CONV)),
        ([semantic()], PixelDecoderSpec(**CONV, flows=("semantic",))),
    ],
    ids=[
        "semantic only",
        "pixel only",
        "third pixel flow",
        "second semantic flow",
        "pixels from the semantic flow",
    ],
)
def test_flows_come_from_the_configuration_alone(flows, decoder, pixels, tmp_path):
    model = build(flows=flows, pixel_decoder=decoder)
    dims = [flow.dim for flow in flows]
    with torch.no_grad():
        encoded = model.encode(pixels)
        decoded = model.decode(encoded.quantized)
    assert encoded.quantized.shape == (2, sum(dims), 4, 4)
    assert set(model.split_flows(encoded.quantized)) == {flow.name for flow in flows}
    assert (decoded.pixel_values is None) == (decoder is None)
    assert (decoded.semantic is None) == ("semantic" not in [flow.name for flow in flows])
    extra = {flow.name for flow in flows if flow.kind == "semantic"} - {"semantic"}
    assert set(decoded.others or {}) == extra
    model.train()
    losses = model.encode(pixels).losses
    (losses["vq"] + losses["commitment"]).backward()
    for flow in flows:
        assert model.quantizer.quantizer.codebooks[flow.name].grad is not None
        assert any(p.grad is not None for p in model.encoders[flow.name].parameters())
    model.save_pretrained(tmp_path)
    again = TokenFlowModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.encode(pixels).indices, encoded.indices)


def test_a_zero_weight_flow_has_no_say(pixels):
    """The pixel flow then follows the semantic one's choice: the shared mapping at its extreme."""
    model = build(flows=[semantic(), {**small_config().flows[1], "weight": 0.0}])
    alone = build(flows=[semantic()], pixel_decoder=None)
    alone.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(model.encode(pixels).indices, alone.encode(pixels).indices)


# decoding
def test_decoding_indices_equals_decoding_the_map(model, pixels):
    with torch.no_grad():
        encoded = model.encode(pixels)
        by_map, by_indices = model.decode(encoded.quantized), model.decode_indices(encoded.indices)
    torch.testing.assert_close(by_indices.pixel_values, by_map.pixel_values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_indices.semantic, by_map.semantic, atol=1e-5, rtol=1e-5)


def test_progressive_decoding_by_prefix_and_by_number_agree(model, pixels):
    with torch.no_grad():
        indices = model.encode(pixels).indices
        images = []
        for count, length in ((1, 1), (2, 5), (3, 21)):
            prefix = model.decode_indices(indices[:, :length]).pixel_values
            assert torch.equal(prefix, model.decode_indices(indices, num_scales=count).pixel_values)
            assert prefix.shape == (2, 3, 32, 32)
            images.append(prefix)
        assert torch.equal(model.decode_indices(indices[:, :5], num_scales=1).pixel_values, images[0])
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize(
    ("indices", "count", "message"),
    [
        (
            torch.zeros(1, 4, dtype=torch.long),
            None,
            r"4 indices do not end with a scale; whole scales end at \[1, 5, 21\]",
        ),
        (torch.zeros(1, 5, dtype=torch.long), 3, "num_scales must be 1 to 2 here, got 3"),
        (torch.zeros(1, 5, dtype=torch.long), 0, "num_scales must be 1 to 2 here, got 0"),
        (torch.tensor([[64]]), None, "indices run from 64 to 64; this codebook has 0 to 63"),
        (torch.tensor([[-1]]), None, "indices run from -1 to -1"),
        (torch.zeros(21, dtype=torch.long), None, r"indices must be \[B, L\] integers, got \[21\]"),
        (torch.zeros(1, 21), None, r"indices must be \[B, L\] integers, got \[1, 21\] torch.float32"),
    ],
)
def test_indices_that_mean_nothing_are_refused_in_one_line(model, indices, count, message):
    with pytest.raises(UserError, match=message) as caught:
        model.decode_indices(indices, num_scales=count)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 31, 31), (1, 3, 32, 64), (1, 1, 32, 32)])
def test_images_of_another_shape_are_refused(model, shape):
    with pytest.raises(UserError, match=r"pixel_values must be \[B, 3, 32, 32\] for this model, got"):
        model.encode(torch.zeros(shape))


def test_raw_bytes_are_refused(model):
    with pytest.raises(UserError, match=r"floating-point in \[-1, 1\], got torch.uint8"):
        model.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_other_arrays_are_refused(model, pixels):
    with pytest.raises(UserError, match="must be a torch tensor, got ndarray; see TokenFlowImageProcessor"):
        model.encode(pixels.numpy())


def test_pixels_that_are_not_finite_are_refused(model, pixels):
    for value, count in (
        (float("nan"), 1),
        (float("inf"), 1),
        (torch.tensor([float("inf"), -float("inf")]), 2),
    ):
        spoilt = pixels.clone()
        spoilt[0, 0, 0, :count] = value
        with pytest.raises(UserError, match=f"pixel_values hold {count} NaN or infinite values"):
            model.encode(spoilt)


def test_losses_are_those_of_training(pixels):
    model = build()
    assert set(model.train().encode(pixels).losses) == {"vq", "commitment"}
    assert model.eval().encode(pixels).losses == {}


def test_a_grid_that_the_flows_do_not_have_is_refused():
    model = build(scales=[1, 3])
    with pytest.raises(UserError, match="flow 'semantic' gives a grid of 4, but scales end at 3"):
        model.encode(torch.zeros(1, 3, 32, 32))


def test_an_image_does_not_depend_on_its_neighbours_in_the_batch(model, pixels):
    with torch.no_grad():
        both, one = model.encode(pixels), model.encode(pixels[1:])
    assert torch.equal(both.indices[1:], one.indices)
    torch.testing.assert_close(both.quantized[1:], one.quantized)


# features
def test_feature_strategies_are_those_of_the_paper(model, pixels):
    with torch.no_grad():
        encoded = model.encode(pixels)
        features = {strategy: model.features(pixels, strategy) for strategy in FEATURE_STRATEGIES}
    last = encoded.quantized.flatten(2).transpose(1, 2)
    assert torch.equal(features["last"], last)
    assert torch.equal(features["last-semantic"], last[..., :32])
    assert torch.equal(features["last-pixel"], last[..., 32:])
    assert features["all"].shape == features["all-residual"].shape == (2, 21, 40)

    codes = model.quantizer.quantizer.codes().detach()
    assert torch.equal(features["all-residual"], codes[encoded.indices])
    start, total = 0, torch.zeros(2, 40, 4, 4)
    for side in (1, 2, 4):
        part = slice(start, start + side * side)
        step = features["all-residual"][:, part].transpose(1, 2).unflatten(2, (side, side))
        total += step if side == 4 else F.interpolate(step, size=(4, 4), mode="bicubic")
        reduced = F.interpolate(total, size=(side, side), mode="area").flatten(2).transpose(1, 2)
        torch.testing.assert_close(features["all"][:, part], reduced, atol=1e-5, rtol=1e-5)
        start += side * side
    torch.testing.assert_close(features["all"][:, 5:], last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strategy", FEATURE_STRATEGIES)
def test_features_are_the_same_while_a_language_model_trains(strategy, pixels):
    model = build(scale_drop=1.0, codebook_update="ema")
    expected, state = model.features(pixels, strategy), copy.deepcopy(model.state_dict())
    model.train()
    for _ in range(3):
        assert torch.equal(model.features(pixels, strategy), expected)
    assert all(child.training for child in model.modules())
    assert model.quantizer.quantizer.usage.seen == 0
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_semantic_features_need_a_semantic_flow(pixels):
    model = build(flows=[pixel()])
    with pytest.raises(UserError, match="has none"):
        model.features(pixels, "last-semantic")


def test_maps_of_another_shape_are_refused(model, pixels):
    quantized = model.encode(pixels).quantized
    for wrong in (quantized[:, :-1], quantized[..., :-1], quantized[0]):
        with pytest.raises(UserError, match="quantized must be"):
            model.decode(wrong)


def test_indices_of_a_token_file_are_decoded(model, pixels):
    indices = model.encode(pixels).indices
    small = model.decode_indices(indices.to(torch.uint16)).pixel_values
    assert torch.equal(small, model.decode_indices(indices).pixel_values)


def test_unknown_strategies_are_refused(model, pixels):
    with pytest.raises(UserError, match="strategy 'first' is not one of last, last-semantic"):
        model.features(pixels, "first")


@pytest.mark.parametrize("strategy", FEATURE_STRATEGIES)
def test_forward_is_the_vision_tower(strategy, pixels):
    model = build(feature_strategy=strategy)
    with torch.no_grad():
        out = model(pixels, output_hidden_states=True, return_dict=True)
        expected = model.features(pixels, strategy)
    assert torch.equal(out.last_hidden_state, expected)
    assert len(out.hidden_states) == 1
    assert expected.shape[-1] == model.config.hidden_size


# saving, loading, precision
def test_loading_restores_every_tensor(tmp_path):
    model = build(codebook_update="ema", codebook_init="kmeans")
    torch.manual_seed(7)
    with torch.no_grad():  # unlike anything that an initialisation would give
        for tensor in model.state_dict().values():
            tensor.copy_(
                torch.randn(tensor.shape) if tensor.is_floating_point() else torch.ones(tensor.shape)
            )
    model.save_pretrained(tmp_path)
    again = TokenFlowModel.from_pretrained(tmp_path)
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.config.to_diff_dict() == model.config.to_diff_dict()


def test_buffers_that_no_file_holds_are_fresh_after_loading(small_model_folder):
    usage = TokenFlowModel.from_pretrained(small_model_folder).quantizer.quantizer.usage
    assert int(usage.seen) == 0
    assert (usage.recent == -1).all()


def test_construction_initialises_every_tensor():
    model = build()
    codes = model.quantizer.quantizer.codebooks["semantic"].detach()
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(64))
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        assert tensor.abs().max() < 10, name
    other = build()
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_weights_of_another_shape_are_refused(small_model_folder):
    with pytest.raises(UserError, match="2 of another shape, first quantizer") as caught:
        TokenFlowModel.from_pretrained(small_model_folder, codebook_size=65)
    assert "\n" not in str(caught.value)
    loose = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    model, report = TokenFlowModel.from_pretrained(small_model_folder, codebook_size=65, **loose)
    assert model.config.codebook_size == 65
    assert len(report["mismatched_keys"]) == 2


def test_a_folder_without_configuration_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"is not a model: there is no config\.json in it"):
        TokenFlowModel.from_pretrained(tmp_path)


def test_codebooks_that_a_file_lacks_are_fresh(small_model_folder, tmp_path):
    model = TokenFlowModel.from_pretrained(small_model_folder)
    kept = {name: value for name, value in model.state_dict().items() if "codebooks" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(
        UserError, match=r"do not fit its config\.json: 2 missing, first quantizer\."
    ) as caught:
        TokenFlowModel.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    loaded = TokenFlowModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    for codebook in loaded.quantizer.quantizer.codebooks.values():
        torch.testing.assert_close(codebook.norm(dim=-1), torch.ones(64))


def test_a_file_in_half_precision_is_loaded_as_float32(small_model_folder, tmp_path):
    weights = {
        name: tensor.half() for name, tensor in load_file(small_model_folder / "model.safetensors").items()
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((small_model_folder / "config.json").read_text())
    model = TokenFlowModel.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name].float()), name


@pytest.mark.parametrize("way", ["to", "load"])
def test_bf16_works_end_to_end_with_the_same_codes(model, pixels, way, tmp_path):
    if way == "to":
        half = copy.deepcopy(model).to(torch.bfloat16)
    else:
        model.save_pretrained(tmp_path)
        half = TokenFlowModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    exact = pixels.bfloat16().float()
    with torch.no_grad():
        encoded, expected = half.encode(pixels.bfloat16()), model.encode(exact)
        decoded = half.decode(encoded.quantized)
        image = model.decode(expected.quantized).pixel_values
    assert torch.equal(encoded.indices, expected.indices)
    assert {p.dtype for p in half.encoders.parameters()} | {p.dtype for p in half.quantizer.parameters()} == {
        torch.float32
    }
    assert decoded.pixel_values.dtype == decoded.semantic.dtype == torch.bfloat16
    assert (decoded.pixel_values.float() - image).abs().mean() < 0.02
    assert half(pixels).last_hidden_state.dtype == torch.bfloat16


def test_the_callers_autocast_does_not_change_the_codes(model, pixels):
    with torch.no_grad():
        expected = model.encode(pixels).indices
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.encode(pixels).indices, expected)
            quantized = model.quantized_from_indices(expected)
    assert quantized.dtype == torch.float32
    torch.testing.assert_close(quantized, model.encode(pixels).quantized, atol=1e-5, rtol=1e-5)


def test_training_under_autocast_gives_finite_gradients_everywhere(pixels):
    model = build(scale_drop=0.0).train()
    with torch.autocast("cpu", torch.bfloat16):
        encoded = model.encode(pixels)
        decoded = model.decode(encoded.quantized)
    loss = decoded.pixel_values.float().square().mean() + decoded.semantic.float().square().mean()
    (loss + sum(encoded.losses.values())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_models_made_in_inference_mode_work(pixels):
    with torch.inference_mode():
        model = build()
        assert model.decode(model.encode(pixels).quantized).pixel_values.shape == (2, 3, 32, 32)


def test_a_copy_encodes_like_the_original(model, pixels):
    with torch.no_grad():
        expected = model.encode(pixels).indices
        assert torch.equal(copy.deepcopy(model).encode(pixels).indices, expected)


FAMILIES = {
    "siglip_vision_model": {
        "hidden_state": -2,
        "final_norm": False,
        "image_mean": (0.5,) * 3,
        "image_std": (0.5,) * 3,
    },
    "siglip2_vision_model": {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3},
    "dinov2": {},
    "vit": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_vision_models_are_encoders_by_configuration(family, pixels, tmp_path):
    vision = {**small_config().flows[0]["encoder"], "model_type": family, "num_patches": 16}
    flow = SemanticFlow(encoder=vision, decoder_layers=1, decoder_heads=2, target_dim=24, **FAMILIES[family])
    model = build(flows=[flow, pixel()])
    model.save_pretrained(tmp_path)
    again = TokenFlowModel.from_pretrained(tmp_path)
    with torch.no_grad():
        features = model.flow_features(pixels)
        assert features.std() > 0.01
        assert torch.equal(again.flow_features(pixels), features)


def test_an_encoder_may_be_given_as_a_configuration_object():
    from transformers import CLIPVisionConfig

    vision = CLIPVisionConfig(
        **{k: v for k, v in small_config().flows[0]["encoder"].items() if k != "model_type"}
    )
    config = small_config(flows=[SemanticFlow(encoder=vision)], pixel_decoder=None)
    assert config.flows[0]["encoder"]["model_type"] == "clip_vision_model"
    assert config.flow_specs[0].encoder["hidden_size"] == 16


def test_an_encoder_without_a_type_is_refused():
    with pytest.raises(UserError, match="encoder needs a model_type"):
        build(flows=[SemanticFlow()], pixel_decoder=None)


# other rooms' use
def test_llava_takes_the_model_as_its_vision_tower(small_model_folder, tmp_path):
    from transformers import AutoConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = AutoConfig.from_pretrained(small_model_folder)
    text = LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=127,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    llava = LlavaForConditionalGeneration(config).eval()
    assert isinstance(llava.model.vision_tower, TokenFlowModel)
    ids = torch.tensor([[1, *[127] * 16, 5, 6]])
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        logits = llava(input_ids=ids, pixel_values=pixels).logits
        other = llava(input_ids=ids, pixel_values=-pixels).logits
    assert logits.shape == (1, 19, 128)
    assert not torch.equal(logits, other)
    llava.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tower = again.model.vision_tower
    assert {p.dtype for p in tower.encoders.parameters()} == {torch.float32}
    with torch.no_grad():
        assert again(input_ids=ids, pixel_values=pixels.bfloat16()).logits.dtype == torch.bfloat16
        expected = llava.model.vision_tower.encode(pixels.bfloat16().float()).indices
        assert torch.equal(tower.encode(pixels.bfloat16()).indices, expected)


@pytest.mark.parametrize("strategy", FEATURE_STRATEGIES)
def test_features_of_known_indices_are_those_of_the_picture(small_model_folder, strategy):
    model = TokenFlowModel.from_pretrained(small_model_folder)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    features = model.features(pixels, strategy)
    known = model.features_from_indices(model.encode(pixels).indices.to(torch.uint16), strategy)
    torch.testing.assert_close(known, features, atol=1e-6, rtol=0)
