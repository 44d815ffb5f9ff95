"""Attention over a pattern, a selection or a plan: one call, one dispatcher boundary, gradients through out and LSE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from operator import index
from typing import Any

import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout, Part
from glocal.kernels import registry
from glocal.kernels.call import Bias, Call, DenseBias, PlanTensors, TableBias
from glocal.kernels.capability import bias_kind
from glocal.kernels.registry import Picked, Request, Visits
from glocal.ops import _operator
from glocal.ops._approximation import Approximation, measured
from glocal.ops.score import Relative, Score
from glocal.patterns.base import Pattern
from glocal.plan.blockplan import BlockPlan
from glocal.plan.build import PlanSpec, plan
from glocal.plan.devices.table import DeviceTable, table_for
from glocal.plan.selection import plan_selection
from glocal.plan.slots import PlanSlots
from glocal.plan.windows import window_keys, window_plan
from glocal.routing.selection import Selection


@dataclass(frozen=True, eq=False)
class Attended:
    """out: [..., Hq, Nq, Dv]. lse: natural-log normaliser [..., Hq, Nq], float32 (float64 for float64), differentiable.
    picked: which backend ran and why. plan: the plan it ran on, None for a dense or reference call.
    approximation: what was rounded (`Score(quant=...)`) and the error of it; None for exact attention.
    """

    out: Tensor
    lse: Tensor
    picked: Picked
    plan: BlockPlan | None
    counts: Tensor | None
    approximation: Approximation | None = None

    @property
    def kept(self) -> float:
        """Visible pairs as a share of all pairs, before run-time lengths and documents."""
        if self.plan is not None:
            return self.plan.kept
        if self.counts is None:
            return 1.0
        return float((self.counts > 0).double().mean()) if self.counts.numel() else 0.0


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Selection | BlockPlan | PlanSlots | None = None,
    *,
    canvas: Canvas | Layout | None = None,
    score: Score | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention restricted to `pattern`.

    q: [..., Hq, Nq, D]; k: [..., Hkv, Nk, D]; v: [..., Hkv, Nk, Dv], as in scaled_dot_product_attention: leading
        dimensions broadcast, Hq is a multiple of Hkv, any strides; float32, bfloat16, float16 or float64.
    pattern: a Pattern, a Selection of a router, a BlockPlan, or PlanSlots that hold one; None is dense.
    canvas: where the tokens lie (a Canvas, or a Layout where the two sides differ); needed by a Pattern.
    score: scale, soft-cap and biases; default scale D ** -0.5.
    backend: "auto" or a name of `glocal.kernels.registry.names()`; a named backend runs or raises.

    Returns [..., Hq, Nq, Dv]. A row that sees nothing is 0. Raises ValueError for shapes, head counts, token counts
    or a backend that do not fit. Under torch.compile, make pattern and canvas outside the compiled function.
    """
    return _run(q, k, v, pattern, canvas, score, backend)[0]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Selection | BlockPlan | PlanSlots | None = None,
    *,
    canvas: Canvas | Layout | None = None,
    score: Score | None = None,
    backend: str = "auto",
) -> Attended:
    """`attention` that also returns the log-sum-exp of the logits, the backend picked and the share of pairs kept."""
    out, lse, (picked, plan_, data) = _run(q, k, v, pattern, canvas, score, backend, lse=True)
    rounded = None if score is None or score.quant is None else _measured(q, k, v, score, out, (picked, plan_, data))
    return Attended(out, lse, picked, plan_, data[0] if picked.needs == "counts" else None, rounded)


