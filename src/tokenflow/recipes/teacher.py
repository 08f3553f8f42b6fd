"""Step zero of `tokenflow-tiny`: the CLIP-style tower that the tokenizer starts from and learns from.

tokenflow train teacher tokenflow-tiny-teacher [overrides]
"""

from __future__ import annotations

from collections.abc import Callable

from tokenflow.training.teacher_recipe import TeacherRecipe


def tokenflow_tiny_teacher() -> TeacherRecipe:
    """CLIPVision 6 x 256, 128 px, patch 16, 5.1 M parameters, on a CPU core or a GPU.

        tokenflow train teacher tokenflow-tiny-teacher \\
            --packs PACKS/tiny_imagenet PACKS/flickr8k PACKS/flowers102 \\
            --classifier PACKS/models/efficientnet-lite0 --classifier-names PACKS/imagenet_1k.tsv \\
            --text-encoder PACKS/models/all-minilm-l6-v2 --max-minutes 60

    The classifier looks at each picture once; 75 images a second and CPU core. The bundled file went on from
    such a run, on one H100 in 2.4 minutes (1,450 steps, 5,600 images a second), where the classifier looks at
    every crop; the options above, and:

        --init-from tokenflow-tiny-teacher --live-targets --mix 0.5 --cache-size 192 --min-crop-area 0.25
        --drop-patches 0 --text-weight 0.5 --logits-weight 2 --features-weight 1 --warmup-steps 100
        --ema-decay 0.998 --batch-size 512 --steps 1000000 --max-minutes 2.4
    """
    return TeacherRecipe()


TEACHER_RECIPES: dict[str, Callable[[], TeacherRecipe]] = {"tokenflow-tiny-teacher": tokenflow_tiny_teacher}
