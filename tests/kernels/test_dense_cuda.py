"""Which dense kernel of a CUDA device takes a call: a choice by shapes alone."""

from __future__ import annotations

import pytest
import torch

from glocal.kernels import _dense_cuda
from glocal.kernels.call import Call


@pytest.mark.parametrize(
    ("batch", "heads", "expected"),
    [(2, 4, "cudnn"), (16_383, 4, "cudnn"), (16_384, 4, "flash"), (65_536, 1, "tiles"), (1, 70_000, "tiles")],
)
def test_many_small_samples_stay_within_the_grid(
    batch: int, heads: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dense_cuda, "_cudnn", lambda device: True)
    monkeypatch.setattr(_dense_cuda, "_triton", lambda: True)
    q = torch.empty(batch, heads, 4, 32, dtype=torch.bfloat16, device="meta")
    assert _dense_cuda.engine(q, q, q, Call("dense", 32**-0.5)) == expected


def test_what_the_fused_kernels_refuse_goes_to_our_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dense_cuda, "_cudnn", lambda device: True)
    monkeypatch.setattr(_dense_cuda, "_triton", lambda: True)
    q = torch.empty(1, 2, 4, 32, dtype=torch.bfloat16, device="meta")
    assert _dense_cuda.engine(q, q, q, Call("dense", 0.1, softcap=5.0)) == "tiles"
    assert (
        _dense_cuda.engine(q, q, torch.empty(1, 2, 4, 64, dtype=q.dtype, device="meta"), Call("dense", 0.1)) == "tiles"
    )
    assert _dense_cuda.engine(q.float(), q.float(), q.float(), Call("dense", 0.1)) == "tiles"
    assert _dense_cuda.engine(q.double(), q.double(), q.double(), Call("dense", 0.1)) is None
