"""Rows of the failure table that no other test here holds: stops, refusals, limits, what a recipe does elsewhere."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glocal.adapt import Site, SiteCall, discover, site
from glocal.adapt import attach as attach_method
from glocal.adapt.records import RunState
from glocal.advise import (
    AdviceError,
    AdviseOptions,
    Effort,
    Frames,
    MethodSpec,
    Recipe,
    Rule,
    Sample,
    Target,
    Workload,
    advise,
    apply,
    attach,
    candidates,
    climb,
    inside,
    preflight,
    run,
)
from glocal.advise.apply import RecipeMethod
from glocal.advise.ladder import Anchors, refused, winners
from glocal.advise.recipe import Fallback
from glocal.advise.search import Rung
from glocal.advise.segmentation import Segmentation, miou
from glocal.canvas import Canvas, Layout
from glocal.models.generation import VideoDiT

from .test_run import times_by_pairs

EFFORT = Effort("tiny", 2, 4, 1, (0.9,), pairs=2, rounds=1, steps_a_bucket=1, published=0, rungs=1)
LISTED = tuple(candidates((4, 8, 8), tile_shape=(2, 4, 4))[:3])
OPTIONS = AdviseOptions(candidates=LISTED, min_tokens=64)
HALF = MethodSpec("tile_windows", {"tile": [2, 4, 4], "window": [{"fraction": 0.5}] * 3}, {"tile": [2, 4, 4]}, (32, 32))
RULE = Rule("half", ((0, 1),))
PROVEN = Recipe(
    "candidate",
    {"half": HALF},
    (RULE,),
    workload={"canvases": [{"shape": [4, 8, 8]}, {"shape": [8, 8, 8]}], "batch": [1, 1]},
    fallback=Fallback(min_tokens=64),
)


class TwoAttentions(nn.Module):
    """A private model whose second attention is no site."""

    def __init__(self, hidden: int, noise: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, 16) / 4)
        self.hidden, self.noise = hidden, noise

    def forward(self, image: Tensor) -> Tensor:
        """image [1, 16, H, W] -> [1, 2, H, W]."""
        x = image.flatten(2).transpose(1, 2)
        q, k, v = (t[:, None] for t in (x @ self.weight[n] for n in range(3)))
        x = x + site("one", q, k, v, canvas=Canvas(tuple(image.shape[2:])))[:, 0]
        for _ in range(self.hidden):
            x = x + nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
        if self.noise:
            x = x + torch.rand_like(x)
        return x.transpose(1, 2).unflatten(2, image.shape[2:])[:, :2]


def images(count: int, label: bool = False) -> Workload:
    made: list[dict[str, Any]] = []
    for n in range(count):
        generator = torch.Generator().manual_seed(n)
        made.append({"image": torch.randn(16, 16, 16, generator=generator)})
        if label:
            made[-1]["label"] = torch.randint(2, (16, 16), generator=generator)
    return Workload.from_calls(made, range(count))


def private(hidden: int = 0, noise: bool = False) -> TwoAttentions:
    torch.manual_seed(0)
    model = TwoAttentions(hidden, noise).eval()
    discover(model, torch.randn(1, 16, 16, 16))
    return model


def test_attention_outside_the_known_sites_stops() -> None:
    with pytest.raises(AdviceError, match=r"host of TwoAttentions does not know takes \d+% of the attention time"):
        preflight(private(hidden=3), images(1).samples[0], Segmentation(2))
    assert preflight(private(), images(1).samples[0], Segmentation(2)).unknown == 0


def test_a_model_that_does_not_reproduce_itself_stops_and_the_operator_is_named() -> None:
    with pytest.raises(AdviceError, match=r"gave two outputs \(the first operator to differ is aten.rand_like"):
        preflight(private(noise=True), images(1).samples[0], Segmentation(2))


def test_one_pass_models_get_advice_with_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segmentation end to end: rules hold always, mIoU stands beside the error, the ceiling knows no place."""
    monkeypatch.setattr(inside, "times_of", times_by_pairs)
    monkeypatch.setattr("glocal.advise.climb.refined", lambda times, found: times)
    monkeypatch.setattr(run, "_refusal", lambda *args: None)
    monkeypatch.setattr(climb, "winners", lambda measured, anchors, target: (list(measured), ""))
    model = private()
    options = AdviseOptions(candidates=tuple(candidates((16, 16), tile_shape=(4, 4))[:3]), min_tokens=16)
    target = Target(limits={"drift": 1e6, "pixels_changed": 1.0})
    found = advise(
        model, images(4, label=True), objective=Segmentation(2), target=target, effort=EFFORT, options=options
    )
    assert found.validation is not None and found.chosen is not None
    assert {r.phase.coordinate for r in found.chosen.recipe.rules} == {"always"}
    assert {"miou", "miou_lost", "pixels_changed"} <= set(found.validation.pairs[0].measures)
    assert found.recipe.objective["name"] == "segmentation"
    pair = found.validation.pairs[0]
    assert pair.floor < 1e-5 < pair.ceiling


