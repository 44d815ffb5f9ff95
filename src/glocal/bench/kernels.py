"""`glocal bench kernels`: our kernels, guests and dense attention side by side, in one process and interleaved.

Each contender is first compared with float64 on a small twin of the case (forward and gradients, the same blocks and
head size) and with exact attention on some rows of the full case; one that is wrong gets no time. ms is the time of the
device, with an empty level-2 cache; host_ms what the host takes to start the call, which counts only where the device
has nothing else to do.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from glocal.bench import planning
from glocal.bench.kernel_cases import CASES, Attend, Case, dense_contenders, inputs, sparse_contenders
from glocal.bench.suites import Options, chosen
from glocal.canvas import Canvas, Layout
from glocal.measure import compare_paired
from glocal.measure.timers import PairedTiming
from glocal.ops import attention
from glocal.plan.blockplan import BlockPlan
from glocal.plan.devices.table import device_table

WORDS = "kernels: ours, guests and dense attention on windows, neighbourhoods and strided shards"
COLUMNS = (
    "case", "pass", "contender", "ms", "ms_low", "ms_high", "host_ms", "over_dense", "over_dense_low",
    "over_dense_high", "dense", "ideal", "over_best_other", "best_other", "visible_tflops", "visited_tflops", "kept",
    "visited", "error", "note", "device", "versions",
)  # fmt: skip
LIMIT = 2e-2  # of the largest entry, bfloat16
OWN = ("triton", "gluon", "cpu")
_PER_PAIR = {"forward": 4, "backward": 10, "both": 14}


def run(options: Options) -> list[tuple[Any, ...]]:
    """All rows; a contender that fails its check, or cannot run, has a row that says so and no time."""
    names = list(dict.fromkeys(case.name for case in CASES))
    wanted = [case for case in CASES if case.name in chosen(names, options.cases)]
    checked: dict[Any, dict[str, str]] = {}
    rows: list[tuple[Any, ...]] = []
    _compiled_ahead(wanted, options)
    options.progress.stage("time", len(wanted))
    pieces: list[Callable[[], list[tuple[Any, ...]]]] = []
    if options.cases is None and options.device.startswith("cuda"):
        pieces.append(lambda: _planning(options))
    pieces += [lambda case=case: _case(case, options, checked) for case in wanted]
    for piece in pieces:
        new = piece()
        rows += new
        options.emit(new)
        options.progress.step()
    return rows


def _kind(case: Case) -> tuple[Any, ...]:
    """Cases with one small twin."""
    return (
        case.window != (),
        case.shards,
        1 in case.stride,
        case.tile,
        case.head_dim,
        case.ordered,
        case.passes == "forward",
    )


def _compiled_ahead(wanted: list[Case], options: Options) -> None:
    """Our kernels compiled by other processes into the cache on disk, while this one lets the guests compile theirs."""
    if not options.workers:
        return
    sparse = [case for case in wanted if case.pattern is not None]
    options.progress.stage("compile", len(sparse))
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_compile, case, options.device) for case in sparse]
        met = set()
        for case in sparse:
            made = case.small.compiled(options.device)
            q, k, v, grad = inputs(case.small, options.device)
            for name, fn in sparse_contenders(case.small, made, options.device).items():
                key = (name, case.head_dim, made.q_block, case.passes == "forward")
                if name not in (*OWN, *options.without) and key not in met:
                    met.add(key)
                    with suppress(Exception):
                        one_pass(case.small, fn, (q, k, v), grad)()
        for job in jobs:
            job.result()
            options.progress.step()


def _compile(case: Case, device: str) -> None:
    """Run our backends once on a case and on its twin; what fails is found again, and told, by the run itself."""
    for some in (case.small, case):
        made = some.compiled(device)
        q, k, v, grad = inputs(some, device)
        for name, fn in sparse_contenders(some, made, device).items():
            if name in OWN:
                with suppress(Exception):
                    one_pass(some, fn, (q, k, v), grad)()


def _planning(options: Options) -> list[tuple[Any, ...]]:
    """Lists of 900 x 900 blocks made on the device, as replays of a CUDA graph."""
    rows = []
    for what, blocks, heads, ms, spread, *_ in planning.measured(((900, 1), (900, 8)), options.device):
        blank = ("",) * (len(COLUMNS) - 9)
        name = f"planning {blocks} x {blocks}, {heads} heads"
        rows.append((name, "", what, f"{ms / 1e3:.5f}", "", "", *blank, f"quartiles {spread / 1e3:.5f} ms apart",
                     _name(options.device), f"torch {torch.__version__}"))  # fmt: skip
    return rows


def _case(case: Case, options: Options, checked: dict[Any, dict[str, str]]) -> list[tuple[Any, ...]]:
    if _kind(case) not in checked:
        checked[_kind(case)] = _checked(case.small, options)
    device, notes = options.device, dict(checked[_kind(case)])
    made = None if case.pattern is None else case.compiled(device)
    whole = dense_contenders(case, device)
    contenders = {**({} if made is None else sparse_contenders(case, made, device)), **whole}
    contenders = {name: fn for name, fn in contenders.items() if name not in options.without}
    q, k, v, grad = inputs(case, device)
    good: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    for name, fn in contenders.items():
        if notes.get(name):
            continue
        try:
            if name in whole and made is not None:
                errors[name] = 0.0  # dense attention beside a pattern computes something else
            else:
                with torch.no_grad():
                    errors[name] = largest_error(case, fn(q, k, v), (q, k, v), made)
            if not errors[name] <= LIMIT:
                notes[name] = f"off by {errors[name]:.1e} of the largest entry; limit {LIMIT:g}"
                continue
            timed = one_pass(case, fn, (q, k, v), grad)
            timed()
            good[name] = timed
        except Exception as error:  # a contender that cannot run says why and the others still run
            notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
    flush = device.startswith("cuda")
    times = compare_paired(good, options.rounds, device, warmup=1, flush=flush) if len(good) > 1 else None
    rows = _rows(case, made, times, errors, {n: notes[n] for n in contenders if notes.get(n)}, tuple(whole), device)
    if times is not None and made is not None and "cuDNN dense" in times.times:
        rows += _natten(case, times.times["cuDNN dense"].median, device)
    return rows


def one_pass(case: Case, fn: Attend, qkv: tuple[Tensor, ...], grad: Tensor) -> Callable[[], object]:
    """What is timed: the forward pass, the backward pass alone, or both."""
    if case.passes == "forward":

        def forward() -> object:
            with torch.no_grad():
                return fn(*qkv)

        return forward
    leaves = [t.detach().requires_grad_() for t in qkv]
    if case.passes == "both":
        return lambda: torch.autograd.grad(fn(*leaves), leaves, grad)
    out = fn(*leaves)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _checked(case: Case, options: Options) -> dict[str, str]:
    """Contenders on the small twin against the definition in float64: what is wrong with each, "" if nothing."""
    device, backward = options.device, case.passes != "forward"
    made = None if case.pattern is None else case.compiled(device)
    contenders = dense_contenders(case, device) if made is None else sparse_contenders(case, made, device)
    contenders = {name: fn for name, fn in contenders.items() if name not in options.without}
    q, k, v, grad = inputs(case, device)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    want = attention(exact[0], exact[1], exact[2], made, backend="reference")
    wanted = [want.detach(), *(torch.autograd.grad(want, exact, grad.double()) if backward else ())]
    notes = {}
    for name, fn in contenders.items():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        try:
            out = fn(*leaves)
            found = [out.detach(), *(torch.autograd.grad(out, leaves, grad) if backward else ())]
            worst = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))
            notes[name] = "" if worst <= LIMIT else f"small twin off by {worst:.1e} of the largest entry"
        except Exception as error:
            notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
    return notes


def largest_error(case: Case, out: Tensor, qkv: tuple[Tensor, ...], made: BlockPlan | None) -> float:
    """Largest error on some queries against exact attention in float32, over the largest entry."""
    q, k, v = qkv
    some = torch.arange(0, case.tokens, case.tokens // 31, device=q.device)[:32]
    if made is None:
        seen: Tensor = torch.ones(1, some.numel(), case.tokens, dtype=torch.bool, device=q.device)
    else:
        seen = _seen(case, some)
    s = (q[:, :, some].float() @ k.float().transpose(-1, -2) * case.head_dim**-0.5).masked_fill(~seen, -torch.inf)
    want = s.softmax(-1) @ v.float()
    return float((out[:, :, some].float() - want).abs().max() / want.abs().max())


def _seen(case: Case, some: Tensor) -> Tensor:
    """Which keys some queries see, bool [heads|1, queries, N], by the definition of the pattern."""
    from glocal.canvas import tile

    pattern, layout = case.pattern, Layout.of(Canvas(case.canvas))
    assert pattern is not None
    every = torch.arange(case.tokens, device=some.device)
    mine, theirs = some, every
    if case.ordered:  # tokens lie in tile order: slot i is token order[i]
        order = tile(Canvas(case.canvas), case.tile).gather.to(some.device)
        mine, theirs = order[some], order[every]
    at = layout.q_coords(mine).unsqueeze(1), layout.kv_coords(theirs).unsqueeze(0)
    heads = [None] if pattern.heads is None else range(pattern.heads)
    return torch.stack([pattern.allows(*at, layout, head) for head in heads])


def _rows(
    case: Case,
    made: BlockPlan | None,
    times: PairedTiming | None,
    errors: dict[str, float],
    notes: dict[str, str],
    whole: tuple[str, ...],
    device: str,
) -> list[tuple[Any, ...]]:
    kept, visited = (1.0, 1.0) if made is None else (made.kept, made.visited)
    ideal = (0.5 if case.causal else 1.0) / kept
    flops = _PER_PAIR[case.passes] * case.tokens**2 * case.head_dim * case.heads
    end = (_name(device), f"torch {torch.__version__}")
    rows: list[tuple[Any, ...]] = []
    timed = {} if times is None else times.times
    dense = min((n for n in whole if n in timed and n != "glocal auto"), key=lambda n: timed[n].median, default=None)
    for name, time in sorted(timed.items(), key=lambda item: item[1].median):
        share, seen = (0.5 if case.causal else 1.0, None) if name in whole else (kept, visited)
        rivals = [n for n in timed if n != name and n not in OWN and n != "glocal auto"]
        others = [n for n in rivals if (n in whole) == (made is None)]
        other = min(others, key=lambda n: timed[n].median, default=None)
        ratio = None
        if times is not None and dense is not None and name != dense:
            ratio = times.against(dense).ratios[name]
        rows.append((
            case.name, case.passes, name, *(f"{t * 1e3:.4f}" for t in (time.median, time.low, time.high)),
            "" if time.host is None else f"{time.host * 1e3:.4f}",
            *(("", "", "") if ratio is None else (f"{r:.3f}" for r in (ratio.median, ratio.low, ratio.high))),
            "" if dense is None else dense, f"{ideal:.2f}",
            "" if other is None else f"{timed[other].median / time.median:.3f}", "" if other is None else other,
            f"{flops * share / time.median / 1e12:.0f}",
            "" if seen is None else f"{flops * seen / time.median / 1e12:.0f}",
            f"{kept:.4f}", f"{visited:.4f}", f"{errors.get(name, 0.0):.1e}", "", *end,
        ))  # fmt: skip
    for name, words in notes.items():
        blank = ("",) * (len(COLUMNS) - 6)
        rows.append((case.name, case.passes, name, *blank, words, *end))
    return rows


def _natten(case: Case, dense_seconds: float, device: str) -> list[tuple[Any, ...]]:
    """NATTEN's time on another card, scaled by cuDNN dense of both runs: it would need a build of its own here."""
    if case.ordered or not case.window or "blocks of 64" in case.name:
        return []
    kind = "masked" if set(case.stride) == {1} else "full"
    wanted = (("natten", kind), ("cudnn", "dense"))
    rows = [m for m in device_table("h200").measurements if m.canvas == case.canvas and m.direction == case.passes]
    known = [m for m in rows if (m.kernel, m.kind) in wanted]
    theirs, dense = ([m for m in known if m.kernel == name] for name in ("natten", "cudnn"))
    if not theirs or not dense:
        return []
    ms = theirs[0].milliseconds * dense_seconds * 1e3 / dense[0].milliseconds
    words = f"measured on another card ({theirs[0].milliseconds} ms), scaled by cuDNN dense of both runs"
    flops = _PER_PAIR[case.passes] * case.tokens * case.heads * case.head_dim
    for w in case.window:
        flops *= w
    blank = ("",) * 8
    rate = f"{flops / ms / 1e9:.0f}"
    return [(case.name, case.passes, "NATTEN", f"{ms:.4f}", "", "", *blank, rate, "", "", "", "", words,
             _name(device), f"torch {torch.__version__}")]  # fmt: skip


def _name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


def wrong(records: list[dict[str, Any]]) -> list[str]:
    """What of ours failed its check, in words."""
    return [
        f"{r['case']} {r['pass']}: {r['contender']} {r['note']}"
        for r in records
        if r["contender"] in OWN and r["note"] and "cannot run this call" not in r["note"]
    ]
