"""Sentences of the advice page: what stays dense and why, what it holds for, what would refute it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from glocal.cli._advice_chosen import range_words

if TYPE_CHECKING:
    from glocal.advise.advice import Advice


def statement(n: int) -> str | None:
    from glocal.measure.stats import exceedance_statement

    return exceedance_statement(n) if n else None


def notice(advice: Advice) -> str | None:
    if advice.effort.name == "demonstration":
        n = 0 if advice.validation is None else len(advice.validation.pairs)
        return f"Demonstration on the built-in model, n = {n}: a proof needs at least 8 pairs."
    return None


def left_dense(advice: Advice) -> tuple[str, ...]:
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
                if recipe.method_in(site, head, bucket) == "dense":
                    dense += 1
                    by_bucket[range_words(bucket)] = by_bucket.get(range_words(bucket), 0) + 1
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


def valid_for(advice: Advice, facts: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    levels = advice.weights.buckets if advice.weights else ()
    shapes = [c["shape"] for c in advice.recipe.workload.get("canvases", [])] or [list(advice.preflight.shape)]
    words = ", ".join("x".join(map(str, shape)) for shape in shapes)
    hashes = [c["weights_sha256"][:12] for c in advice.recipe.host.get("components", []) if "weights_sha256" in c]
    out = [
        ("canvas" if len(shapes) == 1 else "canvases", f"{words} ({advice.preflight.tokens:,} tokens probed)"),
        ("steps", str(sum(b.steps for b in levels)) if levels else "-"),
        ("weights", ", ".join(hashes) if hashes else "-"),
        ("device", facts.get("device", "-")),
    ]
    return tuple(out)


def refuted_by(advice: Advice) -> tuple[str, ...]:
    limit = advice.target.limits.get("drift", 0.10)
    return (
        f"A new sample of this workload with drift above {2 * limit:.2f}.",
        "The same pairs run again with a lower bound of the speed-up under the target.",
        "Another dense kernel on this device that is faster than the baseline named above.",
    )
