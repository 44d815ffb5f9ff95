"""Calibration of PAROAttention (arXiv 2506.16054): look at dense attention in a run or two, choose an axis order for
every head, and then a static block mask for every step, layer and head.

The choice of the order is a reconstruction from the paper, whose code is not released: blocks of mostly vanishing
weights should be many, the largest weight of a block should lie near its mean. The printed score adds both as costs;
the first is a gain, so its complement is added here. The share `alpha` between them is not published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from glocal.adapt.attach import Method, attach
from glocal.adapt.paro import blocks_of
from glocal.adapt.paro_plan import ORDERS, ParoPlan, pack_bits
from glocal.adapt.records import Core, Site, SiteCall
from glocal.adapt.sparse import media_grid
from glocal.ops import Score
from glocal.ops.capture import BlockStats, Capture


@dataclass(frozen=True)
class ParoSpec:
    """density: share of blocks to keep. alpha: weight of sparsity against even blocks in choosing an order. eps, sigma:
    a block counts as sparse if a share of at least sigma of its weights lies below eps. block: tokens of a block.
    share_second_half: one mask for all steps of the second half of a run.
    """

    density: float = 0.5
    alpha: float = 0.5
    eps: float = 1e-3
    sigma: float = 0.9
    block: int = 64
    share_second_half: bool = True

    def __post_init__(self) -> None:
        for name in ("density", "alpha", "sigma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ParoSpec: {name}={getattr(self, name)} must lie between 0 and 1.")


def calibrate(model: Any, run: Callable[[], Any], spec: ParoSpec | None = None) -> ParoPlan:
    """The plan of a pipeline or model for the resolution that `run()` generates at.

    run: generates one or two samples; it is called twice, with dense attention. Time is six times queries x keys for
    each call of attention, memory a few rows at a time. Raises ValueError if heads or resolution change on the way.
    """
    return calibrate_each(model, run, [ParoSpec() if spec is None else spec])[0]


def calibrate_each(model: Any, run: Callable[[], Any], specs: Sequence[ParoSpec]) -> list[ParoPlan]:
    """`calibrate` for specs that differ in `density` alone, from the same two runs."""
    if not specs:
        raise ValueError("calibrate_each: specs is empty; give at least one.")
    for spec in specs:
        if replace(spec, density=specs[0].density) != specs[0]:
            raise ValueError(f"calibrate_each: {spec} and {specs[0]} differ in more than density; go one by one.")
    looking = _Orders(specs[0])
    with attach(model, looking):
        run()
    summing = _Masks(specs[0], looking.orders())
    with attach(model, summing):
        run()
    return [summing.plan(spec.density) for spec in specs]


def order_scores(sparse: Tensor, quant: Tensor, alpha: float = 0.5) -> Tensor:
    """Cost of each order, the least is best, [..., orders].

    sparse: share of sparse blocks in each order; quant: mean over blocks of largest / mean weight.
    """
    dense = 1 - sparse
    gain = dense / dense.sum(-1, keepdim=True).clamp(min=1e-12)
    return alpha * gain + (1 - alpha) * quant / quant.sum(-1, keepdim=True).clamp(min=1e-12)


def order_facts(stats: BlockStats, sigma: float) -> tuple[Tensor, Tensor]:
    """Share of sparse blocks, and mean over blocks of largest / mean weight, each [heads]."""
    assert stats.share_below is not None
    sparse = (stats.share_below >= sigma).float().mean((0, 2, 3))
    peak = torch.where(stats.mean > 0, stats.max / stats.mean.clamp(min=1e-30), 1.0)
    return sparse, peak.mean((0, 2, 3))


def keep_blocks(mass: Tensor, density: float, words: int) -> Tensor:
    """Bool like mass [..., query blocks, key blocks]: the blocks that hold most, the best one of every row, and all
    rows and columns of the first `words` blocks.
    """
    flat = mass.flatten(-2)
    count = max(1, round(density * flat.shape[-1]))
    best = flat.argsort(dim=-1, descending=True, stable=True)[..., :count]
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, best, True).unflatten(-1, mass.shape[-2:])
    kept = kept.scatter(-1, mass.argmax(-1, keepdim=True), True)
    kept[..., :words, :] = True
    kept[..., :words] = True
    return kept


class _Watching(Method):
    """Dense attention, looked at."""

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(s for s in sites if s.kind != "cross")

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        self.look(q.detach(), k.detach(), call)
        return inner(q, k, v, call)

    def look(self, q: Tensor, k: Tensor, call: SiteCall) -> None:
        raise TypeError(f"{type(self).__name__} must define look().")


def _stats(q: Tensor, k: Tensor, call: SiteCall, orders: Tensor, spec: ParoSpec, eps: float | None) -> BlockStats:
    part = blocks_of(call.layout.q, media_grid(call, "paro"), orders, spec.block)
    return Capture(q, k, canvas=call.layout, score=Score(scale=call.site.scale)).blocks(part, part, eps)


class _Orders(_Watching):
    """Facts about every order, summed over calls."""

    def __init__(self, spec: ParoSpec) -> None:
        self.spec = spec
        self.sums: dict[int, Tensor] = {}  # layer -> [2, heads, orders]

    def look(self, q: Tensor, k: Tensor, call: SiteCall) -> None:
        facts = []
        for order in range(len(ORDERS[len(media_grid(call, "paro"))])):
            stats = _stats(q, k, call, torch.tensor([order]), self.spec, self.spec.eps)
            facts.append(torch.stack(order_facts(stats, self.spec.sigma)).cpu())  # [2, heads]
        found = torch.stack(facts, -1)
        self.sums[call.site.layer] = self.sums.get(call.site.layer, torch.zeros_like(found)) + found

    def orders(self) -> Tensor:
        """The best order of every head, int64 [layers, heads]."""
        layers = [self.sums[layer] for layer in sorted(self.sums)]
        return torch.stack([order_scores(facts[0], facts[1], self.spec.alpha).argmin(-1) for facts in layers])


class _Masks(_Watching):
    """Mass of every block, summed over the calls of a step."""

    def __init__(self, spec: ParoSpec, orders: Tensor) -> None:
        self.spec, self._orders = spec, orders
        self.mass: dict[tuple[int, int], Tensor] = {}  # step, layer -> [heads, blocks, blocks]
        self.words = 0
        self.levels: dict[int, float | None] = {}  # of every step

    def look(self, q: Tensor, k: Tensor, call: SiteCall) -> None:
        found = _stats(q, k, call, self._orders[call.site.layer], self.spec, None).sum.sum(0).cpu()
        place = (call.state.step, call.site.layer)
        self.mass[place] = self.mass[place] + found if place in self.mass else found
        self.levels[call.state.step] = call.state.timestep
        text = sum(p.tokens for p in call.layout.q.parts if not p.is_grid)
        self.words = -(-text // self.spec.block)

    def plan(self, density: float) -> ParoPlan:
        """Masks of a density."""
        steps, layers = 1 + max(s for s, _ in self.mass), 1 + max(n for _, n in self.mass)
        own = steps // 2 if self.spec.share_second_half else steps
        groups = [[s] for s in range(own)] + ([list(range(own, steps))] if own < steps else [])
        bits = []
        for group in groups:
            each = [torch.stack([self.mass[s, n] for s in group]).sum(0) for n in range(layers)]
            bits.append(torch.stack([pack_bits(keep_blocks(m, density, self.words)) for m in each]))
        blocks = next(iter(self.mass.values())).shape[-1]
        levels = [level for _, level in sorted(self.levels.items()) if level is not None]
        known = tuple(levels) if len(levels) == steps else None
        return ParoPlan(self._orders, torch.stack(bits), blocks, steps, self.spec.block, levels=known)
