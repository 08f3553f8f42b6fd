from __future__ import annotations

import errno
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tokenflow.data.images import ImageError, read_image, save_image
from tokenflow.errors import UserError


@pytest.fixture
def photo():
    """A smooth RGB picture, 48 wide and 32 high."""
    y, x = np.mgrid[0:32, 0:48]
    return Image.fromarray(np.stack([x * 5, y * 7, (x + y) * 3], axis=-1).astype(np.uint8))


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def assert_one_line(caught, *words):
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# --- what must work -------------------------------------------------------------------------------


def test_path_bytes_file_and_pil_give_the_same(photo, tmp_path):
    path = tmp_path / "photo.png"
    photo.save(path)
    expected = np.asarray(photo)
    with open(path, "rb") as file:
        for source in (path, str(path), path.read_bytes(), file, photo):
            image = read_image(source)
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), expected)


def test_a_pil_image_is_left_untouched(photo):
    result = read_image(photo)
    result.putpixel((0, 0), (1, 2, 3))
    assert photo.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM"])
def test_formats(photo, kind):
    image = read_image(encoded(photo, format=kind))
    assert image.mode == "RGB"
    assert image.size == (48, 32)


def test_one_pixel():
    assert read_image(encoded(Image.new("RGB", (1, 1), (9, 8, 7)), format="PNG")).getpixel((0, 0)) == (
        9,
        8,
        7,
    )


def test_cmyk_jpeg(photo):
    image = read_image(encoded(photo.convert("CMYK"), format="JPEG", quality=95))
    difference = np.asarray(image).astype(int) - np.asarray(photo)
    assert image.mode == "RGB"
    assert np.abs(difference).mean() < 4


def test_palette(photo):
    image = read_image(encoded(photo.quantize(64), format="PNG"))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(photo.quantize(64).convert("RGB")))


def test_palette_with_transparency_is_composited_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    result = read_image(encoded(image, format="PNG", transparency=1))
    assert [result.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


def test_alpha_is_composited_on_white():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)])
    result = read_image(encoded(image, format="PNG"))
    assert [result.getpixel((x, 0)) for x in range(3)] == [(255, 0, 0), (255, 255, 255), (204, 204, 204)]


def test_grey_with_alpha():
    image = Image.new("LA", (2, 1))
    image.putdata([(40, 255), (40, 0)])
    result = read_image(encoded(image, format="PNG"))
    assert [result.getpixel((x, 0)) for x in range(2)] == [(40, 40, 40), (255, 255, 255)]


def test_rgb_with_a_transparent_colour():
    image = Image.new("RGB", (2, 1))
    image.putdata([(1, 2, 3), (4, 5, 6)])
    result = read_image(encoded(image, format="PNG", transparency=(4, 5, 6)))
    assert [result.getpixel((x, 0)) for x in range(2)] == [(1, 2, 3), (255, 255, 255)]


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_alpha(mode):
    straight = Image.new(mode.upper(), (1, 1), (0,) * (len(mode) - 1) + (51,))
    assert read_image(straight.convert(mode)).getpixel((0, 0)) == (204, 204, 204)


