"""Kernels around routers of blocks against plain torch; under the interpreter of Triton where there is no CUDA.

`test_triton_groups.py` starts this file in a process of its own, because the interpreter must be chosen before anything
imports Triton. On a machine with CUDA: ``pytest tests/kernels/triton_group_cases.py``.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from glocal.kernels.triton import groups
from glocal.ops.epilogue import rectify
from glocal.routing.keep import plain_by_mass
from glocal.routing.partition import Partition
from glocal.routing.shares import plain_stats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
READY = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not READY, reason="no CUDA device, TRITON_INTERPRET is not 1")


def members(tokens: int, most: int, generator: torch.Generator) -> Tensor:
    """Groups of scattered tokens, the last one with pads."""
    found = torch.full((-(-tokens // most) * most,), -1, dtype=torch.int32)
    found[:tokens] = torch.randperm(tokens, generator=generator).int()
    return found.reshape(-1, most)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("sizes", [(77, 16, 24), (50, 50, 7), (33, 9, 16)], ids=str)
def test_means_and_spreads(whole: bool, sizes: tuple[int, int, int], generator: torch.Generator) -> None:
    tokens, most, dim = sizes
    x = torch.randn(2, tokens, 3, dim, generator=generator).to(DEVICE).transpose(1, 2)  # strides of a host
    part = members(tokens, most, generator).to(DEVICE)
    want = plain_stats(x, Partition(part[None, None], "groups"), whole, True)
    for mine, plain in zip(groups.group_stats(x, part, whole, True), want, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)
    mean, none = groups.group_stats(x, part, whole, False)
    torch.testing.assert_close(mean, want[0], rtol=1e-5, atol=1e-6)
    assert none.numel() == 0


def test_groups_that_do_not_fit_are_known() -> None:
    assert groups.holds(128, 128) and groups.holds(256, 128) and not groups.holds(257, 128)


@pytest.mark.parametrize("budget", [(0.0, 1, 5), (0.3, 0, 0), (0.9, 0, 50), (0.2, 1, 3)], ids=str)
@pytest.mark.parametrize("columns", [1, 37])
def test_columns_by_mass(budget: tuple[float, int, int], columns: int, generator: torch.Generator) -> None:
    scores = torch.randn(1, 2, 3, columns, generator=generator).mul(2).round().div(2)  # with ties
    scores[torch.rand(scores.shape, generator=generator) < 0.2] = -torch.inf
    scores[0, 0, 0] = -torch.inf
    scores[0, 1, 0, : columns // 2] = -0.0
    mine, plain = groups.by_mass(scores.to(DEVICE), *budget).cpu(), plain_by_mass(scores, *budget)
    assert torch.equal(mine, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_rectified_by_group(dtype: torch.dtype, generator: torch.Generator) -> None:
    out = torch.randn(2, 3, 77, 24, generator=generator).to(dtype)
    label = torch.randint(-1, 6, (77,), generator=generator).int()
    scale = torch.rand(2, 3, 6, generator=generator)
    add = torch.randn(2, 3, 6, 24, generator=generator).to(dtype)
    mine = groups.rectify(*(t.to(DEVICE) for t in (out, label, scale, add))).cpu()
    torch.testing.assert_close(mine, rectify(out, label, scale, add))
