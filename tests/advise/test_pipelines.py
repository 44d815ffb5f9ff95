"""Tiny real models of every host: advice, its recipe in a fresh process, what it ran there, and its undo."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glocal.advise import (
    AdviseOptions,
    Effort,
    MethodSpec,
    Recipe,
    RecipeError,
    Sample,
    Target,
    Workload,
    advise,
    attach,
    candidates,
    climb,
    inside,
    run,
)

from .fresh import DECODERS, PIPELINES, built, sample
from .test_run import times_by_pairs

REASON = "is not installed: pip install 'glocal[diffusers,transformers]'"
pytest.importorskip("diffusers", reason=f"diffusers {REASON}")
pytest.importorskip("transformers", reason=f"transformers, without which diffusers has no pipelines, {REASON}")

EFFORT = Effort("tiny", 2, 8, 1, (0.7,), pairs=2, rounds=1, steps_a_bucket=1, published=1, rungs=1)
SHAPES = {"wan": (3, 2, 3), "hunyuan": (3, 4, 6), "flux": (8, 12), "cogvideox": (3, 2, 3)}
TILES = {"wan": (1, 2, 3), "hunyuan": (1, 2, 3), "flux": (2, 3), "cogvideox": (1, 2, 3)}
ROOT = Path(__file__).resolve().parents[2]


def methods_of(name: str) -> tuple[MethodSpec, ...]:
    if name in PIPELINES:
        return tuple(candidates(SHAPES[name], tile_shape=TILES[name])[:4])
    windows = [{"window": {"fraction": f}, "sinks": 16} for f in (0.25, 0.5)]
    return tuple(MethodSpec("causal_window", window, block=(32, 32)) for window in windows)


def accepted(runs: Any, target: Any) -> Any:
    """The pairs as they are, and a verdict that does not hang on the time of so small a model."""
    found = VERDICT(runs, target)
    return replace(found, verdict=replace(found.verdict, accepted=True, failures=()))


VERDICT = climb.verdict_over


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PIPELINES, *DECODERS])
def test_advice_and_its_recipe_in_a_fresh_process(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "times_of", times_by_pairs)
    monkeypatch.setattr("glocal.advise.climb.refined", lambda times, found: times)
    monkeypatch.setattr(run, "_refusal", lambda *args: None)
    monkeypatch.setattr(climb, "winners", lambda measured, anchors, target: (list(measured), ""))
    monkeypatch.setattr(climb, "verdict_over", accepted)
    # At this size the text refiner weighs as much as the blocks.
    monkeypatch.setattr(importlib.import_module("glocal.advise.preflight"), "MOST_UNKNOWN", 1.0)
    model, objective = built(name)
    workload = Workload(tuple(sample(name, n) for n in range(4)))
    objective.check(model, workload)
    options = AdviseOptions(candidates=methods_of(name), min_tokens=8)
    effort = EFFORT if name in PIPELINES else replace(EFFORT, buckets=1, published=0)
    found = advise(
        model, workload, objective=objective, target=Target(limits={"drift": 1e6}), effort=effort, options=options
    )
    assert found.status == "candidate" and found.validation is not None and found.validation.pairs[0].error > 0
    assert found.recipe.rules and {r.kind for r in found.ladder} >= {"allocation", "single"}
    if name in PIPELINES:
        _check_pipeline(name, found)
    found.recipe.save(tmp_path / "recipe.json")
    with torch.no_grad(), attach(model, tmp_path / "recipe.json"):
        here = objective.run(model, workload.samples[0]).tensor
    subprocess.run(
        [sys.executable, "-m", "tests.advise.fresh", name, str(tmp_path)],
        cwd=ROOT,
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    fresh = torch.load(tmp_path / "found.pt", weights_only=True)
    assert torch.equal(fresh["before"], fresh["after"])
    assert not torch.equal(fresh["before"], fresh["during"])
    torch.testing.assert_close(fresh["during"], here, rtol=1e-4, atol=1e-4)
    assert sum(calls for calls, _ in fresh["stats"].values()) > 0
    assert any(0 < kept < 1 for calls, kept in fresh["stats"].values() if calls)


def _check_pipeline(name: str, found: Any) -> None:
    kind = "self" if name == "wan" else "joint"
    assert found.preflight.shape == SHAPES[name] and len(found.preflight.levels) == 5
    assert {r.site for r in found.recipe.rules} == {kind}
    assert {r.component for r in found.records} == {"transformer", *(["transformer_2"] if name == "wan" else [])}
    canvas = found.recipe.workload["canvases"][0]
    assert canvas["shape"] == list(SHAPES[name]) and (canvas["before"] + canvas["after"] > 0) == (kind == "joint")


def test_other_weights_are_refused_and_named(tmp_path: Path) -> None:
    from glocal.advise.identity import host_record

    pipe, _ = built("flux")
    recipe = Recipe("dense", host=host_record(pipe, (1.0, 0.0), None))
    recipe.save(tmp_path / "recipe.json")
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(1)
    with pytest.raises(RecipeError, match=r"host.components\[transformer\].weights_sha256: the recipe was proven on"):
        attach(pipe, tmp_path / "recipe.json")


def test_an_argument_the_pipeline_does_not_take_is_named() -> None:
    _, objective = built("flux")
    with pytest.raises(ValueError, match="sample 'a': FluxPipeline takes no 'promt'; legal: .*prompt"):
        objective.check(None, Workload((Sample("a", 0, {"promt": "x"}),)))
    with pytest.raises(ValueError, match="start=1: FluxPipeline begins at its first step; legal: 0"):
        objective.run(None, Sample("a", 0, {}), start=1)
