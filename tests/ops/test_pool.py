from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.canvas import Canvas, Part
from glocal.ops import ConvPool, GroupPool, MeanPool, ResizePool, SoftmaxPool, attend, pool
from glocal.ops.score import Score
from glocal.routing import Partition


def mean_twin(x: Tensor, shape: tuple, window: tuple, stride: tuple, fixed: bool) -> tuple[Tensor, list[int]]:
    """Window by window."""
    maps = x.unflatten(-2, shape)
    starts = [
        [s for s in range(0, n, st) if s == 0 or s - st + w < n] for n, st, w in zip(shape, stride, window, strict=True)
    ]
    cells, counts = [], []
    for corner in product(*starts):
        cut = tuple(slice(c, min(c + w, n)) for c, w, n in zip(corner, window, shape, strict=True))
        box = maps[(..., *cut, slice(None))].flatten(-1 - len(shape), -2)
        n = box.shape[-2]
        size = int(torch.tensor(window).prod())
        cells.append(box.sum(-2) / (size if fixed else n))
        counts.append(n)
    return torch.stack(cells, -2), counts


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    "shape,window,stride",
    [((10,), 3, None), ((5, 6), 2, None), ((7, 6), (3, 2), (2, 2)), ((7, 5), 2, 3), ((3, 4, 5), (1, 2, 2), None)],
)
def test_mean_equals_the_loops(shape: tuple, window, stride, fixed: bool, generator: torch.Generator) -> None:
    x = torch.randn(2, 3, int(torch.tensor(shape).prod()), 4, generator=generator)
    found = pool(x, Canvas(shape), MeanPool(window, stride, count="fixed" if fixed else "true"))
    rank = len(shape)
    w = (window,) * rank if isinstance(window, int) else window
    s = w if stride is None else ((stride,) * rank if isinstance(stride, int) else stride)
    want, counts = mean_twin(x, shape, w, s, fixed)
    torch.testing.assert_close(found.tokens, want)
    assert found.counts is not None and found.counts.flatten().tolist() == counts
    assert found.canvas.size == len(counts)


def test_cells_lie_at_their_centre_or_first_token() -> None:
    x = torch.randn(1, 24, 2)
    grid = pool(x, Canvas((4, 6)), MeanPool(2)).canvas.grid
    assert (grid.name, grid.axes, grid.scale, grid.offset) == ("grid.pooled", (2, 3), 2.0, 0.5)
    grid = pool(x, Canvas((4, 6)), MeanPool((2, 3), anchor="first")).canvas.grid
    assert (grid.scale, grid.offset) == ((2.0, 3.0), 0.0)
    twice = pool(torch.randn(1, 6, 2), Canvas([Part("low", (2, 3), scale=2, offset=0.5)]), MeanPool((2, 3))).canvas.grid
    assert (twice.scale, twice.offset) == ((4.0, 6.0), (1.5, 2.5))


def test_conv_equals_torch(generator: torch.Generator) -> None:
    x = torch.randn(2, 30, 4, generator=generator)
    weight = torch.randn(4, 1, 3, 3, generator=generator)
    bias = torch.randn(4, generator=generator)
    found = pool(x, Canvas((5, 6)), ConvPool(weight, bias, stride=2, padding=1, groups=4))
    want = F.conv2d(x.transpose(1, 2).unflatten(2, (5, 6)), weight, bias, 2, 1, groups=4)
    torch.testing.assert_close(found.tokens, want.flatten(2).transpose(1, 2))
    assert found.counts is not None and found.counts[0, 0, 0] == 4  # the corner sees 2 x 2 tokens
    assert (found.canvas.grid.axes, found.canvas.grid.offset) == ((3, 3), 0.0)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_resize_equals_torch(mode: str, generator: torch.Generator) -> None:
    x = torch.randn(2, 3, 42, 4, generator=generator)
    found = pool(x, Canvas((6, 7)), ResizePool((3, 4), mode))  # type: ignore[arg-type]
    maps = x.flatten(0, 1).transpose(1, 2).unflatten(2, (6, 7))
    want = F.interpolate(maps, size=(3, 4), mode="bilinear" if mode == "bilinear" else "nearest-exact")
    torch.testing.assert_close(found.tokens.flatten(0, 1).transpose(1, 2), want.flatten(2))
    assert found.canvas.grid.scale == (2.0, 1.75)
    assert found.counts is not None and found.counts.unique().tolist() == [3.5]


