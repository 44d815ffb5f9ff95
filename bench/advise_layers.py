"""Does an error count alike in every layer? On the built-in video model: end-to-end errors of runs in which one layer,
or the whole model, or a recipe of results/advise_recipes.json is sparse in one range of steps, against what the probe
predicts of them, with and without gains of layers.

    python bench/advise_layers.py --device cuda --raw F      # measures into F, and writes results/advise_layers.csv
    python bench/advise_layers.py --raw F --device cuda      # F is there: rows from it alone

Samples 20 to 27 of the built-in workload; nothing is judged on them. Gains and step weights come from one method
(`pooled_topk(keep=0.5)`); predictions of the recipes use nothing that was measured of them. The gain of a layer is here
its end-to-end error over its residual error, as `glocal advise` takes it where the canvas is small enough.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import torch
from advise_evidence import ROOT, Batch, work

from glocal._files import write_atomic
from glocal.advise import Latents, Recipe, demo_workload
from glocal.advise.preflight import preflight
from glocal.advise.recipe import Fallback, Phase
from glocal.advise.search import base_rules
from glocal.advise.tasks import Looks, probe_sample
from glocal.advise.weights import Bucket, make_buckets, one_bucket
from glocal.models.generation import SampleSpec, load_demo

COLUMNS = ["row", "kind", "budget", "steps", "layer", "method", "residual", "measured", "plain", "with_layers"]
COLUMNS += ["samples", "device"]
METHODS = (("pooled_topk", 0.5), ("pooled_topk", 0.25), ("tile_windows", 0.75))


def alone(recipe: Recipe, bucket: Bucket) -> Recipe | None:
    """The rules of a recipe in one range of steps, everything else dense."""
    rules = []
    for rule in recipe.rules:
        sigma = rule.phase.coordinate == "sigma"
        low = max(rule.phase.low, bucket.low) if sigma else bucket.low
        high = min(rule.phase.high, bucket.high) if sigma else bucket.high
        if low < high:
            rules.append(replace(rule, phase=Phase("sigma", low, high)))
    return replace(recipe, rules=tuple(rules)) if rules else None


def recipes() -> dict[tuple[str, float], Recipe]:
    """Allocations of results/advise_recipes.json by kind and budget."""
    made = json.loads((ROOT / "results" / "advise_recipes.json").read_text())["recipes"]
    kinds = ("residual", "output")
    return {(r["kind"], r["budget"]): Recipe.loads(json.dumps(r["recipe"])) for r in made if r["kind"] in kinds}


@torch.no_grad()
def measured(device: str) -> dict[str, Any]:
    """Errors of every run by sample, and the records of the probe."""
    model = load_demo(device)
    objective = Latents(SampleSpec(steps=8), 16, 64, 64)
    samples = demo_workload(28, fields=model.config.fields).samples[20:]
    before = preflight(model, samples[0], objective)
    buckets = make_buckets(before.levels, 4)
    _, methods = work(model, samples[0], objective, before.sites[len(before.sites) // 2].name, before.shape)
    records = []
    for sample in samples[:5]:
        records += probe_sample(model, objective, sample, methods, Looks(buckets, 2, 16)).records
    batch = Batch(model, objective, samples)
    rules, fallback = base_rules(records), Fallback(min_tokens=64)
    found: dict[str, Any] = {"buckets": buckets, "methods": methods, "records": records}
    ends, layers, of_recipes = {}, {}, {}
    for bucket in buckets:
        for name in named(methods):
            whole = one_bucket(bucket, name, methods[name], rules, fallback)
            ends[bucket.number, name] = batch.of(whole, bucket.first)
            for layer in range(model.config.layers):
                one = replace(whole, rules=tuple(replace(r, layers=((layer, layer),)) for r in whole.rules))
                layers[bucket.number, layer, name] = batch.of(one, bucket.first)
        for key, recipe in recipes().items():
            part = alone(recipe, bucket)
            if part is not None:
                of_recipes[(*key, bucket.number)] = batch.of(part, bucket.first)
    return {**found, "ends": ends, "layer": layers, "recipes": of_recipes}


def named(methods: Any) -> list[str]:
    """Ids of `METHODS`."""
    found = []
    for system, number in METHODS:
        wanted = {"keep": number} if system == "pooled_topk" else {"window": [{"fraction": number}] * 3}
        mine = (n for n, m in methods.items() if m.system == system)
        found.append(next(n for n in mine if all(methods[n].params.get(k) == v for k, v in wanted.items())))
    return found


def rows(data: dict[str, Any]) -> list[dict[str, object]]:
    """Measured and predicted errors (geometric means over samples), and how predictions of recipes hold."""
    buckets, methods = data["buckets"], data["methods"]
    squares: dict[tuple[int, int, int, str], list[float]] = {}
    for r in data["records"]:
        if r.head >= 0:
            squares.setdefault((r.layer, r.head, r.bucket, r.method), []).append(r.residual**2)
    error = {key: fmean(values) for key, values in squares.items()}
    places = sorted({key[:2] for key in error})
    names = named(methods)

    def local(layer: int, bucket: int, name: str) -> float:
        return math.sqrt(sum(error[n, h, bucket, name] for n, h in places if n == layer))

    layers = sorted({n for n, _ in places})
    gain = {}
    for bucket in buckets:
        for layer in layers:
            end = geometric_mean(data["layer"][bucket.number, layer, names[0]])
            gain[bucket.number, layer] = end / local(layer, bucket.number, names[0])
    out: list[dict[str, object]] = []
    logs: dict[str, list[float]] = {"plain": [], "with_layers": []}
    for bucket in buckets:
        b, steps = bucket.number, f"{bucket.first}-{bucket.last}"
        whole = math.sqrt(sum(local(layer, b, names[0]) ** 2 for layer in layers))
        counted = math.sqrt(sum((gain[b, layer] * local(layer, b, names[0])) ** 2 for layer in layers))
        end = geometric_mean(data["ends"][b, names[0]])
        for name in names:
            for layer in layers:
                value = geometric_mean(data["layer"][b, layer, name])
                row = {"row": "layer", "steps": steps, "layer": layer, "method": methods[name].words()}
                out.append({**row, "residual": f"{local(layer, b, name):.5f}", "measured": f"{value:.5f}"})
        for (kind, budget), recipe in recipes().items():
            if (kind, budget, b) not in data["recipes"]:
                continue
            used = {
                (n, h): recipe.method_at(
                    n, h, component="transformer", kind="self", branch="cond", sigma=bucket.high, progress=None
                )
                for n, h in places
            }
            sparse = {p: error[(*p, b, use)] for p, use in used.items() if use != "dense"}
            value = geometric_mean(data["recipes"][kind, budget, b])
            said = {
                "plain": end / whole * math.sqrt(sum(sparse.values())),
                "with_layers": end / counted * math.sqrt(sum(gain[b, n] ** 2 * e for (n, _), e in sparse.items())),
            }
            for name, predicted in said.items():
                logs[name].append(math.log(predicted / value))
            row = {"row": "recipe", "kind": kind, "budget": budget, "steps": steps, "measured": f"{value:.5f}"}
            out.append({**row, **{n: f"{v:.5f}" for n, v in said.items()}})
    for words, value in (
        ("predicted over measured, geometric mean", lambda v: math.exp(fmean(v))),
        ("spread of that, a factor", lambda v: math.exp(math.sqrt(fmean((x - fmean(v)) ** 2 for x in v)))),
    ):
        out.append({"row": "summary", "kind": words, **{n: f"{value(v):.3f}" for n, v in logs.items()}})
    return [{**r, "samples": len(next(iter(data["ends"].values())))} for r in out]


def main() -> None:
    """Parse the command line; measure where nothing is measured yet; write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--raw", type=Path, required=True, help="what was measured")
    parser.add_argument("--name", help="of the device that measured, where rows are written on another machine")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "advise_layers.csv")
    options = parser.parse_args()
    if not options.raw.is_file():
        options.raw.write_bytes(pickle.dumps(measured(options.device)))
    made = rows(pickle.loads(options.raw.read_bytes()))
    name = options.name or (torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU")
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**dict.fromkeys(COLUMNS, ""), **row, "device": name} for row in made)
    write_atomic(options.out, table.getvalue())
    for row in made[-2:]:
        print(row)


if __name__ == "__main__":
    main()
