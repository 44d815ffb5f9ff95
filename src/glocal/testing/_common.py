"""Helpers of the base testers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Bad = tuple[Callable[[], object], str]


def draw(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers from a generator of their own."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(ours: Tensor, reference: Tensor, tolerance: float, what: str) -> None:
    """Assert that the largest error is at most `tolerance` of the reference's largest magnitude."""
    from glocal.testing.tolerance import compare

    found = compare(what, ours, reference, tolerance)
    assert found.passed, f"{what}: {found.why}"


def strided(x: Tensor) -> Tensor:
    """The same values in memory that is transposed and has gaps."""
    wide = torch.stack((x, x), -1).transpose(0, -2).contiguous().transpose(0, -2)
    out = wide[..., 0]
    assert torch.equal(out, x)
    return out


def refused(bad: Sequence[Bad]) -> None:
    """Assert that every call raises a ValueError whose words contain the given text."""
    for call, text in bad:
        try:
            call()
        except ValueError as error:
            assert text in str(error), f"expected the words {text!r} in {str(error)!r}"
        else:
            raise AssertionError(f"nothing was raised; expected a ValueError that says {text!r}")
