"""TokenFlowModel: image to tokens and back (Sec. 3.2). Wiring only; each part has its own file.

Notable: encoders and quantizer stay float32 whatever the model is cast to, because half-precision features
change most codes; decoders follow the model's dtype. `forward` is the vision tower that a language model
looks through.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from tokenflow.errors import UserError
from tokenflow.tokenizer.configuration import FEATURE_STRATEGIES, FeatureStrategy, TokenFlowConfig
from tokenflow.tokenizer.multiscale import MultiScaleQuantizer, reduce_area
from tokenflow.tokenizer.pixel import PixelDecoder, PixelEncoder
from tokenflow.tokenizer.precision import Float32Module, no_autocast
from tokenflow.tokenizer.quantizer import CodeUsage, SharedMappingQuantizer
from tokenflow.tokenizer.semantic import Attention, SemanticDecoder, SemanticEncoder


@dataclass
class TokenFlowEncoderOutput(ModelOutput):
    """Attributes:
    indices: `[B, L]` int64, scales in order, row-major.
    quantized: `[B, D, h, w]` float32.
    losses: the quantizer's losses by name, scalars, averaged over the scales; empty in eval mode.
    """

    indices: Tensor = None  # type: ignore[assignment]  # a ModelOutput's fields need defaults
    quantized: Tensor = None  # type: ignore[assignment]
    losses: dict[str, Tensor] | None = None


@dataclass
class TokenFlowDecoderOutput(ModelOutput):
    """Attributes:
    pixel_values: `[B, 3, H, W]`, about [-1, 1], not clamped; None without a pixel decoder.
    semantic: `[B, h * w, T]`, the flow "semantic" in the teacher's feature space; None without that flow.
    others: the decoded features of further semantic flows, by name.
    """

    pixel_values: Tensor | None = None
    semantic: Tensor | None = None
    others: dict[str, Tensor] | None = None


class PixelFlowEncoder(nn.Module):
    """Pixel encoder and projection to the flow's dimension; resizes the image so that all grids agree."""

    def __init__(self, spec, dim: int, grid: int):
        super().__init__()
        self.network = PixelEncoder(spec)
        self.head = nn.Conv2d(spec.latent_channels, dim, 1)
        self.side = spec.stride * grid

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.network(resize_image(pixel_values, self.side)))


class PixelFlowDecoder(nn.Module):
    """Projection from the quantized flows and the pixel decoder; resizes back to the image's size."""

    def __init__(self, spec, dim: int, image_size: int):
        super().__init__()
        self.head = nn.Conv2d(dim, spec.latent_channels, 1)
        self.network = PixelDecoder(spec)
        self.image_size = image_size

    def forward(self, quantized: Tensor) -> Tensor:
        return resize_image(self.network(self.head(quantized)), self.image_size)


class Encoders(Float32Module, nn.ModuleDict):
    """The flows' encoders by name, in float32."""


class Quantizer(Float32Module, MultiScaleQuantizer):
    """The multi-scale quantizer, in float32."""


