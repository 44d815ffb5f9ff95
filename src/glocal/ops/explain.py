"""Say which backend a call takes and why, what the others refuse, and what a device table forecasts for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout
from glocal.kernels import registry
from glocal.kernels.registry import Picked, Request, Visits
from glocal.ops.attention import _checked, _facts, _flat, _layout, _lower, _meant, _table, _word, layout_size_check
from glocal.ops.score import Score
from glocal.patterns.base import Pattern
from glocal.plan.blockplan import BlockPlan
from glocal.plan.build import PlanSpec, plan
from glocal.plan.cost import BlockWork, forecast
from glocal.plan.selection import plan_selection
from glocal.plan.slots import PlanSlots
from glocal.plan.windows import window_keys, window_plan
from glocal.routing.selection import Selection


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Selection | BlockPlan | PlanSlots | None = None,
    *,
    canvas: Canvas | Layout | None = None,
    score: Score | None = None,
    backend: str = "auto",
    device: str | None = None,
) -> str:
    """What `attention` with the same arguments would do, in words; nothing is computed.

    device: name of a device table (`glocal env --measure` makes one) for a forecast of the forward pass.
    Raises ValueError for the same bad shapes as `attention`; a backend that cannot run is explained, not raised.
    """
    q, k, v = _checked(q, k, v)
    pattern, score = _meant(pattern, score)
    _, (q4, k4, v4) = _flat(q, k, v)
    layout = _layout(q4.shape[2], k4.shape[2], pattern, canvas)
    layout_size_check(layout, q4.shape[2], k4.shape[2])
    bias = _lower(score, layout, q4.shape[1])
    facts = _facts(q4, k4, v4, pattern, bias, layout.segments(q4.shape[0], q.device), score)
    request = Request(*facts, quant=_word(score))
    if isinstance(pattern, Pattern):
        request = replace(request, keys=window_keys(pattern, layout))
    compiled = _compiler(pattern, layout, q.device)
    ready = compiled(None) if isinstance(pattern, (BlockPlan, Selection)) else None
    blocks = None if ready is None else (ready.q_block, ready.kv_block)
    kept = 1.0 if compiled is _none else (lambda size: Visits(*compiled(size).visits))
    table = _table(request.device)
    lines = [
        f"{request.nq:,} queries x {request.nk:,} keys, {request.q_heads} heads on {request.kv_heads}, head size "
        f"{request.head_dim}, {str(request.dtype).removeprefix('torch.')} on {request.device}",
        registry.explain(request, backend, blocks=blocks, kept=kept, table=table),
    ]
    try:
        picked = registry.pick(request, backend, blocks=blocks, kept=kept, table=table)
    except ValueError:
        return "\n".join(lines)
    if picked.needs == "windows" and isinstance(pattern, Pattern):
        lines += _plan_lines(window_plan(pattern, layout, device=q.device), picked, request, device)
    if picked.needs == "plan":
        lines += _plan_lines(compiled(picked.blocks), picked, request, device)
    return "\n".join(lines)


Compiler = Callable[[tuple[int, int] | None], BlockPlan]


def _none(blocks: tuple[int, int] | None) -> BlockPlan:
    raise ValueError("dense attention has no plan")


def _compiler(pattern: Pattern | Selection | BlockPlan | None, layout: Layout, device: torch.device) -> Compiler:
    """The plan of the call for given block sizes; plans and selections bring their own."""
    if pattern is None:
        return _none
    if isinstance(pattern, Pattern):
        return lambda blocks: plan(pattern, layout, None if blocks is None else PlanSpec(*blocks), device=device)
    ready = pattern if isinstance(pattern, BlockPlan) else plan_selection(pattern, device=device)
    return lambda blocks: ready


def _plan_lines(made: BlockPlan, picked: Picked, request: Request, device: str | None) -> list[str]:
    lines = [
        f"plan: {made.name}, sees {made.kept:.2%} of all pairs and visits {made.visited:.2%}, "
        f"{made.masks.shape[0]} distinct masks, {made.bytes() / 2**20:.2f} MiB"
    ]
    if device is not None:
        full, part = (
            int(lists.count[made.owner.long()].sum(-1).double().mean()) for lists in (made.full, made.partial)
        )
        work = BlockWork(
            tokens=request.nq,
            kv_tokens=request.nk,
            block_pairs=made.q_block * made.kv_block,
            full_blocks=full,
            partial_blocks=part,
            visible_pairs=int(made.visible_pairs),
            rows=tuple((made.full.count + made.partial.count)[made.owner[0, 0].long()].tolist()),
        )
        told = forecast(
            work,
            request.batch * request.q_heads,
            request.head_dim,
            device,
            dtype=str(request.dtype).removeprefix("torch."),
        )
        times = f"{told.seconds * 1e3:.3g} ms, dense {told.dense_seconds * 1e3:.3g} ms, speed-up {told.speedup:.2f}"
        lines.append(f"forecast on {told.device} with {told.kernel}: {times}")
    return lines
