"""Rules of a recipe from an allocation, and the settings that papers publish, which compete with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from glocal.advise.allocate import APART, Allocation, Items
from glocal.advise.methods import MethodSpec, default_tile
from glocal.advise.recipe import Expected, Phase, Rule


class Span(Protocol):
    """Noise levels low < sigma <= high."""

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def allocation_rules(items: Items, allocation: Allocation, buckets: Sequence[Span]) -> tuple[Rule, ...]:
    """Disjoint rules that say an allocation: equal neighbours in noise level, heads and layers are one rule.

    buckets: the noise levels of each bucket, noisiest first, each beginning where the one before ends; together they
    are taken for the whole run. What stays dense gets no rule. Expected figures are means over the items of a rule:
    share of pairs and of mass kept, root mean squared error, and time over that of dense.
    """
    _check(items, buckets)
    choice = allocation.choice
    layers = sorted(set(items.layer.tolist()))
    heads_of = {layer: sorted(set(items.head[items.layer == layer].tolist())) for layer in layers}
    chosen = {
        (layer, head, bucket): int(method)
        for layer, head, bucket, method in zip(
            items.layer.tolist(), items.head.tolist(), items.bucket.tolist(), choice.tolist(), strict=True
        )
    }
    ways = [_runs(chosen, len(buckets)), _common_runs(chosen, len(buckets))]
    found = min((_collect(spans, heads_of) for spans in ways), key=len)
    return tuple(_rule(items, choice, block, buckets, heads_of) for block in found)


@dataclass(frozen=True)
class PlainRecipe:
    """A competitor: its name, its only method, its rules."""

    name: str
    method: MethodSpec
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class _Published:
    """Dense layers and dense steps of a published setting, and its share of steps."""

    name: str
    system: Literal["radial", "gna"]
    model: str
    decay: float
    block: int
    dense_layers: int
    dense_steps: int
    steps: int


# Radial attention, arXiv 2506.19852, and its published scripts; generalized neighbourhood attention, arXiv 2504.16922.
_PUBLISHED = (
    _Published("radial, Wan 2.1", "radial", "wan", 0.2, 128, 1, 12, 50),
    _Published("radial, Wan 2.2", "radial", "wan", 0.8, 64, 1, 11, 40),
    _Published("radial, HunyuanVideo", "radial", "hunyuan", 0.95, 128, 0, 12, 50),
    _Published("gna, HunyuanVideo", "gna", "hunyuan", 1.0, 64, 0, 15, 50),
)
_GNA_CANVAS, _GNA_WINDOW, _GNA_STRIDE = (30, 48, 80), (18, 24, 24), (16, 8, 8)


def published_defaults(shape: Sequence[int], layers: int, *, component: str = "transformer") -> tuple[PlainRecipe, ...]:
    """Published video settings on a grid (frames, height, width) of tokens; none for grids of other rank.

    Extents in tokens carry over as shares of their canvas. Dense steps are the first share of a run, dense layers the
    first ones, as published.
    """
    if len(shape) != 3:
        return ()
    found: list[PlainRecipe] = []
    for entry in _PUBLISHED:
        if layers <= entry.dense_layers:
            continue
        if entry.system == "radial":
            params = {"form": "blocks", "decay": entry.decay, "model": entry.model}
            method = MethodSpec("radial", params, "raster", (entry.block, entry.block))
        else:
            tile = default_tile(shape, entry.block)
            window = [{"fraction": w / n} for w, n in zip(_GNA_WINDOW, _GNA_CANVAS, strict=True)]
            size = int(torch.tensor(tile).prod())
            params = {"window": window, "stride": list(_GNA_STRIDE)}
            method = MethodSpec("gna", params, {"tile": list(tile)}, (size, size))
        phase = Phase("progress", entry.dense_steps / entry.steps, 1.0)
        rule = Rule(method.id, ((entry.dense_layers, layers - 1),), "all", phase, component)
        found.append(PlainRecipe(entry.name, method, (rule,)))
    return tuple(found)


@dataclass(frozen=True)
class _Block:
    """Items of one rule: a column at `heads` of `layers` in buckets first..last."""

    method: int
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    first: int
    last: int


Run = tuple[int, int, int]  # column, first bucket, last bucket
Chosen = dict[tuple[int, int, int], int]


def _runs(chosen: Chosen, buckets: int) -> dict[tuple[int, int], list[Run]]:
    """The longest runs of equal choice of each head."""
    return _cut(chosen, [True] * buckets)


def _common_runs(chosen: Chosen, buckets: int) -> dict[tuple[int, int], list[Run]]:
    """Runs of each head that end wherever any head changes: more of them, but alike in more heads."""
    places = {(layer, head) for layer, head, _ in chosen}
    joins = [False]
    for b in range(1, buckets):
        joins.append(all(chosen.get((*p, b)) == chosen.get((*p, b - 1)) for p in places))
    return _cut(chosen, joins)


def _cut(chosen: Chosen, joins: Sequence[bool]) -> dict[tuple[int, int], list[Run]]:
    """Runs of equal choice that are not dense; joins[b]: whether bucket b may go on the run before it."""
    spans: dict[tuple[int, int], list[Run]] = {}
    for layer, head, bucket in sorted(chosen):
        method = chosen[layer, head, bucket]
        if method == 0:
            continue
        own = spans.setdefault((layer, head), [])
        if own and joins[bucket] and own[-1][0] == method and own[-1][2] == bucket - 1:
            own[-1] = (method, own[-1][1], bucket)
        else:
            own.append((method, bucket, bucket))
    return spans


def _collect(spans: dict[tuple[int, int], list[Run]], heads_of: dict[int, list[int]]) -> list[_Block]:
    """Heads of a layer with the same span together, then layers with the same heads."""
    heads: dict[tuple[Run, int], list[int]] = {}
    for (layer, head), own in sorted(spans.items()):
        for span in own:
            heads.setdefault((span, layer), []).append(head)
    layers: dict[tuple[Run, tuple[int, ...], bool, int], list[int]] = {}
    for (span, layer), members in sorted(heads.items()):
        every = members == heads_of[layer]
        layers.setdefault((span, tuple(members), every, layer // APART), []).append(layer)
    blocks = [
        _Block(method, tuple(own), members, first, last)
        for ((method, first, last), members, _, _), own in layers.items()
    ]
    return sorted(blocks, key=lambda b: (b.first, b.layers, b.heads, b.method))


def _rule(
    items: Items,
    choice: Tensor,
    block: _Block,
    buckets: Sequence[Span],
    heads_of: dict[int, list[int]],
) -> Rule:
    rows = torch.isin(items.layer, torch.tensor(block.layers)) & torch.isin(items.head, torch.tensor(block.heads))
    rows &= (items.bucket >= block.first) & (items.bucket <= block.last) & (choice == block.method)

    def mean(part: Tensor) -> float:
        return round(float(part[rows, block.method].double().mean()), 6)

    time = items.time[rows].double()
    expected = Expected(
        kept=mean(items.kept),
        mass=mean(items.mass),
        error=round(float(items.error[rows, block.method].double().mean().sqrt()), 6),
        time_ratio=round(float(time[:, block.method].sum() / time[:, 0].sum()), 6),
    )
    every = all(list(block.heads) == heads_of[layer] for layer in block.layers)
    whole = block.first == 0 and block.last == len(buckets) - 1
    coordinate = getattr(buckets[0], "coordinate", "sigma")
    phase = Phase() if whole else Phase("sigma", buckets[block.last].low, buckets[block.first].high)
    if whole and coordinate == "prefill":
        phase = buckets[0].phase  # type: ignore[attr-defined]
    heads: tuple[int, ...] | Literal["all"] = "all" if every else block.heads
    component, kind = items.groups[block.layers[0] // APART]
    layers = layer_ranges([layer % APART for layer in block.layers])
    site: Literal["self", "joint"] = "joint" if kind == "joint" else "self"
    return Rule(items.methods[block.method], layers, heads, phase, component, site, expected=expected)


def layer_ranges(numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Rising layer numbers as inclusive ranges."""
    found: list[tuple[int, int]] = []
    for n in numbers:
        if found and found[-1][1] == n - 1:
            found[-1] = (found[-1][0], n)
        else:
            found.append((n, n))
    return tuple(found)


def _check(items: Items, buckets: Sequence[Span]) -> None:
    if len(buckets) < items.buckets:
        raise ValueError(f"buckets has {len(buckets)} ranges; the items have {items.buckets} buckets.")
    for number, phase in enumerate(buckets):
        if not phase.low < phase.high:
            raise ValueError(f"buckets[{number}] is empty: low {phase.low} must be below high {phase.high}.")
        if number and phase.high != buckets[number - 1].low:
            raise ValueError(
                f"buckets[{number}] begins at sigma {phase.high}, buckets[{number - 1}] ends at "
                f"{buckets[number - 1].low}; ranges go from the noisiest down without gaps."
            )
