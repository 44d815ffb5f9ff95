"""Step weights on a smaller canvas: its size, and what happens where it says something else than the full one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from glocal.advise import AdviseOptions, Effort, Frames, Target, Workload, advise, climb, inside, reduced, run, stages
from glocal.advise.methods import candidates
from glocal.advise.reduced import agree, reduced_sample, reduced_shape
from glocal.advise.weights import StepWeight
from glocal.advise.workload import Sample
from glocal.models.generation import VideoDiT

from .test_run import times_by_pairs


@pytest.mark.parametrize(
    ("shape", "limit", "wanted"),
    [
        ((21, 45, 80), 30_000, (15, 33, 59)),  # Wan at 720p
        ((16, 16, 16), 30_000, None),  # small enough
        ((128, 128), 8192, (90, 90)),
        ((8, 24, 200), 30_000, None),  # no axis may be cut
        ((8, 32, 200), 20_000, (8, 24, 150)),  # as far as the floors allow
        ((4096,), 100, None),
    ],
)
def test_reduced_grids_keep_the_aspect(shape: tuple[int, ...], limit: int, wanted: tuple[int, ...] | None) -> None:
    assert reduced_shape(shape, limit) == wanted
    if wanted is not None:
        assert wanted[-2] / wanted[-1] == pytest.approx(shape[-2] / shape[-1], rel=0.03)


def test_samples_are_cut_by_their_arguments() -> None:
    sample = Sample("s", 7, {"prompt": "x", "num_frames": 81, "height": 720, "width": 1280})
    sizes = {n: sample.args[n] for n in ("num_frames", "height", "width")}
    small = reduced_sample(sample, sizes, (21, 45, 80), 30_000)
    assert small is not None and (small.id, small.seed) == ("s-reduced", 7)
    assert small.args == {"prompt": "x", "num_frames": 57, "height": 528, "width": 944}
    assert reduced_sample(sample, {"height": 720}, (21, 45, 80), 30_000) is None
    assert reduced_sample(sample, {**sizes, "width": 1281}, (21, 45, 80), 30_000) is None
    assert reduced_sample(sample, {**sizes, "num_frames": 80}, (21, 45, 80), 30_000) is None


def test_sizes_agree_within_half() -> None:
    full = [StepWeight(b, "m", 0.2, 0.1, 0.1) for b in (0, 3)]
    assert agree(full, [replace(r, end_to_end=0.28) for r in full])
    assert not agree(full, [replace(full[0], end_to_end=0.31), full[1]])


@pytest.mark.parametrize("alike", [True, False])
def test_weights_come_from_the_reduced_canvas_where_both_agree(
    alike: bool, model: VideoDiT, workload: Workload, objective: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inside, "times_of", times_by_pairs)
    monkeypatch.setattr("glocal.advise.climb.refined", lambda times, found: times)
    monkeypatch.setattr(run, "_refusal", lambda *args: None)
    monkeypatch.setattr(climb, "winners", lambda measured, anchors, target: (list(measured), ""))
    monkeypatch.setattr(reduced, "FRAMES", 2)
    monkeypatch.setattr(reduced, "SIDE", 4)
    monkeypatch.setattr(reduced, "AGREE", 1e9 if alike else 1.0)
    seen: list[tuple[str, int]] = []
    kept = stages.weight_run

    def watched(model, objective, sample, bucket, *rest):
        seen.append((sample.id, bucket.number))
        return kept(model, objective, sample, bucket, *rest)

    monkeypatch.setattr(stages, "weight_run", watched)
    effort = Effort("tiny", 4, 4, 1, (0.7,), pairs=2, rounds=1, steps_a_bucket=1, published=0, rungs=1, reduced=120)
    options = AdviseOptions(candidates=tuple(candidates((4, 8, 8), tile_shape=(2, 4, 4))[:3]), min_tokens=16)
    target = Target(limits={"drift": 1e6})
    found = advise(model, workload, objective=objective, target=target, effort=effort, options=options)
    name = next(i for i, _ in seen if not i.endswith("-reduced"))
    full = [b for i, b in seen if i == name]
    assert [b for i, b in seen if i != name] == [0, 1, 2, 3]
    assert full == ([0, 3] if alike else [0, 3, 1, 2])
    assert found.weights is not None and len(found.weights.runs) == 4
    assert torch.isfinite(torch.tensor(found.weights.weight)).all()
