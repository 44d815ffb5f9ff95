"""Tokens into another order and back: against plain indexing, with gradients, norm and rotation, under compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glocal.ops import Finish, finish_rows, reorder, restore


def packed(g: torch.Generator, n: int = 11, size: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """q of four heads, k and v of two, as views of one [B, N, 3, H, D]."""
    qkv = torch.randn(2, n, 3, 4, size, generator=g)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    return q, k[:, :2], v[:, :2]


def test_rows_by_one_order(generator: torch.Generator) -> None:
    tensors = packed(generator)
    order = torch.tensor([5, -1, 0, 3, 3, 10], dtype=torch.int32)[None, None]
    for t, found in zip(tensors, reorder(tensors, order), strict=True):
        assert found.shape == (2, t.shape[1], 6, 6)
        assert bool((found[:, :, 1] == 0).all())
        torch.testing.assert_close(found[:, :, [0, 2, 3, 4, 5]], t[:, :, [5, 0, 3, 3, 10]], rtol=0, atol=0)


def test_an_order_for_each_sample_and_head(generator: torch.Generator) -> None:
    q = packed(generator)[0]
    order = torch.stack([torch.randperm(11, generator=generator) for _ in range(4)]).view(2, 2, 11).int()
    (found,) = reorder([q], order)
    for b in range(2):
        for h in range(4):
            torch.testing.assert_close(found[b, h], q[b, h, order[b, h // 2].long()], rtol=0, atol=0)
    torch.testing.assert_close(restore(found, order, 11), q, rtol=0, atol=0)


def test_there_and_back_with_pads(generator: torch.Generator) -> None:
    q = packed(generator)[0]
    order = torch.full((1, 1, 16), -1, dtype=torch.int32)
    order[0, 0, 2:11] = torch.randperm(11, generator=generator)[:9]
    back = restore(reorder([q], order)[0], order, 11)
    kept = order[order >= 0].long().sort().values
    torch.testing.assert_close(back[:, :, kept], q[:, :, kept], rtol=0, atol=0)
    lost = sorted(set(range(11)) - set(kept.tolist()))
    assert bool((back[:, :, lost] == 0).all())


def test_gradients(generator: torch.Generator) -> None:
    q, k, v = (t.double().detach().requires_grad_() for t in packed(generator))
    repeated = torch.tensor([5, -1, 0, 3, 3, 10], dtype=torch.int32)[None, None]
    assert torch.autograd.gradcheck(lambda *t: tuple(reorder(t, repeated)), (q, k, v))
    once = torch.tensor([2, 0, -1, 1], dtype=torch.int32)[None, None]
    t = torch.randn(1, 2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: restore(t, once, 5), (t,))


def test_norm_and_rotation_as_hosts_do_them(generator: torch.Generator) -> None:
    """Interleaved pairs after torch's own RMS-norm over all heads; half-split pairs after one over each head."""
    q, k, v = packed(generator)
    weight, small = torch.rand(24, generator=generator), torch.rand(6, generator=generator)
    angle = torch.rand(11, 3, generator=generator)
    cos, sin = angle.cos(), angle.sin()
    order = torch.randperm(11, generator=generator).int()[None, None]
    steps = [Finish(weight, 1e-5, cos, sin), Finish(small, 1e-6, cos, sin, interleaved=False), None]
    found = reorder((q, k, v), order, finish=steps)
    normed = torch.nn.functional.rms_norm(q.transpose(1, 2).flatten(2), (24,), weight, 1e-5)
    whole = torch.view_as_complex(normed.view(2, 11, 4, 3, 2)) * torch.polar(torch.ones(11, 3), angle)[None, :, None]
    want_q = torch.view_as_real(whole).flatten(3).transpose(1, 2)
    want_k = torch.nn.functional.rms_norm(k, (6,), small, 1e-6)
    turned = torch.cat((-want_k[..., 3:], want_k[..., :3]), -1)
    want_k = want_k * cos.repeat(1, 2) + turned * sin.repeat(1, 2)
    for have, want in zip(found, (want_q, want_k, v), strict=True):
        torch.testing.assert_close(have, want[:, :, order[0, 0].long()], rtol=1e-5, atol=1e-6)


