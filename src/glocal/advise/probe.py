"""In-place probe: what every candidate would lose, measured inside the dense run for the price of about one.

At chosen calls, for a few query blocks, scores against all keys are computed once (`advise.partial`), and every
candidate's output follows from sums over its key blocks; routers run for real on the full q and k. No q, k, v leaves
the call: only records do. Heads are taken in groups; where memory does not suffice, the groups are halved, then the
number of query blocks, and the records say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from glocal.adapt.attach import Method, media_sites
from glocal.adapt.records import Core, Site, SiteCall
from glocal.advise.methods import MethodSpec
from glocal.advise.partial import (
    Lists,
    blocks_of,
    candidates_at,
    gather_keys,
    partial_sums,
    picks_at,
    quick_products,
    rows_of,
)
from glocal.advise.router_rows import Blocks, RectifiedRows, RouterRows, router_blocks, shares_seen
from glocal.plan.blockplan import BlockPlan

LEAST_BLOCKS = 8  # query blocks a call, however little memory there is


@dataclass(frozen=True)
class ProbeRecord:
    """One candidate at one head of one call.

    head -1 is the sum over heads. mass: attention weight kept. output: relative error of the attention output.
    residual: error of what the site adds to the residual stream, relative to the stream (root mean square over rows);
    high: its 95th percentile over rows. kept, visited: of the plan, of a router's at the probed blocks. lost: rows that
    kept under 1 % of their mass.
    kind, component: of the site.
    """

    site: str
    layer: int
    head: int
    bucket: int
    step: int
    branch: str
    sample: str
    method: str
    mass: float
    output: float
    residual: float
    high: float
    kept: float
    visited: float
    lost: int = 0
    kind: str = "self"
    component: str = "transformer"


@dataclass(frozen=True)
class ProbeSpec:
    """methods by id; buckets: bucket of a step; steps: which steps are probed; blocks: query blocks a call; heads: how
    many are measured at once; None for as many as `memory` bytes hold.
    """

    methods: Mapping[str, MethodSpec]
    bucket_of: Callable[[int], int]
    steps: frozenset[int]
    blocks: int = 8
    sample: str = "probe"
    heads: int | None = None
    memory: int = 1 << 30


@dataclass(frozen=True)
class Shrunk:
    """One step back for lack of memory: at which site, and what is measured at once from there on."""

    site: str
    heads: int
    blocks: int


@dataclass
class Share:
    """What is measured at once; it only ever shrinks."""

    heads: int
    blocks: int
    shrunk: list[Shrunk] = field(default_factory=list)

    def less(self, site: str, heads: int) -> bool:
        """Halve the head group (of at most `heads`), else the query blocks; False where neither can shrink."""
        if min(self.heads, heads) > 1:
            self.heads = min(self.heads, heads) // 2
        elif self.blocks > LEAST_BLOCKS:
            self.blocks = max(self.blocks // 2, LEAST_BLOCKS)
        else:
            return False
        self.shrunk.append(Shrunk(site, self.heads, self.blocks))
        return True


def share_of(spec: ProbeSpec, q: Tensor, plan: Blocks) -> Share:
    """As many heads at once as `spec.memory` holds: scores of a query block, its sums, keys and values in float32."""
    if spec.heads is not None:
        return Share(spec.heads, spec.blocks)
    keys, rows, size = plan.kv_order.shape[-1], plan.q_block, q.shape[-1]
    one = 4 * (2 * rows * keys + rows * plan.kv_blocks * size + 2 * keys * size)
    return Share(max(1, min(q.shape[1], spec.memory // one)), spec.blocks)


class MediaMethod(Method):
    """A method at every self and joint attention; cross attention and layers with a sliding window are left alone."""

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """Self and joint attention over everything."""
        return media_sites(sites)


class Probe(MediaMethod):
    """Measures all candidates at the calls of the chosen steps; the model's own output is left as it is.

    weigh: in place of the error in the residual stream, what an error counts for (see `advise.sensitivity`).
    """

    def __init__(self, spec: ProbeSpec, weigh: Weigh | None = None) -> None:
        self.spec, self.weigh = spec, weigh
        self.records: list[ProbeRecord] = []
        self.errors: dict[str, str] = {}
        self.share: Share | None = None
        self.lists: dict[str, Lists] = {}  # of patterns, whose plan is the same one in every call of a canvas

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """Dense as before, then the records."""
        out = inner(q, k, v, call)
        if call.state.step in self.spec.steps:
            self._measure(q, k, v, in_units(call, out))
        return out

    @torch.no_grad()
    def _measure(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> None:
        while True:
            try:
                with quick_products(q):
                    self.records += self._once(q, k, v, call)
                return
            except (torch.OutOfMemoryError, MemoryError):
                if self.share is None or not self.share.less(call.site.name, q.shape[1]):
                    raise
                if q.is_cuda:
                    torch.cuda.empty_cache()

    def _once(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> list[ProbeRecord]:
        """Records of one call, with as much at once as the share says."""
        groups: list[Group] = []
        for name, method in self.spec.methods.items():
            if name in self.errors:
                continue
            try:
                plan, blocks = None, router_blocks(method, call, q.device)
                if blocks is None:
                    plan = method.plan(call.layout, q, k, call.site.scale, call)
                    blocks = Blocks.of(plan)
                group = next((g for g in groups if g.blocks.same(blocks)), None)
                if group is None:
                    self.share = share_of(self.spec, q, blocks) if self.share is None else self.share
                    group = Group((q, k, v), call, blocks, self.share.blocks, self.lists)
                    groups.append(group)
                group.add(name, method, plan)
            except ValueError as error:  # does not fit this canvas: dropped, and said so in the report
                self.errors[name] = str(error)
        found: list[ProbeRecord] = []
        for group in groups:
            if group.candidates and self.share is not None:
                found += measured(group, self.spec, self.share.heads, self.weigh)
        return found


def in_units(call: SiteCall, out: Tensor) -> SiteCall:
    """The stream in units of what heads add, where a norm behind them scales that; out [B, H, N, D] of dense attention.
    To first order: what an error changes of the norm's own factor is left out.
    """
    if call.factor is None or call.residual is None:
        return call
    return replace(call, residual=call.residual / call.factor(out)[..., None].to(call.residual.dtype))


def by_order(plans: Mapping[str, BlockPlan]) -> list[dict[str, BlockPlan]]:
    """Plans that cut queries and keys into the same blocks."""
    groups: list[dict[str, BlockPlan]] = []
    for name, plan in plans.items():
        for group in groups:
            if Blocks.of(next(iter(group.values()))).same(Blocks.of(plan)):
                group[name] = plan
                break
        else:
            groups.append({name: plan})
    return groups


@dataclass(frozen=True, eq=False)
class Candidate:
    """What the probe keeps of a method at one call: its lists at the chosen query blocks, the shares of pairs that it
    keeps and visits (of a router at those blocks, else of the whole plan), and its correction there.
    """

    name: str
    lists: Lists
    kept: float
    visited: float
    after: RectifiedRows | None


class Group:
    """Candidates that cut queries and keys into the same blocks, and so share the partial sums. known: lists of earlier
    calls by method, taken where the plan is the same object and the chosen blocks are the same.
    """

    def __init__(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        call: SiteCall,
        blocks: Blocks,
        count: int,
        known: dict[str, Lists] | None = None,
    ) -> None:
        self.qkv, self.call, self.blocks = qkv, call, blocks
        self.chosen = spread(blocks.q_blocks, count)
        self.known = {} if known is None else known
        self.candidates: list[Candidate] = []
        self.rows = RouterRows(qkv, call, torch.tensor(self.chosen, device=qkv[0].device))
        self._made: dict[int, Lists] = {}  # by plan, which these hold

    def add(self, name: str, method: MethodSpec, plan: BlockPlan | None) -> None:
        """A candidate with its whole plan, or a router that is asked for the chosen blocks alone."""
        heads = self.qkv[0].shape[1]
        if plan is None:
            some = self.rows.plan(method)
            lists = Lists(some, range(len(self.chosen)), heads)
            seen, after = shares_seen(some), self.rows.rectified(method, some, whole=False)
        else:
            lists = self._lists(name, plan, heads)
            seen, after = (plan.kept, plan.visited), self.rows.rectified(method, plan, whole=True)
        self.candidates.append(Candidate(name, lists, *seen, after))

    def _lists(self, name: str, plan: BlockPlan, heads: int) -> Lists:
        """Methods with the same plan have the same lists."""
        mine = self._made.get(id(plan), self.known.get(name))
        if mine is None or mine.plan is not plan or mine.numbers != tuple(self.chosen):
            mine = Lists(plan, self.chosen, heads)
        if not mine.several:
            self._made[id(plan)] = self.known[name] = mine
        return mine


# weigh(call, heads (first, last), rows [R], errors [C, H, R, D]) -> what each row's error counts for [C, H, R].
Weigh = Callable[[SiteCall, tuple[int, int], Tensor, Tensor], Tensor]


def measure(
    q: Tensor, k: Tensor, v: Tensor, call: SiteCall, plans: Mapping[str, BlockPlan], spec: ProbeSpec
) -> list[ProbeRecord]:
    """Records of one call for whole plans on the same blocks: q [B, H, N, D], k, v [B, Hkv, N, D] (a batch is probed at
    its first row).
    """
    blocks = Blocks.of(next(iter(plans.values())))
    share = share_of(spec, q, blocks)
    group = Group((q, k, v), call, blocks, share.blocks)
    for name, plan in plans.items():
        group.add(name, spec.methods[name], plan)
    return measured(group, spec, share.heads)


def measured(group: Group, spec: ProbeSpec, at_once: int, weigh: Weigh | None = None) -> list[ProbeRecord]:
    """Records of the candidates of a group, `at_once` heads at a time."""
    (q, k, v), call, first, chosen = group.qkv, group.call, group.blocks, group.chosen
    every = q.shape[1]
    own_orders = first.q_order.shape[1] > 1 or first.kv_order.shape[1] > 1
    width = 1 if own_orders else min(at_once, every)
    found: list[Tensor] = []  # [C, width, 3, rows]: residual error, output error, mass
    reach = Reach(call, every, v.shape[-1])
    sums: dict[int, list[Tensor]] = {}  # of a query block: what all heads' errors add up to, and their norms
    segments = call.layout.segments(q.shape[0], q.device)
    blocks = blocks_of(first, chosen, call, segments)
    lists = [candidate.lists for candidate in group.candidates]
    apart = list(dict.fromkeys(lists))  # methods that differ in their correction alone share a plan and its sums
    which = torch.tensor([apart.index(one) for one in lists], device=q.device)
    place = {number: at for at, number in enumerate(chosen)}
    picks: dict[int, Tensor] = {}  # of a query block, for all heads
    for head in range(0, every, width):
        last = min(head + width, every)
        if own_orders:
            blocks = blocks_of(first, chosen, call, segments, head)
        keys = gather_keys(k, v, first, call, segments, (head, last, every))
        parts = []
        for block in blocks:
            rows = rows_of(q, block, call, (head, last))
            part = partial_sums(rows, keys)
            at = place[block.number]
            if at not in picks:
                picks[at] = picks_at(apart, at, every)
            outs, masses, dense = candidates_at(part, apart, (at, block), keys, (head, last), picks[at])
            outs, masses = outs[which], masses[which]
            for number, candidate in enumerate(group.candidates):
                if candidate.after is not None:
                    outs[number] = candidate.after.at(at, (head, last), outs[number])
            errors = outs - dense
            single, local, summed = reach.compare(errors, dense, rows.places, (head, last))
            if weigh is not None:
                single = weigh(call, (head, last), rows.places, errors)
            parts.append(torch.stack([single, local, masses], 2))  # [C, H, 3, R]
            summed.append(masses.sum(1) / every)
            if not own_orders:  # rows of different heads are different tokens then, and do not add up
                before = sums.get(block.number)
                summed = summed if before is None else [a + b for a, b in zip(before, summed, strict=True)]
                sums[block.number] = summed
        if parts:
            found.append(torch.cat(parts, -1))
    records: list[ProbeRecord] = []
    for number, columns in enumerate(found):
        records += _records(range(number * width, every), columns, group, spec)
    if sums:
        whole = torch.cat([Reach.together(summed) for summed in sums.values()], -1)
        records += _records([-1], whole[:, None], group, spec)
    return records


def _records(heads: Sequence[int], columns: Tensor, group: Group, spec: ProbeSpec) -> list[ProbeRecord]:
    """A record for each of `heads` (as many as are there) and candidate: columns [C, heads, 3, rows]."""
    errors, masses = columns[:, :, :2], columns[:, :, 2]
    square = errors.square().mean(-1).sqrt()  # [C, heads, 2]
    high = errors[:, :, 0].quantile(0.95, dim=-1)
    lost = (masses < 0.01).sum(-1)
    # One transfer for all of them: a device is waited for once.
    values = torch.stack([masses.mean(-1), square[..., 1], square[..., 0], high, lost.to(square)], -1).transpose(0, 1)
    where, state = group.call.site, group.call.state
    place = (spec.bucket_of(state.step), state.step, state.branch, spec.sample)
    return [
        ProbeRecord(
            where.name,
            where.layer,
            head,
            *place,
            candidate.name,
            *numbers[:4],
            kept=candidate.kept,
            visited=candidate.visited,
            lost=int(numbers[4]),
            kind=where.kind,
            component=where.component,
        )
        for head, row in zip(heads, values.tolist(), strict=False)
        for candidate, numbers in zip(group.candidates, row, strict=True)
    ]


class Reach:
    """How far an error of the heads of one call reaches: into the residual stream, where the host shows it, else as far
    as the attention output. What heads add is linear, so one call of the host's `contribution` says all of it.
    """

    def __init__(self, call: SiteCall, heads: int, size: int) -> None:
        self.heads, self.stream, self.maps = heads, None, None
        if call.contribution is not None and call.residual is not None:
            one = torch.eye(size, dtype=call.residual.dtype, device=call.residual.device)
            added = call.contribution(one.expand(call.residual.shape[0], heads, size, size))[0]
            self.maps = added.float()  # [H, D, channels]
            self.gram = self.maps @ self.maps.transpose(1, 2)  # [H, D, D]
            self.stream = call.residual[0]

    def compare(
        self, error: Tensor, dense: Tensor, rows: Tensor, heads: tuple[int, int]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """For errors [C, h, R, D] of the outputs `dense` [h, R, D] of heads `first` to `last` - 1: residual and output
        error of each head [C, h, R], and what adds up over groups of heads (`together`).
        """
        base = dense.norm(dim=-1)  # [h, R]
        local = error.norm(dim=-1) / base.clamp(min=1e-12)
        if self.maps is None or self.stream is None:
            added, single, scale = error.sum(1), local, base.square().sum(0) / self.heads
        else:
            added = torch.einsum("chrd,hdk->crk", error, self.maps[slice(*heads)])  # [C, R, channels]
            scale = self.stream[rows].float().square().sum(-1)  # [R]
            squared = ((error @ self.gram[slice(*heads)]) * error).sum(-1).clamp(min=0)
            single = squared.sqrt() / scale.sqrt().clamp(min=1e-12)
            scale = scale * (heads[1] - heads[0]) / self.heads  # so that it adds up to itself over all heads
        return single, local, [added, error.square().sum((1, -1)), base.square().sum(0), scale]

    @staticmethod
    def together(summed: Sequence[Tensor]) -> Tensor:
        """Residual error, output error and mass of all heads together, [C, 3, R]."""
        added, error, base, scale, mass = summed
        stream = added.norm(dim=-1) / scale.sqrt().clamp(min=1e-12)
        whole = error.sqrt() / base.sqrt().clamp(min=1e-12)
        return torch.stack([stream, whole, mass], 1)


def spread(blocks: int, count: int) -> list[int]:
    """`count` block numbers from the first to the last, evenly spread (corners and centre included)."""
    if blocks <= count:
        return list(range(blocks))
    return sorted({round(i * (blocks - 1) / (count - 1)) for i in range(count)}) if count > 1 else [blocks // 2]
