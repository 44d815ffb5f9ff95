"""UltraGen's claim of speed at the paper's shapes: its attention, the module around it and a whole denoising forward of
Wan2.1-1.3B blocks with random weights, beside the best dense kernel, into results/ultragen.csv.

python bench/ultragen.py                              # 1080P 81 frames and 4K 29 frames on the GPU
python bench/ultragen.py --device cpu --heads 2 --grid 4 64 64 --variant depthwise
python bench/ultragen.py --tiny --device cpu --out /dev/stdout

Two blocks are built, an even and an odd one (K and K + 1 windows), so a forward of a part is a part of a forward: no
figure is scaled up. "scores": attention alone on given q, k, v of one layer of each kind. "module": self-attention with
projections, branches, gates. "forward": all of it. First a check: at a small size one window with fresh parts is the
untouched model, and the method equals the definition (backend "reference"). Rounds run interleaved in one process.
Not measured: training, and how good the videos are.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from generation.models import WAN
from generation.rows import merged, write
from generation.timing import Dense, dense, dense_times, told
from torch import Tensor, nn

from glocal.adapt import attach
from glocal.adapt.ultragen import UltraGenSettings, ultragen
from glocal.ops import attention
from glocal.ops.fold import window_attention

CSV = Path(__file__).resolve().parent.parent / "results" / "ultragen.csv"
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
HEADS, DIM = 12, 128
Triple = tuple[Tensor, Tensor, Tensor]
SHOWN = ("case", "variant", "measured", "dense_s", "seconds", "speedup", "rounds")


@dataclass(frozen=True)
class Case:
    """A size of the paper. grid: frames, rows, columns of tokens. paper: its figure, end to end against Wan."""

    name: str
    grid: tuple[int, int, int]
    paper: str


CASES = (
    Case("wan2.1-1.3b 81 frames 1080p", (21, 68, 120), "2.69x end to end"),
    Case("wan2.1-1.3b 29 frames 4k", (8, 135, 240), "4.78x end to end"),
)
VARIANTS: Mapping[str, UltraGenSettings] = {
    "depthwise": UltraGenSettings(conv="depthwise"),
    "depthwise, one level": UltraGenSettings(conv="depthwise", hierarchical=False),
    "dense conv": UltraGenSettings(),
}


def wan(heads: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Two blocks."""
    import diffusers

    torch.manual_seed(0)
    with device:
        model: Any = diffusers.WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=DIM, ffn_dim=heads * 8960 // 12, num_layers=2
        )
    return model.to(device, dtype).eval().requires_grad_(False)