def test_miou_counts_classes_that_occur() -> None:
    label = torch.tensor([[0, 0], [1, -1]])
    assert miou(torch.tensor([[0, 1], [1, 0]]), label, 5) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert miou(label.clamp(min=0), label, 5) == 1.0


def test_a_floor_that_hides_errors_refuses() -> None:
    def anchors(floor: float, **measures: float) -> Anchors:
        return Anchors(1.0, floor, 1.0, {"relative_l2": floor, **measures})

    assert refused(anchors(0.01), Target()) is None
    assert "more than a fifth of another seed" in str(refused(anchors(0.3), Target()))
    asked = Target(limits={"drift": 0.1, "relative_l2": 0.005})
    assert "above the limit 0.005 that is asked for" in str(refused(anchors(0.01), asked))


def test_limits_on_other_measures_choose_the_winner() -> None:
    def rung(name: str, speed: float, **measures: float) -> Rung:
        return Rung(name, "single", Recipe("dense"), 0.5, 0.5, None, 1 / speed, 1.0, 0.05, measures)

    anchors = Anchors(1.0, 0.0, 1.0, {})
    fast, slow = rung("fast", 2.0, kl=0.5), rung("slow", 1.5, kl=0.01)
    assert next(r.name for r in winners([fast, slow], anchors, Target())[0]) == "fast"
    limited = Target(limits={"drift": 0.1, "kl": 0.1})
    assert [r.name for r in winners([fast, slow], anchors, limited)[0]] == ["slow"]
    none, why = winners([fast], anchors, limited)
    assert not none and why.endswith("the limit is 0.100, and of kl as asked.")


@pytest.mark.parametrize(
    ("name", "text"),
    [("psnr", "'psnr' is better when higher"), ("lpips", "frames has no measure 'lpips'; legal: drift, relative_l2")],
)
def test_a_limit_on_what_cannot_be_bounded_is_refused(
    name: str, text: str, model: VideoDiT, workload: Workload, objective: Frames
) -> None:
    target = Target(limits={"drift": 0.1, name: 30.0})
    with pytest.raises(ValueError, match=text):
        advise(model, workload, objective=objective, target=target, effort=EFFORT, options=OPTIONS)


def test_too_little_memory_stops(model: VideoDiT) -> None:
    from glocal.advise.forecast import StageForecast, check_memory

    with pytest.raises(AdviceError, match=r"probe will hold .* GiB, here are .* GiB"):
        check_memory([StageForecast("probe", 1.0, 1 << 60, 0), StageForecast("rest", 1.0, None, 0)], model)
    check_memory([StageForecast("rest", 1.0, 1, 0)], model)


def test_several_canvases_in_one_workload_are_all_proven(
    model: VideoDiT, workload: Workload, objective: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inside, "times_of", times_by_pairs)
    monkeypatch.setattr("glocal.advise.climb.refined", lambda times, found: times)
    monkeypatch.setattr(run, "_refusal", lambda *args: None)
    monkeypatch.setattr(climb, "winners", lambda measured, anchors, target: (list(measured), ""))
    sizes = ({"frames": 4, "height": 32, "width": 32}, {"frames": 8, "height": 32, "width": 32})
    effort = replace(EFFORT, pairs=4)
    found = advise(
        model,
        workload,
        objective=objective,
        target=Target(limits={"drift": 1e6}),
        effort=effort,
        options=replace(OPTIONS, canvases=sizes),
    )
    recipe = found.chosen.recipe  # type: ignore[union-attr]
    assert [c["shape"] for c in recipe.workload["canvases"]] == [[4, 8, 8], [8, 8, 8]]
    assert recipe.workload["tokens"] == [256, 512]
    assert found.preflight.shape == (4, 8, 8)
    with pytest.raises(ValueError, match="2 canvases need 4 samples to validate on, two each; there are 2"):
        workload.split(validate=2).sized(sizes)


def ran(model: VideoDiT, objective: Frames, recipe: Recipe, **args: int) -> dict[str, Any]:
    with attach(model, recipe) as handle:
        objective.run(model, Sample("a", 1, {"shape": "disc", **args}))
        return dict(handle.stats())


def test_a_canvas_between_two_proven_ones_runs_and_is_counted(model: VideoDiT, objective: Frames) -> None:
    stats = ran(model, objective, PROVEN, frames=6)
    assert all(s.sparse == 2 * 4 and s.interpolated == 4 for s in stats.values())
    stats = ran(model, objective, PROVEN, frames=8)
    assert all(s.sparse and not s.interpolated for s in stats.values())


