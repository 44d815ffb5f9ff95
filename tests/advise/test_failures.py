"""When something breaks: candidates that fail are dropped and named, an abort leaves nothing, kept sites stay dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

from glocal.adapt import open_handles
from glocal.advise import (
    AdviceError,
    AdviseOptions,
    Effort,
    Frames,
    MethodSpec,
    Target,
    Workload,
    advise,
    candidates,
    climb,
    inside,
    run,
    stages,
)
from glocal.advise.timing import MethodTime, Times
from glocal.cli import _advise_job
from glocal.models.generation import VideoDiT

EFFORT = Effort("tiny", 2, 4, 1, (0.9, 0.7), pairs=2, rounds=1, steps_a_bucket=1, published=4)
LISTED = tuple(candidates((4, 8, 8), tile_shape=(2, 4, 4))[:6])
OPTIONS = AdviseOptions(candidates=LISTED, min_tokens=64)
WIDE = Target(limits={"drift": 1e6})


@pytest.fixture(autouse=True)
def half_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method takes half the time of dense and attention is worth it, so that the ladder is always full."""

    def fixed(q, k, v, call, methods, *, rounds, inner=None):
        dense = MethodTime("dense", 1.0, 1.0, 1.0, 1, 0, 0, 1.0, 1.0, "cpu")
        return Times(dense, {n: replace(dense, method=n, median=0.5, kept=0.4, visited=0.4) for n in methods}, None)

    monkeypatch.setattr(inside, "times_of", fixed)
    monkeypatch.setattr("glocal.advise.climb.refined", lambda times, found: times)
    monkeypatch.setattr(run, "_refusal", lambda *args: None)


def sabotage(monkeypatch: pytest.MonkeyPatch, ids: set[str], how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Methods of these ids give what `how` makes of their output."""
    sound = MethodSpec.run

    def run_it(self: MethodSpec, *args: Any) -> Any:
        out, plan, kernel = sound(self, *args)
        return (how(out) if self.id in ids else out), plan, kernel

    monkeypatch.setattr(MethodSpec, "run", run_it)


def nan(out: torch.Tensor) -> torch.Tensor:
    out = out.clone()
    out[..., 0, 0] = torch.nan
    return out


def crash(out: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image for this device")


@pytest.mark.parametrize(("how", "text"), [(nan, "holds NaN or infinity"), (crash, "RuntimeError: no kernel image")])
@pytest.mark.parametrize("broken", [{0}, {5}, {1, 4}])
def test_a_failing_candidate_is_dropped_with_its_error(
    broken: set[int],
    how: Callable[[torch.Tensor], torch.Tensor],
    text: str,
    model: VideoDiT,
    workload: Workload,
    objective: Frames,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from glocal.cli._advice_page import advice_page
    from glocal.cli._advice_rows import rows
    from glocal.report import render_advice

    ids = {LISTED[i].id for i in broken}
    sabotage(monkeypatch, ids, how)
    found = advise(model, workload, objective=objective, target=WIDE, effort=EFFORT, options=OPTIONS)
    assert set(found.dropped) == ids and all(text in why for why in found.dropped.values())
    assert not ids & {r.method for r in found.records}
    assert all(not ids & set(r.recipe.methods) for r in found.ladder) and found.ladder
    assert [row["name"] for row in rows(found) if row["kind"] == "dropped"] == list(found.dropped)
    page = advice_page(found, model="tiny", workload="2", created="now", reproduce="glocal", facts={"device": "cpu"})
    assert text in render_advice(page)


@pytest.mark.parametrize("how", [nan, crash])
def test_three_failing_candidates_stop(
    how: Callable[[torch.Tensor], torch.Tensor],
    model: VideoDiT,
    workload: Workload,
    objective: Frames,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sabotage(monkeypatch, {m.id for m in LISTED[:3]}, how)
    with pytest.raises(AdviceError, match=f"3 candidates failed.*{LISTED[0].id}.*Mend the kernel"):
        advise(model, workload, objective=objective, target=WIDE, effort=EFFORT, options=OPTIONS)
    assert not open_handles(model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize(
    "stage", ["preflight", "times_inside", "probe_sample", "weight_run", "build_ladder", "measure_rung", "run_pair"]
)
def test_an_abort_in_any_stage_leaves_nothing(
    stage: str,
    error: type[BaseException],
    model: VideoDiT,
    workload: Workload,
    objective: Frames,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*args: Any, **options: Any) -> Any:
        raise error("stopped")

    before = objective.run(model, workload.samples[0]).tensor
    owner = next(m for m in (run, stages, climb) if hasattr(m, stage))
    monkeypatch.setattr(owner, stage, stop)
    loaded = _advise_job.Loaded(model, workload, objective, "quick")
    monkeypatch.setattr(_advise_job, "load", lambda job: loaded)
    monkeypatch.setattr("glocal.advise.AdviseOptions", lambda **_: OPTIONS)
    monkeypatch.setitem(run.effort_of.__globals__["EFFORTS"], "quick", EFFORT)
    job = _advise_job.Job("tiny", tmp_path / "out", limits={"drift": 1e6})
    monkeypatch.setattr(climb, "winners", lambda measured, anchors, target: (list(measured), ""))
    with pytest.raises(error, match="stopped"):
        _advise_job.run_job(job, as_json=True, quiet=True)
    assert not list(tmp_path.iterdir()) and not open_handles(model)
    assert torch.equal(before, objective.run(model, workload.samples[0]).tensor)


@pytest.mark.parametrize("forwards", [1, 4, 12, 30, 60])
def test_ctrl_c_inside_a_forward_restores_the_model(
    forwards: int, model: VideoDiT, workload: Workload, objective: Frames
) -> None:
    before = objective.run(model, workload.samples[0]).tensor
    left = [forwards]

    def count(*args: Any) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise KeyboardInterrupt

    hook = model.blocks[-1].register_forward_hook(count)
    with pytest.raises(KeyboardInterrupt):
        advise(model, workload, objective=objective, target=WIDE, effort=EFFORT, options=OPTIONS)
    hook.remove()
    assert not open_handles(model)
    assert torch.equal(before, objective.run(model, workload.samples[0]).tensor)


def test_an_abort_while_writing_leaves_the_old_outputs(
    model: VideoDiT, workload: Workload, objective: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = advise(model, workload, objective=objective, target=WIDE, effort=EFFORT, options=OPTIONS)
    words = _advise_job.PageWords("tiny", "12", "glocal advise")
    _advise_job.write(tmp_path / "out", found, {"device": "cpu"}, words)
    old = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}

    def stop(page: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("glocal.report.render_advice", stop)
    with pytest.raises(KeyboardInterrupt):
        _advise_job.write(tmp_path / "out", found, {"device": "cpu"}, words)
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == old
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("globs", [("blocks.0.*",), ("*1.attn",)])
def test_kept_sites_stay_dense_in_every_rung(
    globs: tuple[str, ...], model: VideoDiT, workload: Workload, objective: Frames
) -> None:
    options = replace(OPTIONS, keep_dense=globs)
    found = advise(model, workload, objective=objective, target=WIDE, effort=EFFORT, options=options)
    kept = [s for s in found.preflight.sites if any(fnmatch(s.name, g) for g in globs)]
    assert kept and {r.kind for r in found.ladder} >= {"allocation", "single", "published"}
    for rung in found.ladder:
        assert rung.recipe.rules
        assert not any(rule.covers(s.layer) for rule in rung.recipe.rules for s in kept if rule.use != "dense")
