"""Tiny real models of every host: advice, its recipe in a fresh process, its undo there, and an advice that was killed
there and goes on here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glocal.adapt import attach as attach_method
from glocal.adapt.attach import media_sites, sites_of
from glocal.advise import Recipe, RecipeError, Sample, Workload, attach, probe
from glocal.advise.identity import host_record
from glocal.advise.probe import Probe, ProbeSpec

REASON = "is not installed: pip install 'glocal[diffusers,transformers]'"
pytest.importorskip("diffusers", reason=f"diffusers {REASON}")
pytest.importorskip("transformers", reason=f"transformers, without which diffusers has no pipelines, {REASON}")

from .fresh import DECODERS, PIPELINES, SHAPES, advised, built, methods_of, sample, settle  # noqa: E402

HOSTS = [*PIPELINES, *DECODERS]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9 is of POSIX systems")
@pytest.mark.parametrize("name", HOSTS)
def test_advice_and_its_recipe_in_a_fresh_process(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch.setattr)
    model, objective = built(name)
    found = advised(name, model, objective)
    assert found.status == "candidate" and found.validation is not None and found.validation.pairs[0].error > 0
    assert found.recipe.rules and {r.kind for r in found.ladder} >= {"allocation", "single"}
    if name in PIPELINES:
        _check_pipeline(name, found)
    found.recipe.save(tmp_path / "recipe.json")
    with torch.no_grad(), attach(model, tmp_path / "recipe.json"):
        here = objective.run(model, sample(name, 0)).tensor
    done = subprocess.run(
        [sys.executable, "-m", "tests.advise.fresh", name, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    fresh = torch.load(tmp_path / "found.pt", weights_only=True)
    assert torch.equal(fresh["before"], fresh["after"])
    assert not torch.equal(fresh["before"], fresh["during"])
    torch.testing.assert_close(fresh["during"], here, rtol=1e-4, atol=1e-4)
    assert sum(calls for calls, _ in fresh["stats"].values()) > 0
    assert any(0 < kept < 1 for calls, kept in fresh["stats"].values() if calls)
    again = advised(name, model, objective, tmp_path / "state", resume=True)  # killed there, goes on here
    assert again.recipe.id == found.recipe.id


def _check_pipeline(name: str, found: Any) -> None:
    kind = "self" if name == "wan" else "joint"
    assert found.preflight.shape == SHAPES[name] and len(found.preflight.levels) == 5
    assert {r.site for r in found.recipe.rules} == {kind}
    assert {r.component for r in found.records} == {"transformer", *(["transformer_2"] if name == "wan" else [])}
    canvas = found.recipe.workload["canvases"][0]
    assert canvas["shape"] == list(SHAPES[name]) and (canvas["before"] + canvas["after"] > 0) == (kind == "joint")


@pytest.mark.parametrize("name", HOSTS)
def test_out_of_memory_inside_the_probe_halves_and_goes_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every host: one head at a time is all there is memory for, each head has its records, the run is untouched."""
    model, objective = built(name)
    methods = {m.id: m for m in methods_of(name)}

    def probed() -> tuple[Probe, torch.Tensor]:
        found = Probe(ProbeSpec(methods, lambda step: 0, frozenset({0}), blocks=8))
        with torch.no_grad(), attach_method(model, found):
            return found, objective.brief(model, sample(name, 0)).tensor

    whole, before = probed()
    true_sums = probe.partial_sums

    def sums(rows: Any, keys: Any) -> Any:
        if rows.q.shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true_sums(rows, keys)

    monkeypatch.setattr(probe, "partial_sums", sums)
    less, after = probed()
    assert torch.equal(before, after)
    assert less.share is not None and less.share.heads == 1 and less.share.shrunk
    heads = {(s.component, s.name): s.heads for s in media_sites(sites_of(model))}
    seen = {(r.component, r.site) for r in less.records}
    assert seen and {(r.component, r.site, r.head) for r in less.records} == {
        (*place, head) for place in seen for head in range(-1, heads[place])
    }

    def by_place(found: Probe) -> dict[Any, float]:
        return {(r.component, r.site, r.head, r.branch, r.method): r.residual for r in found.records}

    assert by_place(less) == pytest.approx(by_place(whole), rel=1e-3, abs=1e-6)


def test_other_weights_are_refused_and_named(tmp_path: Path) -> None:
    pipe, _ = built("flux")
    Recipe("dense", host=host_record(pipe, (1.0, 0.0), None)).save(tmp_path / "recipe.json")
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
