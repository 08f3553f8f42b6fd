"""Which codes stay: variations, in-painting, and masks that make no sense."""

from __future__ import annotations

import pytest
import torch

from tokenflow.errors import UserError
from tokenflow.generation.editing import keep_outside, keep_scales

SCALES = [1, 2, 4]
CODES = torch.arange(42).view(2, 21)


def test_a_variation_keeps_the_first_scales():
    known = keep_scales(CODES, SCALES, 2)
    assert torch.equal(known.codes, CODES[:, :5])
    assert known.mask is None
    for count in (0, 3, -1):
        with pytest.raises(UserError, match=f"keeps 1 to 2 scales of 3, got {count}"):
            keep_scales(CODES, SCALES, count)


def test_in_painting_keeps_what_lies_outside():
    repaint = torch.zeros(8, 8, dtype=torch.bool)
    repaint[:, 4:] = True
    mask = keep_outside(CODES, repaint, SCALES).mask
    assert mask.shape == CODES.shape
    rows = mask[0].int().split([1, 4, 16])
    assert rows[0].tolist() == [0]  # half of the picture is new
    assert rows[1].tolist() == [1, 0, 1, 0]
    assert rows[2].view(4, 4).tolist() == [[1, 1, 0, 0]] * 4
    repaint[:, 4:6] = False
    assert keep_outside(CODES, repaint, SCALES).mask[0, 0]  # only a quarter


def test_a_mask_a_picture():
    repaint = torch.zeros(2, 4, 4, dtype=torch.bool)
    repaint[0, :2], repaint[1, 2:] = True, True
    mask = keep_outside(CODES, repaint, SCALES).mask
    assert mask[0, 1:5].tolist() == [False, False, True, True]
    assert mask[1, 1:5].tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("repaint", "message"),
    [
        (torch.zeros(8, 8), r"must be \[H, W\] or \[2, H, W\] bool .* got \[1, 8, 8\] torch.float32"),
        (torch.zeros(3, 8, 8).bool(), r"got \[3, 8, 8\] torch.bool"),
        (torch.zeros(8).bool(), r"got \[8\] torch.bool"),
        (torch.zeros(8, 8).bool(), "repaints nothing"),
        (torch.ones(8, 8).bool(), "repaints everything"),
    ],
)
def test_masks_that_make_no_sense(repaint, message):
    with pytest.raises(UserError, match=message):
        keep_outside(CODES, repaint, SCALES)
