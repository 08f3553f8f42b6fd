"""Recipes of the generators: the paper's (Tab. 7, Fig. 6) and the bundled model.

tokenflow train text-to-image RECIPE [overrides]
"""

from __future__ import annotations

from collections.abc import Callable

from tokenflow.training.text_to_image_recipe import (
    ClassModelRecipe,
    ClassToImageRecipe,
    GenerationData,
    GenerationOptimizer,
    LanguageModelRecipe,
    TextToImageRecipe,
)

IMAGES = 60_000_000  # of the paper's training set (Sec. 4.1)


def _paper(name: str, language_model: str, epochs: int) -> TextToImageRecipe:
    """What the two language models share: Sec. 4.1 and the released training code."""
    batch_size = 512
    return TextToImageRecipe(
        model=LanguageModelRecipe(tokenizer="tokenflow-b-256-enhanced", language_model=language_model),
        data=GenerationData(batch_size=batch_size, num_workers=8),
        optimizer=GenerationOptimizer(),  # AdamW, 5e-4, 5,000 steps of warm-up, decay 0.1, clip 0.5
        output_dir=f"runs/{name}",
        steps=IMAGES * epochs // batch_size,
        gradient_checkpointing=True,
        checkpoint_every=5000,
        sample_every=5000,
        eval_every=5000,
    )


def llama2_7b() -> TextToImageRecipe:
    """Llama-2-7B on TokenFlow-B tokens at 256 px, two epochs of 60 M images.

        tokenflow tokenize IMAGES -m TOKENIZER -o tokens --ray --num-workers 64 --device cuda
        torchrun --nproc-per-node 8 -m tokenflow train text-to-image llama2-7b \\
            --model.tokenizer TOKENIZER --data.sources tokens --fsdp-config fsdp.json

    TOKENIZER is a converted or trained `tokenflow-b-256-enhanced`. Paper: GenEval 0.553, ImageReward 0.825
    (Tab. 7). The batch over all GPUs is not stated there; the released code has 16 a GPU.
    """
    return _paper("llama2-7b", "meta-llama/Llama-2-7b-hf", epochs=2)


def tinyllama_1b() -> TextToImageRecipe:
    """TinyLlama-1B on TokenFlow-B tokens at 256 px, four epochs of 60 M images; options as for `llama2-7b`.

    Paper: GenEval 0.485, ImageReward 0.677 (Tab. 7).
    """
    return _paper("tinyllama-1b", "TinyLlama/TinyLlama_v1.1", epochs=4)


def var_d16() -> ClassToImageRecipe:
    """The class-conditional VAR transformer of depth 16 (310 M parameters) on ImageNet tokens (Fig. 6).

        tokenflow tokenize imagenet -m TOKENIZER -o tokens --flip
        torchrun --nproc-per-node 8 -m tokenflow train text-to-image var-d16 \\
            --model.tokenizer TOKENIZER --data.sources tokens/imagenet

    Optimizer, batch and 200 epochs are VAR's for d = 16 (Tian et al. 2024); the paper states only the model.
    """
    batch_size = 768
    return ClassToImageRecipe(
        model=ClassModelRecipe(tokenizer="tokenflow-b-256", depth=16, num_classes=1000),
        data=GenerationData(batch_size=batch_size, num_workers=8),
        optimizer=GenerationOptimizer(
            lr=1e-4 * batch_size / 256,
            betas=(0.9, 0.95),
            weight_decay=0.05,
            clip=2.0,
            schedule="linear",
            warmup_steps=8000,
        ),
        output_dir="runs/var-d16",
        steps=1_281_167 * 200 // batch_size,
        sample_guidance=1.5,
        checkpoint_every=5000,
        sample_every=5000,
        eval_every=5000,
    )


def tokenflow_tiny_t2i() -> TextToImageRecipe:
    """The bundled model: a decoder of 6 layers x 384 from nothing on `tokenflow-tiny` tokens.

        tokenflow tokenize PACKS/flowers102 -o tokens --crops 7 --flip
        tokenflow tokenize PACKS/flickr8k -o tokens --crops 3 --flip
        tokenflow tokenize PACKS/tiny_imagenet -o tokens --crops 1 --flip
        tokenflow tokenize PACKS/emoji -o tokens --crops 2
        tokenflow tokenize PACKS/flowers102 PACKS/flickr8k PACKS/tiny_imagenet PACKS/emoji \\
            -o tokens --split val
        tokenflow train text-to-image tokenflow-tiny-t2i \\
            --data.sources tokens/flowers102@2 tokens/flickr8k@1.5 tokens/tiny_imagenet@2.5 tokens/emoji@1 \\
            --data.eval-sources tokens/flowers102 tokens/flickr8k tokens/tiny_imagenet tokens/emoji

    78,400 draws, two and a half hours of one CPU core (10 images a second where it has it alone). The bundled
    file took 404,000 draws, three minutes of one H100 (1,580 steps, 3,600 images a second where it had it
    alone), with these options beside those above; its shards, 240,000 views, were made there in 98 seconds,
    each set by a command of its own at once (`--device cuda --num-workers 4 --batch-size 512`):

        --data.batch-size 256 --data.num-workers 6 --data.token-noise 0.1 --optimizer.weight-decay 0.1
        --optimizer.warmup-steps 100 --optimizer.ema-decay 0.998 --optimizer.schedule cosine-minutes
        --max-minutes 3 --steps 1000000

    Text and image markers have a small vocabulary of their own.
    """
    return TextToImageRecipe(
        model=LanguageModelRecipe(tokenizer="tokenflow-tiny", max_text_tokens=32),
        data=GenerationData(
            batch_size=32,
            extra_templates=("a photo of {a} {name}", "a picture of {a} {name}", "{a} {name}", "{name}"),
        ),
        optimizer=GenerationOptimizer(
            kind="muon",
            lr=3e-3,
            muon_lr=8e-3,
            betas=(0.9, 0.98),
            weight_decay=0.05,
            clip=1.0,
            schedule="cosine",
            warmup_steps=40,
            ema_decay=0.99,
        ),
        output_dir="runs/tokenflow-tiny-t2i",
        steps=2450,
        sample_guidance=4.0,
        checkpoint_every=100,
        log_every=20,
        eval_every=300,
        sample_every=300,
    )


GENERATION_RECIPES: dict[str, Callable[[], TextToImageRecipe | ClassToImageRecipe]] = {
    "llama2-7b": llama2_7b,
    "tinyllama-1b": tinyllama_1b,
    "var-d16": var_d16,
    "tokenflow-tiny-t2i": tokenflow_tiny_t2i,
}