def test_softmax_pool(generator: torch.Generator) -> None:
    x = torch.randn(2, 10, 4, generator=generator)
    logits = torch.randn(2, 3, 10, generator=generator)
    logits[0, 1] = -torch.inf
    found = pool(x, Canvas((10,)), SoftmaxPool(logits))
    want = logits.softmax(-1).nan_to_num() @ x
    torch.testing.assert_close(found.tokens, want)
    assert found.canvas.size == 3
    with pytest.raises(ValueError, match="softmax pooling has no number of tokens"):
        found.log_counts()


def test_groups(generator: torch.Generator) -> None:
    x = torch.randn(1, 2, 20, 4, generator=generator)
    regions = Partition.regions(Canvas((4, 5)), 2)
    found = pool(x, Canvas((4, 5)), GroupPool(regions))
    for g, rows in enumerate(regions.members[0, 0].tolist()):
        torch.testing.assert_close(found.tokens[:, :, g], x[:, :, [r for r in rows if r >= 0]].mean(2))
    assert found.canvas.grid.axes == (2, 2)
    fixed = pool(x, Canvas((4, 5)), GroupPool(regions, divisor=6))
    torch.testing.assert_close(fixed.tokens[:, :, 1], found.tokens[:, :, 1] * 4 / 6)


def test_log_counts_weigh_cells_as_their_tokens(generator: torch.Generator) -> None:
    """Equal keys inside each window: pooled attention with log-counts equals the full one."""
    cells = torch.randn(2, 1, 2, 4, 8, generator=generator)
    k, v = cells.repeat_interleave(3, 3)[:, :, :, :10]  # the last window holds one token
    q = torch.randn(1, 2, 5, 8, generator=generator)
    keys = pool(k, Canvas((10,)), MeanPool(3))
    values = pool(v, Canvas((10,)), MeanPool(3)).tokens
    found = attend(q, keys.tokens, values, score=Score(bias=(keys.log_counts(),)))
    want = attend(q, k, v)
    torch.testing.assert_close(found.out, want.out)
    torch.testing.assert_close(found.lse, want.lse)


def test_bfloat16_and_gradients(generator: torch.Generator) -> None:
    x = torch.randn(1, 12, 2, dtype=torch.float64, generator=generator).requires_grad_()
    canvas = Canvas((3, 4))
    weight = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=generator)
    for method in (MeanPool(2), ConvPool(weight, groups=2), ResizePool(2), GroupPool(Partition.regions(canvas, 2))):
        assert torch.autograd.gradcheck(lambda t, m=method: pool(t, canvas, m).tokens, (x,))
        assert pool(x.detach().bfloat16(), canvas, method).tokens.dtype == torch.bfloat16


def test_errors() -> None:
    x = torch.ones(1, 12, 2)
    with pytest.raises(ValueError, match=r"x of shape \(1, 12, 2\) must be \[batch, 13, channels\]"):
        pool(x, Canvas((13,)), MeanPool(2))
    with pytest.raises(ValueError, match="window=\\(2,\\) needs 2 entries of at least 1 for the grid \\(3, 4\\)"):
        pool(x, Canvas((3, 4)), MeanPool((2,)))
    with pytest.raises(ValueError, match="must be one grid of at most 3 axes; pool its grid alone"):
        pool(x, Canvas((3, 3), before=3), MeanPool(2))
    with pytest.raises(ValueError, match="mode='cubic'; legal: 'bilinear', 'nearest'"):
        pool(x, Canvas((3, 4)), ResizePool(2, "cubic"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs 2 kernel axes"):
        pool(x, Canvas((3, 4)), ConvPool(torch.ones(2, 2, 3)))
    with pytest.raises(ValueError, match=r"logits of shape \(3, 5\) must be \[..., cells, 12 tokens\]"):
        pool(x, Canvas((3, 4)), SoftmaxPool(torch.ones(3, 5)))
