"""Sums and products in the types they are written in, also under autocast, which would round their factors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def exact(t: Tensor) -> AbstractContextManager[Any]:
    """Autocast off where `t` lies, if it is on there."""
    device = t.device.type
    on = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
