"""In-place probe: what every candidate would lose, measured inside the dense run for the price of about one.

At chosen calls, for a few query blocks, scores against all keys are computed once. With the dense row maximum m, every
key block j gives ``l_j = sum exp(s - m)`` and ``o_j = sum exp(s - m) v``; a candidate made of whole blocks is then
``sum(o_j) / sum(l_j)`` over its blocks. Partial blocks are recomputed with their bit mask; routers run for real on the
full q and k. No q, k, v leaves the call: only records do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.adapt.attach import Method
from glocal.adapt.records import Core, SiteCall
from glocal.advise.methods import MethodSpec
from glocal.plan.blockplan import BlockPlan, unpack


@dataclass(frozen=True)
class ProbeRecord:
    """One candidate at one head of one call.

    head -1 is the sum over heads. mass: attention weight kept. output: relative error of the attention output.
    residual: error of what the site adds to the residual stream, relative to the stream (root mean square over rows);
    high: its 95th percentile over rows. kept, visited: of the whole plan. lost: rows that kept under 1 % of their mass.
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


@dataclass(frozen=True)
class ProbeSpec:
    """methods by id; buckets: bucket of a step; steps: which steps are probed; blocks: query blocks a call."""

    methods: Mapping[str, MethodSpec]
    bucket_of: Callable[[int], int]
    steps: frozenset[int]
    blocks: int = 8
    sample: str = "probe"


