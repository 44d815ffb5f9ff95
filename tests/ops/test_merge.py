from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glocal.canvas import Canvas
from glocal.ops import attend, merge
from glocal.patterns import Neighborhood


def branches(generator: torch.Generator, n: int, holes: bool = False) -> list[tuple[Tensor, Tensor]]:
    out = []
    for _ in range(n):
        o = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=generator)
        row = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)
        if holes:
            row[torch.rand(row.shape, generator=generator) < 0.5] = -torch.inf
        out.append((o, row))
    return out


def twin(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Row by row, by the definition of a softmax over branches."""
    out = torch.zeros_like(pairs[0][0])
    rows = torch.full_like(pairs[0][1], -torch.inf)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in rows.shape)).tolist():
        b, h, i = place
        seen = [(o[b, h, i], row[b, h, i]) for o, row in pairs if row[b, h, i] > -torch.inf]
        if seen:
            z = sum(row.exp() for _, row in seen)
            out[b, h, i] = sum(o * row.exp() / z for o, row in seen)
            rows[b, h, i] = torch.as_tensor(z).log()
    return out, rows


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("holes", [False, True])
def test_lse_equals_the_definition(n: int, holes: bool, generator: torch.Generator) -> None:
    pairs = branches(generator, n, holes)
    found = merge.lse(pairs)
    want = twin(pairs)
    torch.testing.assert_close(found.out, want[0])
    torch.testing.assert_close(found.lse, want[1])


def test_what_unseen_rows_hold_does_not_matter(generator: torch.Generator) -> None:
    (a, la), (b, lb) = branches(generator, 2)
    la[0, 0, 0] = lb[0, 0, 0] = lb[1, 1, 1] = -torch.inf
    a[0, 0, 0] = b[1, 1, 1] = torch.nan
    found = merge.lse([(a, la), (b, lb)])
    assert found.out[0, 0, 0].eq(0).all() and found.lse[0, 0, 0] == -torch.inf
    torch.testing.assert_close(found.out[1, 1, 1], a[1, 1, 1])


def test_extreme_values_do_not_overflow() -> None:
    ones = torch.ones(1, 1, 2, 1)
    rows = [torch.tensor([[[1e4, -1e4]]]), torch.tensor([[[-1e4, -1e4]]])]
    found = merge.lse([(ones, rows[0]), (3 * ones, rows[1])])
    torch.testing.assert_close(found.out.flatten(), torch.tensor([1.0, 2.0]))


def test_gradients(generator: torch.Generator) -> None:
    flat = [t.requires_grad_() for pair in branches(generator, 3) for t in pair]

    def run(*args: Tensor) -> tuple[Tensor, Tensor]:
        found = merge.lse([(args[0], args[1]), (args[2], args[3]), (args[4], args[5])])
        return found.out, found.lse

    assert torch.autograd.gradcheck(run, flat)


def test_gradients_of_holes_are_zero_not_nan(generator: torch.Generator) -> None:
    pairs = branches(generator, 2, holes=True)
    flat = [t.requires_grad_() for pair in pairs for t in pair]
    found = merge.lse(pairs)
    (found.out.sum() + torch.where(found.lse.isinf(), 0, found.lse).sum()).backward()
    for _, row in pairs:
        assert row.grad is not None and row.grad[row == -torch.inf].eq(0).all()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in flat)


def test_two_halves_equal_the_whole(generator: torch.Generator) -> None:
    """Attention over all keys equals the merge over two halves, with gradients to q, k and v."""
    grads = []
    data = torch.randn(3, 1, 2, 12, 4, dtype=torch.float64, generator=generator)
    weight = torch.randn(1, 2, 12, 4, dtype=torch.float64, generator=generator)
    for split in (False, True):
        q, k, v = (t.clone().requires_grad_() for t in data)
        if split:
            found = merge.lse([attend(q, k[:, :, :5], v[:, :, :5]), attend(q, k[:, :, 5:], v[:, :, 5:])])
        else:
            found = attend(q, k, v)
        ((found.out * weight).sum() + found.lse.square().sum()).backward()
        grads.append((found.out, found.lse, q.grad, k.grad, v.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_local_and_text_equal_one_pattern(generator: torch.Generator) -> None:
    """A neighbourhood merged with text keys equals the neighbourhood on a canvas with text keys."""
    q, k, v = torch.randn(3, 1, 2, 16, 4, generator=generator)
    text_k, text_v = torch.randn(2, 1, 2, 3, 4, generator=generator)
    from glocal.canvas import Layout

    near = attend(q, k, v, Neighborhood(3), canvas=Canvas((4, 4)))
    found = merge.lse([attend(q, text_k, text_v), near])
    both = Layout(Canvas((4, 4)), Canvas((4, 4), before=3))
    want = attend(q, torch.cat([text_k, k], 2), torch.cat([text_v, v], 2), Neighborhood(3), canvas=both)
    torch.testing.assert_close(found.out, want.out)
    torch.testing.assert_close(found.lse, want.lse)


@pytest.mark.parametrize("case", ["merge_attentions_2way", "merge_attentions_4way_extreme"])
def test_published_merges(case: str, golden: Callable[[str], Path]) -> None:
    data = load_file(golden(f"gna/{case}.safetensors"))
    n = sum(name.startswith("in.output") for name in data)
    outs = [data[f"in.output{i}"].requires_grad_() for i in range(n)]
    rows = [data[f"in.logsumexp{i}"].requires_grad_() for i in range(n)]
    # heads last there: [B, N, H, D] and [B, N, H]; the merge does not care
    found = merge.lse(list(zip(outs, rows, strict=True)))
    torch.testing.assert_close(found.out, data["out.output"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.lse, data["out.logsumexp"], atol=1e-5, rtol=1e-5)
    loss = (found.out * data["in.grad_output"]).sum() + (found.lse * data["in.grad_logsumexp"]).sum()
    loss.backward()
    for i in range(n):
        for have, name in ((outs[i].grad, f"grad.output{i}"), (rows[i].grad, f"grad.logsumexp{i}")):
            want = data[name]
            assert have is not None
            assert (have - want).abs().max() <= 1e-4 * want.abs().max().clamp(min=1e-6)


def test_bfloat16_stays(generator: torch.Generator) -> None:
    pairs = [(o.bfloat16(), row.float()) for o, row in branches(generator, 2)]
    found = merge.lse(pairs)
    assert (found.out.dtype, found.lse.dtype) == (torch.bfloat16, torch.float32)


def test_gate_sum_concat(generator: torch.Generator) -> None:
    a, b = torch.randn(2, 2, 3, 5, 4, generator=generator)
    torch.testing.assert_close(merge.sum([a, b, a]), 2 * a + b)
    torch.testing.assert_close(merge.concat([a, b[:, :, :2]], dim=-2)[:, :, 5:], b[:, :, :2])
    torch.testing.assert_close(merge.gate(0.25, a, b), 0.25 * a + 0.75 * b)
    for axis, size, place in (("head", 3, 1), ("position", 5, 2), ("channel", 4, 3)):
        alpha = torch.rand(size, generator=generator)
        found = merge.gate(alpha, a, b, axis=axis)  # type: ignore[arg-type]
        for i in range(size):
            want = alpha[i] * a.select(place, i) + (1 - alpha[i]) * b.select(place, i)
            torch.testing.assert_close(found.select(place, i), want)


def test_errors(generator: torch.Generator) -> None:
    (a, la), (b, _) = branches(generator, 2)
    with pytest.raises(ValueError, match="needs at least one"):
        merge.lse([])
    with pytest.raises(ValueError, match=r"branch 1 has out \(2, 3, 4, 4\) and lse \(2, 3, 5\)"):
        merge.lse([(a, la), (b[:, :, :4], la)])
    with pytest.raises(ValueError, match="lse of branch 0 is torch.bfloat16; legal: float32, float64"):
        merge.lse([(a, la.bfloat16())])
    with pytest.raises(ValueError, match=r"outputs of shapes \[\(2, 3, 5, 4\), \(2, 3, 4, 4\)\] do not fit"):
        merge.sum([a, b[:, :, :4]])
    with pytest.raises(ValueError, match="axis='heads'; legal: 'head', 'position', 'channel'"):
        merge.gate(torch.ones(3), a, b, axis="heads")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"alpha of shape \(2,\) with axis='head' must be \[3\]"):
        merge.gate(torch.ones(2), a, b, axis="head")
