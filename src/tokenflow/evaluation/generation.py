"""Do generated pictures show what their prompts say? Measured with networks that the model never saw.

One picture is made for each row of a data set, from the row's own caption or class name, so that every
figure stands between two others: the real pictures of these rows, and the same pictures sent through the
tokenizer (the best that its tokens can do), are the upper bounds; chance, or somebody else's prompt, the
lower one.

None of the names is borrowed: the Frechet distance is one in EfficientNet's features, not FID, and the
similarity comes from a small CLIP-style teacher, not from OpenAI's CLIP.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from tokenflow.bundled import resolve
from tokenflow.data.loader import iterate_eval
from tokenflow.data.sources import Source
from tokenflow.errors import UserError
from tokenflow.evaluation import pictures, report
from tokenflow.evaluation.judges import Judges, frechet, hits, image_vectors, load_judges, pooled_features
from tokenflow.evaluation.options import GenerationEval
from tokenflow.evaluation.reconstruction import to_uint8, to_unit_range
from tokenflow.generation.sampler import SamplingSettings

if TYPE_CHECKING:
    from PIL import Image

    from tokenflow.tokenizer.modeling import TokenFlowModel
SHEET_ROWS = 12
GENERATED, TOKENIZER, REAL = "generated", "real, as tokens", "real"
SIMILARITY = "teacher similarity"
FRECHET = "efficientnet-lite0 Frechet distance"


@dataclass(frozen=True)
class Strategy:
    """How codes are drawn at each scale after the first: one top-k and one top-p for each pass (Sec. 3.3)."""

    top_k: tuple[int, ...]
    top_p: tuple[float, ...]

    def __str__(self) -> str:
        passes = len(self.top_k)
        return f"{passes} step{'s' if passes > 1 else ''}: {', '.join(map(str, self.top_k))}"


# The rows of Tab. 6, worst first; top-p 0 is off.
TABLE_6 = (
    Strategy((1200,), (0.8,)),
    Strategy((1200, 100), (0.8, 0.8)),
    Strategy((1200, 10), (0.8, 0.8)),
    Strategy((1200, 1), (0.8, 0.0)),
    Strategy((1200, 100, 1), (0.8, 0.8, 0.0)),
)
BEST = TABLE_6[-1]


@dataclass(frozen=True)
class Rows:
    """The rows of a data set that are generated anew.

    Attributes:
        prompts: N texts.
        pictures: the rows' own pictures, uint8 [N, 3, H, W].
        labels: int64 [N], None where the set has none.
    """

    prompts: list[str]
    pictures: Tensor
    labels: Tensor | None


# Prompts, their labels and seeds, and a strategy, to uint8 pictures [B, 3, H, W].
Generate = Callable[[list[str], Tensor | None, list[int], Strategy], Tensor]


def prompt_of(row: dict[str, Any], source: Any) -> str:
    """A row's first caption, else "a photo of a NAME" of its `label_name`.

    Raises:
        UserError: the row has neither.
    """
    captions = row.get("captions") or row.get("caption")
    if captions:
        return captions if isinstance(captions, str) else captions[0]
    if row.get("label_name"):
        return f"a photo of a {row['label_name']}"
    raise UserError(f"{source}: needs a column 'captions', 'caption' or 'label_name' to take prompts from")


def read_rows(source: Source, side: int, limit: int | None = None) -> tuple[Rows, dict[str, Any]]:
    """The rows of `source` with pictures of `side` pixels, and their part of the fingerprint."""
    images = iterate_eval(source, side, limit=limit)
    prompts, batches, labels = [], [], []
    for batch, rows in pictures.batched(images, 64, f"pictures of {source.split}"):
        batches.append(batch)
        prompts += [prompt_of(row, source) for row in rows]
        labels += [row.get("label") for row in rows]
    everything = torch.cat(batches)
    digest = hashlib.sha256(json.dumps([prompts, labels]).encode())
    digest.update(everything.numpy().tobytes())
    about = pictures.fingerprint(images, side)
    about["reference"] |= {"pictures": len(prompts), "sha256": digest.hexdigest()}
    known = all(isinstance(label, int) for label in labels)
    return Rows(prompts, everything, torch.tensor(labels) if known else None), about


def judge(shown: Tensor, rows: Rows, judges: Judges) -> tuple[dict[str, Tensor], Tensor | None]:
    """Figures of each picture by name, fp64 [N], and with a classifier its pooled features [N, 1280]."""
    figures: dict[str, Tensor] = {}
    features = None
    if judges.classifier is not None:
        features = pooled_features(judges.classifier, shown)
        if judges.scores is not None and rows.labels is not None:
            places = torch.searchsorted(judges.labels, rows.labels)
            figures |= hits(judges.scores(features), places)
    if judges.teacher is not None and judges.texts is not None:
        vectors = image_vectors(judges.teacher, shown)
        figures[SIMILARITY] = (vectors * judges.texts).sum(1).double()
    return figures, features


def measure(
    rows: Rows, shown: dict[str, Tensor], judges: Judges
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, float]]]:
    """Judge several sets of pictures of the same rows.

    Args:
        shown: uint8 pictures [N, 3, H, W] by name; the rows' own are added as "real".

    Returns:
        figure -> name -> a value a picture, fp64 [N]; and distance -> name -> number.
    """
    single: dict[str, dict[str, Tensor]] = {}
    distances: dict[str, float] = {}
    real_features = None
    for name, given in {REAL: rows.pictures, **shown}.items():
        figures, features = judge(given, rows, judges)
        for figure, values in figures.items():
            single.setdefault(figure, {})[name] = values
        if features is not None:
            real_features = features if real_features is None else real_features
            distances[name] = frechet(real_features, features)
    return single, {FRECHET: distances} if distances else {}


def lower_bounds(rows: Rows, shown: Tensor, judges: Judges) -> dict[str, dict[str, float]]:
    """What agreement by chance is, and the similarity of generated pictures to prompts of other rows."""
    bounds: dict[str, dict[str, float]] = {}
    classes = len(judges.labels)
    if judges.scores is not None and rows.labels is not None:
        bounds = {"top-1": {"chance": 1 / classes}, "top-5": {"chance": min(5, classes) / classes}}
    if judges.teacher is not None and judges.texts is not None and len(rows.prompts) > 1:
        products = image_vectors(judges.teacher, shown) @ judges.texts.T
        others = (products.sum() - products.trace()) / (products.numel() - len(products))
        bounds[SIMILARITY] = {"generated, prompts of other rows": float(others)}
    return bounds


def ablation_summary(single: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """Whether Tab. 6 holds: its order of one, two and three steps, how many of its pairs, and by how much.

    Args:
        single: figure -> strategy -> a value a picture; higher is better.

    Returns:
        for each figure: whether 3 > 2 > 1 steps (the best of Tab. 6 each), the share of the table's pairs in
        the paper's order, and the mean difference of three steps and one with its standard error, paired by
        prompt and seed.
    """
    one, two, three = str(TABLE_6[0]), str(TABLE_6[3]), str(TABLE_6[4])
    summary: dict[str, Any] = {}
    for figure, values in single.items():
        means = [float(values[str(strategy)].mean()) for strategy in TABLE_6]
        pairs = [low < high for i, low in enumerate(means) for high in means[i + 1 :]]
        difference = values[three] - values[one]
        error = difference.std() / len(difference) ** 0.5 if len(difference) > 1 else torch.tensor(0.0)
        summary[figure] = {
            "1 < 2 < 3 steps": bool(values[one].mean() < values[two].mean() < values[three].mean()),
            "pairs as in the paper": sum(pairs) / len(pairs),
            "3 steps - 1 step": float(difference.mean()),
            "standard error": float(error),
        }
    return summary


def generate_all(
    rows: Rows, generate: Generate, strategy: Strategy, seed: int = 0, batch_size: int = 16
) -> Tensor:
    """A picture for each row, uint8 [N, 3, H, W]; row i from the seed `seed + i`."""
    made = []
    with tqdm(total=len(rows.prompts), desc=str(strategy), unit="image", disable=None) as bar:
        for start in range(0, len(rows.prompts), batch_size):
            prompts = rows.prompts[start : start + batch_size]
            labels = None if rows.labels is None else rows.labels[start : start + batch_size]
            seeds = [seed + start + i for i in range(len(prompts))]
            made.append(generate(prompts, labels, seeds, strategy).cpu())
            bar.update(len(prompts))
    return torch.cat(made)


@torch.inference_mode()
def through_tokenizer(tokenizer: TokenFlowModel, shown: Tensor, batch_size: int = 16) -> Tensor:
    """uint8 pictures [N, 3, H, W] as the tokenizer gives them back."""
    rebuilt = []
    for batch in shown.split(batch_size):
        encoded = tokenizer.encode(to_unit_range(batch).to(tokenizer.device))
        rebuilt.append(to_uint8(tokenizer.decode_pixels(encoded.quantized)).cpu())
    return torch.cat(rebuilt)


def evaluate_generation(
    generate: Generate,
    tokenizer: TokenFlowModel,
    rows: Rows,
    judges: Judges,
    *,
    ablation: bool = False,
    seed: int = 0,
    batch_size: int = 16,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Make the pictures of all rows and judge them.

    Args:
        generate: makes the pictures of a batch.
        tokenizer: the one that decodes them; also rebuilds the real pictures.
        ablation: all strategies of Tab. 6, not only the best.

    Returns:
        the metrics; and what was shown to the judges, uint8 [N, 3, H, W] by name.
    """
    with pictures.eval_mode(tokenizer):
        shown = {TOKENIZER: through_tokenizer(tokenizer, rows.pictures, batch_size)}
    for strategy in TABLE_6 if ablation else (BEST,):
        shown[str(strategy)] = generate_all(rows, generate, strategy, seed, batch_size)
    single, distances = measure(rows, shown, judges)
    means = {figure: {n: float(v.mean()) for n, v in values.items()} for figure, values in single.items()}
    metrics: dict[str, Any] = {}
    for figure, values in (means | distances).items():
        metrics[figure] = {GENERATED: values[str(BEST)], TOKENIZER: values[TOKENIZER], REAL: values[REAL]}
    for figure, bounds in lower_bounds(rows, shown[str(BEST)], judges).items():
        metrics[figure] |= bounds
    if ablation:
        metrics["Tab. 6"] = {
            figure: {str(strategy): values[str(strategy)] for strategy in TABLE_6}
            for figure, values in (means | distances).items()
        }
        metrics["order of Tab. 6"] = ablation_summary(single)
    return metrics, shown


