"""Two gloo processes with half of the batch each learn what one process learns from all of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tokenflow.tokenizer.multiscale import MultiScaleQuantizer
from tokenflow.tokenizer.quantizer import SharedMappingQuantizer

PROCESSES = 2


def make(**settings):
    torch.manual_seed(0)
    flows = [("semantic", 4, 1.0), ("pixel", 2, 1.0)]
    single = SharedMappingQuantizer(flows, 12, usage_window=256, **settings)
    return MultiScaleQuantizer(single, [1, 2], drop=0.0, usage_window=256)


def batch():
    return torch.randn(8, 6, 2, 2, generator=torch.Generator().manual_seed(1))


def state(module):
    return {name: value.clone() for name, value in module.named_buffers()} | {
        name: value.detach().clone() for name, value in module.named_parameters()
    }


def ema_step(h):
    q = make(update="ema")
    q(h)
    return state(q)


def kmeans_step(h):
    q = make(update="ema", init="kmeans")
    torch.manual_seed(100 + (dist.get_rank() if dist.is_initialized() else 0))  # ranks would draw other means
    q(h)
    return state(q)


def gradient_step(h):
    q = make()
    model = DistributedDataParallel(q) if dist.is_initialized() else q
    sum(model(h).losses.values()).backward()
    return {name: parameter.grad.clone() for name, parameter in q.named_parameters()} | dict(
        q.named_buffers()
    )


def drops():
    q = make()
    q.drop = 0.5
    torch.manual_seed(7 + (dist.get_rank() if dist.is_initialized() else 0))
    return [q._draw_dropped() for _ in range(12)]


STEPS = {"ema": ema_step, "kmeans": kmeans_step, "gradient": gradient_step}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    mine = batch().chunk(PROCESSES)[rank]
    results = {name: step(mine) for name, step in STEPS.items()} | {"drops": drops()}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that tears the interpreter down around them


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(work, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def sorted_recent(values):
    """Usage windows hold the same indices; only their order differs with how the batch was split."""
    return {k: v.sort().values if k.endswith("recent") else v for k, v in values.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_processes_end_in_the_same_state(results, name):
    first, second = results[0][name], results[1][name]
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ema", "gradient"])
def test_processes_learn_what_one_process_learns_from_the_whole_batch(results, name):
    alone, together = sorted_recent(STEPS[name](batch())), sorted_recent(results[0][name])
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        torch.testing.assert_close(
            together[key], value, atol=1e-6, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )
    window = together["quantizer.usage.recent"]
    assert int((window >= 0).sum()) == 8 * (1 + 4)


@pytest.mark.slow
def test_kmeans_sees_the_vectors_of_all_processes(results):
    values = results[0]["kmeans"]
    assert bool(values["quantizer.initialized"])
    sizes = 8 * (1 + 4)  # what went into k-means; then the EMA steps of the two scales, 8 and 32 vectors
    for vectors in (8, 32):
        sizes = 0.99 * sizes + 0.01 * vectors
    assert float(values["quantizer.cluster_size"].sum()) == pytest.approx(sizes)


@pytest.mark.slow
def test_processes_drop_the_same_scale(results):
    assert results[0]["drops"] == results[1]["drops"]
    assert len(set(results[0]["drops"])) == 2
