"""Every measured row of an advice as plain values."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from glocal.cli._advice_chosen import is_chosen

if TYPE_CHECKING:
    from glocal.advise.advice import Advice


def rows(advice: Advice) -> list[dict[str, Any]]:
    """Every measured row as plain values: the lines of `evidence.jsonl`."""
    out: list[dict[str, Any]] = []
    out += [{**asdict(r), "kind": "probe", "site_kind": r.kind} for r in advice.records]
    out += [{"kind": "time", **asdict(t)} for t in (advice.times.dense, *advice.times.methods.values())]
    out.append({"kind": "further method in a call", "seconds": advice.times.split})
    if advice.weights is not None:
        out += [{"kind": "step weight", **asdict(r)} for r in advice.weights.runs]
    for (component, kind, layer, bucket), value in advice.layers.items():
        place = {"component": component, "site_kind": kind, "layer": layer, "bucket": bucket}
        out.append({"kind": "layer gain", **place, "gain": value})
    for rung in advice.ladder:
        out.append(
            {
                "kind": "rung",
                "name": rung.name,
                "family": rung.kind,
                "budget": rung.budget,
                "chosen": is_chosen(advice, rung),
                "recipe": rung.recipe.id,
                "attention_ratio": rung.attention_ratio,
                "predicted": rung.predicted,
                "error": rung.error,
                "seconds": rung.seconds,
                "dense_seconds": rung.dense_seconds,
            }
        )
    if advice.confirmed is not None:
        out += [
            {"kind": "confirmed call", **asdict(c), "dense": advice.confirmed.dense} for c in advice.confirmed.calls
        ]
    out += [{"kind": "time model check", **asdict(c)} for c in advice.times.checks]
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