def sheet(rows: Rows, shown: dict[str, Tensor], count: int = SHEET_ROWS) -> Image.Image:
    """The first pictures of each set beside the real ones, a row a prompt."""
    from PIL import Image as Pillow

    from tokenflow.data.contact_sheet import contact_sheet

    columns = {REAL: rows.pictures} | shown
    lines = [
        [Pillow.fromarray(column[i].permute(1, 2, 0).numpy()) for column in columns.values()]
        for i in range(min(count, len(rows.prompts)))
    ]
    titles = ["as tokens" if name == TOKENIZER else name for name in columns]
    return contact_sheet(lines, rows.prompts[: len(lines)], titles, cell=max(128, rows.pictures.shape[-1]))


def load_generator(options: GenerationEval) -> tuple[torch.nn.Module, TokenFlowModel, Generate]:
    """The model that `options` names, its image tokenizer, and how the two make pictures.

    A text-to-image model draws from prompts, a class-conditional one (Fig. 6) from labels.

    Raises:
        UserError: it cannot be loaded.
    """
    from tokenflow.drawing import cuts_were_said, load_class_pipeline, load_pipeline
    from tokenflow.generation.class_conditional import TokenFlowClassToImageConfig
    from tokenflow.generation.pictures import model_kind

    if model_kind(resolve(options.model)) == TokenFlowClassToImageConfig.model_type:
        classes = load_class_pipeline(options.model, device=options.device)

        def from_labels(_: list[str], labels: Tensor | None, seeds: list[int], how: Strategy) -> Tensor:
            if labels is None:
                raise UserError(f"{options.data} has no labels; a class-conditional model draws from them")
            drawn = classes(
                labels.tolist(),
                seed=seeds,
                guidance_scale=options.guidance_scale,
                top_k=how.top_k,
                top_p=how.top_p,
                output_type="codes",
            )
            return decoded(classes.tokenizer, drawn.codes)

        return classes.model, classes.tokenizer, from_labels

    pipe = load_pipeline(options.model, device=options.device)

    def from_prompts(prompts: list[str], _: Tensor | None, seeds: list[int], how: Strategy) -> Tensor:
        with cuts_were_said():  # captions longer than the model reads are part of the task
            drawn = pipe(
                prompts,
                seed=seeds,
                guidance_scale=options.guidance_scale,
                top_k=how.top_k,
                top_p=how.top_p,
                output_type="codes",
            )
        return decoded(pipe.tokenizer, drawn.codes)

    return pipe.model, pipe.tokenizer, from_prompts


