"""Released tokenizers end to end: a checkpoint file, converted, loaded, and compared with every golden array
of README 4.1.

Measured on CPU in float32: all indices of the four cases equal, features within 5e-6, images within 6e-6.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from goldens import (
    DISTANCE_NORM_RTOL,
    FEATURE_ATOL,
    IMAGE_ATOL,
    IMAGES,
    INDEX_MIN_MARGIN,
    QUANTIZED_ATOL,
    SEMANTIC_ATOL,
    input_image,
    load_golden,
    load_manifest_of,
)
from seeded_weights import seeded_state_dict

from tokenflow import TokenFlowModel
from tokenflow.checkpoints.tokenizer import convert_tokenizer

pytestmark = pytest.mark.slow
LAYOUTS = {"clipb_224": 224, "clipb_256_enhanced": 256}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(layout, tmp_path_factory):
    """A fake released checkpoint, converted and loaded; its files (0.7 to 1.5 GB each) go at once."""
    folder = tmp_path_factory.mktemp(layout)
    released = folder / "released.pt"
    torch.save({"ema": seeded_state_dict(load_manifest_of(layout))}, released)
    report = convert_tokenizer(released, folder / "converted")
    released.unlink()
    assert report.wrapper == "ema"
    assert report.image_size == LAYOUTS[layout]
    assert list(report.ignored) == ["quantize.codebook_used"]
    model = TokenFlowModel.from_pretrained(folder / "converted").eval()
    weights = folder / "converted" / "model.safetensors"
    yield model
    weights.unlink()


@pytest.fixture(scope="module", params=IMAGES)
def golden(layout, request) -> dict[str, torch.Tensor]:
    return load_golden(f"{layout}/{request.param}") | {"name": request.param}


@pytest.fixture(scope="module")
def encoded(model, layout, golden) -> SimpleNamespace:
    """One public `encode`, with what flowed through its parts."""
    seen = SimpleNamespace()
    semantic, pixel = model.encoders["semantic"], model.encoders["pixel"]
    parts = {
        "semantic_tokens": semantic.tower,
        "semantic_feature": semantic,
        "pixel_encoder": pixel.network,
        "pixel_feature": pixel,
        "quantizer": model.quantizer,
    }
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: setattr(seen, name, output))
        for name, module in parts.items()
    ]
    with torch.inference_mode():
        seen.output = model.encode(input_image(f"{golden['name']}_{LAYOUTS[layout]}"))
    for hook in hooks:
        hook.remove()
    return seen


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def rows(maps: list[torch.Tensor]) -> torch.Tensor:
    """Maps `[1, D, s, s]` of all scales as rows `[T, D]`, scales in order, row-major."""
    return torch.cat([x[0].flatten(1).T for x in maps])


def test_schedule(model, golden):
    assert model.config.scales == golden["scales"].tolist()
    assert model.config.num_tokens == len(golden["indices"])


def test_features(encoded, golden):
    assert_close(encoded.semantic_tokens[0, ::4, ::16], golden["sem_tokens_sub"], FEATURE_ATOL)
    assert_close(encoded.semantic_feature[0], golden["sem_feature"], FEATURE_ATOL)
    assert_close(encoded.pixel_encoder[0, ::16], golden["pix_encoder_sub"], FEATURE_ATOL)
    assert_close(encoded.pixel_feature[0], golden["pix_feature"], FEATURE_ATOL)


def test_encode_gives_every_index(encoded, golden):
    assert torch.equal(encoded.output.indices[0], golden["indices"].long())
    assert_close(encoded.output.quantized[0], golden["quantized"], QUANTIZED_ATOL)
    assert_close(rows(encoded.quantizer.scale_inputs), golden["scale_inputs"], FEATURE_ATOL)


@torch.inference_mode()
def test_quantizer_from_stored_features(model, golden):
    features = torch.cat([golden["sem_feature"], golden["pix_feature"]])[None]
    output = model.quantizer(features)
    assert torch.equal(output.indices[0], golden["indices"].long())
    assert_close(rows(output.scale_inputs), golden["scale_inputs"], QUANTIZED_ATOL)
    assert_close(output.quantized[0], golden["quantized"], QUANTIZED_ATOL)


@torch.inference_mode()
def test_search_from_stored_inputs(model, golden):
    quantizer = model.quantizer.quantizer
    vectors = quantizer.normalize(golden["scale_inputs"])
    assert golden["margin"].min() >= INDEX_MIN_MARGIN
    assert torch.equal(quantizer.search(vectors), golden["indices"].long())

    norms = [quantizer.distance_norms(part) for part in vectors.split([s * s for s in model.config.scales])]
    mean = [torch.stack([scale[flow] for scale in norms]).mean() for flow in ("semantic", "pixel")]
    expected = golden["code_distance_norms"].double()
    torch.testing.assert_close(torch.stack(mean), expected, rtol=DISTANCE_NORM_RTOL, atol=0)


@torch.inference_mode()
def test_from_indices_alone(model, golden):
    indices = golden["indices"].long()[None]
    assert_close(model.quantized_from_indices(indices)[0], golden["quantized"], QUANTIZED_ATOL)
    first = model.quantizer.quantizer.lookup(indices[0, :16])
    assert_close(first, golden["codebook_entry_first16"], QUANTIZED_ATOL)

    features = model.quantizer.next_scale_inputs(indices)[0]
    assert_close(features, golden["next_scale_features"], QUANTIZED_ATOL)
    again = model.quantizer.next_scale_inputs(indices, repredict=3)[0]
    sides = [s * s for s in model.config.scales[1:]]
    start, size = sum(sides[:3]), sides[3]
    assert_close(again[start : start + size], golden["next_scale_features_pred3_block"], QUANTIZED_ATOL)
    again[start : start + size] = features[start : start + size]
    assert torch.equal(again, features)


@torch.inference_mode()
def test_decode_semantic(model, golden):
    semantic = model.decode_semantic(golden["quantized"][None])["semantic"][0]
    assert_close(semantic[:, ::16], golden["sem_decoded_sub"], SEMANTIC_ATOL)
    assert_close(semantic.norm(dim=-1), golden["sem_decoded_l2"], SEMANTIC_ATOL)


@torch.inference_mode()
def test_decode(model, layout, golden):
    if layout == "clipb_224":  # decoding indices covers it, and the enhanced decoder is slow
        assert_close(model.decode(golden["quantized"][None]).pixel_values[0], golden["image"], IMAGE_ATOL)
    image = model.decode_indices(golden["indices"].long()[None]).pixel_values[0]
    assert_close(image[:, ::4, ::4], golden["decode_code_image_sub"], IMAGE_ATOL)
    assert_close(image, golden["image"], IMAGE_ATOL)


@torch.inference_mode()
def test_decode_prefix(model, layout, golden):
    indices, tokens = golden["indices"].long()[None], int(golden["decode_code_prefix_tokens"])
    scales = len(model.config.scales) - 3
    assert tokens == sum(s * s for s in model.config.scales[:scales])
    coarse = model.quantized_from_indices(indices[:, :tokens])
    assert torch.equal(coarse, model.quantized_from_indices(indices, num_scales=scales))
    semantic = model.decode_semantic(coarse)["semantic"]
    assert_close(semantic[0, ::4, ::64], golden["decode_code_prefix_sem_sub"], SEMANTIC_ATOL)
    if layout == "clipb_224" or golden["name"] == "photo":  # one run of the enhanced decoder is enough
        image = model.decode_pixels(coarse)[0]
        assert_close(image[:, ::4, ::4], golden["decode_code_prefix_image_sub"], IMAGE_ATOL)
