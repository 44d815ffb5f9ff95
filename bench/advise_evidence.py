"""Is the allocation worth it? On the built-in video model: by residual error with measured step weights, by relative
error of the attention output, and plain recipes, at three budgets of attention work, paired over unseen seeds.

    python bench/advise_evidence.py --device cuda
    python bench/advise_evidence.py --tiny                  # a dry run

The budget is the share of query-key pairs that kernels visit (a count of the planner, the same on every machine), so
nothing here is a time. A recipe's error is the end-to-end relative error of the latents of each seed; the best plain
recipe of a budget is picked after the fact, by its mean over the very seeds it is judged on. Predicted errors come from
the probe and step-weight samples, which share neither prompt nor seed with those.
"""

from __future__ import annotations

import argparse
import csv
import io
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from glocal._files import write_atomic
from glocal.adapt import attach as attach_method
from glocal.adapt.records import Core, SiteCall
from glocal.advise import Latents, Recipe, Sample, Workload, attach, demo_workload
from glocal.advise.methods import candidates
from glocal.advise.objective import other_seed
from glocal.advise.preflight import Inside, Preflight, preflight
from glocal.advise.probe import ProbeRecord
from glocal.advise.recipe import Fallback
from glocal.advise.search import Found, Rung, allocated, base_rules, published
from glocal.advise.tasks import Looks, probe_sample
from glocal.advise.timing import MethodTime, Times
from glocal.advise.validation import OtherKernel
from glocal.advise.weights import StepWeight, fit_weights, make_buckets, one_bucket, residual_total, weight_run
from glocal.measure.stats import drift, log_ratio, paired
from glocal.models.generation import SampleSpec, VideoDiT, load_demo
from glocal.models.generation.sampler import sample as draw_clip

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["row", "budget", "kind", "name", "visited", "seed", "error", "drift", "predicted_error", "predicted_drift"]
COLUMNS += ["low", "high", "pairs", "device", "torch", "python"]
Row = dict[str, object]


