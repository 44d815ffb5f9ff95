"""Is the allocation worth it? On the built-in video model: by residual error with gains of layers taken at the end of
the run and step weights measured on allocations of one step range ("residual", what `glocal advise` does); with gains
of layers taken behind one step; without gains, with step weights of plain methods; by relative error of the attention
output, with step weights measured either way in its own units, or none (which `glocal advise` tries too); and plain
recipes: at three budgets of attention work, paired over unseen seeds.

    python bench/advise_evidence.py search                      # probe, step weights, gains: recipes
    python bench/advise_evidence.py judge --device cuda         # every recipe on every seed
    python bench/advise_evidence.py compare                     # what the pairs say
    python bench/advise_evidence.py search --tiny --recipes F    # a dry run; then judge and compare with the same

The budget is the share of query-key pairs that kernels visit (a count of the planner, the same on every machine), so
nothing here is a time, and every recipe runs as exact attention under its mask. A recipe's error is the end-to-end
relative error of the latents of each seed. Probe and step-weight samples share neither prompt nor seed with those. At
each budget stand beside the allocations: plain recipes (one method, the first step ranges dense) and published settings
that keep the budget; the best plain recipe is picked after the fact, by its mean over the very seeds it is judged on.
"advised" is what `glocal advise` hands on: the one that erred least on the probe samples. `judge` keeps the rows that
are there and runs what is missing, those of most interest first.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal._files import write_atomic
from glocal.adapt import attach as attach_method
from glocal.adapt.records import Core, SiteCall
from glocal.advise import Latents, MethodSpec, Recipe, Sample, demo_workload
from glocal.advise.calibrate import Group, LayerGains, by_layer, layer_gains, layer_groups
from glocal.advise.methods import candidates
from glocal.advise.objective import other_seed
from glocal.advise.preflight import Inside, Preflight, preflight
from glocal.advise.probe import MediaMethod, ProbeRecord
from glocal.advise.recipe import Fallback, Rule
from glocal.advise.search import Found, Rung, allocated, base_rules, of_range, published
from glocal.advise.stages import plain_methods
from glocal.advise.tasks import Looks, probe_sample
from glocal.advise.timing import MethodTime, Times
from glocal.advise.weights import (
    Bucket,
    StepWeight,
    even_weights,
    fit_weights,
    make_buckets,
    one_bucket,
    residual_total,
    residual_under,
)
from glocal.canvas import Canvas, Layout
from glocal.measure.stats import drift, log_ratio, paired
from glocal.models.generation import SampleSpec, VideoDiT, load_demo
from glocal.models.generation.sampler import sample as draw_clip

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["row", "budget", "kind", "name", "visited", "seed", "error", "drift", "predicted_error", "predicted_drift"]
COLUMNS += ["low", "high", "pairs", "device", "torch", "python"]
Row = dict[str, object]
PROBES, WEIGHTS, MORE = 2, 2, 4  # samples in front of those judged; methods that gains are measured with
BUDGETS = (0.75, 0.6, 0.45)
BEGAN = time.monotonic()
KINDS = ("residual", "gains behind one step", "no gains, plain step weights", "output", "output, plain step weights")
RELATIVE = "output, no step weights"  # the other allocation of `glocal advise`


class Masked(MediaMethod):
    """A recipe as exact attention under its masks, a batch at once; noise levels are those of a run."""

    def __init__(self, recipe: Recipe, cache: dict[str, Tensor]) -> None:
        self.recipe, self.cache = recipe, cache

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """q, k, v [B, H, N, D] -> [B, H, N, D]."""
        groups: dict[str, list[int]] = {}
        for head in range(q.shape[1]):
            site, branch = call.site, call.state.branch
            name = self.recipe.method_at(
                site.layer,
                head,
                component=site.component,
                kind=site.kind,
                branch=branch,
                sigma=call.state.timestep,
                progress=None,
            )
            groups.setdefault(name, []).append(head)
        if set(groups) == {"dense"}:
            return inner(q, k, v, call)
        out = torch.empty_like(q)
        for name, heads in groups.items():
            mine = [t[:, heads] for t in (q, k, v)]
            method = self.recipe.methods.get(name)
            if method is not None and (method.correction != "none" or method.kind == "masks"):  # no mask says it all
                out[:, heads] = method.run(mine[0], mine[1], mine[2], replace(call, heads=tuple(heads)))[0]
                continue
            mask = None if name == "dense" else self._mask(name, mine[0], mine[1], call)
            out[:, heads] = F.scaled_dot_product_attention(*mine, attn_mask=mask, scale=call.site.scale)
        return out

    def _mask(self, name: str, q: Tensor, k: Tensor, call: SiteCall) -> Tensor:
        method = self.recipe.methods[name]
        if method.kind == "pattern":
            if name not in self.cache:
                self.cache[name] = (method.plan(call.layout, q, k).dense_counts()[0, 0] > 0).to(q.device)
            return self.cache[name]
        plan = method.plan(call.layout, q, k)  # a router: whole blocks, lists of each sample and head
        lists, row, column, _ = plan.full.entries()
        seen = torch.zeros(plan.full.count.shape[0], plan.q_blocks, plan.kv_blocks, dtype=torch.bool, device=q.device)
        seen[lists, row, column] = True
        order = plan.q_order[0, 0].long()
        block = torch.empty(plan.layout.nq, dtype=torch.long, device=q.device)
        block[order] = torch.arange(len(order), device=q.device) // plan.q_block
        return seen[plan.owner.long()][..., block, :][..., block]  # [B, H, N, N]


def work(
    model: VideoDiT,
    sample: Sample,
    objective: Latents,
    site: str,
    shape: tuple[int, ...],
    more: Sequence[MethodSpec] = (),
) -> tuple[Times, dict[str, MethodSpec]]:
    """Pairs visited in place of times, of every candidate that fits and of `more`."""
    found: list[tuple[Times, dict[str, MethodSpec]]] = []

    def look(q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> None:
        def one(name: str, visited: float, kept: float) -> MethodTime:
            return MethodTime(name, visited, visited, visited, 1, 0.0, 0.0, kept, visited, "counted")

        methods = {m.id: m for m in [*candidates(shape), *more]}
        plans = {name: m.plan(call.layout, q, k, call.site.scale, call) for name, m in methods.items()}
        counted = {name: one(name, p.visited, p.kept) for name, p in plans.items()}
        found.append((Times(one("dense", 1.0, 1.0), counted, None), methods))

    with attach_method(model, Inside(site, look)):
        objective.brief(model, sample)
    return found[0]


class Batch:
    """All samples in one batch, those of the search in front: latents on the device."""

    def __init__(self, model: VideoDiT, objective: Latents, samples: Sequence[Sample]) -> None:
        self.model, self.objective, self.samples = model, objective, samples
        given = [{k: v for k, v in s.args.items() if k not in ("frames", "height", "width")} for s in samples]
        self.condition = torch.cat([model.condition(**names) for names in given])
        self.cache: dict[str, Tensor] = {}
        self.latents = [self._noise(samples)]  # before every step of the dense run, and behind the last
        self._draw(self.latents[0], 0, slice(None), lambda s: self.latents.append(s.latent.clone()))

    def _noise(self, samples: Sequence[Sample]) -> Tensor:
        noise = torch.cat([self.objective.first_latent(self.model, s) for s in samples])
        return noise.to(next(self.model.parameters()).device)

    def _draw(self, latent: Tensor, start: int, which: slice, callback: Callable | None = None) -> Tensor:
        own = self.condition[which]
        return draw_clip(self.model, latent, own, self.objective.spec, start=start, callback=callback)

    def errors(self, found: Tensor, dense: Tensor) -> list[float]:
        """Relative L2 distance of every sample."""
        gap, base = (t.flatten(1).norm(dim=1) for t in (found - dense, dense))
        return (gap / base).tolist()

    def of(self, recipe: Recipe | MediaMethod, start: int = 0, which: slice = slice(None)) -> list[float]:
        """Errors at the end of a run that goes on from the dense latent before step `start`."""
        with attach_method(self.model, Masked(recipe, self.cache) if isinstance(recipe, Recipe) else recipe):
            end = self._draw(self.latents[start][which], start, which)
        return self.errors(end, self.latents[-1][which])

    def begins(self, recipe: Recipe) -> int:
        """The first step with a rule; before it the run is the dense one."""
        phases, levels = [rule.phase for rule in recipe.rules], self.objective.levels[:-1]
        touched = (s for s, x in enumerate(levels) if any(p.holds(sigma=x, progress=None, tokens=None) for p in phases))
        return next(touched, 0)

    def one_step(self, recipe: Recipe, step: int, which: slice) -> list[float]:
        """Errors behind one step from the dense latent."""
        levels = self.objective.levels
        x = self.latents[step][which]
        with attach_method(self.model, Masked(recipe, self.cache)):
            clean = self.model(x, torch.full((len(x),), levels[step], device=x.device), self.condition[which])
        behind = clean + levels[step + 1] / levels[step] * (x - clean)
        return self.errors(behind, self.latents[step + 1][which])

    def other(self) -> MediaMethod:
        """Dense attention through the kernel that takes masks."""
        everything = MethodSpec("dense")
        rules = (Rule(everything.id, ((0, 1 << 20),)),)
        return Masked(Recipe("candidate", {everything.id: everything}, rules), self.cache)

    def ceilings(self) -> list[float]:
        """Errors of other noise."""
        other = self._noise([replace(s, seed=other_seed(s.seed)) for s in self.samples])
        return self.errors(self._draw(other, 0, slice(None)), self.latents[-1])


def said(words: str) -> None:
    """A line of progress, with the seconds since the start."""
    print(f"{time.monotonic() - BEGAN:.0f} s: {words}", flush=True)


@dataclass(frozen=True)
class Searched:
    """kinds: what allocations go by, "residual" first. found: that one."""

    kinds: dict[str, Found]
    before: Preflight

    @property
    def found(self) -> Found:
        """As `glocal advise` searches."""
        return self.kinds["residual"]


def search(
    batch: Batch,
    more: Sequence[MethodSpec] = (),
    looks: tuple[int, int] = (2, 16),
    budgets: Sequence[float] = BUDGETS,
) -> Searched:
    """Probe, gains and step weights over the first samples. more: candidates beside the built-in ones. looks: steps
    probed of each of four step ranges, query blocks probed a call.
    """
    model, objective = batch.model, batch.objective
    samples = batch.samples[: PROBES + WEIGHTS]
    before = preflight(model, samples[0], objective)
    buckets = make_buckets(before.levels, 4)
    times, methods = work(model, samples[0], objective, before.sites[len(before.sites) // 2].name, before.shape, more)
    plain = plain_methods(times, methods, 2)
    probed = [probe_sample(model, objective, s, methods, Looks(buckets, *looks)) for s in samples]
    records, others = ([r for p in some for r in p.records] for some in (probed[:PROBES], probed[PROBES:]))
    said(f"probed {len(methods)} methods")
    base = Found(records, times, even_weights(buckets), methods, base_rules(records), Fallback(min_tokens=64))
    several = plain_methods(times, methods, MORE)
    layers = {whole: measured_layers(batch, base, several, whole) for whole in (True, False)}
    said("gains of layers")

    def counted(own: list[ProbeRecord], kind: str) -> list[ProbeRecord]:
        if kind.startswith("output"):
            return [replace(r, residual=r.output) for r in own]
        return own if kind.startswith("no gains,") else by_layer(own, layers[kind == "residual"])

    kinds = {}
    for kind in KINDS:
        found, theirs = replace(base, records=counted(records, kind)), counted(others, kind)
        recipes = {
            bucket: [one_bucket(bucket, n, m, base.base, base.fallback) for n, m in plain.items()]
            if "plain" in kind
            else [of_range(found, bucket, budget) for budget in budgets]
            for bucket in buckets
        }
        kinds[kind] = replace(found, weights=fit_weights(buckets, ranges_alone(batch, theirs, recipes)))
        said(f"{kind} {[f'{w:.3g}' for w in kinds[kind].weights.weight]}")
    return Searched(kinds, before)


def ranges_alone(
    batch: Batch, records: Sequence[ProbeRecord], recipes: Mapping[Bucket, Sequence[Recipe]]
) -> list[StepWeight]:
    """Every step-weight sample with one step range sparse at a time, from the dense latent in front of it on."""
    runs = []
    for bucket, some in recipes.items():
        for number, recipe in enumerate(some):
            ends = batch.of(recipe, bucket.first, slice(PROBES, PROBES + WEIGHTS))
            ones = batch.one_step(recipe, bucket.first, slice(PROBES, PROBES + WEIGHTS))
            for sample, end, one in zip(batch.samples[PROBES:], ends, ones, strict=False):
                own = [r for r in records if r.sample == sample.id]
                runs.append(StepWeight(bucket.number, str(number), end, one, residual_under(own, recipe, bucket)))
    return runs


def measured_layers(batch: Batch, base: Found, plain: Mapping[str, MethodSpec], whole: bool) -> LayerGains:
    """Gains of layers in every step range: at the end of the run, or behind the first step of the range."""
    changed: dict[tuple[Group, int], list[float]] = {}
    errors: dict[tuple[Group, int], list[float]] = {}
    probes = slice(0, PROBES)
    for group in layer_groups(base.records, 1 + max(r.layer for r in base.records)):
        own = [r for r in base.records if group.holds(r)]
        for bucket in base.buckets:
            here = own if whole else [r for r in own if r.step == bucket.first]
            for name, method in plain.items():
                rules = tuple(group.rules(base.base, name, bucket.phase))
                recipe = Recipe("candidate", {name: method}, rules, fallback=base.fallback)
                place, first = (group, bucket.number), bucket.first
                found = batch.of(recipe, first, probes) if whole else batch.one_step(recipe, first, probes)
                changed.setdefault(place, []).append(fmean(found))
                errors.setdefault(place, []).append(residual_total(here, name, bucket.number))
    return layer_gains(changed, errors, len(base.buckets))


def plain_rungs(found: Found, budget: float) -> list[Rung]:
    """Every method with as many dense early steps as the budget allows."""
    rungs = []
    for name in found.methods:
        fits = [s for s in range(len(found.buckets)) if found.uniform_ratio(name, found.buckets[s:]) <= budget]
        for skipped in fits[-1:]:
            sparse = found.buckets[skipped:]
            words = f"{found.methods[name].words()}, {skipped} of {len(found.buckets)} step ranges dense"
            ratio, error = found.uniform_ratio(name, sparse), found.uniform_error(name, sparse)
            rungs.append(Rung(words, "single", found.uniform(name, sparse), budget, ratio, error))
    return sorted(rungs, key=lambda r: r.predicted or 0.0)


def spent(rung: Rung, found: Found, before: Preflight) -> float:
    """Share of the attention work of dense, counted over the run's steps."""
    total, levels = 0.0, before.levels[:-1]
    for level in levels:
        for site in before.sites:
            for head in range(site.heads):
                name = rung.recipe.method_at(
                    site.layer, head, component=site.component, kind="self", branch="cond", sigma=level, progress=None
                )
                total += 1.0 if name == "dense" else visited(rung.recipe, name, found, before)
    return total / (len(levels) * sum(s.heads for s in before.sites))


