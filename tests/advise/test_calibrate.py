"""Gains: what errors of a method add up to in one step of the whole model, and what the search goes on with."""

from __future__ import annotations

import math

import pytest
import torch

from glocal.advise import Frames, Recipe, Workload, attach
from glocal.advise.calibrate import (
    Group,
    by_layer,
    layer_gains,
    layer_groups,
    step_error,
    summed,
)
from glocal.advise.methods import candidates
from glocal.advise.objective import main_error, on_cpu
from glocal.advise.probe import ProbeRecord
from glocal.advise.recipe import Fallback, Phase
from glocal.advise.search import base_rules
from glocal.advise.tasks import Looks, probe_sample
from glocal.advise.weights import end_error, make_buckets, one_bucket
from glocal.models.generation import VideoDiT


def record(layer: int, bucket: int, residual: float, kind: str = "self") -> ProbeRecord:
    return ProbeRecord(
        f"blocks.{layer}", layer, 0, bucket, bucket, "cond", "s", "m", mass=1.0, output=0.5, residual=residual,
        high=residual, kept=0.5, visited=0.5, kind=kind,
    )  # fmt: skip


def test_layers_stand_alone_or_in_groups_that_grow() -> None:
    few = layer_groups([record(n, 0, 1.0) for n in range(6)], 8)
    assert [g.layers for g in few] == [(n,) for n in range(6)]
    many = layer_groups([record(n, 0, 1.0) for n in range(40)], 8)
    assert sorted(n for g in many for n in g.layers) == list(range(40)) and len(many) == 8
    sizes = [len(g.layers) for g in many]
    assert sizes[0] == 1 and sizes == sorted(sizes)
    two = layer_groups([record(0, 0, 1.0), record(0, 0, 1.0, "joint"), record(1, 0, 1.0)], 8)
    assert [(g.kind, g.layers) for g in two] == [("joint", (0,)), ("self", (0,)), ("self", (1,))]
    assert two[0].holds(record(0, 3, 1.0, "joint")) and not two[0].holds(record(0, 3, 1.0))


def test_a_group_alone_is_made_sparse() -> None:
    base = base_rules([record(n, 0, 1.0, kind) for n in range(4) for kind in ("self", "joint")])
    rules = Group("transformer", "self", (1, 2)).rules(base, "m", Phase("sigma", 0.2, 0.4))
    assert [(r.site, r.layers, r.use, r.phase.low) for r in rules] == [("self", ((1, 2),), "m", 0.2)]


def test_gains_of_layers_are_relative_and_come_from_the_nearest_range() -> None:
    first, rest = Group("transformer", "self", (0,)), Group("transformer", "self", (1, 2))
    changed = {(first, 0): [0.1, 0.4], (rest, 0): [0.8, 0.8], (first, 3): [0.5], (rest, 3): [0.5]}
    errors = {(first, 0): [1.0, 1.0], (rest, 0): [1.0, 1.0], (first, 3): [1.0], (rest, 3): [1.0]}
    made = layer_gains(changed, errors, 4)
    assert made["transformer", "self", 1, 0] / made["transformer", "self", 0, 0] == pytest.approx(4)
    assert made["transformer", "self", 0, 0] * made["transformer", "self", 1, 0] ** 2 == pytest.approx(1)
    assert made["transformer", "self", 2, 1] == made["transformer", "self", 1, 0]  # bucket 0 is nearer
    assert made["transformer", "self", 0, 2] == pytest.approx(1) == made["transformer", "self", 0, 3]
    counted = by_layer([record(0, 0, 3.0), record(2, 0, 3.0), record(5, 0, 3.0)], made)
    assert [r.residual for r in counted] == pytest.approx([3 * 4 ** (-2 / 3), 3 * 4 ** (1 / 3), 3])
    assert layer_gains({(first, 0): [0.0]}, {(first, 0): [1.0]}, 4) == {}


def test_one_step_is_that_of_a_run_that_is_sparse_in_it(model: VideoDiT, workload: Workload, objective: Frames) -> None:
    sample = workload.samples[0]
    methods = {m.id: m for m in candidates((4, 8, 8), tile_shape=(2, 4, 4))[:2]}
    buckets = make_buckets(objective.levels, 4)
    with torch.no_grad():
        probed = probe_sample(model, objective, sample, methods, Looks(buckets, 1, 4))
        rules, name = base_rules(probed.records), next(iter(methods))
        recipe = one_bucket(buckets[2], name, methods[name], rules, Fallback(min_tokens=64))
        here = step_error(model, objective, sample, recipe, (2, probed.latents[1], probed.latents[2]))
        whole = step_error(model, objective, sample, recipe, (2, None, probed.latents[2]))
        seen: list[torch.Tensor] = []
        with attach(model, recipe, on_unseen="run"):
            objective.run(model, sample, on_step=lambda s: seen.append(s.latent))
        dense = step_error(model, objective, sample, Recipe("dense"), (2, probed.latents[1], probed.latents[2]))
    wanted = float((seen[2] - probed.latents[2]).norm() / probed.latents[2].norm())
    assert here == pytest.approx(wanted, rel=1e-4) and whole == pytest.approx(wanted, rel=1e-4) and dense == 0.0
    own = [r for r in probed.records if r.method == name and r.step == 2 and r.head >= 0]
    assert summed(probed.records, name, 2, sample.id) == pytest.approx(math.sqrt(sum(r.residual**2 for r in own)))


def test_gains_at_the_end_are_those_of_whole_runs(model: VideoDiT, workload: Workload, objective: Frames) -> None:
    sample, (name, method) = workload.samples[0], next((m.id, m) for m in candidates((4, 8, 8), tile_shape=(2, 4, 4)))
    buckets = make_buckets(objective.levels, 2)
    with torch.no_grad():
        probed = probe_sample(model, objective, sample, {name: method}, Looks(buckets, 1, 4))
        rules = Group("transformer", "self", (1,)).rules(base_rules(probed.records), name, buckets[1].phase)
        recipe = Recipe("candidate", {name: method}, tuple(rules), fallback=Fallback(min_tokens=64))
        reference = probed.output, probed.latents[buckets[1].first - 1], probed.latents[buckets[1].first]
        end = end_error(model, objective, sample, buckets[1], recipe, reference)
        with attach(model, recipe, on_unseen="run"):
            whole = main_error(objective.distance(probed.output, on_cpu(objective.run(model, sample))))
    assert end == pytest.approx(whole, rel=1e-4) and end > 0
