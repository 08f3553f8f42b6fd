"""Step zero of `tokenflow-tiny`: a small CLIP-style image tower from public parts.

Three signals, one backward pass; all three act on the projected patch tokens, because the tokenizer's
semantic flow reads patches and drops the class token:

- text: the mean patch token finds its class name or caption among all texts of its pack, in the space of a
  frozen sentence encoder (CLIP's loss with the whole bank as negatives);
- logits: the mean patch token, scored against the names of the classifier's classes, repeats the classifier's
  probabilities for the same crop;
- features: each patch token predicts the classifier's bottleneck features at its place.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tokenflow.errors import UserError
from tokenflow.files import atomic_write
from tokenflow.training.classifier import EfficientNetLite, load_classifier
from tokenflow.training.muon import MuonAdamW, muon_groups
from tokenflow.training.teacher_cache import Source, TeacherCache, build_cache, read_pack, read_square
from tokenflow.training.teacher_recipe import TeacherRecipe


def patch_tokens(
    model: CLIPVisionModelWithProjection, pixel_values: Tensor, kept: Tensor | None = None
) -> Tensor:
    """Projected patch tokens, the target of the tokenizer's semantic flow (released CLIP layouts).

    Args:
        pixel_values: [B, 3, H, W] in [-1, 1].
        kept: [B, n] int64, the patches to look at (FLIP); all h*w if None.

    Returns:
        [B, n or h*w, projection_dim].
    """
    vision = model.vision_model
    embedded = vision.embeddings(pixel_values)
    if kept is not None:
        patches = embedded[:, 1:].gather(1, kept[..., None].expand(-1, -1, embedded.shape[-1]))
        embedded = torch.cat([embedded[:, :1], patches], dim=1)
    hidden = vision.encoder(vision.pre_layrnorm(embedded)).last_hidden_state[:, 1:]
    return model.visual_projection(vision.post_layernorm(hidden))


def embed_images(model: CLIPVisionModelWithProjection, pixel_values: Tensor) -> Tensor:
    """Unit image vectors [B, projection_dim] of `pixel_values` [B, 3, H, W]: mean projected patch tokens."""
    return F.normalize(patch_tokens(model, pixel_values).mean(1), dim=-1)


class TeacherObjective(nn.Module):
    """The tower with what it needs in training only: a head that predicts features, and two temperatures."""

    def __init__(self, model: CLIPVisionModelWithProjection, feature_channels: int):
        super().__init__()
        self.model = model
        self.feature_head = nn.Linear(model.config.projection_dim, feature_channels)
        # Logarithms of inverse temperatures; CLIP starts at 1 / 0.07 and stops at 100.
        self.text_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logits_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(
        self,
        pixel_values: Tensor,
        kept: Tensor | None,
        features: Tensor,
        logits: Tensor,
        classifier_texts: Tensor,
        banks: list[tuple[Tensor, Tensor, Tensor]],
    ) -> dict[str, Tensor]:
        """Mean losses "text", "logits" and "features" of a batch.

        Args:
            pixel_values: [B, 3, H, W]; `kept` [B, n]: the patches that are not dropped.
            features: [B, h*w, C] standardised classifier features; `logits` [B, K] of the classifier.
            classifier_texts: [K, T] unit vectors of the classifier's class names.
            banks: (rows [n], texts [M, T], positives [n]) of each pack present in the batch.
        """
        tokens = patch_tokens(self.model, pixel_values, kept)
        predicted = self.feature_head(tokens).float()
        if kept is not None:
            features = features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
        pooled = F.normalize(tokens.float().mean(1), dim=-1)
        text = pooled.new_zeros(())
        scale = self.text_scale.exp().clamp(max=100)
        with torch.autocast(pooled.device.type, enabled=False):  # bf16 logits of up to 100 are off by 0.25
            for rows, texts, positives in banks:
                text = text + F.cross_entropy(scale * pooled[rows] @ texts.T, positives, reduction="sum")
            student = (self.logits_scale.exp().clamp(max=100) * pooled @ classifier_texts.T).log_softmax(-1)
        return {
            "text": text / len(pooled),
            "logits": F.kl_div(student, logits.log_softmax(-1), reduction="batchmean", log_target=True),
            "features": F.mse_loss(predicted, features),
        }


def random_crops(batch: int, min_area: float, generator: torch.Generator) -> Tensor:
    """Random resized crops with flips as affine maps [B, 2, 3]: they fit images and feature maps alike."""
    draw = torch.rand(5, batch, generator=generator)
    area = min_area + (1 - min_area) * draw[0]
    ratio = torch.exp((2 * draw[1] - 1) * math.log(4 / 3) / 2)
    width, height = (area.sqrt() * ratio).clamp(max=1), (area.sqrt() / ratio).clamp(max=1)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = torch.where(draw[4] < 0.5, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (2 * draw[2] - 1) * (1 - width)
    theta[:, 1, 2] = (2 * draw[3] - 1) * (1 - height)
    return theta


def sample_crops(images: Tensor, theta: Tensor, size: int) -> Tensor:
    """The crops `theta` [B, 2, 3] of `images` [B, C, H, W], resized to [B, C, size, size]."""
    grid = F.affine_grid(theta, [len(images), 1, size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


class Batches:
    """Batch `step` of process `rank` is a pure function of seed, step and rank, so resuming is exact.

    On a GPU the pictures lie in its memory (4 GB at 36,000 of 192 px), and crops are cut there.
    """

    def __init__(
        self,
        recipe: TeacherRecipe,
        cache: TeacherCache,
        classifier: EfficientNetLite,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ):
        self.recipe, self.cache, self.rank, self.world_size = recipe, cache, rank, world_size
        self.device = torch.device(device)
        self.classifier = classifier.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.grid = recipe.image_size // recipe.patch_size
        resident = self.device.type != "cpu"
        self.images = torch.from_numpy(np.array(cache.images)).to(self.device) if resident else None
        self.classifier_texts = cache.classifier_texts.to(self.device)
        self.texts = [source.texts.to(self.device) for source in cache.sources]
        count = len(cache.images)
        sample = np.sort(np.random.default_rng(recipe.seed).choice(count, min(1024, count), replace=False))
        features = torch.cat([self._maps(part) for part in np.array_split(sample, -(-len(sample) // 128))])
        self.mean = features.mean((0, 2, 3), keepdim=True)
        self.std = features.std((0, 2, 3), keepdim=True) + 1e-6

    def rows(self, step: int) -> np.ndarray:
        """Rows of the cache: an epoch is a permutation, split among processes, its incomplete end dropped."""
        count, size = len(self.cache.images), self.recipe.batch_size * self.world_size
        per_epoch = max(count // size, 1)
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((self.recipe.seed, epoch)).permutation(count)
        start = place * size + self.rank * self.recipe.batch_size
        return np.sort(order[start : start + self.recipe.batch_size])

    @torch.no_grad()
    def __call__(self, step: int, drop_patches: float) -> dict:
        """The arguments of `TeacherObjective.forward`, on the device."""
        recipe, rows = self.recipe, self.rows(step)
        generator = torch.Generator().manual_seed(hash((recipe.seed, step, self.rank)) % 2**63)
        theta = self._move(random_crops(len(rows), recipe.min_crop_area, generator))
        kept = None
        if drop_patches > 0:
            count = round(self.grid**2 * (1 - drop_patches))
            kept = self._move(
                torch.rand(len(rows), self.grid**2, generator=generator).argsort(1)[:, :count].contiguous()
            )
        images = self._pixels(rows)
        pure = np.ones(len(rows), bool)
        if recipe.live_targets:
            crops = sample_crops(images, theta, self.classifier.image_size)
            seen = sample_crops(images, theta, recipe.image_size)
            if recipe.mix:
                drawn = torch.rand(2, len(rows), generator=generator)
                share = torch.where(drawn[0] < recipe.mix, drawn[1], 0.0)
                pure, share = (share == 0).numpy(), self._move(share[:, None, None, None])
                other = self._move(torch.randperm(len(rows), generator=generator))
                crops, seen = crops.lerp(crops[other], share), seen.lerp(seen[other], share)
            whole = self._trunk(crops)
            features = F.interpolate(whole, (self.grid, self.grid), mode="bilinear")
        else:
            seen = sample_crops(images, theta, recipe.image_size)
            whole = features = sample_crops(self._maps(rows), theta, self.grid)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.bf16):
            logits = self.classifier.head(whole).float()
        return {
            "pixel_values": seen,
            "kept": kept,
            "features": ((features - self.mean) / self.std).flatten(2).transpose(1, 2),
            "logits": logits,
            "classifier_texts": self.classifier_texts,
            "banks": [
                bank
                for source, texts in zip(self.cache.sources, self.texts, strict=True)
                if (bank := self._bank(source, texts, rows, pure, generator)) is not None
            ],
        }

    def _move(self, t: Tensor) -> Tensor:
        """To the device without waiting for what it is doing."""
        return t.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else t

    def _pixels(self, rows: np.ndarray) -> Tensor:
        """Pictures [n, 3, S, S] in [-1, 1]."""
        if self.images is not None:
            return self.images[self._move(torch.from_numpy(rows))].float() / 127.5 - 1
        return torch.from_numpy(self.cache.images[rows]).float() / 127.5 - 1

    @torch.no_grad()
    def _maps(self, rows: np.ndarray) -> Tensor:
        """The classifier's maps [n, C, h, w] of whole pictures."""
        if self.cache.features is not None:
            return torch.from_numpy(self.cache.features[rows]).float().to(self.device)
        size = self.classifier.image_size
        return self._trunk(F.interpolate(self._pixels(rows), (size, size), mode="bicubic").clamp(-1, 1))

    def _trunk(self, pixels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            return self.classifier.trunk(pixels.contiguous(memory_format=torch.channels_last)).float()

    def _bank(
        self, source: Source, texts: Tensor, rows: np.ndarray, pure: np.ndarray, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """(rows of the batch, texts, positives) of a pack; pictures that are not `pure` have no text."""
        mine = torch.from_numpy(np.flatnonzero((rows >= source.start) & (rows < source.stop) & pure))
        if not len(mine):
            return None
        # Of several captions one is drawn; all pictures of the pack use the same draw.
        which = int(torch.randint(source.texts.shape[1], (), generator=generator))
        positives = source.labels[torch.from_numpy(rows)[mine] - source.start]
        return self._move(mine), texts[:, which], self._move(positives)


def learning_rate_share(recipe: TeacherRecipe, step: int, progress: float) -> float:
    """Share of the peak rate: linear warm-up, then a cosine to zero over `progress` in [0, 1] of the run."""
    warmup = min(1.0, (step + 1) / max(recipe.warmup_steps, 1))
    return warmup * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@torch.no_grad()
def whiten_patch_embedding(model: CLIPVisionModelWithProjection, pixel_values: Tensor) -> None:
    """Start the patch embedding from whitened principal components of the patches of [B, 3, H, W] pictures.

    Patches of photographs are mostly brightness: with random filters all tokens look alike for many steps.
    The idea is from Jordan's fast CIFAR-10 training (arXiv 2404.00498).
    """
    convolution = model.vision_model.embeddings.patch_embedding
    patches = F.unfold(pixel_values, convolution.kernel_size, stride=convolution.stride)
    patches = patches.transpose(1, 2).flatten(0, 1)
    variances, directions = torch.linalg.eigh(torch.cov(patches.T))  # ascending
    count = min(convolution.out_channels, len(variances))
    filters = directions[:, -count:].T / (variances[-count:, None] + 0.1).sqrt()
    convolution.weight[:count] = filters.view(count, *convolution.weight.shape[1:])


def build_model(recipe: TeacherRecipe, projection_dim: int) -> CLIPVisionModelWithProjection:
    """The tower of a recipe, freshly initialised."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_hidden_layers,
            num_attention_heads=recipe.num_attention_heads,
            patch_size=recipe.patch_size,
            image_size=recipe.image_size,
            hidden_act="quick_gelu",
            projection_dim=projection_dim,
        )
    )


def load_start(model: CLIPVisionModelWithProjection, name_or_path: str) -> None:
    """Copy the weights of an exported tower, or of a bundled one, into `model`.

    Raises:
        UserError: it does not exist, or has another shape.
    """
    from tokenflow.bundled import bundled_names, bundled_path

    folder = bundled_path(name_or_path) if name_or_path in bundled_names() else Path(name_or_path)
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except OSError as error:
        raise UserError(f"init_from={name_or_path}: no model.safetensors there") from error
    except RuntimeError as error:
        raise UserError(f"init_from={name_or_path}: {str(error).splitlines()[1].strip()}") from error


def export_teacher(model: CLIPVisionModelWithProjection, sources: list[Source], folder: Path) -> None:
    """Write a transformers folder with the class-text vectors beside the model, then swap it in."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    labelled = [s for s in sources if s.class_names]
    save_file(
        {s.name: s.texts[:, 0].contiguous() for s in labelled},
        fresh / "class_embeddings.safetensors",
        metadata={s.name: json.dumps({"ids": s.class_ids, "names": s.class_names}) for s in labelled},
    )
    size = {"height": model.config.image_size, "width": model.config.image_size}
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": model.config.image_size},
        "crop_size": size,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (fresh / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def train_teacher(recipe: TeacherRecipe) -> Path:
    """Train the tower of a recipe; returns the export, a transformers folder with the EMA weights.

    Resumes from `OUTPUT/checkpoint.pt` if it is there. Runs in one process, or under `torchrun` in several.
    `OUTPUT/log.jsonl` gets a line every `log_every` steps, `OUTPUT/export` is renewed every `save_minutes`.

    Raises:
        UserError: a pack, the classifier or its class names are missing or malformed.
    """
    from accelerate import Accelerator
    from accelerate.utils import broadcast

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    device = accelerator.device
    main, output = accelerator.is_main_process, Path(recipe.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    cache = build_cache(
        recipe, accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone
    )
    classifier = load_classifier(recipe.classifier)
    batches = Batches(recipe, cache, classifier, accelerator.process_index, accelerator.num_processes, device)

    torch.manual_seed(recipe.seed)
    objective = TeacherObjective(build_model(recipe, cache.classifier_texts.shape[-1]), classifier.channels)
    if recipe.init_from is None:
        count = len(cache.images)
        sample = np.random.default_rng(recipe.seed).choice(count, min(512, count), False)
        pixels = torch.from_numpy(cache.images[np.sort(sample)]).float() / 127.5 - 1
        whiten_patch_embedding(objective.model, pixels)
    else:
        load_start(objective.model, recipe.init_from)
    objective.to(device)
    groups = muon_groups(
        objective,
        recipe.hidden_learning_rate,
        recipe.learning_rate,
        recipe.weight_decay,
        adamw=("patch_embedding", "visual_projection", "feature_head"),
    )
    optimizer = MuonAdamW(groups, betas=(0.9, 0.98), fused=True)
    ema = copy.deepcopy(objective.model).requires_grad_(False)
    step, elapsed_before = 0, 0.0
    checkpoint = output / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        objective.load_state_dict(state["objective"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        step, elapsed_before = state["step"], state["elapsed"]
    wrapped = accelerator.prepare_model(objective)

    weights = {"text": recipe.text_weight, "logits": recipe.logits_weight, "features": recipe.features_weight}
    started = saved = time.monotonic()
    logged, logged_step = started, step
    if main:
        (output / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
        export_teacher(ema, cache.sources, output / "export")

    def save() -> None:
        state = {
            "objective": objective.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict(),
            "step": step,
            "elapsed": elapsed,
        }
        with atomic_write(checkpoint) as temporary:
            torch.save(state, temporary)
        export_teacher(ema, cache.sources, output / "export")

    bar = tqdm(total=recipe.steps, initial=step, desc="teacher", disable=not main, mininterval=5)
    elapsed = elapsed_before
    while step < recipe.steps:
        # The clock of the first process rules, so that all processes stop and decay together.
        elapsed = elapsed_before + time.monotonic() - started
        if recipe.max_minutes is not None:
            elapsed = broadcast(torch.tensor(elapsed, dtype=torch.float64, device=device)).item()
        spent = elapsed / (60 * recipe.max_minutes) if recipe.max_minutes is not None else 0.0
        progress = max(step / recipe.steps, spent)
        if progress >= 1:
            break
        batch = batches(step, recipe.drop_patches if progress < recipe.drop_until else 0.0)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
            losses = wrapped(**batch)
        loss = sum((weights[name] * losses[name] for name in losses), torch.zeros((), device=device))
        accelerator.backward(loss)
        norm = nn.utils.clip_grad_norm_(objective.parameters(), recipe.max_grad_norm)
        share = learning_rate_share(recipe, step, progress)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
        if torch.isfinite(norm):  # gradients are already averaged: every process decides alike
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(recipe.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            averages = [p.data for p in ema.parameters()]
            torch._foreach_lerp_(averages, [p.data for p in objective.model.parameters()], 1 - decay)
        bar.update()
        now = time.monotonic()
        if main and step % recipe.log_every == 0:
            images = (step - logged_step) * recipe.batch_size * accelerator.num_processes
            record = {
                "step": step,
                "minutes": round(elapsed / 60, 2),
                "images_per_second": round(images / (now - logged), 1),
                "learning_rate": recipe.learning_rate * share,
                "grad_norm": norm.item(),
                **{name: round(value.item(), 4) for name, value in losses.items()},
                "text_scale": objective.text_scale.exp().item(),
            }
            with (output / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            bar.set_postfix({k: record[k] for k in ("images_per_second", *losses)}, refresh=False)
            logged, logged_step = now, step
        if main and now - saved > 60 * recipe.save_minutes:
            save()
            saved = now
    bar.close()
    if main:
        save()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output / "export"


def load_class_texts(folder: str | Path, pack: str) -> tuple[Tensor, Tensor, list[str]]:
    """Class-text vectors [K, T], sorted label ids [K] and class names of a pack, out of an exported teacher.

    Raises:
        UserError: the teacher was not trained on a labelled pack of this name.
    """
    file = Path(folder) / "class_embeddings.safetensors"
    with safe_open(file, "pt") as tensors:
        if pack not in tensors.keys():  # noqa: SIM118 (not a dict)
            raise UserError(f"{file}: no classes of pack {pack!r}; it has {', '.join(tensors.keys())}")
        classes = json.loads(tensors.metadata()[pack])
        return tensors.get_tensor(pack), torch.tensor(classes["ids"]), classes["names"]


@torch.inference_mode()
def embed_pack(
    model: CLIPVisionModelWithProjection, pack: str | Path, split: str, batch_size: int = 128
) -> tuple[Tensor, Tensor]:
    """Unit image vectors [N, T] and labels [N] of a labelled pack."""
    rows = read_pack(pack, split, ("label",))
    size, vectors = model.config.image_size, []
    assert isinstance(size, int)  # transformers also allows pairs
    for start in tqdm(range(0, len(rows), batch_size), desc=split):
        images = [read_square(row["bytes"], size) for row in rows[start : start + batch_size]]
        vectors.append(embed_images(model, torch.from_numpy(np.stack(images)).float() / 127.5 - 1))
    return torch.cat(vectors), torch.tensor([row["label"] for row in rows])


def zero_shot(vectors: Tensor, labels: Tensor, class_texts: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy of unit vectors [N, T] against class texts [K, T]."""
    ranked = (vectors @ class_texts.T).topk(min(5, len(class_texts)), dim=-1).indices
    hits = ranked == labels[:, None]
    return {"top1": hits[:, 0].float().mean().item(), "top5": hits.any(1).float().mean().item()}


def knn_accuracy(train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, k: int = 20) -> float:
    """Accuracy on `val` [M, T] of a cosine-weighted vote of the `k` nearest of `train` [N, T]; unit rows."""
    classes = int(train_labels.max()) + 1
    correct = 0
    for queries, truth in zip(val.split(512), val_labels.split(512), strict=True):
        similarity, nearest = (queries @ train.T).topk(min(k, len(train)), dim=-1)
        votes = torch.zeros(len(queries), classes).scatter_add_(1, train_labels[nearest], similarity)
        correct += int((votes.argmax(1) == truth).sum())
    return correct / len(val)


def evaluate_teacher(folder: str | Path, pack: str | Path) -> dict[str, float]:
    """Figures of an exported teacher on a labelled pack whose class texts it holds.

    Returns zero-shot "top1" and "top5" on `val` and "knn20": k-NN (k = 20, cosine) from `train` to `val`.
    """
    model = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    texts, ids, _ = load_class_texts(folder, Path(pack).name)
    val, val_labels = embed_pack(model, pack, "val")
    train, train_labels = embed_pack(model, pack, "train")
    known = torch.isin(val_labels, ids)  # a class that `train` lacks has no text
    shot = zero_shot(val[known], torch.searchsorted(ids, val_labels[known]), texts)
    return {**shot, "knn20": knn_accuracy(train, train_labels, val, val_labels)}