def test_an_unseen_canvas_runs_dense_and_is_told_of_once(
    model: VideoDiT, objective: Frames, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "glocal.advise"):
        stats = ran(model, objective, PROVEN, frames=12)
    assert all(dict(s.dense) == {"canvas not proven": 8} for s in stats.values())
    assert len(caplog.records) == 1 and "[12, 8, 8]" in caplog.text


def test_a_batch_that_was_not_proven_runs_dense(model: VideoDiT) -> None:
    clip = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad(), attach(model, PROVEN) as handle:
        model(clip, torch.full((2,), 0.5))
        assert all(dict(s.dense) == {"batch not proven": 2} for s in handle.stats().values())
    with torch.no_grad(), attach(model, PROVEN, on_unseen="raise"):
        with pytest.raises(RuntimeError, match="proven on 1 to 1 samples at once, not 2"):
            model(clip, torch.full((2,), 0.5))


def test_sequences_that_are_short_and_gradients_are_no_case_for_a_recipe(model: VideoDiT) -> None:
    clip = torch.randn(1, 1, 3, 16, 16)
    with attach(model, PROVEN) as handle:
        with torch.no_grad():
            model(clip, torch.tensor([0.5]))
        assert {r for s in handle.stats().values() for r in s.dense} == {"fewer than 64 tokens"}
        with pytest.raises(RuntimeError, match="proven for inference, but gradients are on"):
            model(torch.randn(1, 4, 3, 32, 32), torch.tensor([0.5]))


