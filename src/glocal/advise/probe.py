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
from glocal.adapt.records import Core, Site, SiteCall
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
    groups: dict[tuple, dict[str, BlockPlan]] = {}
    for name, plan in plans.items():
        key = (plan.q_block, plan.kv_block, tuple(plan.q_order.shape), int(plan.q_order.long().sum()))
        key = next(
            (g for g in groups if g == key and torch.equal(next(iter(groups[g].values())).q_order, plan.q_order)), key
        )
        groups.setdefault(key, {})[name] = plan
    return list(groups.values())


def measure(
    q: Tensor, k: Tensor, v: Tensor, call: SiteCall, plans: Mapping[str, BlockPlan], spec: ProbeSpec
) -> list[ProbeRecord]:
    """Records of one call: q, k, v [1, H, N, D] (a batch is probed at its first row)."""
    first = next(iter(plans.values()))
    heads = q.shape[1]
    chosen = spread(first.q_blocks, spec.blocks)
    names = list(plans)
    sums: dict[tuple[int, str], list[Tensor]] = {}
    for block in chosen:
        rows = first.q_order[0, 0].reshape(-1, first.q_block)[block].long()
        rows = rows[rows >= 0]
        part = partial_sums(q[0, :, rows], k[0], v[0], first, call.site.scale)
        dense = part.out(torch.ones(heads, part.mass.shape[-1], dtype=torch.bool, device=q.device))
        stream = None if call.residual is None else call.residual[0, rows].float()  # [R, C]
        for name in names:
            out, mass = candidate(part, plans[name], block, q[0, :, rows], k[0], v[0])
            error = out - dense  # [H, R, D]
            added = error if call.contribution is None else call.contribution(error[None].to(q.dtype))[0].float()
            scale = dense if stream is None else stream
            for head, delta in [*enumerate(added), (-1, added.sum(0))]:
                base = scale.norm(dim=-1) if scale.dim() == 2 else scale.norm(dim=-1)[head]
                rel = delta.norm(dim=-1) / base.clamp(min=1e-12)  # [R]
                one = slice(None) if head < 0 else head
                local = error[one].flatten(0, -2).norm(dim=-1) / dense[one].flatten(0, -2).norm(dim=-1).clamp(min=1e-12)
                sums.setdefault((head, name), []).append(
                    torch.stack([rel, _fit(local, rel), _fit(mass[one].flatten(), rel)])
                )
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


def _fit(values: Tensor, like: Tensor) -> Tensor:
    """Values of all heads [H * R] as a mean over heads [R]; values of one head as they are."""
    return values if values.numel() == like.numel() else values.reshape(-1, like.numel()).mean(0)


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

    def out(self, picked: Tensor) -> Tensor:
        """Attention over the blocks picked, bool [H|1, blocks] -> [H, R, D]; rows without mass give 0."""
        weight = picked.float()
        total = torch.einsum("hrb,hb->hr", self.mass, weight.expand(self.mass.shape[0], -1))
        value = torch.einsum("hrbd,hb->hrd", self.value, weight.expand(self.mass.shape[0], -1))
        return value / torch.where(total > 0, total, 1)[..., None]


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


def candidate(part: PartialSums, plan: BlockPlan, block: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [H, R, D] and mass kept [H, R] of one plan for the rows of one query block."""
    heads = q.shape[0]
    owner = plan.owner[0].long()
    lists = owner.repeat_interleave(heads // owner.numel()) if owner.numel() > 1 else owner.expand(heads)
    blocks = part.mass.shape[-1]
    full = torch.zeros(heads, blocks, device=q.device)
    rows = plan.q_order[0, 0].reshape(-1, plan.q_block)[block] >= 0
    extra_mass = torch.zeros_like(part.top)
    extra_value = torch.zeros(*part.top.shape, v.shape[-1], device=q.device)
    bits = None
    assert plan.partial.mask is not None
    for head in range(heads):
        at = lists[head]
        count = int(plan.full.count[at, block])
        full[head].index_add_(0, plan.full.index[at, block, :count].long(), torch.ones(count, device=q.device))
        for slot in range(int(plan.partial.count[at, block])):
            if bits is None:
                bits = unpack(plan.masks, plan.kv_block)
            number = int(plan.partial.index[at, block, slot])
            seen = bits[int(plan.partial.mask[at, block, slot])][rows]  # [R, kv_block]
            order = plan.kv_order[0, 0].reshape(-1, plan.kv_block)[number].long()
            group = head // (heads // k.shape[0])
            s = q[head].float() @ k[group, order.clamp(min=0)].float().T * part.scale
            p = torch.where(seen, torch.exp(s - part.top[head][:, None]), 0)
            extra_mass[head] += p.sum(-1)
            extra_value[head] += p @ v[group, order.clamp(min=0)].float()
    mass = torch.einsum("hrb,hb->hr", part.mass, full) + extra_mass
    value = torch.einsum("hrbd,hb->hrd", part.value, full) + extra_value
    return value / torch.where(mass > 0, mass, 1)[..., None], mass / part.mass.sum(-1)


def site_names(records: Sequence[ProbeRecord]) -> list[str]:
    """Sites seen, in layer order."""
    return [name for _, name in sorted({(r.layer, r.site) for r in records})]


def wants(site: Site) -> bool:
    """Probes measure self-attention over media tokens."""
    return site.kind == "self" and not site.causal
