"""What `test_text_to_image_distributed.py` shards over two gloo processes; results go to SHARDED_FOLDER.

Accelerate shards over GPUs only. Told that these processes are such, it does all else as it does there.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from tokenflow import TokenFlowForTextToImage, TokenFlowModel, TokenFlowTextToImageConfig
from tokenflow.training import text_to_image
from tokenflow.training.text_to_image_recipe import (
    GenerationData,
    GenerationOptimizer,
    LanguageModelRecipe,
    TextToImageRecipe,
)


def small_recipe(folder: Path, output: str, **changes: Any) -> TextToImageRecipe:
    """A run whose averaged weights are evaluated and sampled from between the steps."""
    tokens, sizes = (
        str(folder / "tokens"),
        {"hidden_size": 16, "intermediate_size": 32, "layers": 2, "heads": 2},
    )
    recipe = TextToImageRecipe(
        model=LanguageModelRecipe(
            tokenizer=str(folder / "model"), max_text_tokens=8, text_vocabulary=280, **sizes
        ),
        data=GenerationData(sources=(tokens,), eval_sources=(tokens,), batch_size=4),
        optimizer=GenerationOptimizer(kind="muon", lr=1e-2, muon_lr=1e-2, warmup_steps=1, ema_decay=0.9),
        output_dir=str(folder / output),
        steps=4,
        mixed_precision="no",
        log_every=1,
        eval_every=1,
        sample_every=2,
        trackers=(),
    )
    return replace(recipe, **changes)


def small_model(folder: Path) -> TokenFlowForTextToImage:
    """Two layers with random weights and the code vectors of the small tokenizer."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = TokenFlowForTextToImage(
        TokenFlowTextToImageConfig(
            text_config=text, codebook_size=64, scales=[1, 2, 4], image_open_ids=[3], image_close_ids=[4]
        )
    )
    model.set_codebooks(TokenFlowModel.from_pretrained(folder / "model"))
    return model


def loss_and_gradients(model: TokenFlowForTextToImage, rows: slice) -> dict[str, torch.Tensor]:
    """Of some rows of a fixed batch; DTensors where the model is sharded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 40, (4, 9), generator=generator)
    codes = torch.randint(64, (4, 21), generator=generator)
    loss = model(ids[rows], torch.ones_like(ids[rows]), codes[rows]).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def shard_plainly(folder: Path) -> None:
    model = small_model(folder)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = loss_and_gradients(model, slice(dist.get_rank(), None, 2))
    assert all(isinstance(p, DTensor) and isinstance(p.grad, DTensor) for p in model.parameters())
    dist.all_reduce(found["loss"], op=dist.ReduceOp.SUM)
    found["loss"] /= 2
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found.items()}
    if dist.get_rank() == 0:
        save_file(whole, folder / "gradients.safetensors")


def let_accelerate_shard_on_cpus() -> None:
    original = AcceleratorState.__init__

    def on_cpus(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = on_cpus


def train_sharded(folder: Path) -> None:
    facts: dict[str, Any] = {}

    class Watched(text_to_image.GenerationTrainer):
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            # Also what an evaluation gathered is given back: its weights were the averaged ones.
            kinds = {type(parameter).__name__ for parameter in self.network.parameters()}
            facts["parameters"] = ", ".join(sorted({*kinds, *filter(None, [facts.get("parameters")])}))
            facts["fsdp_version"] = self.accelerator.state.fsdp_plugin.fsdp_version
            return super().compute_loss(*args, **options)

    text_to_image.GenerationTrainer = Watched
    recipe = small_recipe(folder, "two", fsdp_config=str(folder / "fsdp.json"))
    assert text_to_image.train_text_to_image(replace(recipe, max_minutes=0.0)).step == 1
    assert text_to_image.train_text_to_image(recipe).step == 4
    if dist.get_rank() == 0:
        (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    folder = Path(os.environ["SHARDED_FOLDER"])
    dist.init_process_group("gloo")
    shard_plainly(folder)
    let_accelerate_shard_on_cpus()
    train_sharded(folder)
    dist.barrier()
    os._exit(0)  # without interpreter teardown, which gloo's threads do not always survive