# The backend, its plan, and what it reads: the tensors of the plan, or counts, or nothing. A compiled graph can read
# constant tensors in a tuple, but not call the plan for them.
Prepared = tuple[Picked, BlockPlan | None, tuple[Tensor, ...]]


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Selection | BlockPlan | PlanSlots | None,
    canvas: Canvas | Layout | None,
    score: Score | None,
    backend: str,
    *,
    lse: bool = False,
) -> tuple[Tensor, Tensor, Prepared]:
    kind = _kind(q, k, v, pattern, canvas, score, lse) if backend == "windows" else None
    again = None if kind is None else _AGAIN.get(kind)
    if again is not None and again.holds(pattern, canvas):
        return _run_again(q, k, v, score, again)
    _check(q, k, v)
    if isinstance(pattern, PlanSlots):
        pattern = pattern.plan
    elif pattern is not None and not isinstance(pattern, (Pattern, BlockPlan, Selection)):
        raise TypeError(
            f"attention: pattern is a {type(pattern).__name__}; legal: Pattern, Selection, BlockPlan, PlanSlots, None "
            "(a mask of blocks becomes one by glocal.patterns.Blocks, or per sample by glocal.routing.from_mask)."
        )
    score = Score() if score is None else score
    lead, (q4, k4, v4) = _flat(q, k, v)
    segments, bias = None, ()
    if pattern is not None or canvas is not None or score.bias:  # plain dense attention needs no layout
        layout = _layout(q4.shape[2], k4.shape[2], pattern, canvas)
        layout_size_check(layout, q4.shape[2], k4.shape[2])
        segments = layout.segments(q4.shape[0], q.device)
        bias = _lower(score, layout, q4.shape[1])
    facts = (*_facts(q4, k4, v4, pattern, bias, segments, score), lse, _word(score))
    if isinstance(pattern, BlockPlan):
        pattern.check(q4.shape[2], k4.shape[2])
        picked, compiled, data = _ready(pattern, facts, backend)
    elif isinstance(pattern, Selection):
        picked, compiled, data = _ready(plan_selection(pattern, device=q.device), facts, backend)
    else:
        picked, compiled, data = _prepare(pattern, canvas, facts, backend)
    q4, scale = _scaled(q4, score)
    q_block, kv_block = (0, 0) if picked.blocks is None else picked.blocks
    call = Call(
        backend=picked.name,
        scale=scale,
        softcap=score.softcap,
        q_block=q_block,
        kv_block=kv_block,
        plan=PlanTensors(*data) if picked.needs == "plan" else None,
        counts=data[0] if picked.needs == "counts" else None,
        bias=bias,
        segments=segments,
        dropout=score.dropout,
        seed=_seed(score),
        quant=score.quant,
    )
    if kind is not None and segments is None and call.plan is not None:
        if len(_AGAIN) >= _MOST_WINDOWS:
            _AGAIN.clear()
        codes = (bias[0].q_code, bias[0].k_code) if bias and isinstance(bias[0], TableBias) else None
        _AGAIN[kind] = _Again((pattern, canvas, *_window_records()), (picked, compiled, data), call.plan, codes)
    out, ends = _operator.run(q4, k4, v4, call)
    if len(lead) == 1:
        return out, ends, (picked, compiled, data)
    return out.reshape(*lead, *out.shape[1:]), ends.reshape(*lead, *ends.shape[1:]), (picked, compiled, data)


def _flat(q: Tensor, k: Tensor, v: Tensor) -> tuple[torch.Size, tuple[Tensor, Tensor, Tensor]]:
    """Leading dimensions, and q, k, v as [B, H, N, D]."""
    if q.dim() == k.dim() == v.dim() == 4 and q.shape[0] == k.shape[0] == v.shape[0]:
        return q.shape[:1], (q, k, v)
    lead = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    flat = [t.expand(*lead, *t.shape[-3:]).reshape(prod(lead), *t.shape[-3:]) for t in (q, k, v)]
    return lead, (flat[0], flat[1], flat[2])


