"""The permutation kernels against their definition; `test_windows.py` starts this file under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from glocal.kernels import permute as definition
from glocal.kernels.permute import Finish
from glocal.kernels.triton import permute

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no CUDA device, TRITON_INTERPRET is not 1"),
    pytest.mark.usefixtures("interpreter"),
]
N = 21 if INTERPRETED else 1021


def packed(g: torch.Generator, size: int, dtype: torch.dtype) -> list[Tensor]:
    """q of four heads, k and v of two, as views of one [B, N, 3, H, D]."""
    qkv = torch.randn(2, N, 3, 4, size, generator=g).to(DEVICE, dtype)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    return [q, k[:, :2], v[:, 2:]]


def orders(g: torch.Generator) -> dict[str, Tensor]:
    """One for all, with pads and repeats; and one for each sample and key head."""
    one = torch.randperm(N, generator=g)
    one[3], one[5] = -1, one[4]
    each = torch.stack([torch.randperm(N, generator=g)[: N - 4] for _ in range(4)]).view(2, 2, N - 4)
    return {"one": one.int()[None, None].to(DEVICE), "each": each.int().to(DEVICE)}


def finishes(g: torch.Generator, size: int, kind: str) -> Finish:
    """Norm and rotation of four heads."""
    cos, sin = (torch.randn(N, size, generator=g).to(DEVICE)[:, ::2] for _ in "cs")
    weight = torch.rand(4 * size if kind == "across" else size, generator=g).to(DEVICE)
    return {
        "norm": Finish(weight),
        "side by side": Finish(None, 0.0, cos, sin),
        "apart": Finish(weight, 1e-5, cos, sin, interleaved=False),
        "across": Finish(weight, 1e-5, cos, sin),
    }[kind]


def close(found: Tensor, want: Tensor) -> None:
    """To a rounding of the dtype."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[want.dtype]
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("order", ["one", "each"])
@pytest.mark.parametrize(("size", "dtype"), [(6, torch.float32), (16, torch.bfloat16), (64, torch.float16)])
def test_moves_are_exact(order: str, size: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    tensors, chosen = packed(generator, size, dtype), orders(generator)[order]
    usual = definition.gather_rows(tensors, chosen)
    for have, want in zip(permute.gather_rows(tensors, chosen), usual, strict=True):
        assert torch.equal(have, want)
    moved = usual[0].transpose(2, 3).contiguous().transpose(2, 3)  # channels far apart
    chosen = torch.where(chosen == -1, -1, chosen)
    if order == "one":
        chosen[..., 5] = -1
    assert torch.equal(permute.scatter_rows(moved, chosen, N), definition.scatter_rows(moved, chosen, N))
    into = torch.randn(2, 4, N, size, generator=generator).to(DEVICE, dtype)
    want = definition.scatter_rows(moved, chosen, N, into.clone())
    assert torch.equal(permute.scatter_rows(moved, chosen, N, into), want)


def test_sums_over_repeats(generator: torch.Generator) -> None:
    for chosen in orders(generator).values():
        t = torch.randn(2, 4, chosen.shape[2], 6, generator=generator).to(DEVICE)
        close(permute.sum_rows(t, chosen, N), definition.sum_rows(t, chosen, N))
        first = permute.sum_rows(t, chosen, N)
        chosen[..., 0] = chosen[..., 1]  # changed in place: what was sorted before no longer counts
        close(permute.sum_rows(t, chosen, N), definition.sum_rows(t, chosen, N))
        assert not torch.equal(first, permute.sum_rows(t, chosen, N))


@pytest.mark.parametrize("kind", ["norm", "side by side", "apart", "across"])
@pytest.mark.parametrize(("size", "dtype"), [(6, torch.float32), (16, torch.bfloat16)])
def test_norm_and_rotation(kind: str, size: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    step = finishes(generator, size, kind)
    few = Finish(None if step.weight is None else step.weight[: 2 * size if kind == "across" else size], step.eps,
                 step.cos, step.sin, step.interleaved)  # fmt: skip
    tensors = packed(generator, size, dtype)
    for name, chosen in orders(generator).items():
        if kind == "across" and name == "each":
            continue
        steps = [step, few, None]
        usual = definition.gather_rows(tensors, chosen, steps)
        for have, want in zip(permute.gather_rows(tensors, chosen, steps), usual, strict=True):
            close(have, want)
        if name == "one":
            chosen[..., 5] = -1
        close(
            permute.scatter_rows(usual[0], chosen, N, finish=step),
            definition.scatter_rows(usual[0], chosen, N, finish=step),
        )


def test_angles_of_each_head_and_sample(generator: torch.Generator) -> None:
    q = packed(generator, 8, torch.float32)[0]
    cos, sin = (torch.randn(2, 4, N, 4, generator=generator).to(DEVICE) for _ in "cs")
    chosen = orders(generator)["each"]
    for interleaved in (True, False):
        steps = [Finish(None, 0.0, cos, sin, interleaved)]
        close(permute.gather_rows([q], chosen, steps)[0], definition.gather_rows([q], chosen, steps)[0])


def test_nothing_to_move() -> None:
    order = torch.zeros(1, 1, 0, dtype=torch.int32, device=DEVICE)
    t = torch.ones(2, 3, 5, 4, device=DEVICE)
    assert permute.gather_rows([t], order)[0].shape == (2, 3, 0, 4)
    assert bool((permute.scatter_rows(t[:, :, :0], order, 5) == 0).all())
    assert bool((permute.sum_rows(t[:, :, :0], order, 5) == 0).all())


@pytest.mark.skipif(DEVICE == "cpu", reason="2^31 entries need a GPU")
def test_more_entries_than_32_bits_count() -> None:
    t = torch.zeros(1, 1, (1 << 31) // 64 + 64, 64, dtype=torch.bfloat16, device=DEVICE)
    t[0, 0, -1], t[0, 0, 0] = 3, 5
    order = torch.tensor([0, t.shape[2] - 1], dtype=torch.int32, device=DEVICE)[None, None]
    assert permute.gather_rows([t], order)[0][0, 0, :, 0].tolist() == [5, 3]


@pytest.mark.parametrize("kind", ["norm", "side by side", "apart", "across"])
@pytest.mark.parametrize(("size", "dtype"), [(6, torch.float32), (16, torch.bfloat16)])
def test_rows_finished_where_they_lie(kind: str, size: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """By token in memory, as processors of hosts hold queries and keys."""
    q = packed(generator, size, dtype)[0].transpose(1, 2).contiguous().transpose(1, 2)
    step = finishes(generator, size, kind)
    (found,), (want,) = permute.finish_rows([q], [step]), definition.finish_rows([q], [step])
    close(found, want)
    assert found.stride() == want.stride() == q.stride()
