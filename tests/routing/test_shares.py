"""Shares of block means and single words, the spread around means, ragged last blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glocal.canvas import Canvas
from glocal.canvas.curves import gilbert
from glocal.canvas.touching import touching_blocks
from glocal.ops.rectify import rectification, spread
from glocal.routing import Partition
from glocal.routing.shares import helpful, pooled, shares


def rand(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)


def test_pooled_equals_its_definition(generator: torch.Generator) -> None:
    x = rand(2, 3, 21, 5, generator=generator)
    part = Partition.blocks(21, 8)
    found = pooled(x, part)
    for group, tokens in enumerate((slice(0, 8), slice(8, 16), slice(16, 21))):
        here = x[:, :, tokens]
        torch.testing.assert_close(found.mean[:, :, group], here.mean(2))
        torch.testing.assert_close(found.spread[:, :, group], (here - here.mean(2, keepdim=True)).abs().mean(2))
    assert found.counts.tolist() == [8, 8, 5]
    zeros = torch.cat([x, torch.zeros(2, 3, 3, 5)], 2)
    published, padded = pooled(x, part, "block"), pooled(zeros, Partition.blocks(24, 8))
    torch.testing.assert_close(published.mean, padded.mean)
    torch.testing.assert_close(published.spread, padded.spread)
    assert published.counts.tolist() == [8, 8, 8]


def test_groups_that_are_gathered(generator: torch.Generator) -> None:
    x = rand(1, 2, 12, 4, generator=generator)
    order = torch.randperm(12, generator=generator)
    found = pooled(x, Partition(order.reshape(1, 1, 3, 4), "shuffled"))
    torch.testing.assert_close(found.mean, x[:, :, order].unflatten(2, (3, 4)).mean(3))
    with pytest.raises(ValueError, match="differs by head or sample; legal: groups that all share"):
        pooled(x, Partition(order.reshape(1, 2, 3, 2), "per head"))


def test_shares_of_constant_blocks_are_the_mass_of_full_attention(generator: torch.Generator) -> None:
    """Where the keys of a block are equal, the reallocated share is exactly the block's mass under the mean query."""
    keys, words = rand(1, 2, 3, 6, generator=generator), rand(1, 2, 4, 6, generator=generator)
    k = keys.repeat_interleave(torch.tensor([8, 8, 5]), 2)  # a ragged last block
    q = rand(1, 2, 21, 6, generator=generator)
    part = Partition.blocks(21, 8)
    mine = pooled(q, part)
    found = shares(mine, pooled(k, part), words)
    p = (mine.mean @ torch.cat([k, words], 2).transpose(-1, -2) * 6**-0.5).softmax(-1)
    mass = torch.stack([p[..., :8].sum(-1), p[..., 8:16].sum(-1), p[..., 16:21].sum(-1)], -1)
    torch.testing.assert_close(found.blocks, mass)
    torch.testing.assert_close(found.words, p[..., 21:].sum(-1))
    none = shares(mine, pooled(k, part))
    torch.testing.assert_close(none.blocks.sum(-1), torch.ones(1, 2, 3))
    assert not none.words.any()


def test_hidden_words_have_no_share(generator: torch.Generator) -> None:
    q, k, words = (rand(1, 1, n, 6, generator=generator) for n in (16, 16, 4))
    part = Partition.blocks(16, 8)
    hidden = words.clone()
    hidden[:, :, 2:, 0] = torch.nan
    found = shares(pooled(q, part), pooled(k, part), hidden)
    torch.testing.assert_close(found.words, shares(pooled(q, part), pooled(k, part), words[:, :, :2]).words)


def test_rectification_keeps_the_mass(generator: torch.Generator) -> None:
    q, k, v, words = (rand(1, 2, n, 6, generator=generator) for n in (24, 24, 24, 4))
    part = Partition.blocks(24, 8)
    mine, theirs = pooled(q, part), pooled(k, part)
    share, good = shares(mine, theirs, words), helpful(mine, theirs)
    kept = torch.eye(3, dtype=torch.bool).expand(1, 2, 3, 3)
    factor, addend = rectification(share, kept, good, pooled(v, part).mean)
    gone = good & ~kept
    torch.testing.assert_close(factor + (share.blocks * gone).sum(-1), torch.ones(1, 2, 3))
    torch.testing.assert_close(addend, (share.blocks * gone) @ pooled(v, part).mean)
    whole = Partition.blocks(28, 8)  # four words behind
    out = rand(1, 2, 28, 6, generator=generator)
    done = spread(whole, 28, factor, addend, out.dtype).apply(out)
    assert torch.equal(done[:, :, 24:], out[:, :, 24:])
    torch.testing.assert_close(done[:, :, 9], out[:, :, 9] * factor[:, :, 1, None] + addend[:, :, 1])


@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 6), (7,)])
def test_touching_blocks_by_brute_force(shape: tuple[int, ...]) -> None:
    order = gilbert(shape)
    coords = Canvas(shape).coords(torch.arange(order.numel())).axes
    near = torch.stack([(a[:, None] - a[None]).abs() <= 1 for a in coords[: len(shape)]]).all(0)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel())
    wanted = torch.zeros(-(-order.numel() // 4), -(-order.numel() // 4), dtype=torch.bool)
    for a, b in near.nonzero().tolist():
        wanted[place[a] // 4, place[b] // 4] = True
    assert torch.equal(touching_blocks(order, shape, 4), wanted)
