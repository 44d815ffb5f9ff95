"""Small windows of vision backbones against everything else that computes them, into results/small_windows.csv. CUDA.

python bench/small_windows.py

Neighbourhoods meet FlexAttention and dense SDPA; shifted windows with a relative bias meet SDPA with that bias and
mask, with and without the reshapes around it, and SDPA without any bias, which computes less. Every row was first
compared with masked dense attention of one image in float32. Calls are CUDA graphs, timed interleaved in one process;
times are medians over rounds, ratios are that time / our forward time, with a 90 % interval. Floors are copies that
move as many bytes as q, k, v and the result have; for backward q, k, v, the result, its gradient and those of q, k, v.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from glocal._files import write_atomic
from glocal.canvas import Canvas, Layout
from glocal.kernels.call import Call, PlanTensors
from glocal.kernels.windows import launch
from glocal.measure import compare_paired
from glocal.nn.blocks.windows import from_windows, rolled_visible, to_windows
from glocal.ops import Relative, Score, attention
from glocal.patterns import Neighborhood, Windows
from glocal.plan.windows import window_plan

CSV = Path(__file__).resolve().parent.parent / "results" / "small_windows.csv"
TOLERANCE = 2e-2
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One shape and pattern; bias: a relative table, differentiable."""

    name: str
    pattern: Neighborhood | Windows
    images: int
    heads: int
    side: int
    size: int = 32
    bias: bool = False

    @property
    def canvas(self) -> Canvas:
        """The map."""
        return Canvas((self.side, self.side))

    @property
    def reach(self) -> int:
        """Steps the table reaches either way."""
        window = self.pattern.window if isinstance(self.pattern, Neighborhood) else self.pattern.size
        assert isinstance(window, int)
        return window - 1


SHAPES = ((128, 3, 56), (128, 6, 28), (32, 6, 56))
CASES = (
    *(Case("neighbourhood 7", Neighborhood(7), *shape) for shape in SHAPES[:2]),
    Case("neighbourhood 13", Neighborhood(13), *SHAPES[2]),
    *(Case("neighbourhood 7, bias", Neighborhood(7), *shape, bias=True) for shape in SHAPES[:2]),
    Case("neighbourhood 13, bias", Neighborhood(13), *SHAPES[2], bias=True),
    *(Case("shifted windows 7, bias", Windows(7, roll=3), *shape, bias=True) for shape in SHAPES),
    *(Case("windows 7, bias", Windows(7), *shape, bias=True) for shape in SHAPES[:2]),
    Case("windows 12, bias", Windows(12), 32, 6, 48, bias=True),
    Case("windows 14, bias", Windows(14), *SHAPES[2], bias=True),
)


@dataclass(frozen=True, eq=False)
class Inputs:
    """q, k, v, gradient [B, H, N, D] and the table [H, 2 reach + 1, 2 reach + 1]."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    table: Tensor

    @staticmethod
    def random(case: Case) -> Inputs:
        g = torch.Generator("cuda").manual_seed(0)
        n, extent = case.canvas.size, 2 * case.reach + 1
        shape = (case.images, case.heads, n, case.size)
        q, k, v, grad = (torch.randn(shape, generator=g, device="cuda").bfloat16() for _ in range(4))
        return Inputs(q, k, v, grad, torch.randn(case.heads, extent, extent, generator=g, device="cuda").bfloat16())

    def score(self, case: Case) -> Score:
        """The bias of the case."""
        return Score(bias=(Relative(self.table),) if case.bias else ())


def graph(run: Run) -> Run:
    """`run` as a CUDA graph: what the device does, without the time of the host."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made, stream=side):
        run()
    return made.replay


