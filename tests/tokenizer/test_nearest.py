from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tokenflow.errors import UserError
from tokenflow.tokenizer import nearest
from tokenflow.tokenizer.nearest import nearest_code, prepare_codes

CPU_BACKENDS = ["blocked", "faiss"]


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1)


def check_all(queries: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Every CPU backend, and the blocked one without bf16, against the oracle; returns the indices."""
    expected = nearest_code(queries, codes, bias, backend="dense")
    for backend in CPU_BACKENDS:
        found = nearest_code(queries, codes, bias, backend=backend)
        assert found.dtype == torch.int64
        assert found.tolist() == expected.tolist(), backend
    fp32_only = dataclasses.replace(prepare_codes(codes, bias), bf16_codes=None)
    assert nearest_code(queries, fp32_only).tolist() == expected.tolist()
    return expected


@st.composite
def problems(draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Few distinct values at any magnitude: ties, zero rows, equal rows, cancellation, underflow."""
    n, k, d = draw(st.integers(0, 5)), draw(st.integers(1, 80)), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    scale = 10.0 ** draw(st.integers(-30, 15))
    levels = draw(st.sampled_from([1, 2, 100, 10**6]))
    jitter = draw(st.sampled_from([0.0, 2.0**-22, 2.0**-9]))

    def values(*shape: int) -> torch.Tensor:
        x = rng.integers(-levels, levels + 1, shape) / levels * (1 + jitter * rng.integers(-2, 3, shape))
        return torch.tensor(x * scale, dtype=torch.float32)

    return values(n, d), values(k, d), draw(st.sampled_from([None, values(k), torch.zeros(k)]))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_backends_equal_the_oracle(problem):
    check_all(*problem)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 40]), st.sampled_from([2, 1000]))
def test_oracle_equals_rational_arithmetic(seed, d, levels):
    rng = np.random.default_rng(seed)
    q, c, b = (rng.integers(-levels, levels + 1, shape) for shape in ((4, d), (30, d), 30))
    found = nearest_code(*(torch.tensor(x / 8, dtype=torch.float32) for x in (q, c, b)), backend="dense")
    for row, index in zip(q, found.tolist(), strict=True):
        scores = [
            sum(
                (Fraction(int(x), 8) * Fraction(int(y), 8) for x, y in zip(row, code, strict=True)),
                Fraction(int(bias), 8),
            )
            for code, bias in zip(c, b, strict=True)
        ]
        assert index == scores.index(max(scores))


@pytest.mark.parametrize("bias", [False, True])
def test_many_codes_against_fp64(bias):
    q, c = unit(1100, 40), unit(9001, 40, seed=1)
    b = torch.randn(9001, generator=torch.Generator().manual_seed(2)) if bias else None
    scores = q.double() @ c.double().T + (0 if b is None else b.double())
    expected = scores.argmax(1)
    for backend in CPU_BACKENDS:
        assert torch.equal(nearest_code(q, c, b, backend=backend), expected)


@pytest.mark.parametrize("backend", ["dense", *CPU_BACKENDS])
def test_equal_rows_give_the_lowest_index(backend):
    q, c = unit(300, 40), unit(1000, 40, seed=1)
    found = nearest_code(q, c.repeat(3, 1), backend=backend)
    assert torch.equal(found, nearest_code(q, c, backend=backend))


def test_more_equal_rows_than_candidates_fit():
    q, c = unit(40, 8), unit(7, 8, seed=1)
    assert check_all(q, c.repeat(300, 1)).max() < 7


def test_near_ties_are_decided_in_fp64():
    q = unit(64, 40)
    c = unit(1, 40, seed=1) * (1 + torch.arange(2048)[torch.randperm(2048)][:, None] * 2.0**-23)
    c += 1e-7 * unit(2048, 40, seed=2)
    expected = (q.double() @ c.double().T).argmax(1)
    assert torch.equal(check_all(q, c), expected)
    assert (expected != (q @ c.T).argmax(1)).any()  # or the case would be too easy


def test_crowded_codes_defeat_bf16_but_not_the_search():
    q, c = unit(600, 16), unit(1, 16, seed=1) + 1e-3 * unit(4096, 16, seed=2)
    assert nearest._bf16_screen(q, with_bf16(c)) is None
    assert torch.equal(check_all(q, c), (q.double() @ c.double().T).argmax(1))


@pytest.mark.parametrize("bias", [-10.0, 0.0, 1e6])
def test_bf16_screen_is_exact_where_the_processor_lacks_bf16(bias):
    q, c, b = unit(700, 24), unit(3000, 24, seed=1), torch.full((3000,), bias)
    found = nearest_code(q, with_bf16(c, b), backend="blocked")
    assert torch.equal(found, nearest_code(q, c, b, backend="dense"))


def with_bf16(codes: torch.Tensor, bias: torch.Tensor | None = None) -> nearest.PreparedCodes:
    prepared = prepare_codes(codes, bias)
    bf16 = prepared.codes.bfloat16()
    error = nearest._norms(prepared.codes - bf16).amax()
    return dataclasses.replace(prepared, bf16_codes=bf16, bf16_error=error)


def test_zero_and_broken_queries():
    q = unit(6, 8)
    q[1] = 0
    q[2, 3] = torch.nan
    q[3, 0] = -torch.inf
    c = unit(50, 8, seed=1)
    b = torch.zeros(50)
    b[17] = 0.5
    for backend in ["dense", *CPU_BACKENDS]:
        assert nearest_code(q, c, backend=backend)[1:4].tolist() == [0, 0, 0]
        assert nearest_code(q, c, b, backend=backend)[1:4].tolist() == [17, 17, 17]
    check_all(q, c, b)


