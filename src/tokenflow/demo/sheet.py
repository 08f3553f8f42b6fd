"""The demo as one picture: a row a photograph, from the original over its scales to the reconstruction."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tokenflow.data.images import save_image
from tokenflow.demo import Demonstration, Shown
from tokenflow.demo.gallery import Gallery

CELL, GAP, MARGIN, HEADER, CAPTION = 128, 10, 24, 64, 26
INK, GREY = (24, 28, 36), (110, 116, 128)


def write_sheet(found: Demonstration, path: Path) -> None:
    """Draw `found` and save it. Raises UserError where `path` cannot be written."""
    columns = 2 + len(found.scales)
    width = 2 * MARGIN + columns * (CELL + GAP) + GAP  # one gap more sets the last two columns apart
    height = HEADER + len(found.shown) * (CELL + CAPTION + GAP) + MARGIN
    drawn = None if found.gallery is None else gallery_rows(found.gallery, columns)
    if drawn is not None:
        height += HEADER + len(drawn) * (CELL + CAPTION + GAP)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    side = found.scales[-1]
    titles = ["original", *(_tokens_so_far(found.scales, k) for k in range(1, len(found.scales)))]
    titles += [f"all {found.token_count} tokens", f"the last {side} x {side} tokens"]
    for column, title in enumerate(titles):
        draw.text((_left(column, columns) + CELL / 2, HEADER - 12), title, INK, _font(14), anchor="ms")
    for row, shown in enumerate(found.shown):
        top = HEADER + row * (CELL + CAPTION + GAP)
        pictures = [shown.original, *shown.stages, token_map(found, shown, len(found.scales) - 1)]
        for column, picture in enumerate(pictures):
            resample = Image.Resampling.NEAREST if column == columns - 1 else Image.Resampling.BICUBIC
            sheet.paste(picture.resize((CELL, CELL), resample), (_left(column, columns), top))
        draw.text((MARGIN, top + CELL + 5), _caption(shown), GREY, _font(14))
    if found.gallery is not None and drawn is not None:
        top = HEADER + len(found.shown) * (CELL + CAPTION + GAP)
        title = f"pictures from text, drawn by {found.gallery.model}"
        draw.text((MARGIN, top + HEADER - 12), title, INK, _font(18), anchor="ls")
        for row, cells in enumerate(drawn):
            below = top + HEADER + row * (CELL + CAPTION + GAP)
            for column, (picture, caption) in cells.items():
                left = MARGIN + column * (CELL + GAP)
                sheet.paste(picture.resize((CELL, CELL), Image.Resampling.BICUBIC), (left, below))
                draw.text((left, below + CELL + 5), caption, GREY, _font(14))
    save_image(sheet, path, optimize=True)


def gallery_rows(gallery: Gallery, columns: int) -> list[dict[int, tuple[Image.Image, str]]]:
    """Where the gallery's pictures and their captions go: a row of the growing picture, then the prompts, as
    many beside each other as fit; a dict of column -> picture and caption a row."""
    rows: list[dict[int, tuple[Image.Image, str]]] = [
        {k: (picture, _tokens_so_far(gallery.scales, k + 1)) for k, picture in enumerate(gallery.stages)}
    ]
    width = len(gallery.seeds)
    beside = max(1, columns // width)
    for place, (prompt, pictures) in enumerate(zip(gallery.prompts, gallery.pictures, strict=True)):
        if place % beside == 0:
            rows.append({})
        for i, picture in enumerate(pictures):
            rows[-1][place % beside * width + i] = (picture, "" if i else prompt)
    return rows


def token_map(found: Demonstration, shown: Shown, scale: int) -> Image.Image:
    """The tokens of one scale, a pixel each, in the colours of their codes."""
    side = found.scales[scale]
    colours = found.colours[shown.tokens[scale]].reshape(side, side, 3)
    return Image.fromarray(colours.numpy())


def _tokens_so_far(scales: list[int], k: int) -> str:
    count = sum(side * side for side in scales[:k])
    return f"{count} token{'s' if count > 1 else ''}"


def _caption(shown: Shown) -> str:
    classes = ", ".join(name for name, _ in shown.nearest[:3])
    return f"{shown.name}   {shown.psnr:.1f} dB" + (f"   reads as: {classes}" if classes else "")


def _left(column: int, columns: int) -> int:
    return MARGIN + column * (CELL + GAP) + (GAP if column == columns - 1 else 0)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
