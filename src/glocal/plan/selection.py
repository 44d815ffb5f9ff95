"""Compile a router's Selection into a BlockPlan."""

from __future__ import annotations

import torch

from glocal.plan.blockplan import BlockPlan
from glocal.routing.selection import Selection


def plan_selection(selection: Selection, *, device: torch.device | str = "cpu") -> BlockPlan:
    """A BlockPlan of `selection`."""
    raise ValueError("")
