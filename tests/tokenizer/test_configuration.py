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


def changed_flow(which=0, **values):
    """The small model's flows as dicts, with `values` set in one of them, or in its encoder."""
    flows = small_config().flows
    encoder = values.pop("encoder", {})
    flows[which] = {**flows[which], **values, "encoder": {**flows[which]["encoder"], **encoder}}
    return {"flows": flows}


DECODER = small_config().pixel_decoder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"codebook_size": 0}, "codebook_size: must be an integer of at least 1, got 0"),
        ({"codebook_size": 1.5}, "codebook_size: must be an integer of at least 1, got 1.5"),
        ({"codebook_size": "many"}, "codebook_size: must be an integer of at least 1, got 'many'"),
        ({"image_size": None}, "image_size: must be an integer"),
        ({"scales": None}, "scales: must be positive and rise, got None"),
        ({"scales": [1.0, 2.5]}, "scales: must be positive and rise"),
        ({"scale_drop": 1.5}, "scale_drop: must be a number from 0 to 1, got 1.5"),
        ({"scale_drop": -0.1}, "scale_drop: must be a number from 0 to 1"),
        ({"scale_drop": float("nan")}, "scale_drop: must be a number from 0 to 1, got nan"),
        ({"commitment_weight": -1}, "commitment_weight: must be a number of at least 0"),
        (changed_flow(weight=-1.0), "flow 'semantic': weight: must be a number of at least 0, got -1.0"),
        (changed_flow(1, dim=0), "flow 'pixel': dim: must be an integer of at least 1"),
        (changed_flow(wieght=2.0), "unknown key of flow 'semantic' 'wieght'; did you mean 'weight'"),
        (changed_flow(1, encoder={"widht": 32}), "flow 'pixel', encoder, 'widht'; did you mean 'width'"),
        (changed_flow(1, encoder={"width": 0}), "width: must be an integer of at least 1"),
        (changed_flow(1, encoder={"multipliers": ()}), "multipliers: must name at least one level"),
        ({"pixel_decoder": {**DECODER, "block": 2}}, "key of pixel_decoder 'block'; did you mean 'blocks'"),
        ({"codebok_size": 64}, "key of TokenFlowConfig 'codebok_size'; did you mean 'codebook_size'"),
        ({"scale_drops": 0.1}, "key of TokenFlowConfig 'scale_drops'; did you mean 'scale_drop'"),
        (
            changed_flow(encoder={"model_type": "clip_vison_model"}),
            "unknown model_type of an encoder 'clip_vison_model'; did you mean 'clip_vision_model'",
        ),
        (
            changed_flow(encoder={"num_hiden_layers": 2}),
            "encoder clip_vision_model 'num_hiden_layers'; did you mean 'num_hidden_layers'",
        ),
        (changed_flow(encoder={"hidden_size": "wide"}), "encoder clip_vision_model: .*hidden_size"),
    ],
)
def test_wrong_values_and_misspelt_keys_are_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        small_config(**overrides)
    assert "\n" not in str(caught.value)


def test_keys_of_transformers_present_and_future_are_kept():
    own = {"torch_dtype": "bfloat16", "architectures": ["TokenFlowModel"], "attn_implementation": "eager"}
    config = small_config(
        **own, sharding_of_the_future={"rows": 2}, **changed_flow(encoder={"rope_style": 3})
    )
    assert config.sharding_of_the_future == {"rows": 2}
    assert config.flows[0]["encoder"]["rope_style"] == 3
    again = TokenFlowConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "name",
    ["clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "dinov2", "vit", "dinov3_vit"],
)
def test_every_key_that_transformers_writes_for_an_encoder_is_taken(name):
    from transformers import AutoConfig

    encoder = AutoConfig.for_model(name)
    assert vision_config(encoder.to_dict()).to_dict() == encoder.to_dict()


def test_changes_while_loading_are_checked_too(tmp_path):
    small_config().save_pretrained(tmp_path)
    assert TokenFlowConfig.from_pretrained(tmp_path, feature_strategy="last-semantic").hidden_size == 32
    with pytest.raises(UserError, match="scale_drop: must be a number from 0 to 1"):
        TokenFlowConfig.from_pretrained(tmp_path, scale_drop=2)
    with pytest.raises(UserError, match="'codebok_size'; did you mean 'codebook_size'"):
        TokenFlowConfig.from_pretrained(tmp_path, codebok_size=2)


def test_folders_that_hold_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not a model: there is no config\.json in it"):
        TokenFlowConfig.from_pretrained(tmp_path)
    vision_config(small_config().flows[0]["encoder"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its config says model_type 'clip_vision_model'"):
        TokenFlowConfig.from_pretrained(tmp_path)


def test_a_decoder_may_read_several_flows():
    config = small_config(pixel_decoder=PixelDecoderSpec(32, (1, 1), 1, 32, 4, flows=("semantic", "pixel")))
    assert config.pixel_decoder_spec.flows == ("semantic", "pixel")
