"""Many pictures on one white sheet, with a title over each column and a caption under each row."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP, LINE = 8, 22
INK, GREY = (24, 28, 36), (110, 116, 128)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[str] = (),
    titles: Sequence[str] = (),
    cell: int | None = None,
) -> Image.Image:
    """A sheet of `rows`, which may differ in length.

    Args:
        captions: one line a row, cut to the width of the sheet; none at all leaves no room for them.
        titles: one line a column, cut to the width of a picture.
        cell: side of a picture on the sheet, pixels; by default the width of the first one.
    """
    cell = cell or rows[0][0].width
    step = cell + GAP + (LINE if captions else 0)
    top = GAP + (LINE if titles else 0)
    width = GAP + max(map(len, rows)) * (cell + GAP)
    sheet = Image.new("RGB", (width, top + len(rows) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((GAP + column * (cell + GAP), GAP), _cut(draw, title, cell), INK, _font())
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            place = (GAP + column * (cell + GAP), top + row * step)
            fitting = picture.size == (cell, cell)
            sheet.paste(picture if fitting else picture.resize((cell, cell), Image.Resampling.BICUBIC), place)
    for row, caption in enumerate(captions):
        line = _cut(draw, caption, width - 2 * GAP)
        draw.text((GAP, top + row * step + cell + 3), line, GREY, _font())
    return sheet


def _cut(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """As many characters of one line as fit in `width` pixels."""
    text = " ".join(text.split())[:400]  # measuring more would only take time
    if draw.textlength(text, _font()) <= width:
        return text
    while text and draw.textlength(text + "...", _font()) > width:
        text = text[:-1]
    return text + "..."


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(14)
