"""A start for the projector without the language model: pictures are pulled to the words said of them.

This is not in the paper, whose first stage shows millions of pictures to the language model. Features of a
random projector are noise to it: on a few CPU cores it learns to answer without looking long before the
projector makes sense. Its word embeddings tell where features should lie, and a step that needs nothing else
costs a small part of one through the language model.

What is notable:
- a picture's projected features, averaged over their places, should be the mean embedding of the words of the
  first answer, both seen from the mean of all words; rare words count more (idf);
- the loss is contrastive over the batch, both ways, where equal answers share their target. A squared
  distance and the lengths of the single features keep them where the language model knows words to be;
- lengths are in units of a typical word's, so that the weights of the losses fit any language model;
- only the projector learns. It is kept in `words.safetensors`, which a run that is started again takes.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from tokenflow.data.conversations import ConversationError
from tokenflow.data.images import ImageError
from tokenflow.errors import UserError
from tokenflow.files import atomic_write
from tokenflow.training.progress import LogFile
from tokenflow.training.tower_cache import CachedTower, TowerCache
from tokenflow.training.understanding_data import ConversationRows
from tokenflow.training.understanding_models import Chat
from tokenflow.training.understanding_recipe import UnderstandingRecipe

_WARMUP = 50  # steps
_DISTANCE, _LENGTH = 1.7, 0.3  # weights beside the contrastive loss
_EQUAL = 0.99  # cosine of two targets that are one
_HELD_OUT = 1000  # rows at most that are measured on
_SEEN_FIRST = 256  # pictures that mean and deviation of the features are taken from
_AT_ONCE = 50  # pictures measured at a time
_NAME = 3  # words at most of an answer that is a name


def word_rows(rows: ConversationRows, recipe: UnderstandingRecipe) -> np.ndarray:
    """The places that `align_to_words` reads: as many with pictures as its steps have use for, at random."""
    if recipe.stage != "align" or recipe.init_from is not None:
        return np.zeros(0, dtype=np.int64)
    shuffled = np.random.default_rng(recipe.seed).permutation(np.flatnonzero(rows.pictured))
    return shuffled[: recipe.words.steps * recipe.words.batch_size]


def align_to_words(
    chat: Chat, rows: ConversationRows, places: np.ndarray, recipe: UnderstandingRecipe, device: torch.device
) -> dict[str, float]:
    """Train the projector on the words of answers, or take it from the stage's folder if it was trained.

    Args:
        chat: its projector is changed; the rest stays.
        places: of the rows to learn from, in random order; one in twenty is held out. Rows without an answer,
            and with anything but one usable picture, are left out.
        device: where to compute; the model is on the CPU before and after.

    Returns:
        What a line of log.jsonl says: `word_loss` of the last step; `word_top1` and `word_top5`, how often
        the name of a held-out picture is the nearest, or among the nearest five, of all `word_names` names.
        Nothing if it was trained before.

    Raises:
        UserError: no row to learn from; a place that cannot be written to.
    """
    folder, made_by = Path(recipe.folder), _made_by(recipe)
    file = folder / "words.safetensors"
    if _maker(file) == made_by:
        chat.model.model.multi_modal_projector.load_state_dict(load_file(file))
        return {}
    aligner = WordAligner(chat, *_pictures_and_answers(chat, rows, places), recipe, device)
    figures = aligner.learn() | aligner.measure()
    chat.model.to("cpu")  # type: ignore[arg-type]
    with atomic_write(file) as temporary:
        weights = chat.model.model.multi_modal_projector.state_dict()
        save_file(weights, temporary, metadata={"made_by": made_by})
    LogFile(folder / "log.jsonl", 0).write({"step": 0, **figures})
    return figures


class WordAligner:
    """Pictures, answers, and a projector between them.

    Args:
        entries: a picture each, as `CachedTower` takes them.
        answers: what is said of it.

    Attributes:
        mean: `[D]`, the mean embedding of the words that occur in answers.
        length: their mean distance from it.
        center, spread: `[F]`, of the tower's features while learning. The hidden states of some vision models
            are ten times as large as a codebook's vectors: one learning rate would not fit both.
    """

    def __init__(
        self,
        chat: Chat,
        entries: Sequence[Tensor],
        answers: Sequence[str],
        recipe: UnderstandingRecipe,
        device: torch.device,
    ):
        self.entries, self.answers, self.recipe, self.device = entries, answers, recipe, device
        chat.model.to(device)  # type: ignore[arg-type]
        self.projector: Any = chat.model.model.multi_modal_projector
        self.tower = CachedTower(chat.model.model.vision_tower, chat.model.config)
        held_out = min(_HELD_OUT, len(answers) // 20)
        self.held_out, self.learned = np.split(np.arange(len(answers)), [held_out])

        texts = [f" {answer}" for answer in answers]  # as within a sentence
        encoded = chat.processor.tokenizer(texts, add_special_tokens=False).input_ids
        used, words = np.unique(np.concatenate(encoded), return_inverse=True)
        self.words = np.split(words, np.cumsum([len(ids) for ids in encoded])[:-1])
        found_in = np.bincount(np.concatenate([np.unique(ids) for ids in self.words]))
        idf = np.log(len(answers) / (found_in + 1)).clip(min=0)
        self.idf = torch.from_numpy(idf).float().to(device)
        with torch.no_grad():
            embed: Any = chat.model.get_input_embeddings()
            table = embed(torch.from_numpy(used).to(device)).float()
        self.mean = table.mean(0)
        self.length = (table - self.mean).norm(dim=1).mean()
        self.table = (table - self.mean) / self.length

    def targets(self, places: Sequence[int] | np.ndarray) -> Tensor:
        """`[B, D]`: means of the answers' words, weighted by idf."""
        chosen = [torch.from_numpy(self.words[place]) for place in places]
        starts = torch.tensor([0, *(len(words) for words in chosen)])[:-1].cumsum(0).to(self.device)
        words = torch.cat(chosen).to(self.device)
        weighted = torch.cat([self.table, torch.ones_like(self.table[:, :1])], dim=1) * self.idf[:, None]
        summed = F.embedding_bag(words, weighted, starts, mode="sum")
        return summed[:, :-1] / summed[:, -1:].clamp(min=1e-6)

    def features(self, places: Sequence[int] | np.ndarray) -> Tensor:
        """`[B, N, D]`: what the language model would be given of the pictures, seen from the words' mean."""
        entries = torch.stack([self.entries[place] for place in places]).to(self.device)
        half = self.recipe.mixed_precision == "bf16"
        seen = (self.tower.look(entries).float() - self.center) / self.spread
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            projected = self.projector(seen)
        return (projected.float() - self.mean) / self.length

    @torch.no_grad()
    def standardize(self) -> None:
        """Show the projector every channel with mean 0 and deviation 1, until `fold`."""
        entries = torch.stack([self.entries[place] for place in self.learned[:_SEEN_FIRST]]).to(self.device)
        channels = self.tower.look(entries).float().flatten(0, 1)
        self.center, deviation = channels.mean(0), channels.std(0)
        self.spread = deviation.clamp(min=1e-3 * float(deviation.max()) + 1e-12)

    @torch.no_grad()
    def fold(self) -> None:
        """Have the projector's first layer do what `standardize` did: it takes the features as they are."""
        layer = self.projector.linear_1
        layer.weight /= self.spread
        layer.bias -= layer.weight @ self.center
        self.center, self.spread = torch.zeros_like(self.center), torch.ones_like(self.spread)

    def learn(self) -> dict[str, float]:
        """Train the projector; returns the last loss."""
        r, lots = self.recipe.words, np.random.default_rng(self.recipe.seed)
        self.standardize()
        with torch.no_grad():
            self.projector.linear_2.bias.copy_(self.mean)
        scale = nn.Parameter(torch.tensor(math.log(10.0), device=self.device))
        groups: list[dict[str, Any]] = [
            {"params": list(self.projector.parameters())},
            {"params": [scale], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=r.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min(1, (s + 1) / _WARMUP) * (1 + math.cos(math.pi * s / r.steps)) / 2
        )
        bar = tqdm(range(r.steps), desc="pictures to words", unit="step", mininterval=1.0, dynamic_ncols=True)
        for step in bar:
            batch = lots.choice(self.learned, r.batch_size)
            loss = alignment_loss(self.features(batch), self.targets(batch), scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % self.recipe.log_every == 0:
                bar.set_postfix(loss=f"{loss.item():.3g}", refresh=False)
        self.fold()
        return {"word_loss": loss.item()}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """How often held-out pictures find their names; nothing where none of them has one."""
        first = {answer: place for place, answer in reversed(list(enumerate(self.answers)))}
        names = [answer for answer in first if len(answer.split()) <= _NAME]
        number = {name: i for i, name in enumerate(names)}
        asked = [place for place in self.held_out if self.answers[place] in number]
        if not asked:
            return {}
        right = torch.tensor([number[self.answers[place]] for place in asked], device=self.device)
        parts = [asked[start : start + _AT_ONCE] for start in range(0, len(asked), _AT_ONCE)]
        means = torch.cat([self.features(part).mean(1) for part in parts])
        similar = means @ F.normalize(self.targets([first[name] for name in names]), dim=-1).T
        hits = similar.topk(min(5, len(names))).indices == right[:, None]
        top1, top5 = hits[:, 0].float().mean().item(), hits.any(1).float().mean().item()
        return {"word_top1": top1, "word_top5": top5, "word_names": len(names)}


def alignment_loss(features: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """Of features `[B, N, D]` and targets `[B, D]`; `scale` is the logarithm of the logits' factor."""
    means, directions = features.mean(1), F.normalize(targets, dim=-1)
    logits = scale.exp().clamp(max=100.0) * F.normalize(means, dim=-1) @ directions.T
    equal = (directions @ directions.T > _EQUAL).float().fill_diagonal_(1.0)
    shared = equal / equal.sum(1, keepdim=True)
    contrast = (F.cross_entropy(logits, shared) + F.cross_entropy(logits.T, shared)) / 2
    distance = (means - targets).square().sum(-1).mean()
    length = (features.norm(dim=-1) - 1).square().mean()
    return contrast + _DISTANCE * distance + _LENGTH * length


def _pictures_and_answers(
    chat: Chat, rows: ConversationRows, places: np.ndarray
) -> tuple[list[Tensor], list[str]]:
    """The tower's entries, and first answers without their stops, of the rows with one picture."""
    entries, answers = [], []
    with tempfile.TemporaryDirectory() as folder:
        cache = rows.pictures
        if not isinstance(cache, TowerCache):  # the user keeps none, yet no picture needs two looks
            cache = TowerCache(folder, chat.model, chat.processor)
            cache.encode(rows.data, [(int(rows.sources[place]), int(rows.rows[place])) for place in places])
        for place in places:
            source, row = int(rows.sources[place]), int(rows.rows[place])
            try:
                pictures = cache(source, row)
                messages = rows.data[source].messages(row, len(pictures))
            except (ConversationError, ImageError):  # named when the language model comes to it
                continue
            answer = next((m.text for m in messages if m.role == "assistant"), "").strip().rstrip(".")
            if len(pictures) == 1 and answer:
                entries.append(pictures[0])
                answers.append(answer)
    if not entries:
        raise UserError("no conversation has one picture and an answer with words: set --words.steps 0")
    return entries, answers


def _made_by(recipe: UnderstandingRecipe) -> str:
    """What the projector follows from, as `words.safetensors` says it."""
    data = [recipe.align.sources, recipe.align.image_folder, recipe.align.resize_mode, recipe.seed]
    return json.dumps([asdict(recipe.words), asdict(recipe.model), *data])


def _maker(file: Path) -> str | None:
    try:
        with safe_open(file, "pt") as tensors:
            return (tensors.metadata() or {}).get("made_by")
    except (OSError, SafetensorError):  # none, or a damaged one
        return None
