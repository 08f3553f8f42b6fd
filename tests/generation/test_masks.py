"""Masks: the dense one against its definition, FlexAttention against it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from tokenflow.generation.masks import Segment, block_numbers, dense_mask, flex_mask

TEXT, SCALE = "text", "scale"


def test_text_is_causal_and_scales_are_full():
    blocks = block_numbers([Segment(2, TEXT), Segment(1, SCALE), Segment(3, SCALE), Segment(2, TEXT)])
    assert blocks.tolist() == [1, 2, 3, 4, 4, 4, 5, 6]
    allowed = dense_mask(blocks, torch.ones(1, 8, dtype=torch.bool))[0, 0]
    assert allowed.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        *[[1, 1, 1, 1, 1, 1, 0, 0]] * 3,
        [1, 1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ]


def test_nobody_but_itself_sees_padding():
    blocks = block_numbers([Segment(4, TEXT), Segment(4, SCALE)])
    real = torch.tensor([[False, False, True, True, True, True, True, True]])
    allowed = dense_mask(blocks, real)[0, 0]
    assert allowed.any(dim=1).all()
    assert not allowed[2:, :2].any()
    assert allowed[:2].sum() == 2


def test_text_may_follow_an_image_and_an_image_that_text():
    picture = [Segment(1, SCALE), Segment(4, SCALE)]
    blocks = block_numbers([Segment(2, TEXT), *picture, Segment(3, TEXT), *picture])
    assert blocks.tolist() == [1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 8, 9, 9, 9, 9]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_fused_attention():
    """Forward only: FlexAttention has no backward on CPU."""
    blocks = block_numbers([Segment(7, TEXT), *(Segment(s * s, SCALE) for s in (1, 2, 3)), Segment(3, TEXT)])
    real = torch.ones(2, len(blocks), dtype=torch.bool)
    real[1, :4] = False
    q, k, v = torch.randn(3, 2, 2, len(blocks), 16, generator=torch.Generator().manual_seed(0))
    expected = F.scaled_dot_product_attention(q, k, v, dense_mask(blocks, real))
    flex = flex_attention(q, k, v, block_mask=flex_mask(blocks, real))
    torch.testing.assert_close(flex, expected, atol=1e-5, rtol=0)


@pytest.mark.gpu
def test_flex_attention_learns_as_fused_attention_does():
    """Output and gradients, compiled as in training, at a length that is no multiple of its blocks."""
    scales = [Segment(s * s, SCALE) for s in (1, 2, 4, 6, 8, 10)]
    blocks = block_numbers([Segment(29, TEXT), *scales, Segment(3, TEXT)], "cuda")
    real = torch.ones(3, len(blocks), dtype=torch.bool, device="cuda")
    real[1, :20] = False
    qkv = torch.randn(3, 3, 4, len(blocks), 32, generator=torch.Generator().manual_seed(0)).cuda()
    weight = torch.randn(qkv.shape[1:], generator=torch.Generator().manual_seed(1)).cuda()
    weight *= real[:, None, :, None]  # what padding gives does not matter
    outputs, gradients = [], []
    for attend in (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dense_mask(blocks, real)),
        lambda q, k, v: torch.compile(flex_attention)(q, k, v, block_mask=flex_mask(blocks, real)),
    ):
        leaf = qkv.clone().requires_grad_()
        out = attend(*leaf)
        (out * weight).sum().backward()
        outputs.append(out * real[:, None, :, None])
        gradients.append(leaf.grad)
    torch.testing.assert_close(outputs[1], outputs[0], atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(gradients[1], gradients[0], atol=2e-2, rtol=2e-2)
