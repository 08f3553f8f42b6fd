"""The demo as one self-contained HTML page: pictures are embedded, nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import io
import math
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from tokenflow.demo import SAMPLES, Demonstration, Shown
from tokenflow.demo.answers import BUNDLED, Answers
from tokenflow.demo.gallery import Gallery
from tokenflow.files import atomic_write

TEMPLATE = Path(__file__).parent / "page.html"


def write_page(found: Demonstration, path: Path) -> None:
    """Fill the template with `found`. Raises UserError where `path` cannot be written."""
    bits = math.ceil(math.log2(found.codebook_size))
    token_bytes = math.ceil(found.token_count * bits / 8)
    pixel_bytes = 3 * found.image_size**2
    known = {sample.stem for sample in SAMPLES.glob("*.jpg")}
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        model=escape(found.model),
        side=found.image_size,
        tokens=found.token_count,
        codes=f"{found.codebook_size:,}",
        bits=bits,
        token_bytes=f"{token_bytes:,}",
        pixel_bytes=f"{pixel_bytes:,}",
        ratio=round(pixel_bytes / token_bytes),
        scales=len(found.scales),
        grids=", ".join(f"{side} &times; {side}" for side in found.scales),
        grid=found.scales[-1],
        milliseconds=f"{1000 * found.seconds:,.0f}",
        psnr=f"{sum(shown.psnr for shown in found.shown) / len(found.shown):.1f}",
        classes=found.class_count,
        meanings="" if found.two_meanings else "hidden",
        semantic="" if found.class_count else "hidden",
        cards="\n".join(_card(found, shown) for shown in found.shown),
        answers="" if found.answers is None else _answers(found.answers),
        gallery="" if found.gallery is None else _gallery(found.gallery),
        credits="" if {shown.name for shown in found.shown} <= known else "hidden",
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _card(found: Demonstration, shown: Shown) -> str:
    steps = []
    for k, picture in enumerate(shown.stages):
        side = found.scales[k]
        count = sum(side * side for side in found.scales[: k + 1])
        caption = f"{'+ ' if k else ''}{side} &times; {side}"
        steps.append(
            f"<figure>{_token_grid(found, shown, k)}{_img(picture, f'{shown.name} from {count} tokens')}"
            f"<figcaption>{caption}<br><b>{count}</b> token{'s' if count > 1 else ''}</figcaption></figure>"
        )
    classes = "".join(
        f"<li><span>{escape(name)}</span><meter min='0' max='1' value='{max(cosine, 0):.3f}'></meter>"
        f"<b>{cosine:.2f}</b></li>"
        for name, cosine in shown.nearest
    )
    reads = (
        f"<div class='reads'><h3>What the tokens say it is</h3><ol>{classes}</ol></div>" if classes else ""
    )
    title = escape(shown.name.replace("-", " ").replace("_", " "))
    return f"""<article>
<h2>{title}</h2>
<div class="pair">
<figure>{_img(shown.original, f"{title}, original")}<figcaption>the photograph</figcaption></figure>
<figure>{_img(shown.stages[-1], f"{title}, rebuilt")}<figcaption>rebuilt from {found.token_count} tokens
({shown.psnr:.1f} dB)</figcaption></figure>
{reads}
</div>
<div class="steps">{"".join(steps)}</div>
</article>"""


def _answers(answers: Answers | str) -> str:
    if isinstance(answers, str):
        missing = f"<p><code>{BUNDLED}</code> answers questions about pictures. {escape(answers)}</p>"
        return f"<section>\n<h2>Questions and answers</h2>\n{missing}\n</section>"
    cards = []
    for name, picture, said in zip(answers.names, answers.pictures, answers.answers, strict=True):
        turns = "".join(
            f"<dt>{escape(question)}</dt><dd>{escape(answer) or '&hellip;'}</dd>"
            for question, answer in zip(answers.questions, said, strict=True)
        )
        title = escape(name.replace("-", " ").replace("_", " "))
        cards.append(f"<article><figure>{_img(picture, title)}</figure><dl>{turns}</dl></article>")
    return f"""<section>
<h2>Questions and answers</h2>
<p>In the model <code>{escape(answers.model)}</code> a small language model reads the vectors of a
photograph's tokens. Each question is asked by itself; shown is its likeliest answer, right or wrong, and none
is left out. One took {answers.seconds:.1f} s on this machine. <code>tokenflow ask photo.jpg
"{escape(answers.questions[0])}"</code> asks about your own.</p>
<div class="answers">
{"".join(cards)}
</div>
</section>"""


def _gallery(gallery: Gallery) -> str:
    rows = []
    for prompt, pictures in zip(gallery.prompts, gallery.pictures, strict=True):
        figures = "".join(
            f"<figure>{_img(picture, f'{prompt}, seed {seed}')}</figure>"
            for seed, picture in zip(gallery.seeds, pictures, strict=True)
        )
        rows.append(f"<div><h3>{escape(prompt)}</h3><div class='seeds'>{figures}</div></div>")
    steps, count = [], 0
    for side, picture in zip(gallery.scales, gallery.stages, strict=True):
        count += side * side
        steps.append(
            f"<figure>{_img(picture, f'{gallery.prompts[0]}, first {count} tokens')}"
            f"<figcaption><b>{count}</b> token{'s' if count > 1 else ''}</figcaption></figure>"
        )
    return f"""<section>
<h2>Pictures from text</h2>
<p>The model <code>{escape(gallery.model)}</code> reads a line of text and writes the tokens of a picture,
one grid after the other; the same decoder turns them into pixels. Each row shows one prompt from
{len(gallery.seeds)} seeds, nothing left out; a picture took {gallery.seconds:.1f} s on this machine.
<code>tokenflow generate "{escape(gallery.prompts[0])}" -o pictures</code> draws more.</p>
<article class="gallery">{"".join(rows)}</article>
<article>
<h2>{escape(gallery.prompts[0])}, grid by grid</h2>
<div class="growing">{"".join(steps)}</div>
</article>
</section>"""


def _token_grid(found: Demonstration, shown: Shown, scale: int) -> str:
    """The tokens of one scale as coloured squares; the pointer over one shows its number."""
    side = found.scales[scale]
    squares = []
    for place, token in enumerate(shown.tokens[scale]):
        y, x = divmod(place, side)
        colour = "#{:02x}{:02x}{:02x}".format(*found.colours[token].tolist())
        squares.append(f"<path fill='{colour}' d='M{x} {y}h1v1h-1z'><title>{token}</title></path>")
    return (
        f"<svg viewBox='0 0 {side} {side}' role='img' aria-label='tokens of scale {side}'>"
        f"{''.join(squares)}</svg>"
    )


def _img(picture: Image.Image, text: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{escape(text)}' src='data:image/png;base64,{data}'>"
