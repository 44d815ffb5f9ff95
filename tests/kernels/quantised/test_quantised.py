"""Quantised attention: asked for alone, its definition near exact attention, its error told; kernels interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from glocal.canvas import Canvas
from glocal.kernels.quant import Quant
from glocal.ops import Score, attend, attention, explain
from glocal.patterns import Neighborhood, TileWindows
from glocal.plan.build import PlanSpec, plan

CASES = Path(__file__).with_name("cases.py")
CANVAS, PATTERN = Canvas((8, 40)), Neighborhood((5, 21))


def inputs(generator: torch.Generator, heads: tuple[int, int] = (2, 2), d: int = 32) -> list[torch.Tensor]:
    return [torch.randn(1, h, 320, d, generator=generator) for h in (*heads, heads[1])]


def error(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found - want).norm() / want.norm())


@pytest.mark.parametrize("quant, most", [
    (Quant("int8"), 0.02),
    (Quant("int8", "int8"), 0.03),
    (Quant("fp8", "none"), 0.06),
    (Quant("fp8", "fp8", (1, 16)), 0.08),
    (Quant("int4"), 0.3),
], ids=str)  # fmt: skip
def test_error_against_exact_attention(quant: Quant, most: float, generator: torch.Generator) -> None:
    q, k, v = inputs(generator, (4, 2))
    want = attend(q, k, v, PATTERN, canvas=CANVAS, backend="reference")
    found = attend(q, k, v, PATTERN, canvas=CANVAS, score=Score(quant=quant))
    assert found.picked.name == "quantised" and found.approximation is not None
    assert 1e-4 < error(found.out, want.out) < most
    torch.testing.assert_close(found.lse, want.lse, rtol=0, atol=most)
    told = found.approximation
    assert told.what == str(quant) and told.rows > 0
    assert 0.5 * error(found.out, want.out) < told.error < 2 * error(found.out, want.out)
    assert want.approximation is None


def test_smoothing_keys_helps_where_they_share_a_mean(generator: torch.Generator) -> None:
    q, k, v = inputs(generator)
    k = k + 8 * torch.randn(1, 2, 1, 32, generator=generator)
    want = attend(q, k, v, PATTERN, canvas=CANVAS, backend="reference")
    rough, smooth = (
        attend(q, k, v, PATTERN, canvas=CANVAS, score=Score(quant=Quant(smooth_k=s))) for s in (False, True)
    )
    assert error(smooth.out, want.out) < 0.5 * error(rough.out, want.out)
    torch.testing.assert_close(smooth.lse, want.lse, rtol=0, atol=0.3)


def test_values_that_int8_holds_are_exact(generator: torch.Generator) -> None:
    """Integers up to 127 in every group round to themselves: only the order of sums differs."""
    q, k = (torch.randint(-127, 128, (1, 1, 320, 32), generator=generator).float() for _ in range(2))
    q[..., 0], k[..., 0] = 127, 127
    v = torch.randn(1, 1, 320, 32, generator=generator)
    found = attend(q, k, v, PATTERN, canvas=CANVAS, score=Score(scale=1e-5, quant=Quant()))
    want = attend(q, k, v, PATTERN, canvas=CANVAS, score=Score(scale=1e-5), backend="reference")
    torch.testing.assert_close(found.out, want.out, rtol=1e-5, atol=1e-5)


def test_block_order_of_paro(generator: torch.Generator) -> None:
    """Groups follow the plan's order: where tiles hold like tokens, scales fit them better than in raster order."""
    canvas, pattern = Canvas((16, 16)), TileWindows(8, 2)
    size = torch.ones(16, 16)
    size[:, ::2] = 30
    size = torch.where(torch.arange(16)[None] < 8, size, 1).flatten()
    q, k, v = (torch.randn(1, 1, 256, 32, generator=generator) for _ in range(3))
    k = k * size[:, None] / 30
    want = attention(q, k, v, pattern, canvas=canvas, backend="reference")
    fine, coarse = (
        attention(q, k, v, plan(pattern, canvas, PlanSpec(64, 64)), score=Score(quant=Quant(group=group)))
        for group in ((1, 1), (64, 64))
    )
    assert error(fine, want) < error(coarse, want)


def test_nothing_rounds_unasked(generator: torch.Generator) -> None:
    q, k, v = inputs(generator)
    assert attend(q, k, v, PATTERN, canvas=CANVAS).picked.name == "cpu"
    with pytest.raises(ValueError, match=r"backend='quantised' cannot run this call: exact attention \(not supported"):
        attention(q, k, v, PATTERN, canvas=CANVAS, backend="quantised")
    with pytest.raises(ValueError, match=r"backend='cpu' cannot run this call: quantisation \(not supported\).*quanti"):
        attention(q, k, v, PATTERN, canvas=CANVAS, score=Score(quant=Quant()), backend="cpu")
    text = explain(q, k, v, PATTERN, canvas=CANVAS, score=Score(quant=Quant()))
    assert "runs: quantised" in text and "cpu: refuses quantisation (not supported)" in text


def test_refusals_in_words(generator: torch.Generator) -> None:
    q, k, v = (t.requires_grad_() for t in inputs(generator))
    with pytest.raises(ValueError, match=r"quantised: gradients \(not supported\)"):
        attention(q, k, v, PATTERN, canvas=CANVAS, score=Score(quant=Quant()))
    with pytest.raises(ValueError, match=r"quantised: dense attention \(not supported\)"), torch.no_grad():
        attention(q, k, v, score=Score(quant=Quant()))
    with (
        pytest.raises(ValueError, match="group=.48, 64.: 48 queries a scale must divide the block of 64"),
        torch.no_grad(),
    ):
        attention(q, k, v, PATTERN, canvas=CANVAS, score=Score(quant=Quant(group=(48, 64))))
    with pytest.raises(ValueError, match="Quant: qk='int2'; legal: 'int8', 'fp8', 'int4'."):
        Quant("int2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Quant: group=0 must be two positive numbers"):
        Quant(group=0)  # type: ignore[arg-type]


def test_compiles_whole(generator: torch.Generator) -> None:
    q, k, v = inputs(generator)
    score = Score(quant=Quant())
    want = attention(q, k, v, PATTERN, canvas=CANVAS, score=score)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, PATTERN, canvas=CANVAS, score=score)

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), want)


def test_the_word_of_a_quant() -> None:
    quant = Quant("fp8", "fp8", (64, 128), smooth_k=True)
    assert Quant.of_word(quant.word) == quant
    assert str(quant) == (
        "q and k in fp8 by groups of 64 and 128 tokens, weights and values in fp8, keys less their mean"
    )


def run_cases(**more: str) -> subprocess.CompletedProcess[str]:
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"}, **more}
    command: list[Any] = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(CASES)]
    return subprocess.run(command, env=environment, cwd=CASES.parents[3], capture_output=True, text=True)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_under_the_interpreter() -> None:
    done = run_cases(TRITON_INTERPRET="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "no CUDA device" not in done.stdout


@pytest.mark.gpu
def test_kernels_compiled_on_a_gpu() -> None:
    done = run_cases()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