def _measured(q: Tensor, k: Tensor, v: Tensor, score: Score, out: Tensor, ran: Prepared) -> Approximation:
    """The error of a rounded call on a sample of its rows."""
    picked, _, data = ran
    _, (q4, k4, v4) = _flat(q, k, v)
    q4, scale = _scaled(q4, score)
    assert picked.blocks is not None
    plan_ = PlanTensors(*data)
    call = Call(picked.name, scale, q_block=picked.blocks[0], kv_block=picked.blocks[1], plan=plan_, quant=score.quant)
    return measured((q4, k4, v4), out.reshape(-1, *out.shape[-3:]), call)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() < 3:
            raise ValueError(f"attention: {name} of shape {tuple(t.shape)} needs at least [heads, tokens, head size].")
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(
                f"attention: {name} is {t.dtype} on {t.device}, but q is {q.dtype} on {q.device}; they must agree."
            )
    if q.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(f"attention: q is {q.dtype}; legal: float32, bfloat16, float16, float64.")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"attention: head size of q is {q.shape[-1]}, of k {k.shape[-1]}; they must agree.")
    if k.shape[-2] != v.shape[-2] or k.shape[-3] != v.shape[-3]:
        raise ValueError(
            f"attention: k has (heads, tokens) {tuple(k.shape[-3:-1])}, v has {tuple(v.shape[-3:-1])}; they must agree."
        )
    if k.shape[-3] == 0 or q.shape[-3] % k.shape[-3] != 0:
        raise ValueError(
            f"attention: {q.shape[-3]} query heads do not divide over {k.shape[-3]} key heads; "
            "the query heads must be a multiple of the key heads."
        )


def _layout(
    nq: int, nk: int, pattern: Pattern | Selection | BlockPlan | None, canvas: Canvas | Layout | None
) -> Layout:
    if isinstance(pattern, (Selection, BlockPlan)):
        return pattern.layout if canvas is None else Layout.of(canvas)
    if canvas is not None:
        return Layout.of(canvas)
    if pattern is not None:
        raise ValueError(
            f"attention: pattern={type(pattern).__name__} needs canvas=, for example Canvas((30, 48, 80)); "
            f"q has {nq} tokens."
        )
    return Layout(Canvas([Part("tokens", (nq,))]), Canvas([Part("tokens", (nk,))]))


def layout_size_check(layout: Layout, nq: int, nk: int) -> None:
    """Raise ValueError if the layout holds other numbers of tokens than q and k."""
    for side, have, want, canvas in (("q", nq, layout.nq, layout.q), ("k", nk, layout.nk, layout.kv)):
        if have != want:
            raise ValueError(
                f"attention: {side} has {have} tokens, but {canvas!r} has {want}; give the canvas of these tokens "
                "(before= and after= count text tokens)."
            )


def _lower(score: Score, layout: Layout, heads: int) -> tuple[Bias, ...]:
    out = []
    for term in score.bias:
        bias = term.lower(layout)
        have = bias.values.shape[1] if isinstance(bias, DenseBias) else bias.table.shape[0]
        if have not in (1, heads):
            raise ValueError(f"attention: {type(term).__name__} bias has {have} heads; legal: 1 or {heads}.")
        out.append(bias)
    return tuple(out)


def _facts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Any,
    bias: tuple[Bias, ...],
    segments: tuple[Tensor, Tensor] | None,
    score: Score,
) -> tuple[Any, ...]:
    """The fields of a `Request`, as constants that a compiled graph can carry (`index` settles a symbolic size)."""
    kinds = {bias_kind(b) for b in bias}
    tensors = [q, k, v, *(b.values if isinstance(b, DenseBias) else b.table for b in bias)]
    return (
        q.device.type,
        q.dtype,
        *map(index, (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])),
        tuple(sorted(kinds)),
        torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
        score.softcap is not None,
        segments is not None,
        score.dropout > 0,
        pattern is not None,
    )


def _word(score: Score) -> str | None:
    return None if score.quant is None else score.quant.word


