"""Recognising and renaming the released layouts: whole manifests on the meta device, and a real file."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import struct
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from tokenflow.checkpoints.safe_load import CheckpointError
from tokenflow.checkpoints.tokenizer import REPORT_FILE, convert_state_dict, convert_tokenizer, released_key
from tokenflow.errors import UserError
from tokenflow.tokenizer.configuration import TokenFlowConfig
from tokenflow.tokenizer.image_processing import TokenFlowImageProcessor
from tokenflow.tokenizer.modeling import TokenFlowModel

MANIFESTS = Path(__file__).parents[1] / "parity/tokenizer/manifests"
LAYOUTS = {
    "clipb_224": ("tokenflow-b-224", 224, [1, 2, 4, 6, 8, 10, 12, 14], 549, 1),
    "clipb_256_enhanced": ("tokenflow-b-256-enhanced", 256, [1, 2, 4, 6, 8, 10, 12, 14, 16], 649, 1),
    "siglip_384": ("tokenflow-xl", 384, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27], 848, 30),
    "vitamin_xlarge_256": ("tokenflow-l", 256, [1, 2, 4, 6, 8, 10, 12, 14, 16], 972, 3),
}


def manifest(layout: str) -> dict[str, dict]:
    return json.loads(gzip.decompress((MANIFESTS / f"{layout}.json.gz").read_bytes()))


def weights_of(layout: str) -> dict[str, torch.Tensor]:
    """The layout's state dict, on the meta device but for constants."""
    return {
        key: torch.tensor(entry["value"]).view(entry["shape"])
        if "value" in entry
        else torch.empty(entry["shape"], device="meta")
        for key, entry in manifest(layout).items()
    }


