"""Layer scale (arXiv 2103.17239): a learned factor per channel on a residual branch.

Published checkpoints hold the factor as a parameter of the block under many names (`gamma1`, `gamma_1`, `ls1.gamma`);
a block therefore owns the parameter and `scaled` applies it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gamma(dim: int, init: float | None) -> nn.Parameter | None:
    """A factor of `dim` channels that starts at `init`; None for a branch without one."""
    return None if init is None else nn.Parameter(torch.full((dim,), float(init)))


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    """x: [..., dim] times the factor, or x where there is none."""
    return x if factor is None else x * factor
