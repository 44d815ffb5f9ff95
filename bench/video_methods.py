"""Error against work of every sparse method and of the recipes of `glocal advise` on the built-in video model, into
results/video_methods.csv and results/video_methods.svg.

    python bench/video_methods.py --device cuda          # five or six budgets a method, 32 seeds; minutes on a GPU
    python bench/video_methods.py --tiny                 # a dry run
    python bench/video_methods.py --figure-only          # draw the rows that are there
    python bench/video_methods.py --evidence --figure-only   # take over recipes that bench/advise_evidence.py judged

error is the relative L2 distance of the last latent of a seed to the dense one of the same seed and condition, with t
intervals of 90 % over seeds; `errors` holds all of them, in the order of seeds, so that any two rows are paired.
`floor` is dense attention by another exact kernel: no method can be nearer. `visited` is the share of query-key pairs
that kernels compute over a whole run, dense calls included: on a canvas of 4,096 tokens the time of a GPU is that of
launches and Python, not of attention, so work stands in the place of time (bench/generators.py measures time where it
counts). `gain` of a recipe is the error of the best single method with at most its work (half a per cent of dense work
aside; picked on these very seeds) over its own, paired over the seeds both have, with its interval; `parts` are the
methods it composes. A recipe here is the allocation by residual error; `glocal advise` measures that by relative error
beside it and goes on with the better (bench/advise_evidence.py judges both). paro is calibrated on a seed of its own,
recipes are composed on others again. Recipes of bench/advise_evidence.py are judged there on the first of these very
seeds (a method that both drivers measure has equal errors).

Recipes are composed by counts of pairs, not by times, so any machine can make them (`--compose`); they lie in a folder
with their masks, and a run that finds either there goes on with it.

First every method runs once against the definition (backend "reference"). Rows are written as they come, and a run
that finds them goes on behind them.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import advise_evidence as evidence
import torch
from torch import Tensor

from glocal._files import write_atomic
from glocal.adapt import Method, attach
from glocal.adapt.paro import Paro
from glocal.adapt.paro_calibration import ParoSpec, calibrate_each
from glocal.adapt.published import made
from glocal.adapt.sparse import SparseMethod
from glocal.advise import Latents, Sample, demo_workload
from glocal.advise.apply import RecipeMethod
from glocal.advise.calibrated import masked, paro_candidates
from glocal.advise.recipe import Recipe
from glocal.advise.search import allocated
from glocal.advise.validation import OtherKernel
from glocal.measure import relative_l2
from glocal.measure.stats import log_ratio, paired
from glocal.models.generation import SampleSpec, VideoDiT, draw_noise, load_demo, sample

RESULTS = Path(__file__).resolve().parent.parent / "results"
SPA = {"mass": 0.0, "block": 64, "neighbours": False}
TOLERANCE = 1e-3
ALLOCATED = "glocal advise"
ALIKE = 0.005  # shares of work that count as the same
Row = dict[str, Any]
COLUMNS: tuple[str, ...] = (
    "method", "settings", "kept", "visited", "error", "error_low", "error_high", "gain", "gain_low", "gain_high",
    "than", "parts", "seeds", "steps", "kernel", "device", "torch", "errors",
)  # fmt: skip

# system -> settings from sparse to nearly dense, no two with the same blocks; the demo's canvas is 16 x 16 x 16 tokens
BUDGETS: dict[str, list[dict[str, Any]]] = {
    "radial": [{"decay": d, "block": 64} for d in (0.5, 1.0, 1.5, 2.0, 4.0)],
    "radial, rectified": [{"decay": d, "block": 64, "rectify": True} for d in (0.5, 1.0, 1.5, 2.0, 4.0)],
    "rectified_spaattn": [SPA | {"drop": d} for d in (0.9, 0.8, 0.7, 0.5, 0.3, 0.1)],
    "rectified_spaattn, not rectified": [SPA | {"drop": d, "rectify": False} for d in (0.9, 0.8, 0.7, 0.5, 0.3, 0.1)],
    "gna": [
        {"window": w, "stride": [4, 4, 4]}
        for w in ([8, 8, 8], [8, 8, 12], [8, 12, 12], [12, 12, 12], [16, 12, 12], [16, 16, 12])
    ],
    "tile_windows": [
        {"tile": [4, 4, 4], "window": w} for w in ([2, 2, 2], [4, 2, 2], [2, 3, 3], [3, 3, 3], [4, 3, 3], [4, 4, 3])
    ],
    "paro": [{"density": d} for d in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)],
}
WORK = (0.3, 0.45, 0.6, 0.75, 0.9)  # of the recipes, as shares of dense
PARO = (0.1, 0.2, 0.35, 0.5, 0.7)  # densities a recipe may compose


def calibration(model: VideoDiT, objective: Latents) -> Callable[[], Tensor]:
    """A whole run from noise that is no seed of the workload, [1, T, C, H, W]."""
    noise = draw_noise(10_000, 1, objective.frames, objective.height, objective.width, model.config.channels)
    first = next(model.parameters())
    return lambda: sample(model, noise.to(first.device, first.dtype), None, objective.spec)


class Clips:
    """All unseen seeds in one batch, and their dense latents at the end of a run [S, ...]."""

    def __init__(self, model: VideoDiT, objective: Latents, samples: Sequence[Sample]) -> None:
        self.model, self.spec = model, objective.spec
        given = [{k: v for k, v in s.args.items() if k not in ("frames", "height", "width")} for s in samples]
        self.condition = torch.cat([model.condition(**names) for names in given])
        first = next(model.parameters())
        self.noise = torch.cat([objective.first_latent(model, s) for s in samples]).to(first.device, first.dtype)
        self.dense = self.run()

    def run(self) -> Tensor:
        """The last latents."""
        return sample(self.model, self.noise, self.condition, self.spec).float()

    def errors(self) -> list[float]:
        """Relative L2 distances of a run, as the model is now, to the dense one."""
        gap, base = (t.flatten(1).norm(dim=1) for t in (self.run() - self.dense, self.dense))
        return (gap / base).tolist()


@dataclass(frozen=True)
class Setup:
    """The model, what is judged, and the unseen seeds in one batch."""

    model: Any
    objective: Latents
    clips: Clips
    budgets: int
    backend: str
    only: tuple[str, ...] = ()

    def wants(self, name: str) -> bool:
        """Whether a method is asked for."""
        return not self.only or name in self.only

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a clip."""
        o = self.objective
        return o.frames, o.height, o.width


