"""The Gluon backend for Hopper: layouts and compiled code here, results on a card of sm_90."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("columns", [64, 128])
def test_words_hold_the_columns_a_lane_owns(columns: int, generator: torch.Generator) -> None:
    from glocal.kernels.gluon.masks import owned

    seen = torch.rand(2, 64, columns, generator=generator) < 0.5
    words = owned(seen)
    assert words.shape == (2, 64, 4) and words.dtype == torch.int32
    for lane in range(4):
        for bit in range(columns // 4):
            column = 8 * (bit // 2) + 2 * lane + bit % 2
            assert torch.equal((words[..., lane] >> bit & 1).bool(), seen[..., column])


def test_words_are_made_once_for_a_table(generator: torch.Generator) -> None:
    from glocal.kernels.gluon.masks import by_key, by_query
    from glocal.plan.blockplan import pack

    seen = torch.rand(3, 128, 64, generator=generator) < 0.5
    table = pack(seen)
    words = by_query(table, 64)
    assert words.shape == (4, 128, 4) and by_query(table, 64) is words
    assert by_key(table, 64).shape == (4, 64, 4)
    first = by_key(table, 64)[1]
    assert torch.equal((first[:, 3] >> 5 & 1).bool(), seen[1, 8 * 2 + 2 * 3 + 1])  # bit 5 of lane 3 is column 23
    table[0] = 0
    assert by_query(table, 64) is not words and int(by_query(table, 64)[0].abs().sum()) == 0
