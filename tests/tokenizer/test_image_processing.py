"""TokenFlowImageProcessor: modes, exact values, round trip, saving, hostile shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenflow import TokenFlowImageProcessor
from tokenflow.errors import UserError

CROPS = Path(__file__).parents[1] / "parity" / "tokenizer" / "preprocess" / "crops.npz"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def pixels(processor: TokenFlowImageProcessor, images, **kwargs) -> torch.Tensor:
    return processor(images, return_tensors="pt", **kwargs).pixel_values


def test_values_are_those_of_the_formula_for_all_256_levels():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    processor = TokenFlowImageProcessor(size=16)
    got = pixels(processor, Image.fromarray(np.stack([levels] * 3, -1)))
    expected = (torch.from_numpy(levels).float() / 255 - 0.5) / 0.5
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[0, 0], expected, rtol=0, atol=1.2e-7)
    assert got.min() == -1
    assert got.max() == 1


@pytest.mark.parametrize("name", ["a", "b"])
def test_crop_mode_equals_the_golden_centre_crop(name):
    golden = np.load(CROPS)
    processor = TokenFlowImageProcessor(size=64)
    got = processor(
        Image.fromarray(golden[f"image_{name}"]), do_rescale=False, do_normalize=False
    ).pixel_values[0]
    np.testing.assert_array_equal(np.moveaxis(np.asarray(got), 0, -1), golden[f"center64_{name}"])


def test_pad_centres_on_mean_colour_and_squash_fills():
    red = Image.new("RGB", (40, 20), (255, 0, 0))
    processor = TokenFlowImageProcessor(size=40)
    raw = {"do_rescale": False, "do_normalize": False}
    padded = np.asarray(processor(red, resize_mode="pad", **raw).pixel_values[0])
    assert (padded[:, :9] == 127).all()
    assert (padded[0, 12:28] == 255).all()
    assert (padded[:, 31:] == 127).all()
    squashed = np.asarray(processor(red, resize_mode="squash", **raw).pixel_values[0])
    assert (squashed[0] == 255).all()
    assert (squashed[1:] == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 50_000), (50_000, 1), (3, 7), (301, 299)])
@pytest.mark.parametrize("mode", ["crop", "pad", "squash"])
def test_any_shape_gives_the_same_square(size, mode):
    got = pixels(TokenFlowImageProcessor(size=32, resize_mode=mode), picture(*size))
    assert got.shape == (1, 3, 32, 32)
    assert got.abs().max() <= 1


def test_transparent_parts_become_white_and_grey_becomes_rgb():
    processor = TokenFlowImageProcessor(size=8)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    grey = Image.new("L", (8, 8), 0)
    got = pixels(processor, [clear, grey])
    assert (got[0] == 1).all()
    assert (got[1] == -1).all()


def test_arrays_and_tensors_give_what_pictures_give():
    image = picture(50, 40)
    processor = TokenFlowImageProcessor(size=32)
    expected = pixels(processor, image)
    array = np.asarray(image)
    torch.testing.assert_close(pixels(processor, array), expected)
    torch.testing.assert_close(pixels(processor, torch.from_numpy(array.copy()).permute(2, 0, 1)), expected)


def test_postprocess_gives_back_the_picture():
    image = picture(32, 32)
    processor = TokenFlowImageProcessor(size=32)
    (back,) = processor.postprocess(pixels(processor, image))
    # 127.5 x + 128, truncated, is exact on the 8-bit grid (x = 1 is clamped from 255.5)
    np.testing.assert_array_equal(np.asarray(back), np.asarray(image))


def test_postprocess_clamps_truncates_and_takes_half_precision():
    values = torch.tensor([-3.0, -1.0, 0.0, 0.004, 1.0, 9.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    (image,) = TokenFlowImageProcessor().postprocess(values.bfloat16())
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]
    with pytest.raises(UserError, match=r"pixel_values must be \[B, 3, H, W\], got \[2, 4\]"):
        TokenFlowImageProcessor().postprocess(torch.zeros(2, 4))


def test_saving_and_loading_keeps_every_setting(tmp_path):
    TokenFlowImageProcessor(size=48, resize_mode="pad").save_pretrained(tmp_path)
    loaded = TokenFlowImageProcessor.from_pretrained(tmp_path)
    assert loaded.resize_mode == "pad"
    assert loaded.size.height == 48
    image = picture(30, 50)
    torch.testing.assert_close(
        pixels(loaded, image),
        pixels(TokenFlowImageProcessor(size=48, resize_mode="pad"), image),
        rtol=0,
        atol=0,
    )


def test_wrong_settings_name_the_value_and_the_choices():
    with pytest.raises(UserError, match="one of crop, pad, squash, got 'stretch'"):
        TokenFlowImageProcessor(resize_mode="stretch")
    with pytest.raises(UserError, match="equal height and width"):
        TokenFlowImageProcessor(size={"height": 8, "width": 16})
    with pytest.raises(UserError, match="got 'zoom'"):
        TokenFlowImageProcessor(size=8)(picture(9, 9), resize_mode="zoom")