def contenders(setup: Setup, done: set[tuple[str, str]]) -> Iterator[tuple[str, str, SparseMethod]]:
    """Every method at every budget: its name, its settings in words, itself."""
    for system, settings in BUDGETS.items():
        if not setup.wants(system):
            continue
        rest = [(words(v), v) for v in settings[: setup.budgets] if (system, words(v)) not in done]
        plans = []
        if system == "paro" and rest:
            specs = [ParoSpec(density=v["density"]) for _, v in rest]
            plans = calibrate_each(setup.model, calibration(setup.model, setup.objective), specs)
        for number, (name, values) in enumerate(rest):
            method = Paro(plans[number]) if plans else made(system.split(",")[0], values)
            assert isinstance(method, SparseMethod)
            method.backend = setup.backend
            yield system, name, method


def words(values: dict[str, Any]) -> str:
    """Settings for people."""
    return " ".join(f"{k}={v}" for k, v in values.items() if k not in SPA or k == "drop")


def check(setup: Setup, method: SparseMethod) -> float:
    """Relative difference of one forward to that by the definition."""
    model, outs = setup.model, []
    first = next(model.parameters())
    noise = draw_noise(0, 1, *setup.size, model.config.channels).to(first.device, first.dtype)
    backend = method.backend
    for name in (backend, "reference"):
        method.backend = name
        with torch.no_grad(), attach(model, method) as handle:
            handle.state.total = 1
            outs.append(model(noise, torch.ones(1, device=first.device, dtype=first.dtype)).float())
    method.backend = backend
    method.ran.clear()
    return float(relative_l2(outs[1], outs[0]))


def measured(setup: Setup, method: Method) -> list[float]:
    """Errors of a method, by seed."""
    with attach(setup.model, method) as handle:
        handle.state.total = setup.objective.spec.steps
        return setup.clips.errors()


def composed(model: VideoDiT, objective: Latents, samples: Sequence[Sample], folder: Path) -> dict[float, Recipe]:
    """The recipes of `glocal advise` by their share of dense work: those in `folder`, or made and written there."""
    if not list(folder.glob("*.json")):
        masks = sorted(folder.glob("paro-*.safetensors"))
        candidates = [masked(file) for file in masks]
        candidates = candidates if masks else paro_candidates(model, calibration(model, objective), folder, PARO)
        # As many looks as the demonstration of `glocal advise` takes.
        searched = evidence.search(evidence.Batch(model, objective, samples), candidates, (1, 6))
        for work in WORK:
            rung = allocated(searched.found, work)
            if rung is not None:
                rung.recipe.save(folder / f"{work}.json")
    return {float(file.stem): Recipe.load(file) for file in sorted(folder.glob("*.json"))}


def visited(method: SparseMethod) -> float:
    """Share of pairs that kernels computed; a dense call computes all."""
    calls = sum(r.calls for r in method.ran.values())
    return sum(r.visited * r.sparse + (r.calls - r.sparse) for r in method.ran.values()) / calls


