"""Fixtures of the parity tests; readers and tolerances are in goldens.py."""

from __future__ import annotations

import pytest
import torch
from goldens import input_image, load_golden, seeded_state


@pytest.fixture(scope="session")
def golden():
    """``golden("losses/lpips")`` -> dict of tensors."""
    return load_golden


@pytest.fixture(scope="session")
def state_of():
    """``state_of("patchgan")`` -> the seeded state dict of a layout, built once per session. Read only."""
    return seeded_state


@pytest.fixture(scope="session")
def real_and_fake():
    """``real_and_fake(224)`` -> (input images, golden reconstructions), each ``[2, 3, H, W]``."""
    layouts = {224: "clipb_224", 256: "clipb_256_enhanced"}

    def load(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        names = ("photo", "pattern")
        real = torch.cat([input_image(f"{name}_{size}") for name in names])
        fake = torch.stack([load_golden(f"{layouts[size]}/{name}")["image"] for name in names])
        return real, fake

    return load
