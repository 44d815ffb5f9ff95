from __future__ import annotations

import pytest
import torch

from glocal.routing import BlockMean, MeanToToken, Partition


def twin(q: torch.Tensor, k: torch.Tensor, block: int, combine: str, kind: str) -> torch.Tensor:
    """Loops over heads and groups."""
    b, hq, n, d = q.shape
    groups = -(-n // block)
    ratio = hq // k.shape[1]
    out = torch.zeros(b, hq, groups, groups)
    means_q = torch.zeros(b, hq, groups, d)
    means_k = torch.zeros(b, hq, groups, d)
    for h in range(hq):
        for g in range(groups):
            means_q[:, h, g] = q[:, h, g * block : (g + 1) * block].float().mean(1)
            means_k[:, h, g] = k[:, h // ratio, g * block : (g + 1) * block].float().mean(1)
    if combine == "mean":
        means_q, means_k = means_q.mean(1, keepdim=True), means_k.mean(1, keepdim=True)
        out = out[:, :1]
    for h in range(out.shape[1]):
        for i in range(groups):
            for j in range(groups):
                if kind == "mean":
                    keys = means_k[:, h, j][:, None]
                else:
                    heads = k.float().repeat_interleave(ratio, 1)
                    heads = heads.mean(1, keepdim=True) if combine == "mean" else heads
                    keys = heads[:, h, j * block : (j + 1) * block]
                s = (means_q[:, h, i][:, None] * keys).sum(-1) * d**-0.5
                out[:, h, i, j] = s.amax(1) if kind in ("mean", "max") else s.logsumexp(1)
    return out


@pytest.mark.parametrize("combine", ["none", "mean"])
@pytest.mark.parametrize("kind", ["mean", "max", "logsumexp"])
def test_equals_the_loops(combine: str, kind: str, generator: torch.Generator) -> None:
    q = torch.randn(2, 4, 11, 8, generator=generator)
    k = torch.randn(2, 2, 11, 8, generator=generator)
    part = Partition.blocks(11, 3)
    scorer = BlockMean(combine) if kind == "mean" else MeanToToken(kind, combine, chunk=2)  # type: ignore[arg-type]
    torch.testing.assert_close(scorer(q, k, part, part), twin(q, k, 3, combine, kind))


def test_sum_is_one_long_vector(generator: torch.Generator) -> None:
    q, k = torch.randn(2, 1, 3, 6, 4, generator=generator)
    part = Partition.blocks(6, 2)
    long_q, long_k = (t.transpose(1, 2).flatten(2)[:, None] for t in (q, k))
    want = BlockMean(scale=0.5)(long_q, long_k, part, part)
    torch.testing.assert_close(BlockMean("sum", scale=0.5)(q, k, part, part), want)


def test_bfloat16_is_scored_in_float32(generator: torch.Generator) -> None:
    """A score of bfloat16 would tie; the sums do not."""
    q = torch.randn(1, 1, 256, 32, generator=generator).bfloat16()
    k = torch.randn(1, 1, 256, 32, generator=generator).bfloat16()
    part = Partition.blocks(256, 16)
    scores = BlockMean()(q, k, part, part)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, BlockMean()(q.float(), k.float(), part, part))
    assert scores.unique().numel() == scores.numel()


def test_empty_groups_score_minus_infinity() -> None:
    part = Partition.chunks(torch.tensor([0, 2, 2, 4]))
    x = torch.ones(1, 1, 4, 2)
    for scorer in (BlockMean(), MeanToToken(), MeanToToken("max")):
        scores = scorer(x, x, part, part)
        assert scores[..., 1].eq(-torch.inf).all() and scores[..., [0, 2]].isfinite().all()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="combine='max'; legal: 'none', 'sum'"):
        BlockMean("max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduce='min'; legal: 'logsumexp', 'max'"):
        MeanToToken("min")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 query heads do not divide over 2 key heads"):
        BlockMean()(torch.ones(1, 3, 2, 1), torch.ones(1, 2, 2, 1), Partition.blocks(2, 1), Partition.blocks(2, 1))
