"""Error against time of every sparse method on the built-in video model, into results/video_methods.csv.

python bench/video_methods.py                            # five budgets a method, 32 seeds; a GPU, minutes
python bench/video_methods.py --device cpu --seeds 2 --steps 2 --budgets 1 --out /dev/stdout

For each seed the dense clip and the clips of all methods come from the same noise and condition, run after one another
in an order that is drawn anew. error is the relative L2 distance of a clip to the dense one of its seed, speedup the
ratio of whole generation times; both with t intervals of 90 % over seeds. `floor` is dense attention by another exact
kernel: no method can be nearer. paro is calibrated on seeds of its own. First every method runs once against the
definition (backend "reference").
"""

from __future__ import annotations

import argparse
import csv
import io
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from glocal._files import write_atomic
from glocal.adapt import Method, attach
from glocal.adapt.paro import Paro
from glocal.adapt.paro_calibration import ParoSpec, calibrate
from glocal.adapt.published import made
from glocal.adapt.records import Core, SiteCall
from glocal.adapt.sparse import SparseMethod
from glocal.measure import relative_l2
from glocal.measure.stats import log_ratio, paired
from glocal.models.generation import SampleSpec, draw_noise, load_demo, sample

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "results" / "video_methods.csv"
SPA = {"mass": 0.0, "block": 64, "neighbours": False}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}

# system -> settings from sparse to nearly dense; the demo's canvas is 16 x 16 x 16 tokens
BUDGETS: dict[str, list[dict[str, Any]]] = {
    "radial": [{"decay": d, "block": 64} for d in (0.1, 0.25, 0.5, 1.0, 2.0)],
    "rectified_spaattn": [SPA | {"drop": d} for d in (0.9, 0.8, 0.7, 0.5, 0.3)],
    "rectified_spaattn, not rectified": [SPA | {"drop": d, "rectify": False} for d in (0.9, 0.8, 0.7, 0.5, 0.3)],
    "gna": [
        {"window": w, "stride": [4, 4, 4]} for w in ([8, 8, 8], [8, 8, 12], [8, 12, 12], [12, 12, 12], [16, 12, 12])
    ],
    "tile_windows": [{"tile": [4, 4, 4], "window": w} for w in ([2, 2, 2], [4, 2, 2], [2, 3, 3], [3, 3, 3], [4, 3, 3])],
    "paro": [{"density": d} for d in (0.1, 0.2, 0.3, 0.5, 0.7)],
}


class Floor(Method):
    """Dense attention by another exact kernel."""

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return inner(q, k, v, call)


class Generator:
    """Clips of the built-in model."""

    def __init__(self, device: str, steps: int) -> None:
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = load_demo(device).to(self.dtype)
        self.spec = SampleSpec(steps=steps)

    def clip(self, seed: int) -> tuple[Tensor, float]:
        """The clip [1, T, C, H, W] of a seed and the seconds it took."""
        draw = random.Random(seed)
        asked = {name: draw.choice(words) for name, words in self.model.config.fields}
        condition = self.model.condition(**asked)
        noise = draw_noise(seed, channels=self.model.config.channels).to(self.device, self.dtype)
        self._wait()
        begin = time.perf_counter()
        found = sample(self.model, noise, condition, self.spec)
        self._wait()
        return found.float(), time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def contenders(generator: Generator, budgets: int, backend: str) -> dict[tuple[str, int], SparseMethod]:
    """Every method at every budget."""
    found: dict[tuple[str, int], SparseMethod] = {}
    for system, settings in BUDGETS.items():
        for number, values in enumerate(settings[:budgets]):
            method: Method
            if system == "paro":
                spec = ParoSpec(density=values["density"])
                plan = calibrate(generator.model, lambda: generator.clip(10_000), spec)
                method = Paro(plan)
            else:
                method = made(system.split(",")[0], values)
            assert isinstance(method, SparseMethod)
            method.backend = backend
            found[system, number] = method
    return found


def check(generator: Generator, method: SparseMethod) -> float:
    """Relative difference of one forward to that by the definition."""
    model, outs = generator.model, []
    noise = draw_noise(0, channels=model.config.channels).to(generator.device, generator.dtype)
    backend = method.backend
    for name in (backend, "reference"):
        method.backend = name
        with torch.no_grad(), attach(model, method) as handle:
            handle.state.total = 1
            outs.append(model(noise, torch.ones(1, device=generator.device, dtype=generator.dtype)).float())
    method.backend = backend
    method.ran.clear()
    return float(relative_l2(outs[1], outs[0]))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--budgets", type=int, default=5)
    parser.add_argument("--backend", default="auto", help="kernel of the sparse calls")
    parser.add_argument("--out", type=Path, default=CSV)
    args = parser.parse_args()
    generator = Generator(args.device, args.steps)
    methods: dict[tuple[str, int], Method] = {("floor", 0): Floor()}
    for key, method in contenders(generator, args.budgets, args.backend).items():
        off = check(generator, method)
        if off > TOLERANCE[generator.dtype]:
            raise RuntimeError(f"{key}: a forward is off by {off:.2e}, more than {TOLERANCE[generator.dtype]:.0e}")
        methods[key] = method
    errors: dict[tuple[str, int], list[float]] = {key: [] for key in methods}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in methods}
    dense: list[float] = []
    order = random.Random(0)
    for seed in range(-1, args.seeds):  # the first one plans and compiles
        clip, took = generator.clip(max(seed, 0))
        if seed >= 0:
            dense.append(took)
        keys = list(methods)
        order.shuffle(keys)
        for key in keys:
            with attach(generator.model, methods[key]) as handle:
                handle.state.total = args.steps
                mine, took = generator.clip(max(seed, 0))
            if seed >= 0:
                errors[key].append(float(relative_l2(clip, mine)))
                times[key].append(took)
        print(f"seed {seed}", file=sys.stderr, flush=True)
    rows = [_row(key, method, errors[key], times[key], dense, args) for key, method in methods.items()]
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    if str(args.out) == "/dev/stdout":
        sys.stdout.write(text.getvalue())
    else:
        write_atomic(args.out, text.getvalue())
        print(text.getvalue())


def _row(
    key: tuple[str, int],
    method: Method,
    errors: list[float],
    times: list[float],
    dense: list[float],
    args: argparse.Namespace,
) -> dict[str, object]:
    error, speed = paired(errors), log_ratio(dense, times)
    sparse = isinstance(method, SparseMethod)
    settings = BUDGETS[key[0]][key[1]] if key[0] in BUDGETS else {}
    kernels = sorted({k for r in method.ran.values() for k in r.kernels}) if isinstance(method, SparseMethod) else []
    return {
        "method": key[0],
        "settings": " ".join(f"{k}={v}" for k, v in settings.items() if k not in SPA or k == "drop"),
        "kept": f"{method.kept:.4f}" if sparse else "1.0000",  # type: ignore[attr-defined]
        "kernel": ",".join(kernels),
        "error": f"{error.mean:.4f}",
        "error_low": f"{error.low:.4f}",
        "error_high": f"{error.high:.4f}",
        "seconds": f"{sorted(times)[len(times) // 2]:.4f}",
        "speedup": f"{speed.mean:.3f}",
        "speedup_low": f"{speed.low:.3f}",
        "speedup_high": f"{speed.high:.3f}",
        "seeds": len(errors),
        "steps": args.steps,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
