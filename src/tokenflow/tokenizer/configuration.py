"""The configuration of a TokenFlow tokenizer, and the presets of the paper (Tab. 11).

A tokenizer is a list of *flows* (`flows.py`) that share one index per patch (Sec. 3.2). One pixel decoder
reads the flows that it names.
"""

from __future__ import annotations

from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from tokenflow.errors import UserError
from tokenflow.names import unknown_name
from tokenflow.tokenizer.config_checks import check_keys, check_number, check_scales, check_spelling
from tokenflow.tokenizer.flows import (
    FLOW_KINDS,
    ConvSpec,
    Flow,
    PixelDecoderSpec,
    PixelFlow,
    SemanticFlow,
    names_of,
)

FeatureStrategy = Literal["last", "last-semantic", "last-pixel", "all", "all-residual"]
FEATURE_STRATEGIES = ("last", "last-semantic", "last-pixel", "all", "all-residual")
_ALL_FLOWS = ("last", "all", "all-residual")  # the strategies that show every flow


CLIP_B16 = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "quick_gelu",
}
SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
VITAMIN_XL = {"model_type": "tokenflow_vitamin"}  # ViTaminConfig's defaults

# Scales of L: the paper's Tab. 11 also has a 3; the released code has not, and a file cannot tell.
SCALES_14 = (1, 2, 4, 6, 8, 10, 12, 14)
SCALES_16 = (*SCALES_14, 16)
SCALES_27 = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27)
SCALES_TINY = (1, 2, 3, 4, 5, 6, 8)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


