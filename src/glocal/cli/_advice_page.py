"""From an `Advice` to the plain records of the advice page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from glocal.cli._advice_chosen import chosen_rules, kept_share, mean, range_words
from glocal.cli._advice_rows import rows
from glocal.cli._advice_tables import kernels, ladder, pairs, pictures, sites
from glocal.cli._advice_words import left_dense, notice, refuted_by, statement, valid_for
from glocal.report import (
    AdvicePage,
    BandPoint,
    Baseline,
    Curve,
    CurvePoint,
    Estimate,
    Forecast,
    ForecastPoint,
    Headline,
    KeptMap,
    Strip,
    TimeBar,
    sprite_sheet,
)

if TYPE_CHECKING:
    from glocal.advise.advice import Advice
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
        notice=notice(advice),
        reproduce=reproduce,
        recipe_json=advice.recipe.dumps(),
        curve=_curve(advice),
        strips=_strips(advice),
        kept=_kept(advice),
        times=_bars(advice),
        forecast=_forecast(advice),
        left_dense=left_dense(advice),
        valid_for=valid_for(advice, facts),
        refuted_by=refuted_by(advice),
        sites=sites(advice),
        pictures=pictures(advice),
        pairs=pairs(advice),
        ladder=ladder(advice),
        kernels=kernels(advice),
        versions=dict(facts),
        hashes={"recipe": advice.recipe.id},
        rows=tuple(rows(advice)),
    )


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
        statement=statement(n),
    )


def _curve(advice: Advice) -> Curve | None:
    if advice.anchors is None:
        return None
    floor, ceiling = advice.anchors
    if advice.validation is not None:
        floor = mean([p.floor for p in advice.validation.pairs])
        ceiling = mean([p.ceiling for p in advice.validation.pairs])
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
            CurvePoint("dense", "dense", Estimate(mean([p.dense.whole for p in pairs])), Estimate(max(floor, 1e-6)))
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
        ceiling_name=CEILINGS.get(advice.recipe.objective.get("name", ""), "another seed"),
    )


CEILINGS = {"next_token": "first and last tokens alone", "segmentation": "attention that knows no place"}
"""What the ceiling of an objective is, where it is no other seed."""


def _error_name(measures: Sequence[str]) -> str:
    """The main measure in words."""
    known = {"relative_l2": "relative error of the result", "root_kl": "root of the mean KL"}
    return next((known.get(name, name) for name in measures), "error")


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


def _kept(advice: Advice) -> KeptMap | None:
    recipe = chosen_rules(advice)
    if recipe is None or advice.weights is None:
        return None
    buckets, sites = advice.weights.buckets, advice.preflight.sites
    several = len({s.component for s in sites}) > 1
    values = []
    for site in sites:
        row: list[float | None] = []
        for bucket in buckets:
            used = [recipe.method_in(site, head, bucket) for head in range(site.heads)]
            shares = [1.0 if name == "dense" else kept_share(advice, recipe, name) for name in used]
            row.append(mean(shares) if set(used) != {"dense"} else None)
        values.append(tuple(row))
    rows = tuple(f"{s.component} {s.layer}" if several else str(s.layer) for s in sites)
    return KeptMap(rows, tuple(range_words(b) for b in buckets), tuple(values))


def _bars(advice: Advice) -> tuple[TimeBar, ...]:
    found = advice.validation
    if found is None:
        before = advice.preflight
        return (TimeBar("dense", (("attention", before.attention), ("rest", before.forward - before.attention))),)
    out = []
    for name, runs in (("dense", [p.dense for p in found.pairs]), ("sparse", [p.sparse for p in found.pairs])):
        attention, whole = mean([r.attention for r in runs]), mean([r.whole for r in runs])
        out.append(TimeBar(name, (("attention", attention), ("rest", max(whole - attention, 0.0)))))
    return tuple(out)


def _forecast(advice: Advice) -> Forecast | None:
    if not advice.ladder:
        return None
    model = advice.times.model
    time = [ForecastPoint(c.name, c.forecast, c.measured) for c in advice.times.checks]
    if model is not None and not time:
        for name, t in advice.times.methods.items():
            if advice.methods[name].kind == "pattern":
                predicted = model.seconds(t.full, t.partial, t.uneven)
                time.append(ForecastPoint(advice.methods[name].words(), predicted, t.median))
    if advice.confirmed is not None:
        time += [ForecastPoint(c.words, c.forecast, c.measured) for c in advice.confirmed.calls]
    ranks = advice.weights is None or advice.weights.band > 2
    error = []
    if not ranks:
        error = [ForecastPoint(r.name, r.predicted, r.error) for r in advice.ladder if r.error and r.predicted]
    note = None
    if advice.weights is not None and math.isinf(advice.weights.band):
        note = "One budget gave the step weights, so no prediction could be left out: predictions only rank recipes."
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
