"""Recipes of the tokenizers: the paper's three (Tab. 11), their enhanced decoders, and the bundled model.

Data and weights are yours to name: the paper trains on LAION and COYO images with faces doubled, which mixing
weights express (`--data.sources photos@1 faces@2`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tokenflow.training.loss_config import LossConfig
from tokenflow.training.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, TrainRecipe


def _paper(preset: str, teacher: str, steps: int, channels_last: bool = True) -> TrainRecipe:
    """What the three released tokenizers share: Tab. 11 and the released training code."""
    return TrainRecipe(
        model=ModelRecipe(preset=preset, teacher=teacher),
        data=DataRecipe(batch_size=256, num_workers=8),
        optimizer=OptimizerRecipe(lr=1e-4, betas=(0.9, 0.95), clip=1.0, ema_decay=0.9999),
        loss=LossConfig(),  # l2 + LPIPS + PatchGAN (hinge, 0.5, from step 20,000) + cosine
        output_dir=f"runs/{preset}",
        steps=steps,
        channels_last=channels_last,
        checkpoint_every=5000,
        sample_every=5000,
    )


def tokenflow_b_224() -> TrainRecipe:
    """TokenFlow-B at 224 px: CLIP ViT-B/16 teacher, 561 tokens.

        torchrun --nproc-per-node 8 -m tokenflow train tokenizer tokenflow-b-224 \\
            --data.sources images/ --loss.perceptual-file vgg_lpips.pth

    Paper: batch 256, 1,000,000 steps at 1e-4, beta 0.25, adversarial factor 0.5, gradient norm 1.0 (Tab. 11).
    The preset is the released layout, whose teacher is ViT-B/16; the paper's table says B/14.
    """
    return _paper("tokenflow-b-224", "openai/clip-vit-base-patch16", 1_000_000)


def tokenflow_b_256() -> TrainRecipe:
    """TokenFlow-B at 256 px with interpolated positions, 817 tokens.

        torchrun --nproc-per-node 8 -m tokenflow train tokenizer tokenflow-b-256 \\
            --data.sources images/ --loss.perceptual-file vgg_lpips.pth

    The released 256-px tokenizer was trained at 224 px and only run at 256; this recipe trains at 256. Paper
    at 256 px: rFID 1.37, PSNR 21.41, SSIM 0.687 on ImageNet val (Tab. 2).
    """
    return _paper("tokenflow-b-256", "openai/clip-vit-base-patch16", 1_000_000)


def tokenflow_l() -> TrainRecipe:
    """TokenFlow-L at 256 px: ViTamin-XL-256 teacher, 817 tokens.

        torchrun --nproc-per-node 8 -m tokenflow train tokenizer tokenflow-l --model.teacher FOLDER \\
            --data.sources images/ --loss.perceptual-file vgg_lpips.pth

    Paper: batch 256, 500,000 steps at 1e-4 (Tab. 11). FOLDER is a folder of `tokenflow_vitamin` weights.
    """
    return _paper("tokenflow-l", "", 500_000)


def tokenflow_xl() -> TrainRecipe:
    """TokenFlow-XL at 384 px: SigLIP-SO400M-patch14-384 teacher (before its last layer), 2,227 tokens.

        torchrun --nproc-per-node 8 -m tokenflow train tokenizer tokenflow-xl \\
            --data.sources images/ --loss.perceptual-file vgg_lpips.pth

    Paper: batch 256, 500,000 steps at 1e-4 (Tab. 11); rFID 0.63, PSNR 22.77, SSIM 0.731 at 384 px on ImageNet
    val (Tab. 2).
    """
    return _paper("tokenflow-xl", "google/siglip-so400m-patch14-384", 500_000)


def _enhanced(base: TrainRecipe) -> TrainRecipe:
    """The second stage: a decoder of twice the width and depth on frozen codes (Sec. B.1)."""
    preset = f"{base.model.preset}-enhanced"
    return replace(
        base,
        model=ModelRecipe(
            preset=preset,
            teacher=None,
            init_from=f"{base.output_dir}/export",
            init_except=("pixel_decoder.network.",),
            trainable="decoder",
        ),
        output_dir=f"runs/{preset}",
        steps=500_000,
    )


def tokenflow_b_224_enhanced() -> TrainRecipe:
    """The enhanced decoder of TokenFlow-B at 224 px; FOLDER is your own run or a converted release.

        torchrun --nproc-per-node 8 -m tokenflow train tokenizer tokenflow-b-224-enhanced \\
            --model.init-from FOLDER --data.sources images/ --loss.perceptual-file vgg_lpips.pth
    """
    return _enhanced(tokenflow_b_224())


def tokenflow_b_256_enhanced() -> TrainRecipe:
    """The enhanced decoder of TokenFlow-B at 256 px: the tokenizer of the released text-to-image model.

        torchrun --nproc-per-node 8 -m tokenflow train tokenizer tokenflow-b-256-enhanced \\
            --model.init-from FOLDER --data.sources images/ --loss.perceptual-file vgg_lpips.pth
    """
    return _enhanced(tokenflow_b_256())


def tokenflow_l_enhanced() -> TrainRecipe:
    """The enhanced decoder of TokenFlow-L on frozen codes; options as for `tokenflow-b-224-enhanced`."""
    return _enhanced(tokenflow_l())


def tokenflow_xl_enhanced() -> TrainRecipe:
    """The enhanced decoder of TokenFlow-XL on frozen codes; options as for `tokenflow-b-224-enhanced`."""
    return _enhanced(tokenflow_xl())


def tokenflow_tiny() -> TrainRecipe:
    """The bundled model: 128 px, 155 tokens, trained on the data packs, on two CPU cores or one GPU.

        tokenflow train tokenizer tokenflow-tiny-pixel --data.sources ...    # its pixel flow alone
        tokenflow train tokenizer tokenflow-tiny --model.init-from runs/tokenflow-tiny-pixel/export \\
            --model.init-except encoders.semantic semantic_decoders quantizer.quantizer.codebooks.semantic \\
            --data.sources PACKS/flickr8k/train.parquet@3 PACKS/flowers102/train.parquet \\
            PACKS/photo_crops/train.parquet PACKS/tiny_imagenet/train.parquet

    About 15 images a second and CPU core. Neither perceptual loss (on a CPU it takes longer than all the rest
    of a step) nor discriminator: this model is judged by PSNR. Without `--model.init-from` all parts start
    together, as in the paper; each pixel step then costs twice as much. The teacher is the bundled one; step
    zero, `tokenflow train teacher tokenflow-tiny-teacher`, makes another.

    The bundled file went on from such weights for seven minutes of one H100 (batches of 512, 2,670 images a
    second, 1,540 with a perceptual loss), then its decoder alone on a CPU core: the commands are in
    docs/train.md.
    """
    return TrainRecipe(
        model=ModelRecipe(preset="tokenflow-tiny", teacher="tokenflow-tiny-teacher"),
        data=DataRecipe(batch_size=64, num_workers=1),
        optimizer=OptimizerRecipe(
            lr=5e-4, muon_lr=2e-3, warmup_steps=30, schedule="cosine", final_lr=0.02, ema_decay=0.99
        ),
        loss=LossConfig(perceptual="none", discriminator="none"),
        output_dir="runs/tokenflow-tiny",
        steps=10_000,
        channels_last=False,  # slower behind a pixel-unshuffle stem
        checkpoint_every=100,
        sample_every=300,
        log_every=25,
    )


def tokenflow_tiny_pixel() -> TrainRecipe:
    """The pixel flow of `tokenflow-tiny` alone, for its first hours: twice the images a second, no teacher.

        tokenflow train tokenizer tokenflow-tiny-pixel --data.sources flickr8k/train.parquet@3 \\
            flowers102/train.parquet photo_crops/train.parquet
    """
    base = tokenflow_tiny()
    return replace(
        base,
        model=ModelRecipe(preset="tokenflow-tiny", flows=("pixel",)),
        optimizer=replace(base.optimizer, schedule="constant"),
        loss=replace(base.loss, semantic_weight=0.0),
        output_dir="runs/tokenflow-tiny-pixel",
    )


TOKENIZER_RECIPES: dict[str, Callable[[], TrainRecipe]] = {
    "tokenflow-b-224": tokenflow_b_224,
    "tokenflow-b-256": tokenflow_b_256,
    "tokenflow-l": tokenflow_l,
    "tokenflow-xl": tokenflow_xl,
    "tokenflow-b-224-enhanced": tokenflow_b_224_enhanced,
    "tokenflow-b-256-enhanced": tokenflow_b_256_enhanced,
    "tokenflow-l-enhanced": tokenflow_l_enhanced,
    "tokenflow-xl-enhanced": tokenflow_xl_enhanced,
    "tokenflow-tiny": tokenflow_tiny,
    "tokenflow-tiny-pixel": tokenflow_tiny_pixel,
}
