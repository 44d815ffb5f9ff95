"""Large windows by folding: equal to attention under the pattern, also where windows differ in size."""

from __future__ import annotations

import pytest
import torch

from glocal.canvas import Canvas, Layout
from glocal.ops import attention
from glocal.ops.fold import axis_groups, window_attention, window_pairs
from glocal.patterns.windows import Windows

CASES = [
    (Windows(count=(1, 2, 3)), (2, 6, 9)),
    (Windows(count=(1, 5, 5)), (3, 12, 13)),
    (Windows(count=(1, 4, 4), roll=(0, 2, 1)), (2, 13, 9)),
    (Windows(size=(2, 4)), (5, 4)),
    (Windows(size=4, roll=(1, 3)), (8, 11)),
    (Windows(size=3, roll=5), (9,)),
    (Windows(count=5), (4,)),
    (Windows(count=1), (3, 2, 2)),
]


@pytest.mark.parametrize(("pattern", "axes"), CASES)
def test_it_equals_the_pattern_with_gradients(
    pattern: Windows, axes: tuple[int, ...], generator: torch.Generator
) -> None:
    canvas = Canvas(axes)
    q, k, v, w = (torch.randn(2, 3, canvas.size, 8, generator=generator).requires_grad_(n < 3) for n in range(4))
    out = window_attention(q, k, v, pattern, axes)
    grads = torch.autograd.grad(out, (q, k, v), w)
    wanted = attention(q, k, v, pattern, canvas=canvas, backend="reference")
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-6)
    for mine, theirs in zip(grads, torch.autograd.grad(wanted, (q, k, v), w), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("pattern", "axes"), CASES)
def test_pairs_are_those_of_the_mask(pattern: Windows, axes: tuple[int, ...]) -> None:
    assert window_pairs(pattern, axes) == int(pattern.mask(Layout.of(Canvas(axes)))[0].sum())


def test_strided_inputs_and_other_value_sizes(generator: torch.Generator) -> None:
    pattern, axes = CASES[1]
    packed = torch.randn(1, 468, 2, 3, 8, generator=generator).permute(3, 0, 2, 1, 4)  # [3, B, H, N, D]
    q, k, v = packed[0], packed[1], packed[2][..., :5]
    wanted = attention(q, k, v, pattern, canvas=Canvas(axes), backend="reference")
    torch.testing.assert_close(window_attention(q, k, v, pattern, axes), wanted, rtol=0, atol=2e-6)


def test_a_group_is_one_call() -> None:
    assert axis_groups(Windows(count=(1, 4)), (2, 68)) == (((0, 1, 2),), ((0, 4, 17),))
    assert axis_groups(Windows(count=(1, 5)), (2, 68)) == (((0, 1, 2),), ((0, 4, 14), (56, 1, 12)))


def test_refusals() -> None:
    x = torch.zeros(1, 1, 12, 4)
    with pytest.raises(ValueError, match=r"12 tokens fill no grid of \(3, 5\); legal: 15"):
        window_attention(x, x, x, Windows(count=2), (3, 5))
    with pytest.raises(ValueError, match="masked=False joins both ends of an axis; legal: masked=True"):
        window_attention(x, x, x, Windows(count=2, roll=1, masked=False), (3, 4))