def visited(recipe: Recipe, name: str, found: Found, before: Preflight) -> float:
    """Share of pairs a method visits: as counted, or by its plan where it is no candidate (published settings)."""
    known = found.times.methods.get(name)
    return recipe.methods[name].plan(Layout.of(Canvas(before.shape))).visited if known is None else known.visited


def rungs(searched: Searched, budget: float) -> list[tuple[str, Rung]]:
    """(kind, rung): allocations first, then what competes with them, the most promising by prediction first."""
    found, before = searched.found, searched.before
    made = [(kind, allocated(f, budget)) for kind, f in searched.kinds.items()]
    made.append((RELATIVE, allocated(found, budget, "output")))
    out = [(kind, replace(r, name=f"{r.name} ({kind})")) for kind, r in made if r is not None]
    presets = published(found, before.shape, before.levels)
    out += [("plain", r) for r in presets if spent(r, found, before) <= budget]
    return out + [("plain", r) for r in plain_rungs(found, budget)]


def write_recipes(searched: Searched, budgets: Sequence[float], path: Path) -> None:
    """All recipes with what was predicted of them, in the order they are to be judged."""
    listed = {budget: rungs(searched, budget) for budget in budgets}
    dear = published(searched.found, searched.before.shape, searched.before.levels)
    dear = [r for r in dear if spent(r, searched.found, searched.before) > max(budgets)]
    listed[max(budgets)] += [("published, above the budget", r) for r in dear]
    out: list[dict[str, object]] = []
    for place in range(max(map(len, listed.values()))):
        for budget, own in listed.items():
            if place < len(own):
                kind, rung = own[place]
                one: dict[str, object] = {"budget": budget, "kind": kind, "name": rung.name}
                one["visited"] = round(spent(rung, searched.found, searched.before), 4)
                one["predicted"] = rung.predicted if kind in ("residual", "plain") else None
                out.append({**one, "recipe": json.loads(rung.recipe.dumps())})
    bands = {kind: found.weights.band for kind, found in searched.kinds.items() if found.weights.runs}
    write_atomic(path, json.dumps({"bands": bands, "recipes": out}, indent=0, sort_keys=True) + "\n")