def inputs(grid: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a forward."""
    f, h, w = grid
    draw = torch.Generator(device).manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, f, 2 * h, 2 * w, generator=draw, device=device).to(dtype),
        "timestep": torch.full((1,), 500.0, device=device),
        "encoder_hidden_states": torch.randn(1, 512, 4096, generator=draw, device=device).to(dtype),
        "return_dict": False,
    }


def forward(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """One denoising forward."""
    with torch.no_grad():
        return model(**given)[0]


def check(model: nn.Module, settings: UltraGenSettings, device: torch.device, dtype: torch.dtype) -> float:
    """Relative difference to the definition at a small size; RuntimeError if one window is not the untouched model."""
    given = inputs((2, 10, 14), device, dtype)
    plain = forward(model, given).float()
    one = replace(settings, windows=1, cross_window="fixed", hierarchical=False, global_stride=1)
    with ultragen(model, settings=one):
        error = float((forward(model, given).float() - plain).norm() / plain.norm())
    if error > TOLERANCE[dtype]:
        raise RuntimeError(f"one window with fresh parts is off the untouched model by {error:.1e}")
    found = {}
    for backend in ("auto", "reference"):
        torch.manual_seed(1)
        with ultragen(model, settings=settings, backend=backend):
            found[backend] = forward(model, given).float()
    return float((found["auto"] - found["reference"]).norm() / found["reference"].norm())


def scores(grid: tuple[int, int, int], settings: UltraGenSettings, draw: Callable[[int], Triple]) -> Callable[[], None]:
    """Attention of an even and an odd layer on q, k, v of each branch."""
    fine, coarse = draw(torch.Size(grid).numel()), draw(torch.Size(settings.cells(grid, "coarse")).numel())
    whole = draw(torch.Size(settings.cells(grid, "global")).numel())
    cells = settings.cells(grid, "coarse")

    def run() -> None:
        for layer in (0, 1):
            window_attention(*fine, settings.pattern(grid, layer), grid)
            if settings.hierarchical:
                window_attention(*coarse, settings.pattern(cells, layer, "coarse"), cells)
            if settings.global_branch:
                attention(*whole)

    return run


class Clock:
    """Time inside the self-attention modules."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.cuda, self.marks = device.type == "cuda", list[Any]()
        for name, module in model.named_modules():
            if name.endswith("attn1"):
                module.register_forward_pre_hook(lambda *_: self.marks.append(self._mark()))
                module.register_forward_hook(lambda *_: self.marks.append(self._mark()))

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> float:
        """Seconds since the last reading; nothing may still run."""
        marks, self.marks[:] = list(self.marks), []
        return sum(
            a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in zip(marks[::2], marks[1::2], strict=True)
        )


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(
    case: Case, variants: Mapping[str, UltraGenSettings], rounds: int, device: torch.device, heads: int
) -> Iterator[list[dict[str, object]]]:
    """Rows of one variant after every round anew, variant by variant."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = wan(heads, device, dtype)
    clock = Clock(model, device)
    given = inputs(case.grid, device, dtype)

    def draw(tokens: int) -> Triple:
        q, k, v = (torch.randn(1, heads, tokens, DIM, device=device, dtype=dtype) for _ in range(3))
        return q, k, v

    full = draw(torch.Size(case.grid).numel())
    kernels = dense_times(replace(WAN, heads=heads), full[0].shape[2], device, dtype)
    print(f"  dense, ms a call: {told(kernels)}", flush=True)
    kernel = next(iter(kernels))
    for name, settings in variants.items():
        error = check(model, settings, device, dtype)
        clock.read()
        if error > TOLERANCE[dtype]:
            raise RuntimeError(f"{case.name}: {name}: output is off by {error:.1e}, more than {TOLERANCE[dtype]:.0e}")
        runs: dict[tuple[str, str], list[float]] = {}
        alone = scores(case.grid, settings, draw)
        handle = ultragen(model, settings=settings)
        handle.undo()
        parts: Any = handle.method
        for turn in range(rounds + 1):  # the first one plans and compiles
            timed = {("scores", "dense"): seconds(lambda: [dense(kernel, *full) for _ in range(2)], device)}
            timed["scores", name] = seconds(alone, device)
            with attach(model, Dense(kernel)):
                timed["forward", "dense"] = seconds(lambda: forward(model, given), device)
            timed["module", "dense"] = clock.read()
            with ultragen(model, parts=parts.parts):
                timed["forward", name] = seconds(lambda: forward(model, given), device)
            timed["module", name] = clock.read()
            if turn == 0:
                continue
            for key, value in timed.items():
                runs.setdefault(key, []).append(value)
            shares = [sum(settings.pairs(case.grid, n).values()) / full[0].shape[2] ** 2 for n in (0, 1)]
            common = {"pairs_even_odd": " ".join(f"{share:.4f}" for share in shares), "kernel": kernel}
            end = {
                "bound_by_pairs": f"{2 / sum(shares):.2f}",
                "error": f"{error:.1e}",
                "rounds": turn,
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "torch": torch.__version__,
            }
            yield [
                {
                    "case": case.name, "variant": name, "measured": what, "tokens": full[0].shape[2], **common,
                    **_ratios(runs[what, "dense"], runs[what, name]),
                    "paper": case.paper if what == "forward" else "", **end,
                }
                for what in ("scores", "module", "forward")
            ]  # fmt: skip


def _ratios(dense: Sequence[float], mine: Sequence[float]) -> dict[str, str]:
    ratios = sorted(d / m for d, m in zip(dense, mine, strict=True))
    found = {"dense_s": f"{median(dense):.4f}", "seconds": f"{median(mine):.4f}"}
    names = ("speedup", "speedup_low", "speedup_high")
    return found | dict(zip(names, (f"{r:.3f}" for r in (median(ratios), ratios[0], ratios[-1])), strict=True))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--variant", action="append", help=f"only these: {', '.join(VARIANTS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--grid", type=int, nargs=3, help="frames, rows and columns of tokens, in place of the paper's")
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--tiny", action="store_true", help="small grids, to see that it runs")
    parser.add_argument("--out", type=Path, default=CSV)
    args = parser.parse_args()
    variants = {n: s for n, s in VARIANTS.items() if args.variant is None or n in args.variant}
    cases = CASES
    if args.grid is not None:
        frames, height, width = args.grid
        cases = (Case(f"{args.heads} heads, {frames} x {height} x {width} tokens", (frames, height, width), ""),)
    for case in cases:
        if args.case not in case.name:
            continue
        here = replace(case, grid=(2, 17, 16)) if args.tiny else case
        size = 1 if args.tiny else args.heads
        try:
            for rows in measure(here, variants, args.rounds, torch.device(args.device), size):
                write(merged(args.out, rows, ("case", "variant", "measured")), args.out)
                for row in rows:
                    print({k: row[k] for k in SHOWN}, flush=True)
        except torch.OutOfMemoryError as error:
            print(f"{case.name}: {str(error)[:200]}", file=sys.stderr)


if __name__ == "__main__":
    main()
