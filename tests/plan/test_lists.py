"""Block lists made on the device, against loops."""

from __future__ import annotations

import pytest
import torch

from glocal.plan.lists import compact, compact_columns, rising


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (3, 40, 33), (1, 4, 0), (1, 0, 4)], ids=str)
def test_compact_lists_what_is_picked(shape: tuple[int, int, int], generator: torch.Generator) -> None:
    picked = torch.rand(shape, generator=generator) < 0.4
    count, index = compact(picked, shape[2])
    for u in range(shape[0]):
        for row in range(shape[1]):
            want = picked[u, row].nonzero().flatten().tolist()
            assert index[u, row].tolist() == want + [0] * (shape[2] - len(want)) and int(count[u, row]) == len(want)
    count, index = compact_columns(picked)
    for u in range(shape[0]):
        for column in range(shape[2]):
            want = picked[u, :, column].nonzero().flatten().tolist()
            assert index[u, column].tolist() == want + [0] * (shape[1] - len(want))
            assert int(count[u, column]) == len(want)


def test_a_list_that_is_too_narrow_keeps_the_first_picks() -> None:
    count, index = compact(torch.tensor([[[True, False, True, True]]]), 2)
    assert index.tolist() == [[[0, 2]]] and count.tolist() == [[2]]
    count, index = compact(torch.tensor([[[False, True]]]), 4)
    assert index.tolist() == [[[1, 0, 0, 0]]] and count.tolist() == [[1]]


def test_rising_sorts_keeps_repeats_and_leaves_out_what_is_no_column() -> None:
    index = torch.tensor([[[5, 2, 2, 9, 0], [-1, 3, 12, 1, 1]]], dtype=torch.int32)
    found, place, left = rising(index, torch.tensor([[4, 4]], dtype=torch.int32), 10)
    assert left.tolist() == [[4, 2]]
    assert found.tolist() == [[[2, 2, 5, 9, 0], [1, 3, 0, 0, 0]]]
    assert place[0, 0, :4].tolist() == [1, 2, 0, 3] and place[0, 1, :2].tolist() == [3, 1]
    none = torch.zeros(1, 2, 0, dtype=torch.int32)
    assert rising(none, torch.zeros(1, 2, dtype=torch.int32), 3)[0].shape == (1, 2, 0)


def test_the_operators_have_fakes(generator: torch.Generator) -> None:
    picked = torch.rand(2, 5, 7, generator=generator) < 0.4
    index = torch.randint(0, 7, (2, 5, 3), generator=generator).int()
    count = torch.full((2, 5), 2, dtype=torch.int32)
    for op, args in (
        (torch.ops.glocal.compact, (picked, 7)),
        (torch.ops.glocal.compact_columns, (picked,)),
        (torch.ops.glocal.rising, (index, count, 7)),
    ):
        torch.library.opcheck(op.default, args)
