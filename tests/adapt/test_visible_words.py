"""Hidden words are cut off where all samples hide the same ones, and the result is that of the padded call."""

from __future__ import annotations

import pytest
import torch

from glocal.adapt.visible_words import shared_length, without_hidden
from glocal.canvas import Canvas, Layout, Part
from glocal.ops import attend
from glocal.patterns import RadialBlocks

CANVAS = Canvas([Part("video", (2, 4, 8)), Part("text", 7)], arrives="gilbert")


def layout(*lengths: int, canvas: Canvas = CANVAS) -> Layout:
    return Layout(canvas, canvas, lengths={"text": torch.tensor(lengths, dtype=torch.int32)})


def test_the_last_part_becomes_as_long_as_what_is_visible() -> None:
    found = without_hidden(layout(3, 3))
    assert found is not None and not found.lengths
    assert [p.tokens for p in found.q.parts] == [64, 3] and found.q == found.kv and found.q.arrives == "gilbert"
    none = without_hidden(layout(0))
    assert none is not None and [p.name for p in none.q.parts] == ["video"]


def test_stays_where_nothing_is_hidden_or_samples_differ() -> None:
    assert without_hidden(layout(7)) is None
    assert without_hidden(layout(3, 4)) is None
    assert without_hidden(Layout.of(CANVAS)) is None
    front = Canvas([Part("text", 7), Part("video", (2, 4, 8))])
    assert without_hidden(layout(3, canvas=front)) is None
    documents = torch.zeros(1, 71, dtype=torch.int32)
    assert without_hidden(Layout(CANVAS, CANVAS, lengths=layout(3).lengths, documents=documents)) is None


def test_a_length_that_changes_is_read_again() -> None:
    lengths = torch.tensor([3, 3])
    assert shared_length(lengths) == 3
    lengths.add_(1)
    assert shared_length(lengths) == 4


@pytest.mark.parametrize("length", [3, 0])
def test_equals_the_padded_call(length: int, generator: torch.Generator) -> None:
    canvas = Canvas([Part("video", (2, 4, 8)), Part("text", 7)])
    q, k, v = (torch.randn(1, 2, 71, 8, generator=generator) for _ in "qkv")
    padded, short = layout(length, canvas=canvas), without_hidden(layout(length, canvas=canvas))
    assert short is not None
    pattern, n = RadialBlocks(block=8, decay=0.2), 64 + length
    want = attend(q, k, v, pattern, canvas=padded, backend="reference").out
    got = attend(q[:, :, :n], k[:, :, :n], v[:, :, :n], pattern, canvas=short, backend="reference").out
    torch.testing.assert_close(got, want[:, :, :n])
    assert not want[:, :, n:].any()
