"""The paper's ablations as small runs: Tab. 5 (design choices) and Fig. 6 (codebook size).

Each is `tokenflow-tiny` at a small equal budget, so rows compare with each other, not with the paper's
numbers. Data and teacher are given as for `tokenflow-tiny`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tokenflow.recipes.tokenizer import tokenflow_tiny
from tokenflow.training.recipe import TrainRecipe

STEPS = 2000
CODEBOOK_SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


def _ablation(name: str, **model) -> TrainRecipe:
    base = tokenflow_tiny()
    return replace(
        base,
        model=replace(base.model, **model),
        output_dir=f"runs/{name}",
        steps=STEPS,
        sample_every=STEPS,
        checkpoint_every=500,
    )


def single_codebook() -> TrainRecipe:
    """Row 1 of Tab. 5: one codebook, of semantic features, on one scale. Paper: rFID 8.07."""
    return _ablation(
        "ablation-1-single-codebook",
        flows=("semantic",),
        decoder_flows=("semantic",),
        scales=(8,),
        semantic_init=False,
    )


def shared_mapping() -> TrainRecipe:
    """Row 2 of Tab. 5: a pixel codebook that shares its indices with the semantic one. Paper: rFID 3.96."""
    return _ablation("ablation-2-shared-mapping", scales=(8,), semantic_init=False)


def multi_scale() -> TrainRecipe:
    """Row 3 of Tab. 5: the residual schedule over scales. Paper: rFID 2.18."""
    return _ablation("ablation-3-multi-scale", semantic_init=False)


def pretrained_init() -> TrainRecipe:
    """Row 4 of Tab. 5: the semantic encoder starts from the teacher. Paper: rFID 2.16, MME-P +8.4 %."""
    return _ablation("ablation-4-pretrained-init")


def codebook_size(size: int) -> TrainRecipe:
    """Fig. 6: K codes. Paper: both tasks gain up to K = 131,072, at over 95 % usage."""
    return _ablation(f"ablation-codebook-{size}", codebook_size=size)


ABLATION_RECIPES: dict[str, Callable[[], TrainRecipe]] = {
    "ablation-1-single-codebook": single_codebook,
    "ablation-2-shared-mapping": shared_mapping,
    "ablation-3-multi-scale": multi_scale,
    "ablation-4-pretrained-init": pretrained_init,
    **{f"ablation-codebook-{k}": partial(codebook_size, k) for k in CODEBOOK_SIZES},
}
