"""Times inside a call: what it costs that heads of one call run several methods."""

from __future__ import annotations

import pytest
import torch

from glocal.adapt.records import RunState, Site, SiteCall
from glocal.advise import timing
from glocal.advise.dropped import Dropped
from glocal.advise.inside import ready_for
from glocal.advise.methods import candidates
from glocal.advise.timing import dealt, exact, mixture, time_methods
from glocal.canvas import Canvas, Layout
from glocal.measure.timers import PairedTiming, summarize

SHAPE, HEADS = (4, 4, 8), 5
SITE = Site("blocks.3.attn", 3, HEADS, 8)
CALL = SiteCall(SITE, Layout.of(Canvas(SHAPE)), RunState(step=0, timestep=1.0, rows=((0, "cond"),)))
METHODS = {m.id: m for m in candidates(SHAPE, tile_shape=(2, 2, 4)) if m.correction == "none"}


@pytest.mark.parametrize(("methods", "heads", "ways"), [(5, 40, 4), (5, 2, 2), (1, 8, 2), (3, 1, 1), (0, 4, 1)])
def test_every_head_is_dealt_once(methods: int, heads: int, ways: int) -> None:
    found = dealt([f"m{i}" for i in range(methods)], heads)
    assert len(found) == ways and next(iter(found)) == "dense"
    assert sorted(sum(found.values(), ())) == list(range(heads))


def test_a_mixture_is_each_method_at_its_heads(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(1, HEADS, 128, 8, generator=generator) for _ in range(3))
    shares = dealt(list(METHODS), HEADS)
    out = mixture({n: METHODS[n] for n in shares if n != "dense"}, shares, SITE).core(q, k, v, CALL, _inner)
    for name, heads in shares.items():
        alone = _inner(q, k, v, CALL) if name == "dense" else METHODS[name].run(q, k, v, CALL)[0]
        assert torch.allclose(out[:, heads], alone[:, heads], atol=1e-6)


def test_what_a_further_method_costs(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense takes 5 s, every method 2, and a call of four methods 1.5 s more than its shares."""
    q, k, v = (torch.randn(1, HEADS, 128, 8, generator=generator) for _ in range(3))
    ready = {n: ready_for(Dropped(), n, m, (q, k, v, CALL)) for n, m in METHODS.items()}

    def fixed(contenders, **options) -> PairedTiming:
        seconds = {"dense: host": 5.0, timing._MIXED: (2 * 5 + 3 * 2) / HEADS + 1.5}
        return PairedTiming("dense: host", {n: summarize([seconds.get(n, 2.0)]) for n in contenders}, {})

    monkeypatch.setattr(timing, "compare_paired", fixed)
    working = {n: r for n, r in ready.items() if r is not None}
    found = time_methods(q, k, v, CALL, working, inner=_inner)
    assert found.split == pytest.approx(0.5)
    assert set(found.methods) == set(METHODS)
    assert time_methods(q, k, v, CALL, working).split == 0


def _inner(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: SiteCall) -> torch.Tensor:
    return exact(q, k, v, call)[0]
