"""The released tokenizer checkpoints: from a `.pt` file to a folder for `TokenFlowModel.from_pretrained`.

The released layout is told from its keys and shapes. For every tensor of our model `released_key` says where
the file keeps it, so whatever the file lacks, and whatever it holds that nothing asks for, is an error that
names it.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tokenflow.checkpoints.safe_load import CheckpointError, read_state_dict
from tokenflow.errors import UserError
from tokenflow.files import atomic_folder

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from tokenflow.tokenizer.configuration import TokenFlowConfig

REPORT_FILE = "conversion_report.json"

# Keys of ours and of the released code, by rules that are applied in this order. The released code calls the
# semantic flow "vqkd" and the pixel flow "vqgan".
_RULES = (
    (r"^encoders\.pixel\.network\.", "encoder."),
    (r"^encoders\.pixel\.head\.", "quant_conv."),
    (r"^pixel_decoder\.network\.", "decoder."),
    (r"^pixel_decoder\.head\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.levels\.", r"\1.conv_blocks."),
    (r"^(encoder\..+)\.resample\.", r"\1.downsample."),
    (r"^(decoder\..+)\.resample\.", r"\1.upsample."),
    (r"^((?:en|de)coder\..+)\.shortcut\.", r"\1.nin_shortcut."),
    (r"^encoders\.semantic\.head\.", "encode_task_layer."),
    (r"^semantic_decoders\.semantic\.head\.", "decode_task_layer."),
    (r"^semantic_decoders\.semantic\.patch_embed\.", "decoder_vqkd.patch_embed.proj."),
    (r"^semantic_decoders\.semantic\.norm\.", "decoder_vqkd.fc_norm."),
    (r"^semantic_decoders\.semantic\.(blocks\.\d+\.mlp)\.0\.", r"decoder_vqkd.\1.fc1."),
    (r"^semantic_decoders\.semantic\.(blocks\.\d+\.mlp)\.2\.", r"decoder_vqkd.\1.fc2."),
    (r"^semantic_decoders\.semantic\.", "decoder_vqkd."),
    (r"^quantizer\.quantizer\.codebooks\.semantic$", "quantize.embedding_vqkd.weight"),
    (r"^quantizer\.quantizer\.codebooks\.pixel$", "quantize.embedding_vqgan.weight"),
)
_TOWER = "encoders.semantic.tower.model."
_TOWER_RULES = {
    # OpenAI's CLIP; its fused `attn.in_proj_*` holds our q, k and v projections, in this order
    "clip": (
        (r"embeddings\.class_embedding$", "class_embedding"),
        (r"embeddings\.patch_embedding\.", "conv1."),
        (r"embeddings\.position_embedding\.weight$", "positional_embedding"),
        (r"pre_layrnorm\.", "ln_pre."),
        (r"post_layernorm\.", "ln_post."),
        (r"encoder\.layers\.", "transformer.resblocks."),
        (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
        (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
        (r"\.layer_norm([12])\.", r".ln_\1."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    ),
    "siglip": ((r"^", "vision_model."),),
    "vitamin": (),
}
# A key of each vision tower, the preset's family, and the sizes of image that its files are used with.
_FAMILIES = {
    "clip": ("encoder_vqkd.conv1.weight", "tokenflow-b", (224, 256)),
    "siglip": ("encoder_vqkd.vision_model.embeddings.patch_embedding.weight", "tokenflow-xl", (384,)),
    "vitamin": ("encoder_vqkd.patch_embed.backbone.stem.conv1.weight", "tokenflow-l", (256,)),
}
_UNUSED = (
    (r"quantize\.codebook_used", "usage statistics of the training run"),
    (
        r"encoder_vqkd\.vision_model\.encoder\.layers\.26\..+",
        "SigLIP's last layer: the feature is taken before it",
    ),
    (r"encoder_vqkd\.vision_model\.head\..+", "SigLIP's pooling head"),
)
_DECODERS = {512: "normal", 1024: "enhanced"}


@dataclass
class ConversionReport:
    """What a conversion read, renamed and ignored.

    Attributes:
        source, output: the file and the folder (None: no folder was written).
        wrapper: the entry of the file that held the weights; None: the file itself.
        preset: the preset that the configuration is built from.
        decoder: `"normal"` or `"enhanced"`.
        image_size, image_size_reason: side in pixels, and why that.
        scales, codebook_size: of the configuration.
        tensors, values: how many were read and used.
        renamed: `(key in the file, key in the model)`; CLIP's fused projections give three each.
        ignored: `{key in the file: reason}`.
    """

    source: str
    output: str | None
    wrapper: str | None
    preset: str
    decoder: str
    image_size: int
    image_size_reason: str
    scales: list[int]
    codebook_size: int
    tensors: int
    values: int
    renamed: list[tuple[str, str]]
    ignored: dict[str, str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        reasons: dict[str, int] = {}
        for reason in self.ignored.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        title = self.source if self.output is None else f"{self.source} -> {self.output}"
        table = Table(title=Text(title), show_header=False, title_justify="left")
        table.add_row("weights from", self.wrapper or "the file itself")
        table.add_row("layout", f"{self.preset} ({self.decoder} decoder)")
        table.add_row("image size", f"{self.image_size} ({self.image_size_reason})")
        table.add_row(
            "scales", f"{' '.join(map(str, self.scales))} ({sum(s * s for s in self.scales)} tokens)"
        )
        table.add_row("codebook", f"{self.codebook_size:,} codes")
        table.add_row("read", f"{self.tensors:,} tensors, {self.values:,} values")
        table.add_row("renamed", f"{len(self.renamed):,} (listed in {REPORT_FILE})")
        table.add_row(
            "ignored", "\n".join(f"{count}: {reason}" for reason, count in reasons.items()) or "none"
        )
        return table


def convert_tokenizer(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    image_size: int | None = None,
    wrapper: str | None = None,
) -> ConversionReport:
    """Turn a released tokenizer checkpoint into a folder for `TokenFlowModel.from_pretrained`.

    The folder holds safetensors weights (in the file's own precision), the configuration, the image processor
    and the report; it appears whole or not at all.

    Args:
        file: `.pt` or `.safetensors`; see `safe_load` for what is refused.
        out: the folder to make; must not exist, or be empty.
        image_size: side in pixels for the CLIP layouts, 224 or 256, which keys cannot tell apart. By default
            a normal decoder is taken as 224 and an enhanced one as 256.
        wrapper: the entry to take; by default the first of `ema`, `model`, `state_dict`.

    Returns:
        What was read, renamed and ignored.

    Raises:
        CheckpointError: the file cannot be read safely, has no known layout, or lacks or exceeds it.
        UserError: `image_size` does not fit the layout, or `out` cannot be written.
    """
    import torch

    from tokenflow.tokenizer.image_processing import TokenFlowImageProcessor
    from tokenflow.tokenizer.modeling import TokenFlowModel

    out = Path(out)
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty; choose another folder or remove it")
    weights, wrapper = read_state_dict(file, wrapper)
    config, state, report = convert_state_dict(weights, image_size, source=os.fspath(file))
    report = replace(report, wrapper=wrapper, output=os.fspath(out))
    with torch.device("meta"):  # the file's tensors take the place of the model's, so nothing is held twice
        model = TokenFlowModel(config)
    model.load_state_dict(state, strict=True, assign=True)
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        TokenFlowImageProcessor(size=config.image_size).save_pretrained(folder)
        (folder / REPORT_FILE).write_text(report.to_json() + "\n", encoding="utf-8")
    return report


def convert_state_dict(
    weights: dict[str, Tensor], image_size: int | None = None, source: str = "the state dict"
) -> tuple[TokenFlowConfig, dict[str, Tensor], ConversionReport]:
    """A released state dict as configuration and state dict of a `TokenFlowModel`; tensors are not copied.

    Args:
        weights: `{released key: tensor}`, floating point, on any device.
        image_size: see `convert_tokenizer`.
        source: what errors and the report call it.

    Returns:
        The configuration, `{key of ours: tensor}`, and the report.

    Raises:
        CheckpointError, UserError: see `convert_tokenizer`.
    """
    import torch

    from tokenflow.tokenizer.modeling import TokenFlowModel

    family = _family(weights, source)
    config, decoder, reason = _configuration(weights, family, image_size, source)
    with torch.device("meta"):
        wanted = TokenFlowModel(config).state_dict()
    state, renamed = _rename(weights, wanted, family, source)
    used = {old for old, _ in renamed}
    ignored = _ignored(weights, used, config, source)
    report = ConversionReport(
        source=source,
        output=None,
        wrapper=None,
        preset=_preset(family, config.image_size, decoder),
        decoder=decoder,
        image_size=config.image_size,
        image_size_reason=reason,
        scales=list(config.scales),
        codebook_size=config.codebook_size,
        tensors=len(used),
        values=sum(weights[key].numel() for key in used),
        renamed=renamed,
        ignored=ignored,
    )
    return config, state, report


def released_key(key: str, family: str) -> tuple[str, int | None]:
    """Where the released layout keeps one of our tensors.

    Args:
        key: of `TokenFlowModel.state_dict()`.
        family: `"clip"`, `"siglip"` or `"vitamin"`.

    Returns:
        The released key, and which third of its rows if it is a fused q, k, v projection (else None).
    """
    if key.startswith(_TOWER):
        part = re.search(r"\.self_attn\.([qkv])_proj\.", key) if family == "clip" else None
        name = key.removeprefix(_TOWER)
        for pattern, replacement in _TOWER_RULES[family]:
            name = re.sub(pattern, replacement, name, count=1)
        return f"encoder_vqkd.{name}", "qkv".index(part[1]) if part else None
    for pattern, replacement in _RULES:
        key = re.sub(pattern, replacement, key, count=1)
    return key, None


def _family(weights: dict[str, Tensor], source: str) -> str:
    for family, (key, _, _) in _FAMILIES.items():
        if key in weights:
            return family
    raise CheckpointError(
        f"{source} is no released tokenizer: it has none of "
        + ", ".join(key for key, _, _ in _FAMILIES.values())
    )


def _preset(family: str, image_size: int, decoder: str) -> str:
    name = _FAMILIES[family][1]
    name += f"-{image_size}" if family == "clip" else ""
    return f"{name}-enhanced" if decoder == "enhanced" else name


def _configuration(
    weights: dict[str, Tensor], family: str, image_size: int | None, source: str
) -> tuple[TokenFlowConfig, str, str]:
    """The configuration, the kind of decoder, and why this image size."""
    from tokenflow.tokenizer.configuration import TokenFlowConfig

    width = len(_need(weights, "decoder.conv_in.weight", source))
    if width not in _DECODERS:
        raise CheckpointError(
            f"{source}: decoder.conv_in.weight has {width} channels; "
            "the normal decoder has 512, the enhanced one 1024"
        )
    decoder, sizes = _DECODERS[width], _FAMILIES[family][2]
    if image_size is not None:
        if image_size not in sizes:
            allowed = " or ".join(map(str, sizes))
            raise UserError(f"image size {image_size}: {_FAMILIES[family][1]} has {allowed}")
        reason = "as asked"
    elif len(sizes) == 1:
        image_size, reason = sizes[0], "the only one of this layout"
    else:
        image_size = 256 if decoder == "enhanced" else 224
        reason = f"assumed from the {decoder} decoder; the keys cannot tell, --image-size overrides"
    codes = len(_need(weights, "quantize.embedding_vqkd.weight", source))
    return (
        TokenFlowConfig.from_preset(_preset(family, image_size, decoder), codebook_size=codes),
        decoder,
        reason,
    )


def _need(weights: dict[str, Tensor], key: str, source: str) -> Tensor:
    if key not in weights or weights[key].ndim == 0:
        raise CheckpointError(f"{source} lacks 1 tensor of its layout: {key}")
    return weights[key]


def _rename(
    weights: dict[str, Tensor], wanted: dict[str, Tensor], family: str, source: str
) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """The model's state dict out of the file's tensors, and the pairs of keys.

    Raises:
        CheckpointError: tensors are missing, or have another shape or type; the first few are named.
    """
    places = {key: released_key(key, family) for key in wanted}
    missing = list(dict.fromkeys(old for old, _ in places.values() if old not in weights))
    if missing:
        raise CheckpointError(f"{source} lacks {_count(missing)} of its layout: {_first(missing)}")
    state, wrong = {}, []
    for key, (old, third) in places.items():
        tensor = weights[old]
        expected = list(wanted[key].shape)
        if third is not None:
            expected[0] *= 3
        if list(tensor.shape) != expected or not tensor.is_floating_point():
            wrong.append(f"{old} {list(tensor.shape)} {tensor.dtype}, not {expected} floating point")
            continue
        state[key] = (tensor if third is None else tensor.chunk(3)[third]).contiguous()
    if wrong:
        wrong = list(dict.fromkeys(wrong))
        raise CheckpointError(f"{source}: {_count(wrong)} of another shape or type: {_first(wrong)}")
    return state, [(old, key) for key, (old, _) in places.items()]


def _ignored(
    weights: dict[str, Tensor], used: set[str], config: TokenFlowConfig, source: str
) -> dict[str, str]:
    """The tensors that the model does not need, with the reason.

    Raises:
        CheckpointError: there is one that no reason is known for, or a pixel scaling other than the preset's.
    """
    import torch

    flow = next(flow for flow in config.flow_specs if flow.kind == "semantic")
    scaling = {"scaling_layer.shift": flow.image_mean, "scaling_layer.scale": flow.image_std}
    ignored, unexpected = {}, []
    for key, tensor in weights.items():
        if key in used:
            continue
        reasons = [reason for pattern, reason in _UNUSED if re.fullmatch(pattern, key)]
        expected = scaling.get(key)
        if expected is not None:
            if tensor.numel() != 3 or not torch.allclose(tensor.flatten().float(), torch.tensor(expected)):
                raise CheckpointError(
                    f"{source}: {key} is {tensor.flatten()[:3].tolist()}, "
                    f"but this layout scales pixels by {list(expected)}"
                )
            ignored[key] = "constants that the configuration holds"
        elif reasons:
            ignored[key] = reasons[0]
        else:
            unexpected.append(key)
    if unexpected:
        raise CheckpointError(f"{source} has {_count(unexpected)} beyond its layout: {_first(unexpected)}")
    return ignored


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _first(names: list[str]) -> str:
    shown = ", ".join(str(name)[:120] for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