def work(model: VideoDiT, sample: Sample, objective: Latents, site: str, shape: tuple[int, ...]) -> tuple[Times, dict]:
    """Pairs visited in place of times, of every candidate that fits."""
    found: list[tuple[Times, dict]] = []

    def look(q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> None:
        def one(name: str, visited: float, kept: float) -> MethodTime:
            return MethodTime(name, visited, visited, visited, 1, 0.0, 0.0, kept, visited, "counted")

        methods = {m.id: m for m in candidates(shape)}
        plans = {name: m.plan(call.layout, q, k) for name, m in methods.items()}
        counted = {name: one(name, p.visited, p.kept) for name, p in plans.items()}
        found.append((Times(one("dense", 1.0, 1.0), counted, None), methods))

    with attach_method(model, Inside(site, look)):
        objective.brief(model, sample)
    return found[0]


def search(model: VideoDiT, objective: Latents, workload: Workload) -> tuple[Found, Preflight]:
    """Probe and step weights over the first samples of `workload`."""
    first, second = workload.samples[0], workload.samples[1]
    before = preflight(model, first, objective)
    buckets = make_buckets(before.levels, 4)
    times, methods = work(model, first, objective, before.sites[len(before.sites) // 2].name, before.shape)
    looks = Looks(buckets, 1, 16)
    patterns = sorted((n for n, m in methods.items() if m.kind == "pattern"), key=lambda n: times.methods[n].visited)
    middle = [n for n in patterns if 0.15 <= times.methods[n].visited <= 0.6]
    plain = {n: methods[n] for n in (middle[len(middle) // 4], middle[3 * len(middle) // 4])}
    probes = [probe_sample(model, objective, s, methods, looks) for s in (first, second)]
    records: list[ProbeRecord] = [r for p in probes for r in p.records]
    runs, dense = [], probes[1]
    for bucket in buckets:
        latent = dense.latents[bucket.first - 1] if bucket.first else None
        for name, method in plain.items():
            recipe = one_bucket(bucket, name, method, base_rules(records), Fallback(min_tokens=64))
            reference = (dense.output, latent, dense.latents[bucket.first])
            end, one = weight_run(model, objective, second, bucket, recipe, reference)
            mine = [r for r in records if r.sample == second.id]
            runs.append(StepWeight(bucket.number, name, end, one, residual_total(mine, name, bucket.number)))
    return Found(
        records, times, fit_weights(buckets, runs), methods, base_rules(records), Fallback(min_tokens=64)
    ), before


def plain_rungs(found: Found, budget: float, count: int) -> list[Rung]:
    """Every method with as few dense early steps as the budget asks for, the most promising by prediction."""
    rungs = []
    for name in found.methods:
        for skipped in range(len(found.buckets)):
            sparse = found.buckets[skipped:]
            ratio = found.uniform_ratio(name, sparse)
            if ratio <= budget:
                words = f"{found.methods[name].words()}, {skipped} of {len(found.buckets)} step ranges dense"
                error = found.uniform_error(name, sparse)
                rungs.append(Rung(words, "single", found.uniform(name, sparse), budget, ratio, error))
    return sorted(rungs, key=lambda r: r.predicted or 0.0)[:count]


def spent(rung: Rung, found: Found, before: Preflight) -> float:
    """Share of the attention work of dense, counted over the run's steps."""
    total, levels = 0.0, before.levels[:-1]
    for level in levels:
        for site in before.sites:
            for head in range(site.heads):
                name = rung.recipe.method_at(
                    site.layer, head, component=site.component, kind="self", branch="cond", sigma=level, progress=None
                )
                known = found.times.methods.get(name)
                total += 1.0 if name == "dense" or known is None else known.visited
    return total / (len(levels) * sum(s.heads for s in before.sites))


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--plain", type=int, default=5, help="plain recipes measured at each budget")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.6, 0.75, 0.45])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "advise_evidence.csv")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = load_demo(options.device)
    size = (4, 32, 32) if options.tiny else (16, 64, 64)
    objective = Latents(SampleSpec(steps=4 if options.tiny else options.steps), *size)
    seeds = 2 if options.tiny else options.seeds
    workload = demo_workload(seeds + 2, fields=model.config.fields)
    tail = {"torch": torch.__version__, "python": platform.python_version()}
    tail["device"] = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor()
    rows: list[Row] = []

    def emit(more: list[Row]) -> None:
        rows.extend({**dict.fromkeys(COLUMNS, ""), **row, **tail} for row in more)
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(options.out, table.getvalue())
        for row in more:
            if row["row"] != "seed":
                print({k: v for k, v in row.items() if v != ""}, flush=True)

    with torch.no_grad():
        began = time.monotonic()
        known = search(model, objective, workload)
        print(f"probe and step weights: {time.monotonic() - began:.1f} s", flush=True)
        judge(model, objective, Workload(workload.samples[2:]), known, options, emit)


class Batch:
    """All unseen seeds in one batch: their latents at the end of a run [S, ...] on the CPU."""

    def __init__(self, model: VideoDiT, objective: Latents, samples: Sequence[Sample]) -> None:
        self.model, self.spec, self.samples = model, objective.spec, samples
        given = [{k: v for k, v in s.args.items() if k not in ("frames", "height", "width")} for s in samples]
        self.condition = torch.cat([model.condition(**names) for names in given])
        self.objective = objective
        self.dense = self.run()

    def run(self, *, other: bool = False) -> Tensor:
        """The last latents; from other noise where `other`."""
        chosen = [replace(s, seed=other_seed(s.seed)) if other else s for s in self.samples]
        noise = torch.cat([self.objective.first_latent(self.model, s) for s in chosen])
        return draw_clip(self.model, noise, self.condition, self.spec).float().cpu()

    def errors(self, found: Tensor) -> list[float]:
        """Relative L2 distance to dense of every seed."""
        gap, base = ((t).flatten(1).norm(dim=1) for t in (found - self.dense, self.dense))
        return (gap / base).tolist()

    def of(self, recipe: Recipe) -> list[float]:
        """Errors of a recipe."""
        with attach(self.model, replace(recipe, host={}), on_unseen="run"):
            return self.errors(self.run())


def judge(
    model: VideoDiT,
    objective: Latents,
    unseen: Workload,
    known: tuple[Found, Preflight],
    options: argparse.Namespace,
    emit: Callable[[list[Row]], None],
) -> None:
    """Every recipe on every unseen seed, and what the pairs say; rows are handed to `emit` as they come."""
    found, before = known
    batch = Batch(model, objective, unseen.samples)
    with attach_method(model, OtherKernel()):
        floors = batch.errors(batch.run())
    ceilings = batch.errors(batch.run(other=True))
    floor, ceiling = (sum(v) / len(v) for v in (floors, ceilings))
    band = found.weights.band
    emit(
        [
            {"row": "prediction", "kind": "leave one out", "name": "90 % band, a factor", "error": f"{band:.3f}"},
            {"row": "anchors", "kind": "floor", "error": f"{floor:.3g}", "pairs": len(unseen)},
            {"row": "anchors", "kind": "ceiling", "error": f"{ceiling:.4f}", "pairs": len(unseen)},
        ]
    )
    for budget in options.budgets:
        rows: list[Row] = []
        tried: dict[str, list[Rung]] = {"residual": [], "output": []}
        for measure in ("residual", "output"):
            rung = allocated(found, budget, measure)
            tried[measure] = [] if rung is None else [rung]
        rivals = plain_rungs(found, budget, options.plain)
        rivals += [r for r in published(found, before.shape, before.levels) if spent(r, found, before) <= budget]
        tried["plain"] = rivals
        best: dict[str, tuple[Rung, list[float]]] = {}
        for kind, rungs in tried.items():
            for rung in rungs:
                values = batch.of(rung.recipe)
                if kind not in best or sum(values) < sum(best[kind][1]):
                    best[kind] = rung, values
                share = f"{spent(rung, found, before):.4f}"
                head: Row = {"budget": budget, "kind": kind, "name": rung.name, "visited": share}
                for s, value, low, high in zip(unseen.samples, values, floors, ceilings, strict=True):
                    own = {"seed": s.seed, "error": f"{value:.5f}", "drift": f"{drift(value, low, high):.5f}"}
                    rows.append({"row": "seed", **head, **own})
                mean = paired(values)
                row: Row = {"row": "recipe", **head, "error": f"{mean.mean:.5f}", "low": f"{mean.low:.5f}"}
                row |= {"high": f"{mean.high:.5f}", "pairs": len(values)}
                row["drift"] = f"{drift(mean.mean, floor, ceiling):.5f}"
                if rung.predicted is not None and kind != "output":  # that one predicts in another unit
                    row["predicted_error"] = f"{rung.predicted:.5f}"
                    row["predicted_drift"] = f"{drift(rung.predicted, floor, ceiling):.5f}"
                rows.append(row)
        for rival in ("output", "plain"):
            if rival in best and "residual" in best:
                ratio = log_ratio(best[rival][1], best["residual"][1])
                name = f"{best[rival][0].name} over the allocation by residual error"
                verdict: Row = {"row": "error ratio", "budget": budget, "kind": rival, "name": name}
                verdict |= {"error": f"{ratio.mean:.4f}", "low": f"{ratio.low:.4f}", "high": f"{ratio.high:.4f}"}
                rows.append({**verdict, "pairs": ratio.n})
        emit(rows)


if __name__ == "__main__":
    main()
