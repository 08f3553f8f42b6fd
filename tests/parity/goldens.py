"""Readers and tolerances shared by the parity tests. "README" below is tests/parity/tokenizer/README.md.

Test files import it by name (``from goldens import load_golden, IMAGE_ATOL``).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from seeded_weights import load_manifest, seeded_state_dict
from torch import Tensor

TOKENIZER = Path(__file__).parent / "tokenizer"
IMAGES = ("photo", "pattern")

# README section 5, "Recommended".
FEATURE_ATOL = 2e-4  # sem_feature, pix_feature, *_sub encoder outputs (values have std 0.5 to 2)
INDEX_MIN_MARGIN = 1e-5  # teacher-forced indices are equal wherever `margin` is at least this
INDEX_AGREEMENT = 0.995  # indices from the stored features or the image; on CPU in fp32 all are equal
QUANTIZED_ATOL = 1e-5  # quantized (same indices), next_scale_features, codebook_entry_first16
IMAGE_ATOL = 5e-4  # image, decode_code_*
SEMANTIC_ATOL = 1e-4  # sem_decoded_sub, sem_decoded_l2, prefix semantic
DISTANCE_NORM_RTOL = 1e-5  # code_distance_norms
QUANTIZER_ATOL = 1e-6  # quantizer and multi-scale losses and outputs
QUANTIZER_GRAD_TOL = 1e-4  # their gradients, as a share of the largest entry
LOSS_RTOL = 1e-4  # logits, losses, LPIPS
PATCHGAN_GRAD_TOL = 5e-3  # gradients through PatchGAN, share of the largest entry (leaky-ReLU kinks)
LOSS_GRAD_TOL = 1e-3  # other loss gradients, share of the largest entry


def load_golden(name: str) -> dict[str, Tensor]:
    """All arrays of ``tokenizer/<name>.npz`` as tensors, e.g. ``load_golden("clipb_224/photo")``.

    Arrays of strings (the logged names of ``losses/full_loss``) are left out; read them with numpy.
    """
    with np.load(TOKENIZER / f"{name}.npz") as arrays:
        return {k: torch.from_numpy(np.array(arrays[k])) for k in arrays.files if arrays[k].dtype.kind != "U"}


def load_manifest_of(layout: str) -> dict[str, dict]:
    """Key manifest ``{key: {"shape": ..., "dtype": ...}}`` of a layout, e.g. ``"clipb_224"``."""
    return load_manifest(TOKENIZER / "manifests" / f"{layout}.json.gz")


@lru_cache(maxsize=2)  # the tokenizer layouts are 0.7 to 2.2 GB each, so keep to one layout per test file
def seeded_state(layout: str) -> dict[str, Tensor]:
    """Seeded state dict of a layout (``clipb_224``: 9 s, ``clipb_256_enhanced``: 18 s). Read only."""
    return seeded_state_dict(load_manifest_of(layout))


def input_image(name: str) -> Tensor:
    """``tokenizer/inputs/<name>.png`` as the model's input, fp32 ``[1, 3, H, W]`` in [-1, 1], contiguous."""
    pixels = np.asarray(Image.open(TOKENIZER / "inputs" / f"{name}.png").convert("RGB"))
    return ((torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5).contiguous()


def assert_grad_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest difference at most ``tolerance`` times the largest entry of the golden gradient."""
    assert actual.shape == expected.shape
    difference = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert difference <= tolerance, f"gradient differs by {difference:.2e} of its largest entry"
