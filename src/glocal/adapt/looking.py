"""Looking at attention inside a model: a method that leaves attention as it is and keeps reductions of its maps.

    look = Look({"seen": column_mean(), "first": rows([0])}, layers=(0, 5))
    with attach(pipe, look):
        pipe(...)
    look.found[0].values["seen"]                    # [B, H, keys]

The reductions are those of `glocal.ops.capture`, computed a few rows at a time; no map of all pairs is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glocal.adapt.attach import Method
from glocal.adapt.records import Branch, Core, Kind, Site, SiteCall
from glocal.ops import Score
from glocal.ops.capture import Capture
from glocal.routing.partition import Partition

Reading = Callable[[Capture, SiteCall], Tensor]


@dataclass(frozen=True, eq=False)
class Found:
    """What one call of one site gave: values by the name of the reading, and where the run was. row: the sample, where
    the host calls once a sample.
    """

    site: Site
    step: int
    timestep: float | None
    branch: Branch
    values: Mapping[str, Tensor]
    row: int | None = None


class Look(Method):
    """readings: name -> reduction. layers, steps: only these; None for all. kinds: of attention. heads: "each", or
    "mean" over them. keys: name of a part of the canvas; each row is then normalised over its keys alone.
    """

    def __init__(
        self,
        readings: Mapping[str, Reading],
        *,
        layers: Sequence[int] | None = None,
        steps: Sequence[int] | None = None,
        kinds: Sequence[Kind] = ("self", "joint"),
        heads: str = "each",
        keys: str | None = None,
    ) -> None:
        if heads not in ("each", "mean"):
            raise ValueError(f"Look: heads={heads!r}; legal: 'each', 'mean'.")
        self.readings, self.layers, self.steps, self.kinds = dict(readings), layers, steps, tuple(kinds)
        self.heads, self.keys = heads, keys
        self.found: list[Found] = []

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """Those of the kinds and layers asked for."""
        return tuple(s for s in sites if s.kind in self.kinds and (self.layers is None or s.layer in self.layers))

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """The attention below, and a look at its maps."""
        out = inner(q, k, v, call)
        if self.steps is None or call.state.step in self.steps:
            self.found.append(self._read(q.detach(), k.detach(), call))
        return out

    def _read(self, q: Tensor, k: Tensor, call: SiteCall) -> Found:
        score = Score(scale=call.site.scale, softcap=call.site.softcap)
        subset = None if self.keys is None else call.layout.kv.indices(self.keys).to(q.device)
        seen = Capture(q, k, canvas=call.layout, score=score, keys=subset)
        values = {name: reading(seen, call) for name, reading in self.readings.items()}
        if self.heads == "mean":
            values = {name: t.mean(1) for name, t in values.items()}
        state = call.state
        return Found(call.site, state.step, state.timestep, state.branch, values, call.row)


def rows(index: Sequence[int]) -> Reading:
    """Rows of the queries `index`, [B, H, n, keys]."""
    return lambda seen, call: seen.rows(torch.tensor(list(index)))


def columns(part: str) -> Reading:
    """Columns of the keys of a part (the words, say) under the normaliser of all keys, [B, H, queries, n]."""

    def read(seen: Capture, call: SiteCall) -> Tensor:
        keys = call.layout.kv.indices(part).to(seen.q.device)
        return torch.cat([p[..., keys] for _, p in replace(seen, keys=None).stream_rows()], 2)

    return read


def column_mean(power: int = 1) -> Reading:
    """Mean over queries of P^power, [B, H, keys]: what each key receives, and its second moment."""
    return lambda seen, call: seen.column_mean(power)


def entropy() -> Reading:
    """Entropy of each row in nats, [B, H, queries]."""
    return lambda seen, call: seen.entropy()


def block_mass(block: int | Sequence[int]) -> Reading:
    """Sum of P over blocks of queries and keys, [B, H, query blocks, key blocks]; `block`: tokens or a box."""

    def read(seen: Capture, call: SiteCall) -> Tensor:
        return seen.blocks(Partition.blocks(call.layout.q, block), Partition.blocks(call.layout.kv, block)).sum

    return read