class TokenFlowConfig(PreTrainedConfig):
    r"""Configuration of a [`TokenFlowModel`].

    Args:
        image_size (`int`): side of the square input, pixels.
        scales (`list[int]`): grid sides of the residual schedule, coarse to fine; the last is the final grid
            `g`. One entry is plain single-scale vector quantization.
        flows (`list[dict]`): see [`SemanticFlow`] and [`PixelFlow`]; order gives the order of channels.
        pixel_decoder (`dict` or None): see [`PixelDecoderSpec`].
        codebook_size (`int`): K, shared by all flows.
        l2_norm (`bool`): compare l2-normalised vectors (Eq. 1 to 3).
        commitment_weight (`float`): beta of the VQ loss.
        entropy_weight, entropy_temperature: the entropy loss; 0 (the default) skips it.
        codebook_init (`"uniform"` or `"kmeans"`): k-means runs on the first training batch.
        codebook_update (`"gradient"` or `"ema"`), `ema_decay`: how codes learn.
        restart_dead_codes (`bool`): in training, codes that a whole usage window never chose move to random
            vectors of the batch (as in Jukebox, Dhariwal et al. 2020).
        scale_drop (`float`): probability that a training step skips one scale (never the first).
        prefix_decoding (`float`): share of training images decoded from a random prefix of the scales, so
            that the first scales alone give a picture (progressive decoding, streaming).
        usage_window (`int`): how many recent indices the usage figures look at.
        feature_strategy: what `forward` returns as a vision tower: a row of Tab. 8, or the pixel flow.

    Raises:
        UserError: a value that no tokenizer can have, or a misspelt key, here or in the dicts of flows,
            encoders and decoder. Keys that resemble none of ours pass: another transformers may know them.
    """

    model_type = "tokenflow"

    image_size: int = 224
    scales: list[int] | tuple[int, ...] = SCALES_14
    flows: Any = None
    pixel_decoder: Any = None
    codebook_size: int = 32768
    l2_norm: bool = True
    commitment_weight: float = 0.25
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01
    codebook_init: str = "uniform"
    codebook_update: str = "gradient"
    ema_decay: float = 0.99
    restart_dead_codes: bool = False
    scale_drop: float = 0.1
    prefix_decoding: float = 0.0
    usage_window: int = 131072
    feature_strategy: str = "last"
    hidden_size: int | None = None

    def __post_init__(self, **kwargs):
        check_spelling("TokenFlowConfig", kwargs, TokenFlowConfig)
        if self.flows is None:
            self.flows = [SemanticFlow(encoder=CLIP_B16), PixelFlow()]
            if self.pixel_decoder is None:
                self.pixel_decoder = PixelDecoderSpec()
        self.flows = [_plain(flow if isinstance(flow, dict) else asdict(flow)) for flow in self.flows]
        if self.pixel_decoder is not None:
            decoder = self.pixel_decoder
            self.pixel_decoder = _plain(decoder if isinstance(decoder, dict) else asdict(decoder))
        self.scales = check_scales(self.scales)
        self._check()
        self.hidden_size = sum(flow.dim for flow in self.feature_flows)
        super().__post_init__(**kwargs)

    @property
    def flow_specs(self) -> list[Flow]:
        """The flows as typed, validated objects."""
        return [FLOW_KINDS[flow["kind"]](**flow) for flow in self.flows]

    @property
    def feature_flows(self) -> list[Flow]:
        """The flows that `feature_strategy` shows: all, or those of one kind."""
        strategy, flows = self.feature_strategy, self.flow_specs
        return [flow for flow in flows if strategy in (*_ALL_FLOWS, f"last-{flow.kind}")]

    @property
    def pixel_decoder_spec(self) -> PixelDecoderSpec | None:
        return None if self.pixel_decoder is None else PixelDecoderSpec(**self.pixel_decoder)

    @property
    def grid(self) -> int:
        """Side g of the final token grid."""
        return self.scales[-1]

    @property
    def code_dim(self) -> int:
        """D, channels of the quantized map: the flows' dimensions added up."""
        return sum(flow["dim"] for flow in self.flows)

    @property
    def num_tokens(self) -> int:
        """L, indices of one image: the squares of the scales added up."""
        return sum(s * s for s in self.scales)

    def _check(self) -> None:
        for key in ("image_size", "codebook_size", "usage_window"):
            check_number(key, getattr(self, key), 1)
        highest = {
            "scale_drop": 1,
            "prefix_decoding": 1,
            "ema_decay": 1,
            "commitment_weight": inf,
            "entropy_weight": inf,
        }
        for key, high in highest.items():
            check_number(key, getattr(self, key), 0, high, whole=False)
        for key, choices in (
            ("feature_strategy", FEATURE_STRATEGIES),
            ("codebook_init", ("uniform", "kmeans")),
            ("codebook_update", ("gradient", "ema")),
        ):
            if getattr(self, key) not in choices:
                raise UserError(f"{key}: {getattr(self, key)!r} is not one of {', '.join(choices)}")
        names = [flow.get("name") for flow in self.flows]
        if not names or len(set(names)) != len(names):
            raise UserError(f"flows: names must be given and distinct, got {names}")
        for flow in self.flows:
            _check_flow(flow)
        if self.pixel_decoder is not None:
            check_keys("pixel_decoder", self.pixel_decoder, names_of(PixelDecoderSpec))
            for name in PixelDecoderSpec(**self.pixel_decoder).flows:
                if name not in names:
                    raise UserError(
                        f"pixel_decoder reads flow {name!r}; the flows are {names}: set pixel_decoder=None, "
                        "or its flows to some of these"
                    )
        if not self.feature_flows:
            kind = self.feature_strategy.removeprefix("last-")
            raise UserError(
                f"feature_strategy 'last-{kind}' needs a {kind} flow; this model has no {kind} flow"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):  # type: ignore[override]
        """As in transformers; names of bundled models come first.

        Raises:
            UserError: a folder without config.json or with the one of another kind of model; values that make
                no tokenizer.
            OSError: a hub name that cannot be fetched; a config.json that is not JSON.
        """
        from tokenflow.bundled import resolve

        name = resolve(pretrained_model_name_or_path)
        if Path(name).is_dir() and not Path(name, kwargs.get("subfolder") or "", "config.json").is_file():
            raise UserError(f"{pretrained_model_name_or_path} is not a model: there is no config.json in it")
        return super().from_pretrained(name, **kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; changes of our own fields in `kwargs` are checked like all others.

        Raises:
            UserError: `config_dict` is that of another kind of model; values that make no tokenizer.
        """
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise UserError(f"this is not a tokenflow tokenizer: its config says model_type {kind!r}")
        check_spelling("TokenFlowConfig", kwargs, cls)
        changed = {key: kwargs.pop(key) for key in cls.__annotations__ if key in kwargs}
        return super().from_dict({**config_dict, **changed}, **kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> TokenFlowConfig:
        """The configuration of a named preset, such as `"tokenflow-b-224"` or `"tokenflow-xl-enhanced"`.

        Raises:
            UserError: unknown name; the message suggests the nearest one.
        """
        if name not in PRESETS:
            raise unknown_name("preset", name, PRESETS)
        return cls(**{**PRESETS[name](), **overrides})


def _check_flow(flow: dict[str, Any]) -> None:
    name = f"flow {flow.get('name')!r}"
    if flow.get("kind") not in FLOW_KINDS:
        raise UserError(
            f"flows: {flow.get('name')!r} has kind {flow.get('kind')!r}; choose {' or '.join(FLOW_KINDS)}"
        )
    check_keys(name, flow, names_of(FLOW_KINDS[flow["kind"]]))
    spec = FLOW_KINDS[flow["kind"]](**flow)
    check_number(f"{name}: dim", spec.dim, 1)
    check_number(f"{name}: weight", spec.weight, 0, whole=False)
    if spec.kind == "semantic":
        for key in ("decoder_layers", "decoder_heads", "target_dim"):
            check_number(f"{name}: {key}", getattr(spec, key), 1)
        vision_config(spec.encoder)


def _plain(value: Any) -> Any:
    """Tuples as lists, as a JSON file gives them back: a configuration equals itself after a round trip."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def vision_config(encoder: dict[str, Any]) -> PreTrainedConfig:
    """The vision model's own configuration object from a flow's `encoder` dict.

    Raises:
        UserError: no model_type or an unknown one, a misspelt key, or values that this kind of model refuses.
    """
    if "model_type" not in encoder:
        raise UserError("a semantic flow's encoder needs a model_type, such as clip_vision_model or dinov2")
    kind = encoder["model_type"]
    if kind == "tokenflow_vitamin":
        from tokenflow.tokenizer.vitamin import ViTaminConfig

        config_class: type[PreTrainedConfig] = ViTaminConfig
    elif kind in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[kind]
    else:
        raise unknown_name("model_type of an encoder", kind, [*CONFIG_MAPPING, "tokenflow_vitamin"])
    values = {key: value for key, value in encoder.items() if key != "model_type"}
    check_spelling(f"encoder {kind}", values, config_class)
    try:
        return config_class(**values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(f"encoder {kind}: {' '.join(str(error).split())}") from error


# presets
def _released(
    encoder: dict, image_size: int, scales: tuple[int, ...], enhanced: bool, **semantic: Any
) -> dict[str, Any]:
    # The enhanced decoder has twice the channels and, beyond the paper's "double", 5 blocks (Sec. B.1).
    decoder = PixelDecoderSpec(width=256, blocks=5) if enhanced else PixelDecoderSpec()
    flows = [SemanticFlow(encoder=encoder, **semantic), PixelFlow()]
    return {"image_size": image_size, "scales": scales, "flows": flows, "pixel_decoder": decoder}


def _b(image_size: int, enhanced: bool = False) -> dict[str, Any]:
    # At 256 px the stored 14 x 14 positions are interpolated on every forward.
    return _released(CLIP_B16, image_size, SCALES_14 if image_size == 224 else SCALES_16, enhanced)


def _l(enhanced: bool = False) -> dict[str, Any]:
    norm = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    return _released(VITAMIN_XL, 256, SCALES_16, enhanced, final_norm=False, target_dim=1152, **norm)


def _xl(enhanced: bool = False) -> dict[str, Any]:
    options = {
        "hidden_state": -2,
        "final_norm": False,
        "image_mean": HALF,
        "image_std": HALF,
        "target_dim": 1152,
    }
    return _released(SIGLIP_SO400M, 384, SCALES_27, enhanced, **options)


def _tiny() -> dict[str, Any]:
    """The bundled model: 128 px, 155 tokens, a ViT of 6 layers, pixel networks on pixel-unshuffled images."""
    encoder = {
        "model_type": "clip_vision_model",
        "hidden_size": 256,
        "intermediate_size": 1024,
        "projection_dim": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 128,
        "patch_size": 16,
        "hidden_act": "quick_gelu",
    }
    return {
        "image_size": 128,
        "scales": SCALES_TINY,
        "flows": [
            SemanticFlow(encoder=encoder, decoder_heads=4, target_dim=384),
            # At equal weights the semantic channels have most of the say: 0.3 dB less, fewer codes alive.
            PixelFlow(
                encoder=ConvSpec(width=96, multipliers=(1, 2), latent_channels=64, patch=8), weight=3.0
            ),
        ],
        "pixel_decoder": PixelDecoderSpec(
            width=64, multipliers=(1, 2, 4), blocks=2, latent_channels=64, patch=4
        ),
        "codebook_size": 8192,
        "restart_dead_codes": True,
        "scale_drop": 0.0,
        "prefix_decoding": 0.1,
    }


PRESETS = {
    "tokenflow-b-224": lambda: _b(224),
    "tokenflow-b-224-enhanced": lambda: _b(224, enhanced=True),
    "tokenflow-b-256": lambda: _b(256),
    "tokenflow-b-256-enhanced": lambda: _b(256, enhanced=True),
    "tokenflow-l": _l,
    "tokenflow-l-enhanced": lambda: _l(enhanced=True),
    "tokenflow-xl": _xl,
    "tokenflow-xl-enhanced": lambda: _xl(enhanced=True),
    "tokenflow-tiny": _tiny,
}

__all__ = [
    "PRESETS",
    "ConvSpec",
    "PixelDecoderSpec",
    "PixelFlow",
    "SemanticFlow",
    "TokenFlowConfig",
    "vision_config",
]