@torch.compiler.assume_constant_result
def _prepare(pattern: Pattern | None, canvas: Canvas | Layout | None, facts: tuple[Any, ...], backend: str) -> Prepared:
    """Pick a backend and build what it reads; a constant for a compiled graph."""
    place = (id(pattern), id(canvas), facts) if backend == "windows" and type(canvas) is Canvas else None
    records = _window_records() if place is not None else ()
    known = _WINDOWS.get(place) if place is not None else None
    if known is not None and all(a is b for a, b in zip(known[0], (pattern, canvas, *records), strict=True)):
        return known[1]
    request = Request(*facts)
    layout = _layout(request.nq, request.nk, pattern, canvas)
    if pattern is None:
        picked = _remembered(
            request.device,
            (facts, backend),
            lambda: registry.pick(request, backend, blocks=None, kept=1.0, table=_table(request.device)),
        )
        return picked, None, (_ones(layout, request),) if picked.needs == "counts" else ()
    pattern.check(layout)
    _heads_fit(pattern, request)

    request = replace(request, keys=window_keys(pattern, layout))

    def compiled(blocks: tuple[int, int]) -> BlockPlan:
        return plan(pattern, layout, PlanSpec(*blocks), device=request.device)

    table = _table(request.device)
    picked = _remembered(
        request.device,
        (pattern.key, layout.key, request.keys, facts, backend),
        lambda: registry.pick(
            request, backend, blocks=None, kept=lambda blocks: Visits(*compiled(blocks).visits), table=table
        ),
    )
    if picked.needs == "counts":
        return picked, None, (pattern.mask(layout, request.device).int()[None],)
    if picked.needs == "windows":
        made = window_plan(pattern, layout, device=request.device)
        picked = replace(picked, needs="plan", blocks=(made.q_block, made.kv_block))
        prepared = picked, made, tuple(made.tensors().values())
        if place is not None:
            if len(_WINDOWS) >= _MOST_WINDOWS:
                _WINDOWS.clear()
            _WINDOWS[place] = (pattern, canvas, *records), prepared
        return prepared
    if picked.blocks is None:
        raise ValueError(f"Backend {picked.name!r} needs a plan but names no block sizes.")
    made = compiled(picked.blocks)
    if backend == "auto" and made.kept == 1.0:  # nothing is hidden: a dense kernel gives the same, and faster
        whole = _remembered(
            request.device,
            (facts, backend, "hides nothing"),
            lambda: registry.pick(replace(request, sparse=False), backend, blocks=None, kept=1.0, table=table),
        )
        if whole.needs == "nothing":
            return replace(whole, why=f"the pattern hides nothing; {whole.why}"), None, ()
    return picked, made, tuple(made.tensors().values())


# What layers of small windows ask for at every call, by the pattern and the canvas themselves (kept alive, so that
# their numbers are theirs alone): to compare them by content takes longer than launching a kernel.
_WINDOWS: dict[tuple[Any, ...], tuple[tuple[Any, ...], Prepared]] = {}
_MOST_WINDOWS = 256


@dataclass(frozen=True, eq=False)
class _Again:
    """What a call of small windows rested on (pattern, canvas, records), and what came of it: codes of a table."""

    asked: tuple[Any, ...]
    prepared: Prepared
    plan: PlanTensors
    codes: tuple[Tensor, Tensor] | None

    def holds(self, pattern: Any, canvas: Any) -> bool:
        """Whether it all is as it was."""
        return all(a is b for a, b in zip(self.asked, (pattern, canvas, *_window_records()), strict=True))


# Calls by all that they depend on: layers ask the same hundreds of times a second. Pattern and canvas are kept alive.
_AGAIN: dict[tuple[Any, ...], _Again] = {}


def _kind(
    q: Tensor, k: Tensor, v: Tensor, pattern: Any, canvas: Any, score: Score | None, lse: bool
) -> tuple[Any, ...] | None:
    """What tells calls by the name of `windows` apart; None for those that are not remembered."""
    if type(canvas) is not Canvas or q.dim() != 4 or torch.compiler.is_compiling():
        return None
    about = None
    if score is not None:
        if score.softcap is not None or score.dropout > 0 or score.quant is not None or len(score.bias) > 1:
            return None
        if isinstance(score.scale, Tensor):
            return None
        if score.bias:
            term = score.bias[0]
            if type(term) is not Relative or not term.within:
                return None
            about = term.table.shape, term.table.dtype, term.table.device, term.step, term.sign, term.part
    tensors = tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in (q, k, v))
    return id(pattern), id(canvas), torch.is_grad_enabled(), lse, about, tensors


def _run_again(q: Tensor, k: Tensor, v: Tensor, score: Score | None, again: _Again) -> tuple[Tensor, Tensor, Prepared]:
    picked, _, _ = again.prepared
    assert picked.blocks is not None
    scale = q.shape[-1] ** -0.5 if score is None or score.scale is None else float(score.scale)
    bias: tuple[Bias, ...] = ()
    if again.codes is not None and score is not None:
        term = score.bias[0]
        assert isinstance(term, Relative)
        bias = (TableBias(term.table.flatten(1), *again.codes),)
    call = Call(picked.name, scale, None, *picked.blocks, plan=again.plan, bias=bias)
    return *_operator.run(q, k, v, call), again.prepared