class TokenFlowPreTrainedModel(PreTrainedModel):
    config_class = TokenFlowConfig
    base_model_prefix = "tokenflow"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["encoders", "quantizer"]  # noqa: RUF012 (transformers' own way)
    _no_split_modules = ["Block", "Level"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Covers every module of ours with parameters: what is left out here stays as it was allocated.
        if isinstance(module, nn.ParameterDict):  # the codebooks
            for name, codebook in module.items():
                fresh = torch.empty_like(codebook).uniform_(-1 / len(codebook), 1 / len(codebook))
                init.copy_(module[name], F.normalize(fresh, dim=-1) if self.config.l2_norm else fresh)
        elif isinstance(module, SharedMappingQuantizer):
            if module.update == "ema":
                init.zeros_(module.cluster_size)
            if module.init == "kmeans":
                init.copy_(module.initialized, torch.zeros_like(module.initialized))
        elif isinstance(module, CodeUsage):
            init.copy_(module.recent, torch.full_like(module.recent, -1))
            init.zeros_(module.seen)
        elif isinstance(module, SemanticDecoder):
            init.trunc_normal_(module.cls_token, std=0.02)
            init.trunc_normal_(module.pos_embed, std=0.02)
        elif isinstance(module, Attention):
            init.zeros_(module.q_bias)
            init.zeros_(module.v_bias)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)  # PyTorch's own default, as in VQGAN
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class TokenFlowModel(TokenFlowPreTrainedModel):
    r"""The TokenFlow tokenizer.

    Example:

    ```python
    model = TokenFlowModel.from_pretrained("tokenflow-tiny")
    tokens = model.encode(pixel_values).indices              # [B, 3, 128, 128] in [-1, 1] -> [B, 155]
    image = model.decode_indices(tokens).pixel_values        # [B, 3, 128, 128]
    ```
    """

    def __init__(self, config: TokenFlowConfig):
        super().__init__(config)
        flows, decoder = config.flow_specs, config.pixel_decoder_spec
        self.dims = {flow.name: flow.dim for flow in flows}
        self.encoders = Encoders()
        self.semantic_decoders = nn.ModuleDict()
        for flow in flows:
            if flow.kind == "pixel":
                self.encoders[flow.name] = PixelFlowEncoder(flow.encoder, flow.dim, config.grid)
            else:
                encoder = SemanticEncoder(flow)
                self.encoders[flow.name] = encoder
                self.semantic_decoders[flow.name] = SemanticDecoder(
                    flow, encoder.tower.width, encoder.tower.base_grid
                )
        single = SharedMappingQuantizer(
            [(flow.name, flow.dim, flow.weight) for flow in flows],
            config.codebook_size,
            config.l2_norm,
            config.commitment_weight,
            config.entropy_weight,
            config.entropy_temperature,
            config.codebook_init,
            config.codebook_update,
            config.ema_decay,
            config.usage_window,
        )
        self.quantizer = Quantizer(
            single,
            config.scales,
            config.scale_drop,
            config.usage_window,
            config.restart_dead_codes,
            config.prefix_decoding,
        )
        self.pixel_decoder = None
        if decoder is not None:
            dim = sum(self.dims[name] for name in decoder.flows)
            self.pixel_decoder = PixelFlowDecoder(decoder, dim, config.image_size)
            self.pixel_decoder_flows = decoder.flows
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; names of bundled models come first, and weights are loaded as float32 unless
        `dtype` says otherwise (files are stored in half precision).

        Raises:
            UserError: no such folder or bundled name; no config.json; weights that are missing or of another
                shape (transformers would warn and leave random values; `ignore_mismatched_sizes=True` asks
                for that).
            OSError: a hub name that cannot be fetched; a folder without weights.
        """
        from tokenflow.bundled import resolve

        wants_report = kwargs.pop("output_loading_info", False)
        lenient = kwargs.pop("ignore_mismatched_sizes", False)
        loaded: Any = super().from_pretrained(
            resolve(pretrained_model_name_or_path),
            *args,
            **{"dtype": torch.float32, **kwargs},
            ignore_mismatched_sizes=True,  # its own error is a page long
            output_loading_info=True,
        )
        model, report = loaded
        if not lenient:
            mismatched = [key for key, *_ in report["mismatched_keys"]]
            check_weights(pretrained_model_name_or_path, "missing", report["missing_keys"])
            check_weights(pretrained_model_name_or_path, "of another shape", mismatched)
        return (model, report) if wants_report else model

    @property
    def decoder_dtype(self) -> torch.dtype:
        """The dtype that the model was cast to; encoders and quantizer are float32 in any case."""
        decoders = self.semantic_decoders if self.pixel_decoder is None else self.pixel_decoder
        return next(decoders.parameters()).dtype

    # encode
    def flow_features(self, pixel_values: Tensor) -> Tensor:
        """The flows' features before quantization, concatenated: `[B, 3, H, W]` to `[B, D, g, g]` float32.

        Raises:
            UserError: as in `encode`.
        """
        size = self.config.image_size
        if not isinstance(pixel_values, Tensor):
            kind = type(pixel_values).__name__
            raise UserError(f"pixel_values must be a torch tensor, got {kind}; see TokenFlowImageProcessor")
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size) or not len(pixel_values):
            raise UserError(
                f"pixel_values must be [B, 3, {size}, {size}] for this model, got {list(pixel_values.shape)}"
            )
        if not pixel_values.is_floating_point():
            raise UserError(f"pixel_values must be floating-point in [-1, 1], got {pixel_values.dtype}")
        x = pixel_values.float()
        # NaN would silently become code 0. While training, the loop looks at its losses instead.
        if not self.encoders.training and not torch.compiler.is_compiling() and not x.sum().isfinite():
            raise UserError(
                f"pixel_values hold {int((~x.isfinite()).sum())} NaN or infinite values; see what made them"
            )
        features = [encoder(x).float() for encoder in self.encoders.values()]
        for name, feature in zip(self.dims, features, strict=True):
            if feature.shape[-1] != self.config.grid:
                raise UserError(
                    f"flow {name!r} gives a grid of {feature.shape[-1]}, but scales end at {self.config.grid}"
                )
        return torch.cat(features, dim=1)

    def encode(self, pixel_values: Tensor) -> TokenFlowEncoderOutput:
        """Images to tokens.

        Args:
            pixel_values: `[B, 3, H, W]` in [-1, 1], H = W = `config.image_size`.

        Returns:
            `indices` `[B, L]` int64; `quantized` `[B, D, g, g]` float32; `losses`, the scalars that training
            adds to its own ("vq", "commitment" and, if it has a weight, "entropy"), empty in eval mode.

        Raises:
            UserError: pixels of another shape, not floating-point, or (in eval mode) not finite; flows whose
                grid is not the last scale.
        """
        if self.encoders.training:  # may run under the caller's autocast; the search is float32 all the same
            h = self.flow_features(pixel_values)
        else:
            with no_autocast(self.device):
                h = self.flow_features(pixel_values)
        with no_autocast(self.device):
            out = self.quantizer(h)
        return TokenFlowEncoderOutput(indices=out.indices, quantized=out.quantized, losses=out.losses)

    # decode
    def decode(self, quantized: Tensor) -> TokenFlowDecoderOutput:
        """A quantized map `[B, D, g, g]` to pixels `[B, 3, H, W]` and semantic features `[B, g * g, T]`.

        Raises:
            UserError: a map of another shape.
        """
        shape = (self.config.code_dim, self.config.grid, self.config.grid)
        if quantized.shape[1:] != shape:
            raise UserError(f"quantized must be {['B', *shape]} for this model, got {list(quantized.shape)}")
        semantic = self.decode_semantic(quantized)
        return TokenFlowDecoderOutput(
            pixel_values=None if self.pixel_decoder is None else self.decode_pixels(quantized),
            semantic=semantic.pop("semantic", None),
            others=semantic or None,
        )

    def decode_pixels(self, quantized: Tensor) -> Tensor:
        """Only the pixels of `decode`."""
        decoder = cast(PixelFlowDecoder, self.pixel_decoder)
        parts = self.split_flows(quantized)
        x = torch.cat([parts[name] for name in self.pixel_decoder_flows], dim=1)
        return decoder(x.to(self.decoder_dtype).contiguous())

    def decode_semantic(self, quantized: Tensor) -> dict[str, Tensor]:
        """Each semantic flow in its teacher's feature space, by name."""
        parts = self.split_flows(quantized)
        dtype = self.decoder_dtype
        return {name: decoder(parts[name].to(dtype)) for name, decoder in self.semantic_decoders.items()}

    def decode_indices(self, indices: Tensor, num_scales: int | None = None) -> TokenFlowDecoderOutput:
        """Tokens to an image.

        Args:
            indices: `[B, L]`, or only the first scales' indices.
            num_scales: decode only the first k scales: coarse, but full-size (progressive decoding).

        Raises:
            UserError: `indices` do not end with a scale, an index is outside the codebook, `num_scales` is
                out of range.
        """
        return self.decode(self.quantized_from_indices(indices, num_scales))

    def quantized_from_indices(self, indices: Tensor, num_scales: int | None = None) -> Tensor:
        """The quantized map `[B, D, g, g]` of `indices`; arguments and what it raises: `decode_indices`."""
        if indices.ndim != 2 or indices.is_floating_point() or indices.is_complex():
            raise UserError(f"indices must be [B, L] integers, got {list(indices.shape)} {indices.dtype}")
        indices = indices.long()  # token files hold 16-bit ones
        scales = self.quantizer.prefix_scales(indices.shape[1])
        if num_scales is not None:
            if not 1 <= num_scales <= len(scales):
                raise UserError(f"num_scales must be 1 to {len(scales)} here, got {num_scales}")
            indices = indices[:, : sum(s * s for s in scales[:num_scales])]
        low, high = (int(x) for x in indices.aminmax()) if indices.numel() else (0, 0)
        if low < 0 or high >= self.config.codebook_size:
            raise UserError(
                f"indices run from {low} to {high}; this codebook has 0 to {self.config.codebook_size - 1}"
            )
        with no_autocast(indices.device):
            return self.quantizer.quantized(indices)

    def split_flows(self, x: Tensor, dim: int = 1) -> dict[str, Tensor]:
        """The parts of the D channels by flow name."""
        return dict(zip(self.dims, x.split(list(self.dims.values()), dim=dim), strict=True))

    # features
    def features(self, pixel_values: Tensor, strategy: FeatureStrategy = "last") -> Tensor:
        """Input of a language model (Sec. 3.4, Tab. 8).

        Args:
            pixel_values: as in `encode`.
            strategy: `"last"`: the final quantized map, `[B, g * g, D]`; `"last-semantic"` and
                `"last-pixel"`: the channels of its flows of that kind; `"all-residual"`: the code vectors of
                every scale, `[B, L, D]`; `"all"`: the running sum after each scale, area-reduced to it.

        The same in training mode: a language model around this tower may be training, the tower is not.

        Raises:
            UserError: unknown strategy; "last-semantic" of a model without a semantic flow, and so on.
        """
        _check_strategy(strategy)
        with as_at_inference(self.encoders, self.quantizer):
            encoded = self.encode(pixel_values)
        return self._features(strategy, encoded.indices, encoded.quantized)

    def features_from_indices(self, indices: Tensor, strategy: FeatureStrategy = "last") -> Tensor:
        """`features` of images whose indices `[B, L]` are known; errors: as there and in `decode_indices`."""
        _check_strategy(strategy)
        maps = self.quantized_from_indices(indices)
        with no_autocast(indices.device):
            return self._features(strategy, indices.long(), maps)

    def _features(self, strategy: FeatureStrategy, indices: Tensor, maps: Tensor) -> Tensor:
        if strategy == "all-residual":
            return self.quantizer.quantizer.lookup(indices)
        if strategy == "all":
            sums = self.quantizer.partial_sums(indices)
            reduced = [reduce_area(x, s).flatten(2) for x, s in zip(sums, self.config.scales, strict=True)]
            return torch.cat(reduced, dim=2).transpose(1, 2)
        if strategy != "last":
            kind = strategy.removeprefix("last-")
            names = [flow.name for flow in self.config.flow_specs if flow.kind == kind]
            if not names:
                raise UserError(f"strategy {strategy!r} needs a {kind} flow; this model has none")
            parts = self.split_flows(maps)
            maps = torch.cat([parts[name] for name in names], dim=1)
        return maps.flatten(2).transpose(1, 2)

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutput:
        """The vision tower: features of `config.feature_strategy`, in the dtype the model was cast to."""
        features = self.features(pixel_values, self.config.feature_strategy).to(self.decoder_dtype)
        return BaseModelOutput(last_hidden_state=features, hidden_states=(features,))


def _check_strategy(strategy: str) -> None:
    if strategy not in FEATURE_STRATEGIES:
        raise UserError(f"strategy {strategy!r} is not one of {', '.join(FEATURE_STRATEGIES)}")


def check_weights(name: object, what: str, keys: Collection[str]) -> None:
    """Raise the UserError of model `name` whose weights `keys` are `what` ("missing", "unexpected", ...)."""
    if keys:
        raise UserError(
            f"the weights of model {name} do not fit its config.json: {len(keys)} {what}, first {min(keys)}"
        )


@contextmanager
def as_at_inference(*modules: nn.Module) -> Iterator[None]:
    """Eval mode for a while; each submodule's own mode comes back."""
    modes = [(child, child.training) for module in modules for child in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for child, training in modes:
            child.training = training


def resize_image(x: Tensor, side: int) -> Tensor:
    # SigLIP's 384 px give 27 x 27 patches, so its pixel networks run at 16 * 27 = 432 px.
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="bicubic")
