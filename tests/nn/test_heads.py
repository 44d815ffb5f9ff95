"""Joint projections cut into heads."""

from __future__ import annotations

import torch

from glocal.nn._heads import _Split, split_heads


def test_parts_and_heads() -> None:
    x = torch.arange(2 * 3 * 12.0).reshape(2, 3, 12)
    q, k, v = split_heads(x, 3, 2)
    assert q.shape == (2, 2, 3, 2) and torch.equal(k[1, 0, 2], x[1, 2, 4:6]) and torch.equal(v[0, 1, 1], x[0, 1, 10:])
    assert all(part.data_ptr() != q.data_ptr() or part is q for part in (q, k, v)) and q._base is not None
    assert [t.shape for t in split_heads(x[:0], 3, 2)] == [(0, 2, 3, 2)] * 3


def test_gradients_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: _Split.apply(t, 3, 2), (x,))
    weights = [torch.randn(2, 2, 5, 4, dtype=torch.float64) for _ in range(3)]
    found = []
    for cut in (split_heads, _Split.apply):
        q, _k, v = cut(x, 3, 2)
        loss = (q * weights[0]).sum() + (v.sin() * weights[2]).sum()  # k is left out
        found.append(torch.autograd.grad(loss, x)[0])
    assert torch.equal(*found) and not found[0][..., 8:16].any()


def test_gradients_that_lie_side_by_side_are_not_copied() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    whole = torch.randn_like(x)
    loose = [t.contiguous() for t in split_heads(whole, 3, 2)]
    taken = []
    x.register_hook(lambda grad: taken.append(grad.data_ptr()))
    for given in (split_heads(whole, 3, 2), loose, [*split_heads(whole, 3, 2)[:2], loose[2]]):
        parts = _Split.apply(x, 3, 2)
        assert torch.equal(torch.autograd.grad(parts, x, given)[0], whole)
    assert taken[0] == whole.data_ptr() and whole.data_ptr() not in taken[1:]