def sparse_file(path: Path, layout: str) -> Path:
    """A safetensors file with every tensor of the layout, all zeros and taking no room on the disk."""
    header, end = {}, 0
    for key, entry in manifest(layout).items():
        begin, end = end, end + 4 * math.prod(entry["shape"])
        header[key] = {"dtype": "F32", "shape": entry["shape"], "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + end)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_of_the_released_layouts_is_placed(layout):
    preset, image_size, scales, tensors, ignored = LAYOUTS[layout]
    weights = weights_of(layout)
    assert len(weights) == tensors
    config, state, report = convert_state_dict(weights)
    assert config.to_dict() == TokenFlowConfig.from_preset(preset).to_dict()
    assert (report.preset, report.image_size, report.scales) == (preset, image_size, scales)
    assert len(report.ignored) == ignored
    assert report.tensors + len(report.ignored) == tensors
    assert {old for old, _ in report.renamed} | set(report.ignored) == set(weights)
    with torch.device("meta"):
        model = TokenFlowModel(config)
    model.load_state_dict(state, strict=True, assign=True)
    assert report.values == sum(tensor.numel() for tensor in model.state_dict().values())


def test_keys_of_every_part():
    expected = {
        "encoders.pixel.network.levels.0.resample.conv.bias": "encoder.conv_blocks.0.downsample.conv.bias",
        "encoders.pixel.network.levels.2.res.0.shortcut.bias": (
            "encoder.conv_blocks.2.res.0.nin_shortcut.bias"
        ),
        "pixel_decoder.network.levels.0.attn.2.proj_out.bias": "decoder.conv_blocks.0.attn.2.proj_out.bias",
        "pixel_decoder.network.levels.0.resample.conv.bias": "decoder.conv_blocks.0.upsample.conv.bias",
        "encoders.pixel.head.weight": "quant_conv.weight",
        "pixel_decoder.head.weight": "post_quant_conv.weight",
        "encoders.semantic.head.2.weight": "encode_task_layer.2.weight",
        "semantic_decoders.semantic.head.0.bias": "decode_task_layer.0.bias",
        "semantic_decoders.semantic.patch_embed.weight": "decoder_vqkd.patch_embed.proj.weight",
        "semantic_decoders.semantic.blocks.1.norm2.bias": "decoder_vqkd.blocks.1.norm2.bias",
        "semantic_decoders.semantic.blocks.1.mlp.2.bias": "decoder_vqkd.blocks.1.mlp.fc2.bias",
        "semantic_decoders.semantic.norm.weight": "decoder_vqkd.fc_norm.weight",
        "quantizer.quantizer.codebooks.pixel": "quantize.embedding_vqgan.weight",
    }
    assert {key: released_key(key, "clip")[0] for key in expected} == expected
    layer = "encoders.semantic.tower.model.encoder.layers.3"
    block = "encoder_vqkd.transformer.resblocks.3"
    assert released_key(f"{layer}.self_attn.k_proj.bias", "clip") == (f"{block}.attn.in_proj_bias", 1)
    assert released_key(f"{layer}.self_attn.out_proj.bias", "clip") == (f"{block}.attn.out_proj.bias", None)
    assert released_key(f"{layer}.mlp.fc1.weight", "clip") == (f"{block}.mlp.c_fc.weight", None)
    assert released_key(f"{layer}.self_attn.k_proj.bias", "siglip") == (
        "encoder_vqkd.vision_model.encoder.layers.3.self_attn.k_proj.bias",
        None,
    )


def test_fused_projection_is_cut_in_the_order_q_k_v():
    weights = weights_of("clipb_224")
    fused = torch.arange(3 * 768.0)
    weights["encoder_vqkd.transformer.resblocks.5.attn.in_proj_bias"] = fused
    _, state, _ = convert_state_dict(weights)
    for third, name in enumerate("qkv"):
        key = f"encoders.semantic.tower.model.encoder.layers.5.self_attn.{name}_proj.bias"
        assert torch.equal(state[key], fused[768 * third : 768 * (third + 1)])


def test_image_size_is_assumed_or_given():
    weights = weights_of("clipb_224")
    assert "assumed from the normal decoder" in convert_state_dict(weights)[2].image_size_reason
    config, _, report = convert_state_dict(weights, image_size=256)
    assert (config.image_size, config.grid, report.preset) == (256, 16, "tokenflow-b-256")
    assert report.image_size_reason == "as asked"
    with pytest.raises(UserError, match="image size 384: tokenflow-b has 224 or 256"):
        convert_state_dict(weights, image_size=384)
    with pytest.raises(UserError, match="image size 256: tokenflow-xl has 384"):
        convert_state_dict(weights_of("siglip_384"), image_size=256)


def test_codebook_size_comes_from_the_file():
    weights = weights_of("clipb_224")
    weights["quantize.embedding_vqkd.weight"] = torch.empty(8192, 32, device="meta")
    weights["quantize.embedding_vqgan.weight"] = torch.empty(8192, 8, device="meta")
    assert convert_state_dict(weights)[0].codebook_size == 8192


def test_missing_unexpected_and_misshapen_tensors_are_named():
    weights = weights_of("clipb_224")
    del weights["decoder_vqkd.fc_norm.bias"]
    with pytest.raises(
        CheckpointError, match=r"x\.pt lacks 1 tensor of its layout: decoder_vqkd\.fc_norm\.bias$"
    ):
        convert_state_dict(weights, source="x.pt")

    weights = weights_of("clipb_224")
    for index in range(6):
        weights[f"decoder.extra.{index}"] = torch.empty(1)
    expected = "has 6 tensors beyond its layout: decoder.extra.0, .* and 1 more$"
    with pytest.raises(CheckpointError, match=expected):
        convert_state_dict(weights)

    weights = weights_of("clipb_224")
    weights["encoder_vqkd.transformer.resblocks.0.attn.in_proj_weight"] = torch.empty(768, 768)
    with pytest.raises(
        CheckpointError, match=r"1 tensor of another .*in_proj_weight \[768, 768\].*\[2304, 768\]"
    ):
        convert_state_dict(weights)

    weights = weights_of("clipb_224")
    weights["quant_conv.bias"] = torch.empty(8, dtype=torch.int64)
    with pytest.raises(CheckpointError, match=r"quant_conv\.bias \[8\] torch\.int64"):
        convert_state_dict(weights)


def test_other_decoders_scalings_and_models_are_refused():
    weights = weights_of("clipb_224")
    weights["decoder.conv_in.weight"] = torch.empty(256, 256, 3, 3)
    with pytest.raises(
        CheckpointError, match="256 channels; the normal decoder has 512, the enhanced one 1024"
    ):
        convert_state_dict(weights)

    weights = weights_of("vitamin_xlarge_256")
    weights["scaling_layer.shift"] = torch.full((1, 3, 1, 1), 0.5)
    with pytest.raises(
        CheckpointError, match=r"scaling_layer\.shift is \[0\.5, 0\.5, 0\.5\], but this layout"
    ):
        convert_state_dict(weights)

    with pytest.raises(CheckpointError, match="is no released tokenizer: it has none of encoder_vqkd"):
        convert_state_dict({"visual.conv1.weight": torch.empty(768, 3, 16, 16)})
    # the k-means variant keeps codebooks that the released code never trained
    weights = weights_of("clipb_224")
    weights["quantize.embedding_vqkd.cluster_size"] = torch.empty(32768)
    with pytest.raises(CheckpointError, match=r"beyond its layout: quantize\.embedding_vqkd\.cluster_size"):
        convert_state_dict(weights)


@pytest.mark.slow
def test_file_to_folder_and_back(tmp_path):
    source = sparse_file(tmp_path / "released.pt", "clipb_224")
    report = convert_tokenizer(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "released.pt"]
    assert sorted(os.listdir(tmp_path / "out")) == [
        "config.json",
        REPORT_FILE,
        "model.safetensors",
        "preprocessor_config.json",
    ]
    saved = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert saved == json.loads(report.to_json())
    assert saved["ignored"] == {"quantize.codebook_used": "usage statistics of the training run"}
    assert TokenFlowConfig.from_pretrained(tmp_path / "out").scales == [1, 2, 4, 6, 8, 10, 12, 14]
    processor = TokenFlowImageProcessor.from_pretrained(tmp_path / "out")
    assert (processor.size["height"], processor.resize_mode) == (224, "crop")
    with torch.device("meta"):
        expected = TokenFlowModel(TokenFlowConfig.from_preset("tokenflow-b-224")).state_dict()
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()} == {  # noqa: SIM118
            key: tuple(tensor.shape) for key, tensor in expected.items()
        }

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report)
    text = console.export_text()
    for words in ("tokenflow-b-224 (normal decoder)", "--image-size overrides", "561 tokens", "1: usage"):
        assert words in text

    with pytest.raises(UserError, match="exists and is not empty"):
        convert_tokenizer(source, tmp_path / "out")


def test_a_bad_file_leaves_no_folder(tmp_path):
    torch.save({"model": {"encoder_vqkd.conv1.weight": torch.ones(2)}}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor of its layout: decoder\.conv_in\.weight"):
        convert_tokenizer(tmp_path / "bad.pt", tmp_path / "out")
    assert os.listdir(tmp_path) == ["bad.pt"]
