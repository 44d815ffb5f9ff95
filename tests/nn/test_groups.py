"""Attention inside groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from glocal.nn import _groups
from glocal.nn._groups import attend_groups


class _OnDevice(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU, so that the rules for GPUs are looked at here."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("masked", ["", "one", "each"])
def test_groups_beyond_a_launch_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch, masked: str) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(_groups, "_GRID", 4)
    q, k, v = (torch.randn(10, 2, n, 8) for n in (3, 5, 5))
    mask = {"": None, "one": torch.randn(1, 2, 3, 5), "each": torch.randn(10, 2, 3, 5)}[masked]
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    there = [t.as_subclass(_OnDevice) for t in (q, k, v)]
    found = attend_groups(there[0], there[1], there[2], mask)
    assert torch.allclose(found.as_subclass(torch.Tensor), wanted, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("groups", [40_000, 70_000])
def test_many_groups_on_a_gpu(groups: int) -> None:
    """More than 65,535 groups times heads, forward and backward."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(groups, 2, n, 24, device="cuda", dtype=torch.bfloat16) for n in (16, 21, 21))
    given = [t.requires_grad_() for t in (q, k, v)]
    out = attend_groups(given[0], given[1], given[2])
    out.sum().backward()
    few = [t.detach()[-5:].float().requires_grad_() for t in given]
    wanted = F.scaled_dot_product_attention(few[0], few[1], few[2])
    wanted.sum().backward()
    assert torch.allclose(out[-5:].float(), wanted, atol=2e-2)
    for have, want in zip(given, few, strict=True):
        assert have.grad is not None and want.grad is not None
        assert torch.allclose(have.grad[-5:].float(), want.grad, atol=3e-2)
