"""Below the fold of the advice page: cells, pattern pictures, pairs, losing candidates, kernel times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glocal.cli._advice_chosen import chosen_rules, is_chosen, layout, range_words
from glocal.report import Column, KernelTime, Pair, Picture, Table, matrix_png

if TYPE_CHECKING:
    from glocal.advise.advice import Advice


def sites(advice: Advice) -> Table | None:
    recipe = chosen_rules(advice)
    if recipe is None or advice.weights is None:
        return None
    by_cell: dict[tuple[str, int, int, str], list[Any]] = {}
    for r in advice.records:
        by_cell.setdefault((f"{r.component}.{r.site}", r.head, r.bucket, r.method), []).append(r)
    rows_out, total = [], 0.0
    for bucket in advice.weights.buckets:
        for site in advice.preflight.sites:
            for head in range(site.heads):
                name = recipe.method_in(site, head, bucket)
                found = by_cell.get((f"{site.component}.{site.name}", head, bucket.number, name))
                share = 0.0 if found is None else _share(advice, bucket.number, found[0]) ** 2
                total += share
                rows_out.append((site.layer, head, range_words(bucket), name, found, share))
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


def _share(advice: Advice, bucket: int, record: Any) -> float:
    """What one head's error adds to the predicted one, before squares are summed."""
    assert advice.weights is not None
    layer = advice.layers.get((record.component, record.kind, record.layer, bucket), 1.0)
    return advice.weights.weight[bucket] * record.residual * layer


def pictures(advice: Advice) -> tuple[Picture, ...]:
    recipe = chosen_rules(advice)
    if recipe is None:
        return ()
    place, out = layout(advice), []
    for method in recipe.methods.values():
        pattern = method.pattern(place)
        if pattern is None or method.kind == "route":
            continue
        plan = method.plan(place)
        matrix = plan.block_shares().numpy()
        out.append(
            Picture(
                f"{method.words()}: {plan.kept:.0%} of pairs kept, {plan.visited:.0%} visited",
                matrix_png(matrix, palette="ink", low=0.0, high=1.0, max_side=384),
                f"Block map of {method.words()}: query blocks down, key blocks across, darker is more visible.",
            )
        )
    return tuple(out)


def pairs(advice: Advice) -> tuple[Pair, ...]:
    if advice.validation is None:
        return ()
    return tuple(
        Pair(p.sample, p.dense.whole, p.sparse.whole, p.error, p.drift, p.floor, p.ceiling, dict(p.measures))
        for p in advice.validation.pairs
    )


def ladder(advice: Advice) -> Table | None:
    from glocal.advise.ladder import rivals

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
            "yes" if is_chosen(advice, r) else "",
        )
        for r in advice.ladder
    )
    count = advice.ladder[0].samples
    words = "the probe sample, one run" if count == 1 else f"{count} probe samples, means over one run"
    told = [f"Measured on {words} each."]
    if advice.confirmed is not None:
        most, real = advice.confirmed.ratio("forecast"), advice.confirmed.ratio()
        told.append(f"Attention of the chosen recipe, call by call: forecast {most:.0%} of dense, timed {real:.0%}.")
    return Table(columns, table, " ".join([*told, *rivals(advice.ladder)]))


def kernels(advice: Advice) -> tuple[KernelTime, ...]:
    timed = [("dense", advice.times.dense)] + [
        (advice.methods[n].words(), t) for n, t in sorted(advice.times.methods.items(), key=lambda i: i[1].median)
    ]
    return tuple(
        KernelTime(
            f"{t.kernel}",
            f"{name}, kept {t.kept:.0%}, visited {t.visited:.0%}{'' if t.rounds else ', forecast'}",
            t.median * 1e3,
            t.low * 1e3,
            t.high * 1e3,
            t.rounds,
        )
        for name, t in timed
    )
