"""What a teacher learns from in each step: crops of pictures, and what classifier and texts say of them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tokenflow.training.classifier import EfficientNetLite
from tokenflow.training.teacher_cache import Source, TeacherCache
from tokenflow.training.teacher_recipe import TeacherRecipe


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