def shares_of(recipe: RecipeMethod) -> dict[str, str]:
    """What a recipe kept and computed of all pairs in all its calls, and by which kernels."""
    stats = recipe.stats.values()
    dense = sum(sum(s.dense.values()) for s in stats)
    heads = dense + sum(s.sparse for s in stats)
    kernels = ",".join(sorted({k for s in stats for k in s.kernels}))
    kept, seen = (dense + sum(getattr(s, name) for s in stats) for name in ("kept_sum", "visited_sum"))
    return {"kept": f"{kept / heads:.4f}", "visited": f"{seen / heads:.4f}", "kernel": kernels}


def row_of(name: str, settings: str, errors: list[float], **more: Any) -> Row:
    """A row; `errors` are kept in it."""
    found = paired(errors)
    return {
        "method": name, "settings": settings, "error": f"{found.mean:.5f}", "error_low": f"{found.low:.5f}",
        "error_high": f"{found.high:.5f}", "seeds": len(errors), "errors": " ".join(f"{e:.5f}" for e in errors),
    } | more  # fmt: skip


def judged_elsewhere(table: Path, recipes: Path) -> list[Row]:
    """Allocations that bench/advise_evidence.py judged, on the first seeds of these curves."""
    with table.open(newline="") as file:
        found = [r for r in csv.DictReader(file) if r["row"] == "seed" and r["kind"] == "residual"]
    composed_of = {
        str(one["budget"]): Recipe.loads(json.dumps(one["recipe"]))
        for one in json.loads(recipes.read_text())["recipes"]
        if one["kind"] == "residual"
    }
    first, rows = evidence.PROBES + evidence.WEIGHTS, []
    for budget in dict.fromkeys(r["budget"] for r in found):
        mine = sorted((r for r in found if r["budget"] == budget), key=lambda r: int(r["seed"]))
        seeds = [int(r["seed"]) for r in mine]
        if seeds != list(range(first, first + len(seeds))):
            raise ValueError(f"{table}: seeds {seeds} are not the first ones here, which begin at {first}.")
        parts = "; ".join(sorted(m.words() for m in composed_of[budget].methods.values()))
        shared = {"visited": mine[0]["visited"], "parts": parts, "steps": 8}
        shared |= {"device": mine[0]["device"], "torch": mine[0]["torch"]}
        name = f"work={budget}, of bench/advise_evidence.py"
        rows.append(row_of(ALLOCATED, name, [float(r["error"]) for r in mine], **shared))
    return rows


def compare(rows: list[Row]) -> None:
    """Hold each recipe against the best single method of at most its work."""
    singles = [r for r in rows if r["method"] in BUDGETS]
    for row in rows:
        rivals = [r for r in singles if float(r["visited"]) <= float(row["visited"]) + ALIKE]
        if row["method"] != ALLOCATED or not rivals:
            continue
        mine = [float(e) for e in row["errors"].split()]
        known = {id(r): [float(e) for e in r["errors"].split()][: len(mine)] for r in rivals}
        best = min(rivals, key=lambda r: fmean(known[id(r)]))
        theirs = known[id(best)]
        ratio = log_ratio(theirs, mine)
        row |= {"gain": f"{ratio.mean:.3f}", "gain_low": f"{ratio.low:.3f}", "gain_high": f"{ratio.high:.3f}"}
        row["than"] = f"{best['method']} {best['settings']}"