def check(case: Case, x: Inputs) -> float:
    """Largest error of out and gradients relative to the largest value, against masked attention of one image."""
    mask = case.pattern.mask(Layout.of(case.canvas), "cuda")[0]
    found, want = ([t[:1].detach().clone().requires_grad_() for t in (x.q, x.k, x.v)] for _ in range(2))
    table, exact = (x.table.detach().clone().requires_grad_() for _ in range(2))
    spec = Score(bias=(Relative(table),) if case.bias else ())
    out = attention(found[0], found[1], found[2], case.pattern, canvas=case.canvas, score=spec, backend="windows")
    logits = want[0].float() @ want[1].float().mT * case.size**-0.5
    if case.bias:
        place = torch.cartesian_prod(*[torch.arange(case.side, device="cuda")] * 2)
        step = (place[None] - place[:, None] + case.reach).clamp(0, 2 * case.reach)
        logits = logits + exact.float()[:, step[..., 0], step[..., 1]]
    truth = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ want[2].float()
    pairs = [(out, truth)]
    some = found + ([table] if case.bias else [])
    along = x.grad[:1]
    grads = torch.autograd.grad(out, some, along)
    pairs += zip(grads, torch.autograd.grad(truth, want + ([exact] if case.bias else []), along.float()), strict=True)
    worst = max(
        float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in ((a.float(), b.float()) for a, b in pairs)
    )
    if not worst <= TOLERANCE:
        raise RuntimeError(f"{case.name}: off by {worst:.2e} of the largest value; limit {TOLERANCE:g}")
    return worst


def ours(case: Case, x: Inputs) -> tuple[Run, Run]:
    """Forward, and backward given its results, as the operator runs them."""
    made = window_plan(case.pattern, case.canvas, device="cuda")
    bias = tuple(term.lower(made.layout) for term in x.score(case).bias)
    plan = PlanTensors(**made.tensors())
    call = Call("windows", case.size**-0.5, q_block=made.q_block, kv_block=made.kv_block, plan=plan, bias=bias)
    out, lse = launch.forward(x.q, x.k, x.v, call)
    known = launch.Known(x.grad, torch.zeros_like(lse), out, lse)
    return lambda: launch.forward(x.q, x.k, x.v, call), lambda: launch.backward(known, x.q, x.k, x.v, call)


def peers(case: Case, x: Inputs) -> dict[str, Run]:
    """Other ways to the same result; those in brackets compute something else or leave something out."""
    if isinstance(case.pattern, Neighborhood):
        found: dict[str, Run] = {} if case.bias else {"FlexAttention": _flex(case, x)}
        return found | {"(dense SDPA)": lambda: sdpa(x.q, x.k, x.v)}
    roll = case.pattern.roll
    assert isinstance(roll, int)
    reach, size = case.reach, (case.side, case.side)
    window, tokens = (reach + 1, reach + 1), (reach + 1) ** 2
    place = torch.cartesian_prod(*[torch.arange(reach + 1, device="cuda")] * 2)
    step = place[None] - place[:, None] + reach
    bias = x.table[:, step[..., 0], step[..., 1]][None]  # [1, H, tokens, tokens]
    if roll:
        seen = rolled_visible(size, window, (roll, roll), "cuda")
        hidden = torch.zeros(seen.shape, dtype=bias.dtype, device="cuda").masked_fill(~seen, -torch.inf)[:, None]
        bias = (hidden + bias)[None].expand(case.images, *([-1] * 4)).flatten(0, 1)  # [B * windows, H, tokens, tokens]

    def cut(t: Tensor) -> Tensor:
        t = t.transpose(1, 2).reshape(case.images, *size, -1)
        t = t.roll((-roll, -roll), (1, 2)) if roll else t
        return to_windows(t, window).reshape(-1, tokens, case.heads, case.size).transpose(1, 2)

    def whole(mask: Tensor | None) -> Run:
        def run() -> Tensor:
            out = sdpa(cut(x.q), cut(x.k), cut(x.v), attn_mask=mask)
            out = from_windows(
                out.transpose(1, 2).reshape(case.images, -1, tokens, case.heads * case.size), size, window
            )
            return out.roll((roll, roll), (1, 2)) if roll else out

        return run

    q, k, v = (cut(t).contiguous() for t in (x.q, x.k, x.v))
    return {
        "SDPA, bias, reshapes": whole(bias),
        "SDPA, bias, kernel alone": lambda: sdpa(q, k, v, attn_mask=bias),
        "(SDPA, no bias, kernel alone)": lambda: sdpa(q, k, v),
    }


