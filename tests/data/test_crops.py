from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokenflow.data.crops import center_crop, random_crop, random_flip
from tokenflow.data.images import ImageError

GOLDEN = Path(__file__).parents[1] / "parity" / "tokenizer" / "preprocess" / "crops.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("case", ["a", "b"])
def test_center_crop_equals_the_released_one(golden, case):
    crop = center_crop(Image.fromarray(golden[f"image_{case}"]), 64)
    np.testing.assert_array_equal(np.asarray(crop), golden[f"center64_{case}"])


class RecordingRandom(random.Random):
    """Keeps what `randrange` gave, to compare the draws themselves."""

    def __init__(self, seed):
        super().__init__(seed)
        self.draws = []

    def randrange(self, *args):
        self.draws.append(super().randrange(*args))
        return self.draws[-1]


@pytest.mark.parametrize("case", ["a", "b"])
def test_random_crop_equals_the_released_one(golden, case):
    rng = RecordingRandom(7)
    crop = random_crop(Image.fromarray(golden[f"image_{case}"]), 64, rng)
    assert rng.draws == golden[f"random64_seed7_draws_{case}"].tolist()
    np.testing.assert_array_equal(np.asarray(crop), golden[f"random64_seed7_{case}"])


sides = st.integers(1, 150)


@given(width=sides, height=sides, size=st.integers(1, 48), seed=st.integers(0, 2**32))
def test_every_crop_has_the_size_and_stays_inside(width, height, size, seed):
    image = Image.new("RGB", (width, height), (200, 100, 50))
    for crop in (center_crop(image, size), random_crop(image, size, random.Random(seed))):
        assert crop.size == (size, size)
        # Pillow fills what lies outside with black, so a plain picture must stay plain.
        assert crop.getcolors() == [(size * size, (200, 100, 50))]


@given(width=sides, height=sides, size=st.integers(1, 48), seed=st.integers(0, 2**32))
def test_random_crop_shows_at_least_four_fifths(width, height, size, seed):
    rng = RecordingRandom(seed)
    random_crop(Image.new("RGB", (width, height)), size, rng)
    assert size <= rng.draws[0] <= int(np.ceil(size / 0.8))


def test_exact_size_is_left_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(center_crop(Image.fromarray(pixels), 32)), pixels)


def test_flip_mirrors_about_half_of_the_time():
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    image, rng = Image.fromarray(pixels), random.Random(0)
    flipped = 0
    for _ in range(200):
        result = np.asarray(random_flip(image, rng))
        if not np.array_equal(result, pixels):
            np.testing.assert_array_equal(result, pixels[:, ::-1])
            flipped += 1
    assert 70 < flipped < 130


@pytest.mark.parametrize(
    "crop", [center_crop, lambda image, size: random_crop(image, size, random.Random(0))]
)
def test_absurdly_elongated_image_is_refused(crop):
    with pytest.raises(ImageError, match="too elongated"):
        crop(Image.new("RGB", (60_000, 1)), 64)
