"""Every pattern side by side with dense attention on this device: first exact, then timed in interleaved rounds.

Exact means equal to softmax over the pairs that the pattern's definition shows, in float64, written here without plans
or kernels. No time is taken before all contenders have passed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from glocal._errors import CheckFailed, check_choice
from glocal._progress import NoProgress, Progress
from glocal.bench.calibrate import TOLERANCE
from glocal.bench.contenders import Contender, contenders
from glocal.bench.inputs import WORDS, local_inputs
from glocal.canvas import Canvas, Layout
from glocal.kernels import registry
from glocal.measure import PairedTiming, Ratio, Timing, compare_paired, peak_memory, relative_l2
from glocal.ops import Attended, attend, attention
from glocal.patterns import Pattern
from glocal.plan.build import PlanSpec, clear_cache, plan
from glocal.routing import PooledTopK, Selection

_ROWS = 128  # queries of the definition computed at once


@dataclass(frozen=True)
class CompareSpec:
    """What to compare. shape: axis lengths of the canvas. keep: share of pairs that windows are made for.

    dtype: float32, bfloat16 or float16; errors are then those of that precision. rounds: timed rounds, every contender
    once in each. check_rows: queries whose outputs are compared with the definition. backend: of the patterns.
    """

    shape: tuple[int, ...]
    heads: int
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    keep: float = 0.25
    rounds: int = 9
    seed: int = 0
    backend: str = "auto"
    check_rows: int = 512

    def __post_init__(self) -> None:
        for name, least in (("heads", 1), ("head_dim", 1), ("rounds", 2), ("check_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r}; legal: at least {least}; nearest: {least}.")
        check_choice("dtype", self.dtype, TOLERANCE)
        check_choice("backend", self.backend, ("auto", *registry.names()))


@dataclass(frozen=True)
class Row:
    """One contender. Shares are of all pairs, times in seconds, memory in bytes above the inputs.

    plan_seconds: to compile the pattern, once a canvas; a router plans in every call, inside its time.
    error: relative L2 distance to dense attention in float32. max_error: to the definition, over its largest magnitude.
    skipped: why it did not run; then the rest is None.
    """

    name: str
    what: str
    backend: str | None = None
    kept: float | None = None
    visited: float | None = None
    plan_seconds: float | None = None
    time: Timing | None = None
    speedup: Ratio | None = None
    memory: int | None = None
    error: float | None = None
    max_error: float | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Comparison:
    """rows: dense kernels first, then patterns, fastest first, then what was skipped.

    baseline: the fastest dense kernel, to which speed-ups refer. inputs: how q, k and v were made.
    """

    spec: CompareSpec
    rows: tuple[Row, ...]
    baseline: str
    tolerance: float
    checked_rows: int
    inputs: str = WORDS
    facts: Mapping[str, str] = field(default_factory=dict)


def compare(spec: CompareSpec, names: Sequence[str] | None = None, progress: Progress | None = None) -> Comparison:
    """Check and time the contenders of `spec` (those called `names`, all if None).

    Raises CheckFailed, naming each, if one differs from its definition; ValueError for names or sizes that do not fit.
    """
    bar = NoProgress() if progress is None else progress
    chosen = contenders(spec.shape, spec.heads, spec.keep, names)
    where, dtype = torch.device(spec.device), getattr(torch, spec.dtype)
    layout = Layout.of(Canvas(spec.shape))
    generator = torch.Generator().manual_seed(spec.seed)
    made = local_inputs(spec.shape, spec.heads, spec.head_dim, generator)
    q, k, v = (t.to(where, dtype) for t in made)
    count = min(spec.check_rows, layout.nq)
    checked = torch.randperm(layout.nq, generator=generator)[:count].sort().values
    limit = TOLERANCE[spec.dtype]

    with torch.no_grad():
        dense = {name: run for name, run in _dense_kernels(q, k, v).items() if _runs(run)}
        exact = attention(q.float(), k.float(), v.float(), backend="dense")
        bar.stage("check against the definition", len(chosen) + len(dense))
        rows: dict[str, Row] = {}
        runs: dict[str, Callable[[], Tensor]] = {}
        for name, run in dense.items():
            truth = masked_rows(q, k, v, checked, lambda rows: torch.ones(len(rows), layout.nk, dtype=torch.bool))
            out = run()
            rows[name] = Row(
                name=name,
                what="every pair",
                backend=name.removeprefix("dense, "),
                kept=1.0,
                visited=1.0,
                memory=peak_memory(run, device=where).extra,
                error=float(relative_l2(exact, out.float())),
                max_error=_off(out, truth, checked),
            )
            runs[name] = run
            bar.step()
        skipped: list[Row] = []
        for contender in chosen:
            try:
                rows[contender.name], runs[contender.name] = _examine(
                    contender, spec, layout, (q, k, v), exact, checked
                )
            except ValueError as error:
                skipped.append(Row(contender.name, contender.what, skipped=str(error)))
            bar.step()
        wrong = [f"{r.name} is off by {r.max_error:.2e}" for r in rows.values() if not _passes(r, limit)]
        if wrong:
            raise CheckFailed(
                f"{'; '.join(wrong)} of the largest value ({spec.dtype}); limit {limit:g}. No times taken."
            )

        bar.stage("time in rounds", None)
        flush = where.type == "cuda"
        times = compare_paired(runs, spec.rounds, where, generator, warmup=1, flush=flush)
    baseline = min(dense, key=lambda name: times.times[name].median)
    times = times.against(baseline)
    timed = [_timed(row, times) for row in rows.values()]
    timed.sort(key=lambda r: (r.name not in dense, r.time.median if r.time is not None else 0.0))
    return Comparison(spec, (*timed, *skipped), baseline, limit, count)


def masked_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, seen: Callable[[Tensor], Tensor]) -> Tensor:
    """The definition: softmax over the keys that each query sees, float64 [1, H, rows, Dv].

    seen: maps query indices [n] to bool [n, Nk] or [H, n, Nk]. A query that sees nothing gives 0.
    """
    pieces = []
    k64, v64 = k.double(), v.double()
    for part in rows.split(_ROWS):
        logits = q[:, :, part].double() @ k64.mT * q.shape[-1] ** -0.5  # [1, H, n, Nk]
        logits = logits.masked_fill(~seen(part).to(q.device), -torch.inf)
        weights = logits.softmax(-1).nan_to_num(0.0)
        pieces.append(weights @ v64)
    return torch.cat(pieces, 2)


def _examine(
    contender: Contender,
    spec: CompareSpec,
    layout: Layout,
    tensors: tuple[Tensor, Tensor, Tensor],
    exact: Tensor,
    checked: Tensor,
) -> tuple[Row, Callable[[], Tensor]]:
    q, k, v = tensors
    method = contender.method
    if isinstance(method, PooledTopK):

        def run() -> Tensor:
            return attention(q, k, v, method.select(q, k, layout), backend=spec.backend)

        selection = method.select(q, k, layout)
        done = attend(q, k, v, selection, backend=spec.backend)
        seen = _selected(selection)
    else:

        def run() -> Tensor:
            return attention(q, k, v, method, canvas=layout, backend=spec.backend)

        done = attend(q, k, v, method, canvas=layout, backend=spec.backend)

        def visible(rows: Tensor) -> Tensor:
            a, b = layout.q_coords(rows).unsqueeze(1), layout.kv_coords().unsqueeze(0)
            heads = [None] if method.heads is None else range(method.heads)
            masks = torch.stack([method.allows(a, b, layout, h).expand(len(rows), layout.nk) for h in heads])
            return masks.repeat_interleave(q.shape[1] // masks.shape[0], 0) if masks.shape[0] > 1 else masks[0]

        seen = visible

    truth = masked_rows(q, k, v, checked, seen)
    row = Row(
        name=contender.name,
        what=contender.what,
        backend=done.picked.name,
        kept=done.kept,
        visited=None if done.plan is None else done.plan.visited,
        plan_seconds=_planning(method, layout, done) if isinstance(method, Pattern) else None,
        memory=peak_memory(run, device=q.device).extra,
        error=float(relative_l2(exact, done.out.float())),
        max_error=_off(done.out, truth, checked),
    )
    return row, run


def _planning(pattern: Pattern, layout: Layout, done: Attended) -> float | None:
    """Seconds to compile the pattern for the blocks that were used; None where the backend reads no plan."""
    if done.plan is None:
        return None
    clear_cache()
    begin = time.perf_counter()
    plan(pattern, layout, PlanSpec(done.plan.q_block, done.plan.kv_block), device=done.out.device)
    return time.perf_counter() - begin


def _selected(selection: Selection) -> Callable[[Tensor], Tensor]:
    """Who sees whom under a selection of one sample, from its groups alone."""
    times = selection.multiplicity()[0] > 0  # [heads|1, query groups, key groups]
    tokens = selection.layout.nq, selection.layout.nk
    group = [torch.zeros(count, dtype=torch.long) for count in tokens]
    for place, part in zip(group, (selection.q_groups, selection.kv_groups), strict=True):
        for number, members in enumerate(part[0, 0].cpu()):
            place[members[members >= 0].long()] = number

    def seen(rows: Tensor) -> Tensor:
        return times.cpu()[:, group[0][rows]][:, :, group[1]]

    return seen


def _off(out: Tensor, truth: Tensor, rows: Tensor) -> float:
    return float((out[:, :, rows].double() - truth).abs().max() / truth.abs().max())


def _passes(row: Row, limit: float) -> bool:
    return row.max_error is not None and row.max_error <= limit


def _dense_kernels(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Dense contenders of this device; some may not run there."""
    runs: dict[str, Callable[[], Tensor]] = {
        "dense, sdpa": lambda: scaled_dot_product_attention(q, k, v),
        "dense, glocal": lambda: attention(q, k, v, backend="dense"),
    }
    if q.device.type == "cuda":
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def only(which: SDPBackend) -> Callable[[], Tensor]:
            def run() -> Tensor:
                with sdpa_kernel(which):
                    return scaled_dot_product_attention(q, k, v)

            return run

        runs["dense, sdpa cudnn"] = only(SDPBackend.CUDNN_ATTENTION)
        runs["dense, sdpa flash"] = only(SDPBackend.FLASH_ATTENTION)
    return runs


def _runs(run: Callable[[], Tensor]) -> bool:
    try:
        run()
    except RuntimeError:  # a kernel of torch that refuses the device, dtype or head size
        return False
    return True


def _timed(row: Row, times: PairedTiming) -> Row:
    return replace(row, time=times.times[row.name], speedup=times.ratios.get(row.name))
