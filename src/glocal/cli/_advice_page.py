"""From an `Advice` to the plain records of the advice page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from glocal.report import (
    AdvicePage,
    BandPoint,
    Baseline,
    Column,
    Curve,
    CurvePoint,
    Estimate,
    Forecast,
    ForecastPoint,
    Headline,
    KeptMap,
    KernelTime,
    Pair,
    Picture,
    Strip,
    Table,
    TimeBar,
    matrix_png,
    sprite_sheet,
)

if TYPE_CHECKING:
    from glocal.adapt.records import Site
    from glocal.advise.recipe import Recipe
    from glocal.advise.run import Advice
    from glocal.advise.weights import Bucket
    from glocal.canvas import Layout
    from glocal.measure.stats import Interval


def advice_page(
    advice: Advice, *, model: str, workload: str, created: str, reproduce: str, facts: Mapping[str, str]
) -> AdvicePage:
    """The page of one advice. facts: versions of what ran."""
    return AdvicePage(
        model=model,
        workload=workload,
        created=created,
        headline=_headline(advice, facts),
        notice=_notice(advice),
        reproduce=reproduce,
        recipe_json=advice.recipe.dumps(),
        curve=_curve(advice),
        strips=_strips(advice),
        kept=_kept(advice),
        times=_bars(advice),
        forecast=_forecast(advice),
        left_dense=_left_dense(advice),
        valid_for=_valid_for(advice, facts),
        refuted_by=_refuted_by(advice),
        sites=_sites(advice),
        pictures=_pictures(advice),
        pairs=_pairs(advice),
        ladder=_ladder(advice),
        kernels=_kernels(advice),
        versions=dict(facts),
        hashes={"recipe": advice.recipe.id},
        rows=tuple(rows(advice)),
    )


def rows(advice: Advice) -> list[dict[str, Any]]:
    """Every measured row as plain values: the lines of `evidence.jsonl`."""
    out: list[dict[str, Any]] = []
    out += [{**asdict(r), "kind": "probe", "site_kind": r.kind} for r in advice.records]
    out += [{"kind": "time", **asdict(t)} for t in (advice.times.dense, *advice.times.methods.values())]
    if advice.weights is not None:
        out += [{"kind": "step weight", **asdict(r)} for r in advice.weights.runs]
    for rung in advice.ladder:
        out.append(
            {
                "kind": "rung",
                "name": rung.name,
                "family": rung.kind,
                "recipe": rung.recipe.id,
                "attention_ratio": rung.attention_ratio,
                "predicted": rung.predicted,
                "error": rung.error,
                "seconds": rung.seconds,
                "dense_seconds": rung.dense_seconds,
            }
        )
    if advice.validation is not None:
        out += [{"kind": "pair", **asdict(p), "drift": p.drift} for p in advice.validation.pairs]
    for attempt in advice.rejected:
        for pair in attempt.validation.pairs:
            row = {"kind": "rejected pair", "rung": attempt.rung.name, **asdict(pair), "drift": pair.drift}
            out.append(row)
    out += [{"kind": "less memory", **asdict(s)} for s in advice.shrunk]
    out += [{"kind": "dropped", "name": name, "why": why} for name, why in advice.dropped.items()]
    out += [{"kind": "stage", "name": name, "seconds": seconds} for name, seconds in advice.stages.items()]
    return out


def _estimate(interval: Interval | None) -> Estimate | None:
    return None if interval is None else Estimate(interval.mean, interval.low, interval.high, interval.level)


def _headline(advice: Advice, facts: Mapping[str, str]) -> Headline:
    found = advice.validation
    n = 0 if found is None else len(found.pairs)
    status = advice.status
    if status == "candidate" and advice.effort.name == "demonstration":
        status = "demonstration"
    worst = None if found is None else found.pairs[found.verdict.worst_index]
    return Headline(
        status=status,  # type: ignore[arg-type]
        n=n,
        reason=advice.reason,
        end_to_end=None if found is None else _estimate(found.verdict.speedup),
        step=None if found is None else _estimate(found.step),
        operator=None if found is None else _estimate(found.operator),
        drift=None if found is None else _estimate(found.verdict.drift),
        worst=None if worst is None else worst.drift,
        worst_sample=None if worst is None else worst.sample,
        limit=advice.target.limits.get("drift", 0.10),
        target=advice.target.speedup,
        baseline=Baseline(advice.times.dense.kernel, advice.times.dense.median * 1e3, "one dense attention call"),
        device=facts.get("device"),
        statement=_statement(n),
    )


def _statement(n: int) -> str | None:
    from glocal.measure.stats import exceedance_statement

    return exceedance_statement(n) if n else None


def _notice(advice: Advice) -> str | None:
    if advice.effort.name == "demonstration":
        n = 0 if advice.validation is None else len(advice.validation.pairs)
        return f"Demonstration on the built-in model, n = {n}: a proof needs at least 8 pairs."
    return None


def _curve(advice: Advice) -> Curve | None:
    if advice.anchors is None:
        return None
    floor, ceiling = advice.anchors
    if advice.validation is not None:
        floor = _mean([p.floor for p in advice.validation.pairs])
        ceiling = _mean([p.ceiling for p in advice.validation.pairs])
    points = []
    for rung in advice.ladder:
        if rung.error is None or rung.seconds is None:
            continue
        points.append(CurvePoint(rung.name, rung.kind, Estimate(rung.seconds), Estimate(rung.error), 1))
    if advice.validation is not None:
        from glocal.measure.stats import paired

        pairs = advice.validation.pairs
        points.append(
            CurvePoint(
                "this recipe, unseen pairs",
                "chosen",
                _estimate(paired([p.sparse.whole for p in pairs])) or Estimate(0.0),
                _estimate(paired([p.error for p in pairs])) or Estimate(0.0),
                len(pairs),
            )
        )
        points.append(
            CurvePoint("dense", "dense", Estimate(_mean([p.dense.whole for p in pairs])), Estimate(max(floor, 1e-6)))
        )
    if not points:  # refused before anything was tried
        return None
    band: tuple[BandPoint, ...] = ()
    if advice.weights is not None and advice.weights.band <= 2:
        factor = advice.weights.band
        mine = [(r.seconds, r.predicted) for r in advice.ladder if r.kind == "allocation"]
        known = sorted((seconds, middle) for seconds, middle in mine if seconds and middle)
        band = tuple(BandPoint(seconds, middle / factor, middle, middle * factor) for seconds, middle in known)
    limit = advice.target.limits.get("drift", 0.10)
    return Curve(
        tuple(points),
        floor=max(floor, 1e-7),
        ceiling=ceiling,
        limit=floor + limit * (ceiling - floor),
        band=band if len(band) > 1 else (),
        error_name=_error_name(advice.preflight.measures),
    )


def _error_name(measures: Sequence[str]) -> str:
    """The main measure in words."""
    known = {"relative_l2": "relative error of the result", "root_kl": "root of the mean KL"}
    return next((known.get(name, name) for name in measures), "error")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _strips(advice: Advice) -> tuple[Strip, ...]:
    found = advice.validation
    if found is None or any(o[0].frames is None for o in found.outputs.values()):
        return ()
    ranked = sorted(found.pairs, key=lambda p: p.drift)
    roles = [("worst", ranked[-1]), ("median", ranked[len(ranked) // 2]), ("best", ranked[0])]
    strips = []
    for role, pair in roles:
        dense, sparse, _ = found.outputs[pair.sample]
        caption = f"drift {pair.drift:.3f}, error {pair.error:.3f}"
        if "psnr" in pair.measures:
            caption += f", PSNR {pair.measures['psnr']:.1f} dB"
        strips.append(_strip(role, pair.sample, dense.frames, sparse.frames, caption, ("dense", "sparse")))
    worst = ranked[-1]
    dense, _, other = found.outputs[worst.sample]
    caption = f"error {worst.floor:.2g}: what changing the dense kernel does"
    strips.append(_strip("floor pair", worst.sample, dense.frames, other.frames, caption, ("dense", "other kernel")))
    return tuple(strips)


def _strip(role: str, sample: str, a: Any, b: Any, caption: str, labels: tuple[str, str]) -> Strip:
    """a, b: frames [T, C, H, W] in [0, 1]."""
    frames = [list((side * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()) for side in (a, b)]
    height, width = a.shape[2], a.shape[3]
    sheets = [sprite_sheet(side) for side in frames]
    return Strip(role, sample, len(frames[0]), sheets[0], sheets[1], width, height, caption, labels=labels)


def _chosen_rules(advice: Advice) -> Recipe | None:
    """The recipe that was validated, also where it was rejected."""
    if advice.recipe.rules:
        return advice.recipe
    return None if advice.chosen is None else advice.chosen.recipe


def _kept(advice: Advice) -> KeptMap | None:
    recipe = _chosen_rules(advice)
    if recipe is None or advice.weights is None:
        return None
    buckets, sites = advice.weights.buckets, advice.preflight.sites
    several = len({s.component for s in sites}) > 1
    values = []
    for site in sites:
        row: list[float | None] = []
        for bucket in buckets:
            used = [_method_of(recipe, site, head, bucket) for head in range(site.heads)]
            shares = [1.0 if name == "dense" else _kept_share(advice, recipe, name) for name in used]
            row.append(_mean(shares) if set(used) != {"dense"} else None)
        values.append(tuple(row))
    rows = tuple(f"{s.component} {s.layer}" if several else str(s.layer) for s in sites)
    return KeptMap(rows, tuple(_range(b) for b in buckets), tuple(values))


def _method_of(recipe: Recipe, site: Site, head: int, bucket: Bucket) -> str:
    """What one head runs in a step range."""
    return recipe.method_at(
        site.layer,
        head,
        component=site.component,
        kind=site.kind,
        branch="cond",
        sigma=bucket.high if bucket.coordinate == "sigma" else None,
        progress=None,
        tokens=1,
    )


def _range(bucket: Bucket) -> str:
    return f"{bucket.high:.2f}–{bucket.low:.2f}" if bucket.coordinate == "sigma" else "whole run"


def _kept_share(advice: Advice, recipe: Recipe, name: str) -> float:
    """Share of pairs a method keeps on this canvas; published settings were not timed one by one."""
    if name in advice.times.methods:
        return advice.times.methods[name].kept
    return recipe.methods[name].plan(_layout(advice)).kept


def _layout(advice: Advice) -> Layout:
    """The canvas of the probe sample, with its other tokens."""
    from glocal.canvas import Canvas, Layout

    place = advice.preflight.place
    before, after = (0, 0) if place is None else (place.before, place.after)
    return Layout.of(Canvas(advice.preflight.shape, before=before, after=after))


def _bars(advice: Advice) -> tuple[TimeBar, ...]:
    found = advice.validation
    if found is None:
        before = advice.preflight
        return (TimeBar("dense", (("attention", before.attention), ("rest", before.forward - before.attention))),)
    out = []
    for name, runs in (("dense", [p.dense for p in found.pairs]), ("sparse", [p.sparse for p in found.pairs])):
        attention, whole = _mean([r.attention for r in runs]), _mean([r.whole for r in runs])
        out.append(TimeBar(name, (("attention", attention), ("rest", max(whole - attention, 0.0)))))
    return tuple(out)


def _forecast(advice: Advice) -> Forecast | None:
    if not advice.ladder:
        return None
    model, time = advice.times.model, []
    if model is not None:
        for name, t in advice.times.methods.items():
            if advice.methods[name].kind == "pattern":
                predicted = model.seconds(t.full, t.partial)
                time.append(ForecastPoint(advice.methods[name].words(), predicted, t.median))
    ranks = advice.weights is None or advice.weights.band > 2
    error = []
    if not ranks:
        error = [ForecastPoint(r.name, r.predicted, r.error) for r in advice.ladder if r.error and r.predicted]
    note = None
    if advice.weights is not None and math.isinf(advice.weights.band):
        note = "One method gave the step weights, so no prediction could be left out: predictions only rank recipes."
    elif advice.weights is not None and ranks:
        note = (
            f"The 90 % band of left-out predictions is a factor of {advice.weights.band:.1f}, wider than 2: "
            "predictions rank recipes, and no predicted error is shown."
        )
    return Forecast(
        tuple(time),
        tuple(error),
        None if model is None else model.check_error,
        None if advice.weights is None or ranks else advice.weights.band,
        note,
    )


def _left_dense(advice: Advice) -> tuple[str, ...]:
    dropped = [f"Dropped: {_name(advice, name)}: {why}" for name, why in advice.dropped.items()]
    return (*_why_dense(advice), *dropped)


def _name(advice: Advice, method: str) -> str:
    return advice.methods[method].words() if method in advice.methods else method


def _why_dense(advice: Advice) -> tuple[str, ...]:
    if advice.status == "dense":
        return (advice.reason, "The recipe says dense everywhere; the curve shows what was tried.")
    recipe = advice.recipe
    if advice.weights is None:
        return ("An existing recipe was proven again; why it leaves parts dense stands on the page it came from.",)
    cells, dense = 0, 0
    by_bucket: dict[str, int] = {}
    for bucket in advice.weights.buckets:
        for site in advice.preflight.sites:
            for head in range(site.heads):
                cells += 1
                if _method_of(recipe, site, head, bucket) == "dense":
                    dense += 1
                    by_bucket[_range(bucket)] = by_bucket.get(_range(bucket), 0) + 1
    lines = [f"{dense} of {cells} (layer, head, step range) cells stay dense: their error outweighs their time."]
    if len(advice.weights.buckets) == 1:
        return tuple(lines)
    if by_bucket:
        most = max(by_bucket, key=lambda k: by_bucket[k])
        lines.append(f"Most of them at noise levels {most}: {by_bucket[most]} cells.")
    step = advice.weights.step
    heavy = max(range(len(step)), key=lambda i: step[i])
    b = advice.weights.buckets[heavy]
    lines.append(
        f"One-step errors weigh most at noise levels {b.high:.2f}–{b.low:.2f} ({step[heavy]:.2f} at the end for 1)."
    )
    return tuple(lines)


def _valid_for(advice: Advice, facts: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    levels = advice.weights.buckets if advice.weights else ()
    shapes = [c["shape"] for c in advice.recipe.workload.get("canvases", [])] or [list(advice.preflight.shape)]
    words = ", ".join("x".join(map(str, shape)) for shape in shapes)
    out = [
        ("canvas" if len(shapes) == 1 else "canvases", f"{words} ({advice.preflight.tokens:,} tokens probed)"),
        ("steps", str(sum(b.steps for b in levels)) if levels else "-"),
        ("adapters", "none"),
        ("device", facts.get("device", "-")),
    ]
    return tuple(out)


def _refuted_by(advice: Advice) -> tuple[str, ...]:
    limit = advice.target.limits.get("drift", 0.10)
    return (
        f"A new sample of this workload with drift above {2 * limit:.2f}.",
        "The same pairs run again with a lower bound of the speed-up under the target.",
        "Another dense kernel on this device that is faster than the baseline named above.",
    )


def _sites(advice: Advice) -> Table | None:
    recipe = _chosen_rules(advice)
    if recipe is None or advice.weights is None:
        return None
    by_cell: dict[tuple[str, int, int, str], list[Any]] = {}
    for r in advice.records:
        by_cell.setdefault((f"{r.component}.{r.site}", r.head, r.bucket, r.method), []).append(r)
    rows_out, total = [], 0.0
    for bucket in advice.weights.buckets:
        for site in advice.preflight.sites:
            for head in range(site.heads):
                name = _method_of(recipe, site, head, bucket)
                found = by_cell.get((f"{site.component}.{site.name}", head, bucket.number, name))
                share = 0.0 if found is None else (advice.weights.weight[bucket.number] * found[0].residual) ** 2
                total += share
                rows_out.append((site.layer, head, _range(bucket), name, found, share))
    columns = (
        Column("layer", digits=0),
        Column("head", digits=0),
        Column("noise level"),
        Column("method"),
        Column("mass kept", percent=True),
        Column("error of the output", percent=True),
        Column("error in the residual stream", percent=True),
        Column("share of predicted error", percent=True),
    )
    table = []
    for layer, head, level, name, found, share in rows_out:
        words = "dense" if name == "dense" else recipe.methods[name].words()
        mass, out, res = (None, None, None) if found is None else (found[0].mass, found[0].output, found[0].residual)
        table.append((layer, head, level, words, mass, out, res, share / total if total and found else None))
    return Table(columns, tuple(table))


def _pictures(advice: Advice) -> tuple[Picture, ...]:
    recipe = _chosen_rules(advice)
    if recipe is None:
        return ()
    layout, out = _layout(advice), []
    for method in recipe.methods.values():
        pattern = method.pattern(layout)
        if pattern is None or method.kind == "route":
            continue
        plan = method.plan(layout)
        matrix = plan.block_shares().numpy()
        out.append(
            Picture(
                f"{method.words()}: {plan.kept:.0%} of pairs kept, {plan.visited:.0%} visited",
                matrix_png(matrix, palette="ink", low=0.0, high=1.0, max_side=384),
                f"Block map of {method.words()}: query blocks down, key blocks across, darker is more visible.",
            )
        )
    return tuple(out)


def _pairs(advice: Advice) -> tuple[Pair, ...]:
    if advice.validation is None:
        return ()
    return tuple(
        Pair(p.sample, p.dense.whole, p.sparse.whole, p.error, p.drift, p.floor, p.ceiling, dict(p.measures))
        for p in advice.validation.pairs
    )


def _ladder(advice: Advice) -> Table | None:
    if not advice.ladder:
        return None
    columns = (
        Column("recipe"),
        Column("kind"),
        Column("attention time, forecast", "of dense", percent=True),
        Column("predicted error"),
        Column("measured error"),
        Column("time", "s"),
        Column("speed-up, end to end", "x"),
        Column("chosen"),
    )
    ranks = advice.weights is None or advice.weights.band > 2
    table = tuple(
        (
            r.name,
            r.kind,
            r.attention_ratio,
            None if ranks else r.predicted,
            r.error,
            r.seconds,
            r.speedup,
            "yes"
            if advice.chosen is not None and r.name == advice.chosen.name and r.budget == advice.chosen.budget
            else "",
        )
        for r in advice.ladder
    )
    count = advice.ladder[0].samples
    words = "the probe sample, one run" if count == 1 else f"{count} probe samples, means over one run"
    return Table(columns, table, f"Measured on {words} each.")


def _kernels(advice: Advice) -> tuple[KernelTime, ...]:
    timed = [("dense", advice.times.dense)] + [
        (advice.methods[n].words(), t) for n, t in sorted(advice.times.methods.items(), key=lambda i: i[1].median)
    ]
    return tuple(
        KernelTime(
            f"{t.kernel}",
            f"{name}, kept {t.kept:.0%}, visited {t.visited:.0%}",
            t.median * 1e3,
            t.low * 1e3,
            t.high * 1e3,
            t.rounds,
        )
        for name, t in timed
    )