def main() -> None:
    """Parse the command line and do one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["search", "judge", "compare"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--first", type=int, default=PROBES + WEIGHTS, help="of the samples judged; 20 to decide by")
    parser.add_argument("--only", nargs="+", help="kinds of recipes to judge")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--size", type=int, nargs=3, default=(16, 64, 64), help="frames, height, width")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--recipes", type=Path, default=ROOT / "results" / "advise_recipes.json")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "advise_evidence.csv")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    if options.part != "search" and options.out.is_file():
        with options.out.open(newline="") as file:
            rows.extend(dict(row) for row in csv.DictReader(file))
    tail = {"torch": torch.__version__, "python": platform.python_version()}
    tail["device"] = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor()

    def emit(more: list[Row]) -> None:
        rows.extend({**dict.fromkeys(COLUMNS, ""), **row, **tail} for row in more)
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(options.out, table.getvalue())
        for row in more:
            if row["row"] not in ("seed", "probe sample"):
                print({k: v for k, v in row.items() if v != ""}, flush=True)

    if options.part == "compare":
        rows[:] = [row for row in rows if row["row"] not in ("advised", "error ratio", "correlation")]
        tail["device"] = str(rows[0]["device"])
        compare(rows, emit)
        return
    model = load_demo(options.device)
    size = (4, 32, 32) if options.tiny else options.size
    objective = Latents(SampleSpec(steps=4 if options.tiny else options.steps), *size)
    seeds = 2 if options.tiny else options.seeds
    samples = demo_workload(options.first + seeds, fields=model.config.fields).samples
    with torch.no_grad():
        if options.part == "search":
            searched = search(Batch(model, objective, samples[: PROBES + WEIGHTS]), budgets=options.budgets)
            write_recipes(searched, options.budgets, options.recipes)
        else:
            batch = Batch(model, objective, [*samples[:PROBES], *samples[options.first :]])
            made = json.loads(options.recipes.read_text())
            if options.only:
                made["recipes"] = [r for r in made["recipes"] if r["kind"] in options.only]
            judge(batch, made, rows, emit)
        said(options.part)


def judge(batch: Batch, made: dict, rows: list[Row], emit: Callable[[list[Row]], None]) -> None:
    """Every recipe on every sample; rows are handed to `emit` as they come."""
    floors, ceilings = batch.of(batch.other()), batch.ceilings()
    ends = fmean(floors[PROBES:]), fmean(ceilings[PROBES:])
    if not any(row["row"] == "anchors" for row in rows):
        name = "90 % band of left-out step weights, a factor, "
        emit([{"row": "prediction", "name": name + n, "error": f"{band:.3f}"} for n, band in made["bands"].items()])
        kinds = zip(("floor", "ceiling"), ends, strict=True)
        emit([{"row": "anchors", "kind": k, "error": f"{v:.3g}", "pairs": len(floors) - PROBES} for k, v in kinds])
    known = {(str(r["budget"]), r["kind"], r["name"]) for r in rows if r["row"] == "recipe"}
    for one in made["recipes"]:
        if (str(one["budget"]), one["kind"], one["name"]) in known:
            continue
        recipe = Recipe.loads(json.dumps(one["recipe"]))
        errors = batch.of(recipe, batch.begins(recipe))
        head: Row = {n: one[n] for n in ("budget", "kind", "name", "visited")}
        new: list[Row] = []
        for number, (s, value, *anchors) in enumerate(zip(batch.samples, errors, floors, ceilings, strict=True)):
            row = {"row": "probe sample" if number < PROBES else "seed", **head, "seed": s.seed}
            new.append({**row, "error": f"{value:.5f}", "drift": f"{drift(value, *anchors):.5f}"})
        mean = paired(errors[PROBES:])
        row = {"row": "recipe", **head, "error": f"{mean.mean:.5f}", "low": f"{mean.low:.5f}"}
        row |= {"high": f"{mean.high:.5f}", "pairs": mean.n, "drift": f"{drift(mean.mean, *ends):.5f}"}
        if one["predicted"] is not None:
            row["predicted_error"] = f"{one['predicted']:.5f}"
            row["predicted_drift"] = f"{drift(one['predicted'], *ends):.5f}"
        emit([*new, row])


def compare(rows: Sequence[Row], emit: Callable[[list[Row]], None]) -> None:
    """Paired ratios of errors over the allocation and over what the probe samples advise, at every budget."""
    out: list[Row] = []
    for budget in dict.fromkeys(str(r["budget"]) for r in rows if r["row"] == "recipe"):
        known: dict[str, dict[str, tuple[list[float], list[float]]]] = {}  # kind -> name -> errors of probes, seeds
        for r in rows:
            if str(r["budget"]) == budget and r["row"] in ("seed", "probe sample"):
                own = known.setdefault(str(r["kind"]), {}).setdefault(str(r["name"]), ([], []))
                own[r["row"] == "seed"].append(float(str(r["error"])))
        ours = next(iter(known["residual"].items()))
        others = [*known[RELATIVE].items(), *known["plain"].items()]
        advised = min([ours, *others], key=lambda one: fmean(one[1][0]))
        mean = paired(advised[1][1])
        row: Row = {"row": "advised", "budget": budget, "name": advised[0], "error": f"{mean.mean:.5f}"}
        out.append({**row, "low": f"{mean.low:.5f}", "high": f"{mean.high:.5f}", "pairs": mean.n})
        for words, chosen in (("the allocation", ours), ("what is advised", advised)):
            for kind in [kind for kind in known if kind != "residual"]:
                rival = min(known[kind].items(), key=lambda one: fmean(one[1][1]))
                if rival[1] is chosen[1]:
                    continue
                ratio = log_ratio(rival[1][1], chosen[1][1])
                verdict: Row = {"row": "error ratio", "budget": budget, "kind": kind}
                verdict["name"] = f"{rival[0]} over {words}" + f" ({len(known[kind])} of its kind)"
                verdict |= {"error": f"{ratio.mean:.4f}", "low": f"{ratio.low:.4f}", "high": f"{ratio.high:.4f}"}
                out.append({**verdict, "pairs": ratio.n})
    pairs = [(float(str(r["predicted_error"])), float(str(r["error"]))) for r in rows if r["predicted_error"]]
    logs = torch.tensor(pairs, dtype=torch.float64).log().T
    found = float(torch.corrcoef(logs)[0, 1])
    words = "of the logarithms of predicted and measured errors, all recipes"
    out.append({"row": "correlation", "name": words, "error": f"{found:.3f}", "pairs": len(pairs)})
    emit(out)


if __name__ == "__main__":
    main()