def test_zero_codes_tie():
    assert check_all(unit(20, 8), torch.zeros(70, 8)).tolist() == [0] * 20


@pytest.mark.parametrize("scale", [1e-38, 1e-42, 1e17])
def test_extreme_magnitudes(scale):
    check_all(unit(20, 8) * scale, unit(70, 8, seed=1))
    check_all(unit(20, 8), unit(70, 8, seed=1) * scale)
    check_all(unit(20, 8) * 1e21, unit(70, 8, seed=1) * scale)  # the products overflow in fp32


@pytest.mark.parametrize("backend", ["dense", *CPU_BACKENDS])
def test_empty_and_single(backend):
    assert nearest_code(torch.empty(0, 8), unit(5, 8), backend=backend).shape == (0,)
    assert nearest_code(unit(3, 8), unit(1, 8), backend=backend).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_are_cast_to_fp32(dtype):
    q, c = unit(50, 16).to(dtype), unit(400, 16, seed=1).to(dtype)
    assert torch.equal(check_all(q, c), nearest_code(q.float(), c.float()))


def test_views_and_autograd_and_autocast():
    q, c = unit(16, 200).T.requires_grad_(), unit(16, 900, seed=1).T[::2]
    expected = (q.double() @ c.double().T).argmax(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(check_all(q, c), expected)
    with torch.inference_mode():
        assert torch.equal(nearest_code(q, c), expected)


def test_relaxed_matmul_precision_stays_exact(monkeypatch):
    q, c = unit(300, 40), unit(5000, 40, seed=1)
    expected = nearest_code(q, c)
    exact_product = torch.mm
    monkeypatch.setattr(  # what oneDNN or TF32 does to fp32 products where the user allows it
        nearest.torch,
        "mm",
        lambda a, b, out: exact_product(a.bfloat16().float(), b.bfloat16().float(), out=out),
    )
    fp32_only = dataclasses.replace(prepare_codes(c), bf16_codes=None)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(nearest_code(q, fp32_only, backend="blocked"), expected)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_no_tensor_is_nearly_as_large_as_the_scores():
    q, c = unit(2000, 8), unit(8192, 8, seed=1)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    with Largest() as largest:
        nearest_code(q, c)
    assert largest.numel <= 2**22 < q.shape[0] * c.shape[0] / 3


def test_prepared_codes_serve_many_searches():
    c, b = unit(100, 8), torch.linspace(0, 1, 100)
    prepared = prepare_codes(c, b)
    for seed in range(3):
        q = unit(30, 8, seed=seed)
        assert torch.equal(nearest_code(q, prepared), nearest_code(q, c, b))


def test_errors_name_what_is_wrong(monkeypatch):
    c = unit(10, 8)
    with pytest.raises(UserError, match=r"queries must be \[N, 8\] like the codes, got \[3, 7\]"):
        nearest_code(torch.zeros(3, 7), c)
    with pytest.raises(UserError, match=r"codes must be \[K, D\] with K >= 1, got \[0, 8\]"):
        nearest_code(torch.zeros(3, 8), torch.zeros(0, 8))
    with pytest.raises(UserError, match=r"bias must be \[10\] like the codes, got \[9\]"):
        nearest_code(torch.zeros(3, 8), c, torch.zeros(9))
    with pytest.raises(UserError, match="finite"):
        nearest_code(torch.zeros(3, 8), c * torch.nan)
    with pytest.raises(UserError, match="give the bias to prepare_codes"):
        nearest_code(torch.zeros(3, 8), prepare_codes(c), torch.zeros(10))
    with pytest.raises(
        UserError, match=r'at most 16,777,216 scores, got 20,000 queries x 1,000 codes: use "auto"'
    ):
        nearest_code(torch.ones(20000, 1), torch.ones(1000, 1), backend="dense")
    with pytest.raises(UserError, match='unknown backend "annoy"'):
        nearest_code(unit(1, 8), c, backend="annoy")  # type: ignore[arg-type]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match='backend "triton" needs a CUDA device, and the queries are on cpu'):
        nearest_code(unit(1, 8), c, backend="triton")


TRITON_CASES = """
import torch
from tokenflow.tokenizer.nearest import nearest_code
from tokenflow.tokenizer.nearest_triton import top_two

torch.manual_seed(0)
for n, k, d in ((1, 1, 3), (70, 200, 40), (3, 700, 17)):
    q, c, b = torch.randn(n, d), torch.randn(k, d), torch.randn(k)
    q[0] = 0
    first, index, second = top_two(q, c)
    scores = (q @ c.T).sort(dim=1, descending=True).values
    torch.testing.assert_close(first, scores[:, 0])
    if k > 1:
        torch.testing.assert_close(second, scores[:, 1])
    for codes, bias in ((c, None), (c.repeat(2, 1), b.repeat(2)), (torch.zeros(k, d), None)):
        expected = nearest_code(q, codes, bias, backend="dense")
        assert torch.equal(nearest_code(q, codes, bias, backend="triton"), expected), (n, k, d)
print("equal")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no wheel for this platform"
)
def test_triton_kernel_in_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", TRITON_CASES], env=env, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_cuda(backend):
    q, c = unit(3000, 40), unit(20000, 40, seed=1)
    c = torch.cat([c, c])
    found = nearest_code(q.cuda(), c.cuda(), backend=backend)
    assert torch.equal(found.cpu(), nearest_code(q, c))
