from __future__ import annotations

import math

import pytest
import torch

from glocal.routing import Keep


def naive(row: list[float], keep: Keep, allowed: list[bool], must: list[bool]) -> set[int]:
    """The definition, one row at a time."""
    everybody = [i for i, ok in enumerate(allowed) if ok]
    forced = [i for i in everybody if must[i]]
    field = [i for i in everybody if not must[i]] if keep.forced == "outside" else everybody
    front = forced if keep.forced == "inside" else []
    order = sorted(front, key=lambda i: (-row[i], i))
    order += sorted((i for i in field if i not in front), key=lambda i: (-row[i], i))
    if keep.mass is not None:
        total, cumulative, need = sum(math.exp(row[i]) for i in field), 0.0, 0
        for i in order:
            cumulative += math.exp(row[i]) / total
            need += cumulative <= keep.mass
        need = max(need + (keep.crossing == "in"), keep.at_least)
    elif keep.ratio is not None:
        need = max(int(keep.ratio * len(row)), keep.at_least)
    else:
        assert isinstance(keep.top, int)
        need = max(keep.top, keep.at_least)
    return set(order[:need]) | set(forced)


@pytest.mark.parametrize("forced", ["inside", "outside", "union"])
@pytest.mark.parametrize(
    "how",
    [
        {"top": 3},
        {"top": 0},
        {"top": 99},
        {"ratio": 0.4},
        {"ratio": 0.0, "at_least": 1},
        {"mass": 0.5, "crossing": "in"},
        {"mass": 0.5, "crossing": "out"},
        {"mass": 0.3, "crossing": "in", "at_least": 4},
    ],
)
def test_equals_the_definition(how: dict, forced: str, generator: torch.Generator) -> None:
    keep = Keep(**how, forced=forced)  # type: ignore[arg-type]
    scores = torch.randn(2, 2, 5, 9, generator=generator).mul(2).round().div(2)  # with ties
    allowed = torch.rand(2, 1, 5, 9, generator=generator) > 0.3
    must = torch.rand(1, 2, 1, 9, generator=generator) > 0.8
    kept = keep.select(scores, allowed, must)
    for b in range(2):
        for h in range(2):
            for i in range(5):
                n = int(kept.count[b, h, i])
                got = kept.index[b, h, i, :n].tolist()
                want = naive(scores[b, h, i].tolist(), keep, allowed[b, 0, i].tolist(), must[0, h, 0].tolist())
                assert set(got) == want and len(got) == n
                assert got == sorted(got, key=lambda j: (-float(scores[b, h, i, j]), j))  # best first


def test_ties_go_to_the_lowest_index() -> None:
    kept = Keep(top=3).select(torch.zeros(1, 1, 1, 50))
    assert kept.index.flatten().tolist() == [0, 1, 2]


def test_budget_of_each_head() -> None:
    kept = Keep(top=torch.tensor([1, 3])[:, None]).select(torch.arange(5.0).expand(1, 2, 2, 5))
    assert kept.count.tolist() == [[[1, 1], [3, 3]]]
    assert kept.index[0, 1, 0].tolist() == [4, 3, 2]


def test_competing_columns_use_up_places() -> None:
    scores = torch.tensor([3.0, 2.0, 1.0]).reshape(1, 1, 1, 3)
    text = torch.tensor([2.5, 0.0]).reshape(1, 1, 1, 2)
    kept = Keep(top=2).select(scores, competing=text)
    assert kept.index.flatten().tolist() == [0] and kept.count.item() == 1
    assert kept.competing is not None and kept.competing.flatten().tolist() == [True, False]


def test_hidden_and_nan_rows_keep_nothing() -> None:
    scores = torch.tensor([[float("nan"), -math.inf, 1.0], [-math.inf, -math.inf, float("nan")]]).reshape(1, 1, 2, 3)
    for keep in (Keep(top=2), Keep(mass=0.9), Keep(ratio=1.0)):
        kept = keep.select(scores)
        assert kept.count.flatten().tolist() == [1, 0]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="exactly one of top, ratio, mass is needed; given: top, mass"):
        Keep(top=1, mass=0.5)
    with pytest.raises(ValueError, match="given: none"):
        Keep()
    with pytest.raises(ValueError, match="ratio=1.5 must lie between 0 and 1"):
        Keep(ratio=1.5)
    with pytest.raises(ValueError, match="crossing='maybe'; legal: 'in', 'out'"):
        Keep(mass=0.5, crossing="maybe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top=-1 must not be negative"):
        Keep(top=-1)


def test_the_map_holds_what_is_selected(generator: torch.Generator) -> None:
    scores = torch.randn(2, 2, 5, 9, generator=generator)
    words = torch.randn(2, 2, 5, 2, generator=generator)
    must = torch.rand(5, 9, generator=generator) > 0.8
    keep = Keep(mass=0.4, crossing="in", at_least=2, forced="union")
    kept, found = keep.select(scores, None, must, words), keep.mask(scores, None, must, words)
    want = torch.zeros_like(found)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(5)).tolist():
        want[tuple(place)][kept.index[tuple(place)][: int(kept.count[tuple(place)])].long()] = True
    assert torch.equal(found, want)
