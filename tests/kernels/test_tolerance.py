"""Every backend on every case and precision: out, LSE and all gradients against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glocal.kernels import registry

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "dense", "flex", "reference"])
def test_fault_13_precision_of_values_and_gradients(case: Any, backend: str, dtype: torch.dtype, examine: Any) -> None:
    capability = next(b.capability for b in registry.backends() if b.name == backend)
    if not (capability.dense if case.pattern is None else capability.sparse):
        return  # this backend is for the other kind of call
    if dtype not in capability.dtypes:
        return
    examine(case, backend, dtype)
