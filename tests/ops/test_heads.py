from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glocal.canvas import Canvas
from glocal.ops import HeadGroup, attention, heads
from glocal.patterns import Causal, Neighborhood


def qkv(generator: torch.Generator, q_heads: int = 4, kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, q_heads, 9, 8, generator=generator)
    k, v = torch.randn(2, 2, kv_heads, 9, 8, generator=generator)
    return q, k, v


def test_each_group_runs_its_own_operator(generator: torch.Generator) -> None:
    q, k, v = qkv(generator)
    canvas = Canvas((9,))
    pooled_k, pooled_v = k[:, 3:, ::3], v[:, 3:, ::3]
    found = heads(
        [
            (slice(0, 2), {"pattern": Neighborhood(3), "canvas": canvas}),
            ([2], lambda q, k, v: attention(q, k, v, Causal(), canvas=canvas)),
            HeadGroup([3], attention, pooled_k, pooled_v),
        ],
        q,
        k,
        v,
    )
    torch.testing.assert_close(found[:, :2], attention(q, k, v, Neighborhood(3), canvas=canvas)[:, :2])
    torch.testing.assert_close(found[:, 2], attention(q, k, v, Causal(), canvas=canvas)[:, 2])
    torch.testing.assert_close(found[:, 3:], attention(q[:, 3:], pooled_k, pooled_v))


def test_the_given_order_is_kept(generator: torch.Generator) -> None:
    q, k, v = qkv(generator)
    dense = attention(q, k, v)
    found = heads([(slice(2, 4), attention), (slice(0, 2), attention)], q, k, v)
    torch.testing.assert_close(found, torch.cat([dense[:, 2:], dense[:, :2]], 1))
    scattered = heads([([3, 0], attention), ([1, 2], attention)], q, k, v)
    torch.testing.assert_close(scattered, dense[:, [3, 0, 1, 2]])


def test_grouped_heads(generator: torch.Generator) -> None:
    q, k, v = qkv(generator, 6, 3)
    found = heads([(slice(0, 2), {}), (slice(2, 6), {})], q, k, v)
    torch.testing.assert_close(found, attention(q, k, v))
    with pytest.raises(ValueError, match=r"group \[0, 1, 2\] splits query heads that share a head of k \(2 to 1\)"):
        heads([(slice(0, 3), attention), (slice(3, 6), attention)], q, k, v)


def test_errors(generator: torch.Generator) -> None:
    q, k, v = qkv(generator)
    with pytest.raises(ValueError, match=r"heads \[1\] are in two groups"):
        heads([(slice(0, 2), attention), (slice(1, 4), attention)], q, k, v)
    with pytest.raises(ValueError, match=r"heads \[3\] are in no group"):
        heads([(slice(0, 3), attention)], q, k, v)
    with pytest.raises(ValueError, match=r"heads \[7\] do not exist"):
        heads([(slice(0, 4), attention), ([7], attention)], q, k, v)
    with pytest.raises(ValueError, match=r"group of heads \[0, 1, 2, 3\] has no k"):
        heads([(slice(0, 4), attention)], q)
    with pytest.raises(ValueError, match=r"branch of heads \[0, 1, 2, 3\] returned 1 heads, not 4"):
        heads([(slice(0, 4), lambda q, k, v: q[:, :1])], q, k, v)


def test_gradients_reach_every_group(generator: torch.Generator) -> None:
    q, k, v = (t.requires_grad_() for t in qkv(generator))
    heads([(slice(0, 1), attention), (slice(1, 4), attention)], q, k, v).square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().amax((0, 2, 3)).gt(0).all() for t in (q, k, v))
