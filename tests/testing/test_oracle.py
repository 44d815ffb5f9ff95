from __future__ import annotations

import torch

from glocal.testing import dense_attention, oracle


def test_dense_equals_torch(generator: torch.Generator) -> None:
    q = torch.randn(2, 4, 5, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 7, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(dense_attention(q, k, v).out, want)


def test_blind_rows_are_zero_without_gradient(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 1, 3, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    seen = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 0]])
    done = dense_attention(q, k, v, seen)
    assert bool((done.out[0, 0, 1] == 0).all()) and done.lse[0, 0, 1] == -torch.inf
    done.out.sum().backward()
    assert q.grad is not None and v.grad is not None
    assert bool((q.grad[0, 0, 1] == 0).all()) and bool((v.grad[0, 0, 1] == 0).all())


def test_a_key_listed_twice_counts_twice(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 1, 3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    twice = dense_attention(q, k, v, torch.tensor([[2, 1, 0]]).expand(3, 3))
    other = dense_attention(q, k[:, :, [0, 0, 1]], v[:, :, [0, 0, 1]])
    torch.testing.assert_close(twice.out, other.out)
    torch.testing.assert_close(twice.lse, other.lse)


def test_rows_of_a_neighbourhood_hold_the_window() -> None:
    for length, window, stride, dilation in ((9, 4, 1, 1), (11, 3, 3, 2), (7, 7, 2, 1), (13, 4, 2, 3)):
        seen = oracle.axiswise((length,), [oracle.neighborhood(length, window, stride, dilation)])
        assert bool((seen.sum(1) == window).all())
    causal = oracle.axiswise((9,), [oracle.neighborhood(9, 4, causal=True)])
    assert causal.sum(1).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4]


def test_windows_and_clipped_borders() -> None:
    assert oracle.axiswise((5,), [oracle.windowed(2)]).sum(1).tolist() == [2, 2, 2, 2, 1]
    assert oracle.axiswise((5,), [oracle.clipped(1, 2)]).sum(1).tolist() == [3, 4, 4, 3, 2]


def test_strided_shards_cover_everything_together() -> None:
    masks = [oracle.relation((24,), (24,), oracle.strided_shard(4, 1, 3, 3, head)) for head in range(3)]
    assert torch.equal(torch.stack(masks).any(0), torch.ones(24, 24, dtype=torch.bool).tril())


def test_radial_blocks_are_dense_for_two_frames() -> None:
    assert bool(oracle.radial_blocks(2, 128, 64, 1.0, sink=False).all())