def test_one_bit():
    image = Image.new("1", (2, 1))
    image.putdata([0, 255])
    result = read_image(encoded(image, format="PNG"))
    assert [result.getpixel((x, 0)) for x in range(2)] == [(0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    grey = np.array([[0, 255, 256, 257, 32896, 65535]], dtype=np.uint16)
    result = np.asarray(read_image(encoded(Image.fromarray(grey), format=kind)))
    np.testing.assert_array_equal(result[0, :, 0], [0, 1, 1, 1, 128, 255])
    np.testing.assert_array_equal(result[..., 0], result[..., 2])


def test_16_bit_grey_with_a_transparent_value(packs):
    grey = Image.fromarray(np.array([[0, 1000, 65535]], dtype=np.uint16))
    data = encoded(grey, format="PNG")
    end_of_header = 8 + 25
    transparent = packs.png_chunk(b"tRNS", struct.pack(">H", 1000))
    result = np.asarray(read_image(data[:end_of_header] + transparent + data[end_of_header:]))
    np.testing.assert_array_equal(result[0, :, 0], [0, 255, 255])


def test_16_bit_rgb_png(packs):
    rows = b"".join(b"\0" + struct.pack(">3H", 0xFFFF, 0x8080, 0x0101) for _ in range(1))
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + packs.png_chunk(b"IHDR", header)
        + packs.png_chunk(b"IDAT", zlib.compress(rows))
    )
    assert read_image(data + packs.png_chunk(b"IEND", b"")).getpixel((0, 0)) == (255, 128, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_undone(photo, orientation, kind):
    inverse = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = photo if inverse is None else photo.transpose(inverse)
    exif = Image.Exif()
    exif[274] = orientation
    image = read_image(encoded(stored, format=kind, exif=exif, quality=98))
    assert image.size == photo.size
    assert np.abs(np.asarray(image).astype(int) - np.asarray(photo)).mean() < 5


def test_damaged_exif_is_no_reason_to_refuse(photo):
    image = read_image(encoded(photo, format="JPEG", exif=b"Exif\0\0rubbish rubbish"))
    assert image.size == photo.size


# --- what must be refused -------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / "none.jpg")
    assert_one_line(caught, "none.jpg", "no such file")


def test_folder(tmp_path):
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path)
    assert_one_line(caught, str(tmp_path), "folder")


@pytest.mark.parametrize("content", [b"", b"hello, I am a text\n" * 50, b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_not_an_image(tmp_path, content):
    path = tmp_path / "note.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert_one_line(caught, "note.jpg", "not an image")


def test_empty_bytes_are_named():
    with pytest.raises(ImageError, match="cannot read image row 3: it is empty"):
        read_image(b"", name="row 3")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated(photo, tmp_path, kind, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format=kind)
    path = tmp_path / "cut.bin"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert_one_line(caught, "cut.bin")


def test_header_bomb_is_refused_before_decoding(packs, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(packs.png_of_claimed_size(50_000, 50_000))
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert_one_line(caught, "bomb.png", "pixels")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_size_that_pillow_only_warns_about_is_refused(packs):
    with pytest.raises(ImageError, match="10000 x 12000 pixels"):
        read_image(packs.png_of_claimed_size(10_000, 12_000))


def test_own_cap(photo):
    read_image(photo, max_pixels=48 * 32)
    with pytest.raises(ImageError, match="48 x 32"):
        read_image(photo, max_pixels=48 * 32 - 1)


def test_text_bomb_in_a_png(photo):
    notes = PngImagePlugin.PngInfo()
    notes.add_text("k", "a" * (80 << 20), zip=True)
    with pytest.raises(ImageError):
        read_image(encoded(photo, format="PNG", pnginfo=notes))


def test_float_pixels():
    with pytest.raises(ImageError, match="floats"):
        read_image(encoded(Image.new("F", (4, 4)), format="TIFF"))


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_give_an_image_or_an_image_error(photo, seed):
    rng = np.random.default_rng(seed)
    kind = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "ICO"][seed % 8]
    data = np.frombuffer(encoded(photo, format=kind), np.uint8).copy()
    where = rng.integers(0, len(data), 12)
    data[where] = rng.integers(0, 256, 12)
    try:
        outcome = read_image(data.tobytes()).mode
    except ImageError as error:
        outcome = str(error)
    assert outcome == "RGB" or (outcome.startswith("cannot read image") and "\n" not in outcome)


# --- saving ---------------------------------------------------------------------------------------


def test_save_and_read_back(photo, tmp_path):
    save_image(photo, tmp_path / "new" / "photo.png")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "new" / "photo.png")), np.asarray(photo))


def test_save_with_unknown_suffix(photo, tmp_path):
    with pytest.raises(UserError, match=r"'\.xyz'"):
        save_image(photo, tmp_path / "photo.xyz")


def test_save_on_a_full_disk_leaves_nothing(photo, tmp_path, monkeypatch):
    def full(self, path, **options):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="no space left"):
        save_image(photo, tmp_path / "photo.png")
    assert os.listdir(tmp_path) == []