def _flex(case: Case, x: Inputs) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    seen = case.pattern.mask(Layout.of(case.canvas), "cuda")[0]
    n, half, side = case.canvas.size, case.reach // 2, case.side

    def near(b: Any, h: Any, q: Any, k: Any) -> Any:
        y = (q // side).clamp(half, side - 1 - half) - k // side
        z = (q % side).clamp(half, side - 1 - half) - k % side
        return (y.abs() <= half) & (z.abs() <= half)

    mask = create_block_mask(near, None, None, n, n, device="cuda")
    run = torch.compile(flex_attention, dynamic=False)
    out = run(x.q[:1], x.k[:1], x.v[:1], block_mask=mask)
    want = sdpa(x.q[:1], x.k[:1], x.v[:1], attn_mask=seen)
    if float((out - want).abs().max()) > TOLERANCE * float(want.abs().max()):
        raise RuntimeError(f"{case.name}: FlexAttention computes something else")
    return lambda: run(x.q, x.k, x.v, block_mask=mask)


def measure(case: Case, rounds: int) -> list[dict[str, object]]:
    """The rows of one case."""
    x = Inputs.random(case)
    error = check(case, x)
    forward, backward = ours(case, x)
    four = torch.stack([x.q, x.k, x.v, x.grad])
    room = torch.empty_like(four)
    calls: dict[str, Run] = {
        "ours": forward,
        "floor": lambda: room[:2].copy_(four[:2]),
        "ours, backward": backward,
        "floor, backward": lambda: room.copy_(four),
    }
    calls |= peers(case, x)
    timed = compare_paired(
        {name: graph(run) for name, run in calls.items()}, rounds, "cuda", torch.Generator(), warmup=3
    )
    same = [name for name in calls if not name.startswith(("(", "ours", "floor"))]
    best = min(same, key=lambda name: timed.times[name].median, default=None)
    rows = []
    for name, time in timed.times.items():
        ratio = timed.against(name).ratios["ours"] if name != "ours" else None
        rows.append(
            {
                "case": case.name,
                "images": case.images,
                "heads": case.heads,
                "map": f"{case.side}x{case.side}",
                "head_dim": case.size,
                "dtype": "bfloat16",
                "call": name,
                "error": f"{error:.2e}" if name.startswith("ours") else "",
                "ms": f"{time.median * 1e3:.4f}",
                "ms_low": f"{time.low * 1e3:.4f}",
                "ms_high": f"{time.high * 1e3:.4f}",
                "over_ours": "" if ratio is None else f"{ratio.median:.3f}",
                "over_ours_low": "" if ratio is None else f"{ratio.low:.3f}",
                "over_ours_high": "" if ratio is None else f"{ratio.high:.3f}",
                "best_peer": "yes" if name == best else "",
                "rounds": rounds,
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
            }
        )
        print(
            f"{case.name:24} {case.images:4} x {case.heads} x {case.side:3} {name:32} {rows[-1]['ms']} ms "
            f"{rows[-1]['over_ours']} {rows[-1]['best_peer']}",
            flush=True,
        )
    return rows


def main() -> int:
    """Measure all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="interleaved rounds a case")
    parser.add_argument("--out", type=Path, default=CSV, help="where the table goes")
    parser.add_argument("--only", type=int, nargs="*", default=None, help="numbers of the cases to measure, from 0")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for case in CASES if options.only is None else [CASES[i] for i in options.only]:
        rows += measure(case, options.rounds)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(options.out, text.getvalue())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