def test_gradients_through_norm_and_rotation(generator: torch.Generator) -> None:
    q, k, v = (t.double().detach().requires_grad_() for t in packed(generator))
    weight, small = (torch.rand(n, generator=generator).double().requires_grad_() for n in (24, 6))
    angle = torch.rand(11, 3, generator=generator).double()
    cos, sin = (t.requires_grad_() for t in (angle.cos(), angle.sin()))
    order = torch.tensor([5, -1, 0, 3, 3, 10], dtype=torch.int32)[None, None]

    def run(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        a, b, c, s = given
        steps = [Finish(a, 1e-5, c, s), Finish(b, cos=c, sin=s, interleaved=False), None]
        return tuple(reorder((q, k, v), order, finish=steps))

    assert torch.autograd.gradcheck(run, (q, k, v, weight, small, cos, sin), fast_mode=True)
    inputs = (q, k, v, weight, small, cos, sin)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    along = [torch.randn(t.shape, generator=generator).double() for t in run(*inputs)]
    for a, b in zip(*(torch.autograd.grad(f(*inputs), inputs, along) for f in (run, compiled)), strict=True):
        torch.testing.assert_close(a, b)


def test_compiles(generator: torch.Generator) -> None:
    q, k, v = (t.detach().requires_grad_() for t in packed(generator))
    order = torch.randperm(11, generator=generator).int()[None, None]

    def there_and_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a, b, c = reorder((q, k, v), order)
        return restore(a, order, 11) + (b * c).sum()

    out = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(out, there_and_back(q, k, v))
    torch.library.opcheck(torch.ops.glocal.reorder.default, ([q, k, v], order, [], ""))
    torch.library.opcheck(torch.ops.glocal.restore.default, (q, order, 11))


def test_bad_input(generator: torch.Generator) -> None:
    q, k, v = packed(generator)
    order = torch.zeros(1, 1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"order of shape \(3,\), torch.int32; legal: \[batch\|1, heads\|1, slots\]"):
        reorder([q], order[0, 0])
    with pytest.raises(ValueError, match=r"legal: batch 1 or 2, heads a divisor of 4"):
        reorder([q], order.expand(1, 3, 3))
    with pytest.raises(ValueError, match=r"1 entries in finish for 2 tensors"):
        reorder([q, k], order, finish=[None])
    with pytest.raises(
        ValueError, match=r"norm weight of shape \(5,\) .* legal: \[6\] \(a head\) or \[24\] \(all heads\)"
    ):
        reorder([q], order, finish=[Finish(torch.ones(5))])
    with pytest.raises(ValueError, match=r"a norm over all 4 heads with an order for each of 2 heads"):
        reorder([q], order.expand(1, 2, 3), finish=[Finish(torch.ones(24))])
    with pytest.raises(ValueError, match=r"cos of shape \(11, 6\) does not broadcast to \(2, 4, 11, 3\)"):
        reorder([q], order, finish=[Finish(cos=torch.ones(11, 6), sin=torch.ones(11, 6))])
    with pytest.raises(ValueError, match=r"t has 11 rows, order 3 slots"):
        restore(v, order, 11)


def test_rows_finished_where_they_lie(generator: torch.Generator) -> None:
    """As `reorder` by the order they lie in, in memory as they were; gradients, fake and compiled."""
    q, k, _ = (t.double() for t in packed(generator))
    angles = torch.rand(1, 1, 11, 3, generator=generator, dtype=torch.float64)
    weight = torch.rand(24, generator=generator, dtype=torch.float64)
    steps = [Finish(weight, cos=angles.cos(), sin=angles.sin()), Finish(weight[:6])]
    order = torch.arange(11, dtype=torch.int32)[None, None]
    found = finish_rows([q, k], steps)
    for mine, theirs, t in zip(found, reorder([q, k], order, finish=steps), (q, k), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        assert mine.stride() == torch.empty_like(t).stride()
    turned = finish_rows([q.transpose(1, 2).contiguous().transpose(1, 2)], steps[:1])[0]
    assert turned.transpose(1, 2).is_contiguous()

    def run(q: Tensor, weight: Tensor, angles: Tensor) -> Tensor:
        return finish_rows([q], [Finish(weight, cos=angles.cos(), sin=angles.sin())])[0]

    given = [t.detach().clone().requires_grad_() for t in (q, weight, angles)]
    assert torch.autograd.gradcheck(run, given)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(*given), run(*given))


def test_rows_that_cannot_be_finished(generator: torch.Generator) -> None:
    q = packed(generator)[0]
    with pytest.raises(ValueError, match=r"finish_rows: 0 steps for 1 tensors; legal: one each"):
        finish_rows([q], [])
    with pytest.raises(ValueError, match=r"norm weight of shape \(5,\) for tensor 0 of 4 heads of size 6"):
        finish_rows([q], [Finish(torch.ones(5))])
