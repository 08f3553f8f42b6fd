"""Presets, checks and round trips of the configuration."""

from __future__ import annotations

import pytest

from small_model import small_config
from tokenflow import TokenFlowConfig
from tokenflow.errors import UserError
from tokenflow.tokenizer.configuration import (
    PRESETS,
    ConvSpec,
    PixelDecoderSpec,
    PixelFlow,
    SemanticFlow,
    vision_config,
)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_together(name):
    config = TokenFlowConfig.from_preset(name)
    semantic, pixel = config.flow_specs
    tower = vision_config(semantic.encoder)
    assert config.code_dim == config.hidden_size == 40
    assert config.num_tokens == sum(side * side for side in config.scales)
    assert config.image_size // tower.patch_size == config.grid
    assert pixel.encoder.stride == config.pixel_decoder_spec.stride == 16


@pytest.mark.parametrize(
    ("name", "side", "tokens", "teacher_dim"),
    [
        ("tokenflow-b-224", 224, 561, 512),
        ("tokenflow-b-256", 256, 817, 512),
        ("tokenflow-l", 256, 817, 1152),
        ("tokenflow-xl", 384, 2227, 1152),
        ("tokenflow-tiny", 128, 155, 384),
    ],
)
def test_presets_are_those_of_the_paper(name, side, tokens, teacher_dim):
    config = TokenFlowConfig.from_preset(name)
    assert (config.image_size, config.num_tokens) == (side, tokens)
    assert config.flow_specs[0].target_dim == teacher_dim
    if name != "tokenflow-tiny":
        assert config.codebook_size == 32768
        enhanced = TokenFlowConfig.from_preset(f"{name}-enhanced")
        assert enhanced.pixel_decoder_spec.width == 2 * config.pixel_decoder_spec.width
        assert enhanced.pixel_decoder_spec.blocks == 5
        assert enhanced.flows == config.flows


def test_the_default_is_the_b_preset():
    assert TokenFlowConfig().to_diff_dict() == TokenFlowConfig.from_preset("tokenflow-b-224").to_diff_dict()


def test_a_round_trip_keeps_every_field(tmp_path):
    config = small_config(
        flows=[SemanticFlow(encoder=small_config().flows[0]["encoder"], weight=0.5)], pixel_decoder=None
    )
    config.save_pretrained(tmp_path)
    again = TokenFlowConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.flow_specs == config.flow_specs
    assert again.pixel_decoder_spec is None


def test_overrides_and_unknown_presets():
    assert TokenFlowConfig.from_preset("tokenflow-tiny", codebook_size=77).codebook_size == 77
    with pytest.raises(UserError, match="unknown preset 'tokenflow-x1'; did you mean 'tokenflow-xl'"):
        TokenFlowConfig.from_preset("tokenflow-x1")


def test_last_semantic_shrinks_the_hidden_size():
    assert small_config(feature_strategy="last-semantic").hidden_size == 32
    assert small_config(feature_strategy="all").hidden_size == 40


def pixel(name="pixel"):
    return PixelFlow(name=name, encoder=ConvSpec(32, (1, 1), 1, 32, 4))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"scales": []}, "scales: must be positive and rise"),
        ({"scales": [1, 4, 2]}, "scales: must be positive and rise"),
        ({"scales": [0, 4]}, "scales: must be positive and rise"),
        ({"flows": []}, "flows: names must be given and distinct"),
        ({"flows": [pixel(), pixel()]}, "flows: names must be given and distinct"),
        (
            {"flows": [{"name": "audio", "kind": "sound", "dim": 2}], "pixel_decoder": None},
            "'audio' has kind 'sound'",
        ),
        ({"flows": [pixel("fine")]}, r"pixel_decoder reads flow 'pixel'; the flows are \['fine'\]"),
        ({"feature_strategy": "first"}, "feature_strategy: 'first' is not one of last"),
        ({"codebook_init": "random"}, "codebook_init: 'random' is not one of uniform, kmeans"),
        ({"codebook_update": "never"}, "codebook_update: 'never' is not one of gradient, ema"),
        ({"flows": [pixel()], "feature_strategy": "last-semantic"}, "last-semantic.*no semantic flow"),
    ],
)
def test_impossible_configurations_are_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        small_config(**overrides)
    assert "\n" not in str(caught.value)


def test_a_decoder_may_read_several_flows():
    config = small_config(pixel_decoder=PixelDecoderSpec(32, (1, 1), 1, 32, 4, flows=("semantic", "pixel")))
    assert config.pixel_decoder_spec.flows == ("semantic", "pixel")