def decoded(tokenizer: TokenFlowModel, codes: Tensor) -> Tensor:
    """uint8 pictures [B, 3, H, W] of codes [B, L]; one by one, so that no pixel depends on the batch."""
    maps = (tokenizer.quantized_from_indices(row) for row in codes.split(1))
    return to_uint8(torch.cat([tokenizer.decode_pixels(x) for x in maps]))


def run(options: GenerationEval) -> report.Result:
    """What `tokenflow eval generation` does: load, draw, judge, write JSON and sheet where asked. Prints
    nothing but progress."""
    from tokenflow.codec import check_writable
    from tokenflow.data.images import save_image

    for path in (options.out, options.sheet):
        if path is not None:
            check_writable(path)
    SamplingSettings(options.guidance_scale)
    started = time.perf_counter()
    model, tokenizer, generate = load_generator(options)
    side, device = tokenizer.config.image_size, tokenizer.device
    rows, fingerprint = read_rows(Source(options.data, split=options.split), side, options.limit)
    judges = load_judges(options, rows.prompts, side, device)
    with torch.inference_mode():
        metrics, shown = evaluate_generation(
            generate,
            tokenizer,
            rows,
            judges,
            ablation=options.ablation,
            seed=options.seed,
            batch_size=options.batch_size,
        )
    name = f"{options.model}, guidance {options.guidance_scale:g}"
    about = report.model_fingerprint(torch.nn.ModuleList([model, tokenizer]), name)
    result = {
        "kind": "generation",
        "metrics": metrics,
        "fingerprint": fingerprint | judges.settings | {"seed": options.seed, "backend": device.type},
        "model": about,
        "sampling": {"guidance_scale": options.guidance_scale, "strategy": str(BEST)},
        "command": report.command_line(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    if options.out is not None:
        report.write(result, options.out)
    if options.sheet is not None:
        save_image(sheet(rows, shown), options.sheet, optimize=True)
    return result
