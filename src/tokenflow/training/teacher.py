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
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPVisionModelWithProjection

from tokenflow.files import atomic_write
from tokenflow.training.classifier import load_classifier
from tokenflow.training.muon import MuonAdamW, muon_groups
from tokenflow.training.teacher_batches import Batches
from tokenflow.training.teacher_cache import build_cache
from tokenflow.training.teacher_model import (
    build_model,
    export_teacher,
    load_start,
    patch_tokens,
    whiten_patch_embedding,
)
from tokenflow.training.teacher_recipe import TeacherRecipe


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


def learning_rate_share(recipe: TeacherRecipe, step: int, progress: float) -> float:
    """Share of the peak rate: linear warm-up, then a cosine to zero over `progress` in [0, 1] of the run."""
    warmup = min(1.0, (step + 1) / max(recipe.warmup_steps, 1))
    return warmup * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


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