def _window_records() -> tuple[Any, ...]:
    """All that a call by the name of `windows` rests on beside the request."""
    module: Any = registry.implementation("windows")
    return module.CAPABILITY, module.missing


def _ready(compiled: BlockPlan, facts: tuple[Any, ...], backend: str) -> Prepared:
    """The same for a plan that exists."""
    q_heads, kv_heads = facts[3:5]
    if compiled.heads not in (1, kv_heads, q_heads):
        raise ValueError(
            f"attention: the plan has {compiled.heads} heads; legal: 1, {kv_heads} (key heads) or "
            f"{q_heads} (query heads)."
        )
    masked = compiled.partial.index.shape[-1] > 0
    picked = _pick_for(compiled.q_block, compiled.kv_block, masked, facts, backend)
    if picked.needs == "counts":
        return picked, None, (compiled.dense_counts(),)
    return picked, compiled, tuple(compiled.tensors().values())


@torch.compiler.assume_constant_result
def _pick_for(q_block: int, kv_block: int, masked: bool, facts: tuple[Any, ...], backend: str) -> Picked:
    """For a plan whose contents may change: what it holds is not looked at, only whether it has partial blocks."""
    return _remembered(
        facts[0],
        (q_block, kv_block, masked, facts, backend),
        lambda: registry.pick(
            Request(*facts),
            backend,
            blocks=(q_block, kv_block),
            kept=Visits(0.05, 0.05) if masked else Visits(0.1),
            table=_table(facts[0]),
        ),
    )


# What was picked, by everything that the choice looks at; the entry keeps the records it was made from alive.
_PICKED: dict[tuple[Any, ...], tuple[Picked, tuple[Any, ...]]] = {}
_MOST_PICKED = 4096


def _remembered(device: str, request: tuple[Any, ...], pick: Callable[[], Picked]) -> Picked:
    """The backend for a request, picked once: asking all of them takes longer than launching a kernel."""
    records = registry.records()
    card = torch.cuda.current_device() if device == "cuda" and torch.cuda.is_available() else None
    key = (request, card, *map(id, records))
    known = _PICKED.get(key)
    if known is None:
        if len(_PICKED) >= _MOST_PICKED:
            _PICKED.clear()
        known = _PICKED[key] = (pick(), records)
    return known[0]


def _table(device: str) -> DeviceTable | None:
    """Measured calls of the current device of this kind, if there are any."""
    return _named(torch.cuda.get_device_name()) if device == "cuda" and torch.cuda.is_available() else None


@lru_cache(maxsize=16)
def _named(title: str) -> DeviceTable | None:
    """The table is read once a process: looking for its file takes as long as launching a kernel."""
    return table_for(title)


def _heads_fit(pattern: Pattern, request: Request) -> None:
    if pattern.heads not in (None, 1, request.kv_heads, request.q_heads):
        raise ValueError(
            f"attention: {type(pattern).__name__} has {pattern.heads} heads; legal: 1, {request.kv_heads} (key heads) "
            f"or {request.q_heads} (query heads)."
        )


def _ones(layout: Layout, request: Request) -> Tensor:
    return torch.ones(1, 1, layout.nq, layout.nk, dtype=torch.int32, device=request.device)


def _scaled(q: Tensor, score: Score) -> tuple[Tensor, float]:
    """The scale of the call; a scale for every head is folded into q."""
    if isinstance(score.scale, Tensor):
        if score.scale.shape != (q.shape[1],):
            raise ValueError(
                f"attention: scale of shape {tuple(score.scale.shape)} needs one entry for each of "
                f"{q.shape[1]} query heads."
            )
        return q * score.scale.to(q.dtype)[:, None, None], 1.0
    return q, q.shape[-1] ** -0.5 if score.scale is None else float(score.scale)


def _seed(score: Score) -> Tensor | None:
    if score.dropout == 0:
        return None
    return torch.randint(0, 2**62, (1,), generator=score.generator)
