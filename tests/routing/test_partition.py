from __future__ import annotations

import pytest
import torch

from glocal.canvas import Canvas, Part, from_gather
from glocal.routing import Partition


def lists(part: Partition, sample: int = 0, head: int = 0) -> list[list[int]]:
    return [[int(t) for t in row if t >= 0] for row in part.members[sample, head]]


def test_blocks_are_runs_boxes_or_an_order() -> None:
    assert lists(Partition.blocks(5, 2)) == [[0, 1], [2, 3], [4]]
    boxes = Partition.blocks(Canvas((4, 4)), (2, 2))
    assert lists(boxes) == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert boxes.shape == (2, 2)
    with_text = Partition.blocks(Canvas((2, 2), before=3), (2, 2))
    assert lists(with_text) == [[0, 1, 2], [3, 4, 5, 6]]
    order = from_gather("back", torch.tensor([2, 1, 0]))
    assert lists(Partition.blocks(3, order)) == [[2], [1], [0]]
    with pytest.raises(ValueError, match=r"Partition.blocks: block=0 must be at least 1"):
        Partition.blocks(4, 0)


def test_regions_count_as_published() -> None:
    """30 tokens in 7 regions: 7 regions of 5 with padding, or regions of 4 and then 8 of them."""
    up = Partition.regions(Canvas((30, 7)), 7)
    assert up.shape == (7, 7) and up.most == 5
    assert up.counts[0, 0, :7].tolist() == [5] * 7 and up.counts[0, 0, -7:].tolist() == [0] * 7
    down = Partition.regions(Canvas((30, 7)), (7, 7), rounding="down")
    assert down.shape == (8, 7) and down.most == 4 and int(down.counts[0, 0, -1]) == 2
    for part in (up, down):
        assert sorted(t for row in lists(part) for t in row) == list(range(210))
    with pytest.raises(ValueError, match=r"count=\(8, 8\) asks for more regions than tokens on axis 1 of \(30, 7\)"):
        Partition.regions(Canvas((30, 7)), 8, rounding="down")
    with pytest.raises(ValueError, match=r"count=\(1, 2, 3\) needs 2 positive entries"):
        Partition.regions(Canvas((30, 7)), (1, 2, 3))


def test_chunks_are_ragged_per_sample() -> None:
    part = Partition.chunks(torch.tensor([[0, 1, 5, 5], [0, 3, 4, 5]]))
    assert lists(part, 0) == [[0], [1, 2, 3, 4], []]
    assert lists(part, 1) == [[0, 1, 2], [3], [4]]
    with pytest.raises(ValueError, match="must not decrease"):
        Partition.chunks(torch.tensor([0, 3, 2]))


def test_frames_take_what_repeats_with_them() -> None:
    canvas = Canvas([Part("camera", 1, times=3), Part("patch", (2, 2), times=3), Part("text", 2)])
    part = Partition.frames(canvas)
    assert lists(part) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16]]
    assert lists(Partition.frames(Canvas((2, 1, 3)))) == [[0, 1, 2], [3, 4, 5]]


def test_clusters_keep_order_and_drop_minus_one() -> None:
    part = Partition.clusters(torch.tensor([[2, 0, 2, -1, 0], [1, 1, 1, 1, 1]]), 3)
    assert lists(part, 0) == [[1, 4], [], [0, 2]]
    assert lists(part, 1) == [[], [0, 1, 2, 3, 4], []]
    with pytest.raises(ValueError, match="most=1, but the largest cluster has 2 tokens"):
        Partition.clusters(torch.tensor([0, 0, 1]), 2, most=1)


def test_mean_is_over_true_counts_in_float32(generator: torch.Generator) -> None:
    x = torch.randn(2, 3, 7, 4, generator=generator)
    labels = torch.randint(-1, 3, (2, 3, 7), generator=generator)
    part = Partition.clusters(labels, 3)
    want = torch.zeros(2, 3, 3, 4)
    for b in range(2):
        for h in range(3):
            for g in range(3):
                rows = x[b, h][labels[b, h] == g]
                if rows.shape[0]:
                    want[b, h, g] = rows.mean(0)
    torch.testing.assert_close(part.mean(x), want)
    assert part.mean(x.bfloat16()).dtype == torch.float32


def test_without_and_holding() -> None:
    part = Partition.blocks(6, 2)
    hidden = torch.tensor([[False] * 3 + [True] * 3, [False] * 6])
    assert lists(part.without(hidden), 0) == [[0, 1], [2], []]
    assert lists(part.without(hidden), 1) == [[0, 1], [2, 3], [4, 5]]
    assert part.holding(torch.tensor([3, 5])).tolist() == [[[False, True, True]]]