class Probe(Method):
    """Measures all candidates at the calls of the chosen steps; the model's own output is left as it is."""

    def __init__(self, spec: ProbeSpec) -> None:
        self.spec = spec
        self.records: list[ProbeRecord] = []
        self.errors: dict[str, str] = {}

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """Dense as before, then the records."""
        out = inner(q, k, v, call)
        if call.state.step in self.spec.steps:
            self._measure(q, k, v, call)
        return out

    @torch.no_grad()
    def _measure(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> None:
        plans: dict[str, BlockPlan] = {}
        for name, method in self.spec.methods.items():
            if name in self.errors:
                continue
            try:
                plans[name] = method.plan(call.layout, q, k)
            except ValueError as error:  # does not fit this canvas: dropped, and said so in the report
                self.errors[name] = str(error)
        for group in _by_order(plans):
            self.records += measure(q, k, v, call, group, self.spec)


def _by_order(plans: Mapping[str, BlockPlan]) -> list[dict[str, BlockPlan]]:
    """Plans that share orders and blocks share the partial sums."""
    groups: list[dict[str, BlockPlan]] = []
    for name, plan in plans.items():
        for group in groups:
            if _same_blocks(next(iter(group.values())), plan):
                group[name] = plan
                break
        else:
            groups.append({name: plan})
    return groups


def _same_blocks(a: BlockPlan, b: BlockPlan) -> bool:
    """Whether two plans cut queries and keys into the same blocks."""
    return (
        (a.q_block, a.kv_block) == (b.q_block, b.kv_block)
        and torch.equal(a.q_order, b.q_order)
        and torch.equal(a.kv_order, b.kv_order)
    )


def measure(
    q: Tensor, k: Tensor, v: Tensor, call: SiteCall, plans: Mapping[str, BlockPlan], spec: ProbeSpec
) -> list[ProbeRecord]:
    """Records of one call: q, k, v [1, H, N, D] (a batch is probed at its first row)."""
    first = next(iter(plans.values()))
    chosen = spread(first.q_blocks, spec.blocks)
    names = list(plans)
    sums: dict[tuple[int, str], list[Tensor]] = {}
    for block in chosen:
        rows = first.q_order[0, 0].reshape(-1, first.q_block)[block].long()
        rows = rows[rows >= 0]
        part = partial_sums(q[0, :, rows], k[0], v[0], first, call.site.scale)
        outs, masses = candidates_at(part, list(plans.values()), block, q[0, :, rows], k[0], v[0])
        dense = part.value.sum(2) / part.mass.sum(2)[..., None]  # [H, R, D]
        for name, out, mass in zip(names, outs, masses, strict=True):
            for head, columns in _compare(out, dense, mass, rows, call):
                sums.setdefault((head, name), []).append(columns)
    records = []
    for (head, name), parts in sums.items():
        rel, local, mass = torch.cat(parts, 1)
        plan = plans[name]
        records.append(
            ProbeRecord(
                call.site.name,
                call.site.layer,
                head,
                spec.bucket_of(call.state.step),
                call.state.step,
                call.state.branch,
                spec.sample,
                name,
                mass=float(mass.mean()),
                output=float(local.square().mean().sqrt()),
                residual=float(rel.square().mean().sqrt()),
                high=float(rel.quantile(0.95)),
                kept=plan.kept,
                visited=plan.visited,
                lost=int((mass < 0.01).sum()),
            )
        )
    return records


def _compare(out: Tensor, dense: Tensor, mass: Tensor, rows: Tensor, call: SiteCall) -> list[tuple[int, Tensor]]:
    """For every head and for all together (-1): residual error, output error and mass of each row, [3, R]."""
    error = out - dense  # [H, R, D]
    base = dense.norm(dim=-1)  # [H, R]
    local, added = error.norm(dim=-1) / base.clamp(min=1e-12), error
    whole = error.square().sum((0, -1)).sqrt() / base.square().sum(0).sqrt().clamp(min=1e-12)  # [R]
    if call.contribution is not None and call.residual is not None:
        added = call.contribution(error[None].to(call.residual.dtype))[0].float()  # [H, R, C]
        base = call.residual[0, rows].float().norm(dim=-1).expand(len(error), -1)
    single = added.norm(dim=-1) / base.clamp(min=1e-12)
    together = added.sum(0).norm(dim=-1) / base.square().mean(0).sqrt().clamp(min=1e-12)
    heads = torch.stack([single, local, mass], 1)  # [H, 3, R]
    return [*enumerate(heads), (-1, torch.stack([together, whole, mass.mean(0)]))]


def spread(blocks: int, count: int) -> list[int]:
    """`count` block numbers from the first to the last, evenly spread (corners and centre included)."""
    if blocks <= count:
        return list(range(blocks))
    return sorted({round(i * (blocks - 1) / (count - 1)) for i in range(count)}) if count > 1 else [blocks // 2]


@dataclass(frozen=True, eq=False)
class PartialSums:
    """Of some query rows against every key block: mass [H, R, blocks] (dense row maximum taken out) and value
    [H, R, blocks, D]; top [H, R]: that maximum; scale: of the logits.
    """

    mass: Tensor
    value: Tensor
    top: Tensor
    scale: float


def partial_sums(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float | None) -> PartialSums:
    """q [H, R, D] rows; k, v [Hkv, N, D] all keys, in the key blocks of `plan` (one order for all heads)."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    order = plan.kv_order[0, 0].long()
    groups = q.shape[0] // k.shape[0]
    keys = k[:, order.clamp(min=0)].float().repeat_interleave(groups, 0)
    values = v[:, order.clamp(min=0)].float().repeat_interleave(groups, 0)
    s = q.float() @ keys.transpose(-1, -2) * factor
    s = s.masked_fill(order < 0, -torch.inf)  # [H, R, ordered keys]
    top = s.amax(-1)
    p = torch.exp(s - top[..., None]).unflatten(-1, (-1, plan.kv_block))  # [H, R, blocks, kv_block]
    value = torch.einsum("hrbk,hbkd->hrbd", p, values.unflatten(1, (-1, plan.kv_block)))
    return PartialSums(p.sum(-1), value, top, factor)


def candidates_at(
    part: PartialSums, plans: Sequence[BlockPlan], block: int, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs [C, H, R, D] and masses kept [C, H, R] of all plans for the rows of one query block.

    Whole blocks of all plans are one product of [plans, key blocks] with the partial sums; partial blocks are added.
    """
    heads = q.shape[0]
    picked = torch.stack([_full(plan, block, heads) for plan in plans], 1)  # [H, C, blocks]
    mass = (picked @ part.mass.transpose(1, 2)).transpose(0, 1).contiguous()  # [C, H, R]
    value = picked @ part.value.transpose(1, 2).flatten(2)  # [H, C, R * D]
    value = value.unflatten(-1, (mass.shape[-1], -1)).transpose(0, 1).contiguous()  # [C, H, R, D]
    for number, plan in enumerate(plans):
        _add_partial(mass[number], value[number], part, plan, block, (q, k, v))
    return value / torch.where(mass > 0, mass, 1)[..., None], mass / part.mass.sum(-1)


def _lists(plan: BlockPlan, heads: int) -> Tensor:
    """The list of every query head, [H]."""
    owner = plan.owner[0].long()
    return owner.repeat_interleave(heads // owner.numel())


def _full(plan: BlockPlan, block: int, heads: int) -> Tensor:
    """How often each head visits each key block in full, float [H, blocks]."""
    lists = _lists(plan, heads)
    index = plan.full.index[lists, block].long()  # [H, most]
    live = torch.arange(index.shape[1], device=index.device) < plan.full.count[lists, block][:, None]
    out = torch.zeros(heads, plan.kv_blocks, device=index.device)
    return out.scatter_add_(1, index, live.float())


def _add_partial(
    mass: Tensor, value: Tensor, part: PartialSums, plan: BlockPlan, block: int, qkv: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Add the partly visible key blocks of one plan to mass [H, R] and value [H, R, D]."""
    q, k, v = qkv
    heads, lists = q.shape[0], _lists(plan, q.shape[0])
    counts = plan.partial.count[lists, block]
    if int(counts.max()) == 0:
        return
    assert plan.partial.mask is not None
    rows = plan.q_order[0, 0].reshape(-1, plan.q_block)[block] >= 0
    order = plan.kv_order[0, 0].reshape(-1, plan.kv_block).long()
    for head in range(heads):
        count, at = int(counts[head]), lists[head]
        keys = order[plan.partial.index[at, block, :count].long()].flatten()  # [count * kv_block]
        bits = unpack(plan.masks[plan.partial.mask[at, block, :count].long()], plan.kv_block)[:, rows]  # [count, R, kv]
        seen = bits.transpose(0, 1).flatten(1)
        group = head // (heads // k.shape[0])
        s = q[head].float() @ k[group, keys.clamp(min=0)].float().T * part.scale
        p = torch.where(seen, torch.exp(s - part.top[head][:, None]), 0)
        mass[head] += p.sum(-1)
        value[head] += p @ v[group, keys.clamp(min=0)].float()
