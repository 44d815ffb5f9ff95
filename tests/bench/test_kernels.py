"""The suite of kernels on the CPU: rows, checks, and what a wrong contender gets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from glocal.bench import kernels, suites
from glocal.bench.kernel_cases import CASES, Case
from glocal.bench.suites import Options
from glocal.ops import attention

SMALL = Case("window", (12, 16), 2, 16, window=(6, 8), stride=(1, 1), tile=(4, 4))


@pytest.fixture(autouse=True)
def two_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU backend and dense attention on a small case."""
    monkeypatch.setattr(kernels, "CASES", (SMALL, replace(SMALL, passes="backward", ordered=True)))
    monkeypatch.setattr(
        kernels,
        "sparse_contenders",
        lambda case, made, device: {"cpu": lambda q, k, v: attention(q, k, v, made, backend="cpu")},
    )
    monkeypatch.setattr(
        kernels, "dense_contenders", lambda case, device: {"cuDNN dense": lambda q, k, v: attention(q, k, v)}
    )


def records(rows: list[tuple]) -> list[dict]:
    return [dict(zip(kernels.COLUMNS, row, strict=True)) for row in rows]


def test_rows_come_case_by_case_with_ratios() -> None:
    seen: list[int] = []
    rows = records(kernels.run(Options("cpu", None, 2, emit=lambda new: seen.append(len(new)))))
    assert seen == [2, 2] and {r["pass"] for r in rows} == {"forward", "backward"}
    mine = next(r for r in rows if r["contender"] == "cpu")
    assert float(mine["ms"]) > 0 and float(mine["over_dense"]) > 0 and mine["dense"] == "cuDNN dense"
    assert float(mine["ideal"]) == pytest.approx(12 * 16 / 48) and float(mine["error"]) < kernels.LIMIT
    assert kernels.wrong(rows) == []


def test_a_wrong_contender_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        kernels, "sparse_contenders", lambda case, made, device: {"cpu": lambda q, k, v: 2 * attention(q, k, v)}
    )
    rows = records(kernels.run(Options("cpu", None, 2)))
    mine = [r for r in rows if r["contender"] == "cpu"]
    assert mine and all(r["ms"] == "" and "off by" in r["note"] for r in mine)
    assert len(kernels.wrong(rows)) == 2


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match="suite='kernel' is unknown; legal: kernels, .*; nearest: kernels"):
        suites.suite("kernel")
    with pytest.raises(ValueError, match="case='windw' is unknown; legal: window; nearest: window"):
        kernels.run(Options("cpu", ("windw",)))
    with pytest.raises(ValueError, match="planning is timed on CUDA"):
        suites.suite("planning").run(Options("cpu"))


def test_every_case_has_a_twin_that_is_small_and_keeps_its_blocks() -> None:
    for case in CASES:
        twin = case.small
        assert twin.tokens <= 4096 and (twin.tile, twin.head_dim, twin.passes) == (
            case.tile,
            case.head_dim,
            case.passes,
        )
        if twin.pattern is not None and twin.tile:
            made = twin.compiled("cpu")
            assert made.q_block == torch.tensor(case.tile).prod() and 0 < made.kept < 1