def test_cross_attention_is_no_site_of_a_recipe() -> None:
    kinds = tuple(Site(k, 0, 1, 8, kind=k) for k in ("self", "joint", "cross"))  # type: ignore[arg-type]
    assert [s.kind for s in RecipeMethod(PROVEN).sites(kinds)] == ["self", "joint"]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Another GPU; sparse and dense calls take the seconds of the list in turn."""
    clock = [2e-3, 1e-3]
    monkeypatch.setattr(apply, "device_name", lambda tensor: "Other GPU")
    turn = iter(range(10**6))
    monkeypatch.setattr(apply, "_clocked", lambda run, tensor: (run(), clock[next(turn) % 2]))
    yield clock


@pytest.mark.parametrize("slower", [True, False])
def test_on_another_gpu_one_warning_with_both_times(
    slower: bool, elsewhere: list[float], model: VideoDiT, objective: Frames
) -> None:
    if not slower:
        elsewhere.reverse()
    recipe = replace(PROVEN, device={"device": "This GPU"})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with attach(model, recipe):
            for _ in range(5):
                objective.run(model, Sample("a", 1, {"shape": "disc"}))
    told = [str(w.message) for w in seen if "not measured here" in str(w.message)]
    assert len(told) == slower
    if slower:
        assert "taken on This GPU" in told[0] and "2.00 ms a call and dense 1.00 ms" in told[0]


def test_an_exception_while_attached_goes_through_and_undo_still_restores(model: VideoDiT, objective: Frames) -> None:
    sample = Sample("a", 1, {"shape": "disc"})
    plain = objective.run(model, sample).tensor

    def burst(*args: Any) -> None:
        raise ZeroDivisionError("in the model")

    handle = attach(model, PROVEN)
    hook = model.blocks[1].register_forward_hook(burst)
    with pytest.raises(ZeroDivisionError, match="in the model"):
        objective.run(model, sample)
    hook.remove()
    handle.undo()
    assert torch.equal(objective.run(model, sample).tensor, plain)


def test_recipes_nest_and_come_out_in_order(model: VideoDiT, objective: Frames) -> None:
    first = attach(model, PROVEN)
    second = attach(model, replace(PROVEN, rules=()))
    stats = second.stats
    objective.run(model, Sample("a", 1, {"shape": "disc"}))
    assert all(s.sparse == 0 for s in stats().values()) and first.stats()  # the inner one hands on to the outer
    with pytest.raises(RuntimeError, match="cannot be undone: RecipeMethod was attached later"):
        first.undo()
    second.undo()
    first.undo()


def test_less_memory_stands_in_the_evidence(
    model: VideoDiT, workload: Workload, objective: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glocal.advise import probe
    from glocal.cli._advice_rows import rows
    from glocal.cli._advise_job import evidence

    true_sums = probe.partial_sums

    def sums(rows: Any, keys: Any) -> Any:
        if rows.q.shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true_sums(rows, keys)

    monkeypatch.setattr(probe, "partial_sums", sums)
    monkeypatch.setattr(inside, "times_of", times_by_pairs)
    monkeypatch.setattr("glocal.advise.climb.refined", lambda times, found: times)
    monkeypatch.setattr(run, "_refusal", lambda *args: None)
    found = advise(model, workload, objective=objective, effort=EFFORT, options=OPTIONS)
    assert {r.head for r in found.records} == {-1, 0, 1}
    assert evidence(found)["less_memory"][0] == {"site": "blocks.0.attn", "heads": 1, "blocks": 4}
    assert [row["kind"] for row in rows(found)].count("less memory") == 2  # one a sample


def test_gradients_weigh_errors_by_what_they_do_to_the_output(
    model: VideoDiT, workload: Workload, objective: Frames
) -> None:
    """With every block probed, the estimate follows the true one-step error of the output from method to method."""
    from glocal.advise.tasks import Looks, probe_sample
    from glocal.advise.weights import make_buckets

    sample = workload.samples[0]
    methods = {m.id: m for m in LISTED}
    looks = Looks(make_buckets(objective.levels, 4), 1, 64, "gradient")
    with torch.no_grad():
        probed = probe_sample(model, objective, sample, methods, looks)
        dense = objective.run(model, sample)
    assert torch.equal(probed.output.tensor, dense.tensor)
    first = [r for r in probed.records if r.step == 0 and r.head >= 0]
    guess, truth = [], []
    noise = objective.first_latent(model, sample)
    level = torch.tensor([1.0])
    condition = model.condition(**sample.args)
    with torch.no_grad():
        plain = model(noise, level, condition)
        for name, method in methods.items():
            rule = Rule(name, ((0, 1),))
            recipe = Recipe("candidate", {name: method}, (rule,), fallback=Fallback(min_tokens=64))
            with attach(model, recipe):
                truth.append(float((model(noise, level, condition) - plain).norm() / plain.norm()))
            guess.append(sum(r.residual**2 for r in first if r.method == name) ** 0.5)
    assert all(0.2 < g / t < 5 for g, t in zip(guess, truth, strict=True)), (guess, truth)


def test_a_site_of_several_grids_is_no_case_for_a_recipe() -> None:
    from glocal.canvas import Part

    canvas = Canvas([Part("image", (4, 8)), Part("reference", (4, 8))])
    q = torch.randn(1, 1, 64, 8)
    call = SiteCall(Site("s", 0, 1, 8), Layout.of(canvas), RunState())
    method = RecipeMethod(replace(PROVEN, workload={}))
    assert torch.equal(method.core(q, q, q, call, lambda q, k, v, call: v), q)
    assert dict(method.stats["s"].dense) == {"a canvas of several grids, or none": 1}


def test_the_host_is_at_fault_where_a_dense_plan_changes_the_model(
    model: VideoDiT, workload: Workload, objective: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_core = RecipeMethod.core
    monkeypatch.setattr(RecipeMethod, "core", lambda self, *args: true_core(self, *args) + 1e-3)
    with pytest.raises(AdviceError, match="A dense plan through the host of VideoDiT does not reproduce the model"):
        preflight(model, workload.samples[0], objective)
    assert attach_method is not None


@pytest.mark.parametrize("why", ["floor", "empty ladder"])
def test_a_refusal_before_anything_was_tried_has_a_page(
    why: str, model: VideoDiT, workload: Workload, objective: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glocal.cli._advice_page import advice_page
    from glocal.report import render_advice

    monkeypatch.setattr(inside, "times_of", times_by_pairs)
    monkeypatch.setattr("glocal.advise.climb.refined", lambda times, found: times)
    monkeypatch.setattr(run, "_refusal", lambda *args: None)
    if why == "floor":
        monkeypatch.setattr(climb, "refused", lambda anchors, target: "No recipe can be judged on this model.")
    else:
        monkeypatch.setattr(climb, "build_ladder", lambda *args: [])
    found = advise(model, workload, objective=objective, effort=EFFORT, options=OPTIONS)
    assert found.status == "dense" and not found.ladder and found.anchors is not None
    html = render_advice(advice_page(found, model="m", workload="w", created="now", reproduce="glocal", facts={}))
    assert found.reason in html


def test_candidates_that_are_all_slower_than_dense_refuse(
    model: VideoDiT, workload: Workload, objective: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(q: Any, k: Any, v: Any, call: Any, methods: Any, *, rounds: int, inner: Any = None) -> Any:
        found = times_by_pairs(q, k, v, call, methods, rounds=rounds)
        return replace(found, dense=replace(found.dense, median=1e-9))

    monkeypatch.setattr(inside, "times_of", slow)
    found = advise(model, workload, objective=objective, effort=EFFORT, options=replace(OPTIONS, min_tokens=1))
    assert found.status == "dense" and not found.recipe.rules and not found.records
    assert found.reason == "Every candidate is slower than the best dense kernel here (cpu)."
