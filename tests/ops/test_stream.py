"""A branch joins the stream and the sum is normed, scaled and shifted: as written with torch, step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glocal.ops.stream import joined


def steps(g: torch.Generator, tokens: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """x and branch [2, 5, 12]; gate, scale and shift of each sample, or of each token too; weight and bias."""
    wide = {n: torch.randn(2, 5, 12, generator=g, dtype=dtype) for n in ("x", "branch")}
    rows = {n: torch.randn(2, tokens, 12, generator=g, dtype=torch.float32) for n in ("gate", "scale", "shift")}
    return wide | rows | {n: torch.randn(12, generator=g, dtype=dtype) for n in ("weight", "bias")}


@pytest.mark.parametrize("tokens", [1, 5])
def test_all_of_it(tokens: int, generator: torch.Generator) -> None:
    t = steps(generator, tokens, torch.float32)
    total, normed = joined(
        t["x"], t["branch"], t["gate"], norm=(t["weight"], t["bias"]), change=(t["scale"], t["shift"]), eps=1e-5
    )
    whole = t["x"] + t["branch"] * t["gate"]
    torch.testing.assert_close(total, whole)
    away = whole - whole.mean(-1, keepdim=True)
    want = away / (away.square().mean(-1, keepdim=True) + 1e-5).sqrt() * t["weight"] + t["bias"]
    torch.testing.assert_close(normed, want * (1 + t["scale"]) + t["shift"])


def test_parts_may_be_left_out(generator: torch.Generator) -> None:
    t = steps(generator, 1, torch.bfloat16)
    total, normed = joined(t["x"])
    assert total is t["x"] and normed is not None and normed.dtype == torch.bfloat16
    torch.testing.assert_close(normed.float().mean(-1), torch.zeros(2, 5), atol=2e-2, rtol=0)
    total, nothing = joined(t["x"], t["branch"], eps=None)
    assert nothing is None
    torch.testing.assert_close(total, (t["x"].float() + t["branch"].float()).bfloat16())


def test_the_sum_is_rounded_before_it_is_normed(generator: torch.Generator) -> None:
    t = steps(generator, 1, torch.bfloat16)
    total, normed = joined(t["x"], t["branch"], t["gate"])
    again = joined(total)[1]
    assert normed is not None and again is not None
    torch.testing.assert_close(normed, again, rtol=0, atol=0)


def test_gradients(generator: torch.Generator) -> None:
    t = {n: v.float().requires_grad_() for n, v in steps(generator, 1).items()}
    total, normed = joined(t["x"], t["branch"], t["gate"], change=(t["scale"], t["shift"]))
    assert normed is not None
    (total.sum() + normed.square().sum()).backward()
    assert all(bool(t[n].grad.abs().sum() > 0) for n in ("x", "branch", "gate", "scale", "shift"))  # type: ignore[union-attr]