def write(rows: list[Row], out: Path) -> None:
    """The table, whole or not at all."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n", restval="")
    table.writeheader()
    table.writerows(rows)
    write_atomic(out, text.getvalue())


def figure(rows: list[Row], out: Path) -> None:
    """Curves of error against work; bars are the intervals."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "glocal"
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name in [*BUDGETS, ALLOCATED]:
        mine = sorted((r for r in rows if r["method"] == name), key=lambda r: float(r["visited"]))
        if not mine:
            continue
        x, y, low, high = ([float(r[c]) for r in mine] for c in ("visited", "error", "error_low", "error_high"))
        bars = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
        style = {"color": "black", "linewidth": 2.5, "zorder": 5} if name == ALLOCATED else {"linewidth": 1.2}
        axes.errorbar(x, y, yerr=bars, label=name, marker="o", markersize=4, capsize=2, **style)  # type: ignore[arg-type]
    for row in rows:
        if row["method"] == "floor":
            axes.axhline(float(row["error"]), color="grey", linestyle=":", label="another exact kernel")
    axes.set_yscale("log")
    axes.set_xlabel("share of query-key pairs computed over a run")
    axes.set_ylabel("relative error of the clip, mean over seeds")
    axes.legend(fontsize=8)
    text = io.StringIO()
    picture.savefig(text, format="svg", metadata={"Date": None})
    write_atomic(out, text.getvalue())


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--budgets", type=int, default=6, help="at most so many a method, from the sparsest")
    parser.add_argument("--backend", default="auto", help="kernel of the sparse calls")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin nothing more after so many")
    parser.add_argument("--only", action="append", help="only this method, several times; also floor, glocal advise")
    parser.add_argument("--carry", type=Path, action="append", help="a table whose rows are taken over, several times")
    parser.add_argument("--recipes", type=Path, default=RESULTS.parent / "out" / "video_recipes", help="their folder")
    parser.add_argument("--compose", action="store_true", help="write the recipes alone; any machine can")
    parser.add_argument("--evidence", action="store_true", help="take over the recipes of results/advise_evidence.csv")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--figure-only", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "video_methods.csv")
    args = parser.parse_args()
    rows: list[Row] = []
    for path in [args.out, *([] if args.carry is None else args.carry)]:
        known = {(r["method"], r["settings"]) for r in rows}
        more = list(csv.DictReader(io.StringIO(path.read_text()))) if path.is_file() else []
        rows += [r for r in more if (r["method"], r["settings"]) not in known]
    asked = {(name, words(v)) for name, settings in BUDGETS.items() for v in settings}
    rows = [r for r in rows if r["method"] not in BUDGETS or (r["method"], r["settings"]) in asked]
    if args.evidence:
        more = judged_elsewhere(RESULTS / "advise_evidence.csv", RESULTS / "advise_recipes.json")
        names = {r["settings"] for r in more}
        rows = [r for r in rows if r["method"] != ALLOCATED or r["settings"] not in names] + more
    if args.carry is not None or args.evidence:
        compare(rows)
        write(rows, args.out)
    if not args.figure_only:
        begin = time.monotonic()
        wrong = run(args, rows, begin)
        if wrong:
            print(f"wrong: {json.dumps(wrong)}", file=sys.stderr)
            return 1
    figure(rows, args.out.with_suffix(".svg"))
    return 0


def run(args: argparse.Namespace, rows: list[Row], begin: float) -> list[str]:
    """Fill `rows` up and write them; returns methods whose check failed."""
    torch.manual_seed(0)
    model = load_demo(args.device)
    size = (4, 32, 32) if args.tiny else (16, 64, 64)
    steps, seeds = (2, 2) if args.tiny else (args.steps, args.seeds)
    objective = Latents(SampleSpec(steps=steps), *size)
    apart = evidence.PROBES + evidence.WEIGHTS
    samples = demo_workload(seeds + apart, fields=model.config.fields).samples
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    tail = {"steps": steps, "device": name, "torch": torch.__version__}
    wrong: list[str] = []
    done = {(r["method"], r["settings"]) for r in rows}

    def emit(row: Row) -> None:
        rows.append(row | tail)
        compare(rows)
        write(rows, args.out)
        shown = ("method", "settings", "visited", "error", "error_low", "error_high", "gain", "than")
        print(f"{time.monotonic() - begin:.0f} s", {k: row[k] for k in shown if k in row}, flush=True)

    with torch.no_grad():
        if args.compose:
            composed(model, objective, samples[:apart], args.recipes)
            return wrong
        only = () if args.only is None else tuple(args.only)
        setup = Setup(model, objective, Clips(model, objective, samples[apart:]), args.budgets, args.backend, only)
        if ("floor", "") not in done and setup.wants("floor"):
            emit(row_of("floor", "", measured(setup, OtherKernel()), kept="1.0000", visited="1.0000"))
        for system, settings, method in contenders(setup, done):
            if time.monotonic() - begin > args.seconds:
                return wrong
            try:
                off = check(setup, method)
            except ValueError as problem:
                if not args.tiny:
                    raise
                print(f"{system} {settings}: {problem}", file=sys.stderr)
                continue
            if off > TOLERANCE:
                wrong.append(f"{system} {settings}: a forward is off by {off:.2e}")
                continue
            errors = measured(setup, method)
            kernels = ",".join(sorted({k for r in method.ran.values() for k in r.kernels}))
            shares = {"kept": f"{method.kept:.4f}", "visited": f"{visited(method):.4f}", "kernel": kernels}
            emit(row_of(system, settings, errors, **shares))
        works = WORK[: args.budgets] if setup.wants(ALLOCATED) else ()
        rest = [work for work in works if (ALLOCATED, f"work={work}") not in done]
        if rest and time.monotonic() - begin < args.seconds:
            made = composed(model, objective, samples[:apart], args.recipes)
            for work, recipe in made.items():
                if work not in rest or time.monotonic() - begin > args.seconds:
                    continue
                method = RecipeMethod(recipe, check_canvas=False)
                errors = measured(setup, method)
                parts = "; ".join(sorted(m.words() for m in recipe.methods.values()))
                emit(row_of(ALLOCATED, f"work={work}", errors, parts=parts, **shares_of(method)))
    return wrong


if __name__ == "__main__":
    sys.exit(main())
