"""The demo as one picture: a row a photograph, from the original over its scales to the reconstruction; then
answers about the photographs, and pictures from text."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from tokenflow.data.images import save_image
from tokenflow.demo import Demonstration, Shown
from tokenflow.demo.answers import Answers
from tokenflow.demo.gallery import Gallery

CELL, GAP, MARGIN, HEADER, CAPTION, LINE = 128, 10, 24, 64, 26, 18
INK, GREY = (24, 28, 36), (110, 116, 128)
ANSWER_COLUMNS = 4  # a photograph and, in the width of three more, what was said about it


def write_sheet(found: Demonstration, path: Path) -> None:
    """Draw `found` and save it. Raises UserError where `path` cannot be written."""
    columns = 2 + len(found.scales)
    parts = [_photographs(found, columns)]
    if isinstance(found.answers, Answers):
        parts.append(_answers(found.answers, columns))
    if found.gallery is not None:
        parts.append(_gallery(found.gallery, columns))
    sheet = Image.new("RGB", (parts[0].width, sum(part.height for part in parts) + MARGIN), "white")
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    save_image(sheet, path, optimize=True)


def _part(columns: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A part of the sheet: what lies below its heading is so high."""
    width = 2 * MARGIN + columns * (CELL + GAP) + GAP  # one gap more sets the last two columns apart
    part = Image.new("RGB", (width, HEADER + height), "white")
    return part, ImageDraw.Draw(part)


def _photographs(found: Demonstration, columns: int) -> Image.Image:
    part, draw = _part(columns, len(found.shown) * (CELL + CAPTION + GAP))
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
            part.paste(picture.resize((CELL, CELL), resample), (_left(column, columns), top))
        draw.text((MARGIN, top + CELL + 5), _caption(shown), GREY, _font(14))
    return part


def _answers(answers: Answers, columns: int) -> Image.Image:
    """Each photograph with its questions and answers beside it; as many in a row as fit."""
    beside = max(1, columns // ANSWER_COLUMNS)
    width = (min(columns, ANSWER_COLUMNS) - 1) * (CELL + GAP) - 2 * GAP
    blocks = []
    for said in answers.answers:
        lines: list[tuple[str, tuple[int, int, int]]] = []
        for question, answer in zip(answers.questions, said, strict=True):
            lines += [(line, GREY) for line in _wrapped(question, width)]
            lines += [(line, INK) for line in _wrapped(answer, width)]
        blocks.append(lines)
    rows = [blocks[i : i + beside] for i in range(0, len(blocks), beside)]
    heights = [max(CELL, *(len(lines) * LINE for lines in row)) + CAPTION for row in rows]
    part, draw = _part(columns, sum(heights))
    _heading(draw, f"questions about the photographs, answered by {answers.model}")
    top = HEADER
    for i, (row, height) in enumerate(zip(rows, heights, strict=True)):
        for k, lines in enumerate(row):
            left = MARGIN + k * ANSWER_COLUMNS * (CELL + GAP)
            picture = ImageOps.pad(answers.pictures[i * beside + k], (CELL, CELL), color="white")
            part.paste(picture, (left, top))
            for n, (line, colour) in enumerate(lines):
                draw.text((left + CELL + 2 * GAP, top + n * LINE), line, colour, _font(14))
        top += height
    return part


def _gallery(gallery: Gallery, columns: int) -> Image.Image:
    drawn = gallery_rows(gallery, columns)
    part, draw = _part(columns, len(drawn) * (CELL + CAPTION + GAP))
    _heading(draw, f"pictures from text, drawn by {gallery.model}")
    for row, cells in enumerate(drawn):
        top = HEADER + row * (CELL + CAPTION + GAP)
        for column, (picture, caption) in cells.items():
            left = MARGIN + column * (CELL + GAP)
            part.paste(picture.resize((CELL, CELL), Image.Resampling.BICUBIC), (left, top))
            draw.text((left, top + CELL + 5), caption, GREY, _font(14))
    return part


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


def _heading(draw: ImageDraw.ImageDraw, text: str) -> None:
    draw.text((MARGIN, HEADER - 12), text, INK, _font(18), anchor="ls")


def _wrapped(text: str, width: int) -> list[str]:
    """The words of `text` in lines of at most so many pixels; a word that is longer has a line of its own."""
    lines: list[str] = []
    font = _font(14)
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _caption(shown: Shown) -> str:
    classes = ", ".join(name for name, _ in shown.nearest[:3])
    return f"{shown.name}   {shown.psnr:.1f} dB" + (f"   reads as: {classes}" if classes else "")


def _left(column: int, columns: int) -> int:
    return MARGIN + column * (CELL + GAP) + (GAP if column == columns - 1 else 0)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
