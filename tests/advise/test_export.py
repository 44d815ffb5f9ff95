"""Recipes for other libraries: what goes across, what is said to be lost, and which rule stands in the way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from typer.testing import CliRunner

from glocal.adapt.records import RunState, Site, SiteCall
from glocal.advise import MethodSpec, Phase, Recipe, RecipeError, Rule
from glocal.advise.export import from_modelopt, sparse_attention, to_modelopt, to_vllm_omni
from glocal.canvas import Canvas, Layout
from glocal.cli import app
from glocal.routing.skip_softmax import SkipSoftmax

SITES = tuple(Site(f"blocks.{n}.attn1", n, 2, 8) for n in range(4))
HOST = {
    "components": [{"name": "transformer", "layers": 4}],
    "scheduler": {"sigmas": [1.0, 0.9, 0.7, 0.4, 0.0]},
}
SKIP = MethodSpec("skip_softmax", {"threshold_scale_factor": 20.0}, kind="route")
TILES = MethodSpec("tile_windows", {"tile": [2, 2, 2], "window": [{"fraction": 0.5}] * 3}, {"tile": [2, 2, 2]}, (8, 8))


def recipe(method: MethodSpec, *rules: Rule) -> Recipe:
    return Recipe("candidate", {method.id: method}, rules, host=HOST)


def test_modelopt_survives_there_and_back() -> None:
    given = {
        "sparse_attention_config": {
            "config_groups": {
                "group_0": {
                    "algorithm": "skip_softmax",
                    "threshold_scale_factor": 20.0,
                    "target_sparsity": 0.5,
                    "ignore": ["*.0.*"],
                    "initial_disabled_steps": 1,
                }
            }
        }
    }
    read = from_modelopt(given, SITES, steps=4)
    assert [r.layers for r in read.rules] == [((1, 3),)] and read.rules[0].phase == Phase("progress", 0.25, 1.0)
    assert next(iter(read.methods.values())).system == "skip_softmax"
    written = to_modelopt(replace(read, host=HOST))
    group = written.content["transformer"]["sparse_attention_config"]["config_groups"]["group_0"]
    assert group == {
        "algorithm": "skip_softmax",
        "threshold_scale_factor": 20.0,
        "ignore": ["*.0.*"],
        "initial_disabled_steps": 1,
    }
    assert any("first steps are counted in the 4" in line for line in written.lost)
    assert from_modelopt(written.content["transformer"], SITES, steps=4).rules == read.rules


def test_the_older_form_is_read() -> None:
    read = from_modelopt({"sparse_algo": "softmax_skip", "threshold": 1e-3}, SITES)
    assert dict(next(iter(read.methods.values())).params) == {"threshold": 1e-3} and read.rules[0].layers == ((0, 3),)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"sparse_algo": "nm"}, "sparse_algo='nm'; legal: 'softmax_skip'"),
        ({"config_groups": {"g": {"algorithm": "vsa"}}}, "config_groups.g.algorithm='vsa'; legal: 'skip_softmax'"),
        (
            {"config_groups": {"g": {"algorithm": "skip_softmax"}}},
            "exactly one of threshold and threshold_scale_factor",
        ),
        ({"config_groups": {"a": {}, "b": {}}}, "has 2 groups; legal: one"),
        (
            {"config_groups": {"g": {"algorithm": "skip_softmax", "threshold": 0.1, "initial_disabled_steps": 3}}},
            "initial_disabled_steps=3 with steps=None",
        ),
        (
            {"config_groups": {"g": {"algorithm": "skip_softmax", "threshold": 0.1, "ignore": ["*"]}}},
            "leaves no attention site",
        ),
    ],
)
def test_what_modelopt_may_not_say_here(config: dict, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        from_modelopt({"sparse_attention_config": config}, SITES)


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ((Rule(TILES.id, ((0, 3),)),), r"rules\[0\] uses tile_windows.*; it knows skip_softmax alone"),
        ((Rule(SKIP.id, ((0, 3),), (1,)),), r"rules\[0\] names heads \[1\]; it knows no heads"),
        ((Rule(SKIP.id, ((0, 3),), branch="cond"),), r"rules\[0\] holds for the cond branch"),
        ((Rule(SKIP.id, ((0, 3),), phase=Phase("sigma", 0.5, 1.0)),), r"rules\[0\] ends at 75% of the run"),
        (
            (Rule(SKIP.id, ((0, 1),)), Rule(SKIP.id, ((2, 3),), phase=Phase("progress", 0.5, 1.0))),
            r"rules\[1\] differs from rules\[0\]; it holds one threshold",
        ),
        ((), "no sparse rule; nothing to export"),
    ],
)
def test_rules_that_modelopt_cannot_say_are_named(rules: tuple[Rule, ...], text: str) -> None:
    given = Recipe("candidate", {SKIP.id: SKIP, TILES.id: TILES}, rules, host=HOST)
    with pytest.raises(RecipeError, match=text):
        to_modelopt(given)


def test_a_layer_uniform_recipe_becomes_a_plugin_and_runs(generator: torch.Generator) -> None:
    rule = Rule(TILES.id, ((0, 3),), phase=Phase("sigma", 0.0, 0.7))
    made = to_vllm_omni(recipe(TILES, rule))
    params = made.content["sparse_attn"]["params"]
    assert [(p["from"], p["to"]) for p in params["phases"]] == [(0.5, 1.0)]
    assert any("phases are shares of the steps" in line for line in made.lost)
    params = {**json.loads(json.dumps(params)), "min_tokens": 16, "grid": (4, 4, 4), "total": 4}
    q, k, v = (torch.randn(1, 70, 2, 8, generator=generator) for _ in range(3))  # [B, N, H, D], six of text behind
    a, b, c = (t.transpose(1, 2) for t in (q, k, v))
    dense = scaled_dot_product_attention(a, b, c).transpose(1, 2)
    torch.testing.assert_close(sparse_attention(q, k, v, {**params, "step": 1}), dense)
    call = SiteCall(Site("s", 0, 2, 8), Layout.of(Canvas((4, 4, 4), after=6)), RunState())
    wanted = TILES.run(a, b, c, call)[0].transpose(1, 2)
    assert not torch.allclose(wanted, dense, atol=1e-3)
    torch.testing.assert_close(sparse_attention(q, k, v, {**params, "step": 2}), wanted)
    for changed in ({"grid": None}, {"grid": (9, 9, 9)}, {"min_tokens": 1000}):
        torch.testing.assert_close(sparse_attention(q, k, v, {**params, "step": 2, **changed}), dense)
    with pytest.raises(RecipeError, match="legal: what glocal export --to vllm-omni writes"):
        sparse_attention(q, k, v, {"step": 1})
    assert sparse_attention.capabilities == {  # type: ignore[attr-defined]
        "supports_attention_mask": False,
        "supports_full_attn_spans": False,
    }


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Rule(TILES.id, ((1, 3),)), r"rules\[0\] names layers \[\[1, 3\]\]; its plug-ins are told no layer"),
        (Rule(TILES.id, ((0, 2),)), r"rules\[0\] names layers \[\[0, 2\]\]"),
        (Rule(TILES.id, ((0, 3),), (0,)), r"rules\[0\] names heads \[0\]; its plug-ins are told no heads"),
        (Rule(TILES.id, ((0, 3),), branch="uncond"), "its plug-ins are told no branch"),
        (Rule(TILES.id, ((0, 3),), phase=Phase("prefill", 0, 9)), "holds for prefill 0 to 9"),
    ],
)
def test_rules_that_a_plugin_is_not_told_are_named(rule: Rule, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        to_vllm_omni(recipe(TILES, rule))


def test_the_verb_writes_a_file_or_nothing(tmp_path: Path) -> None:
    recipe(SKIP, Rule(SKIP.id, ((0, 3),))).save(tmp_path / "good.json")
    recipe(TILES, Rule(TILES.id, ((0, 3),), (1,))).save(tmp_path / "bad.json")
    runner, out = CliRunner(), tmp_path / "config.json"
    done = runner.invoke(app, ["export", str(tmp_path / "bad.json"), "--to", "modelopt", "-o", str(out)])
    assert done.exit_code == 2 and "rules[0] uses tile_windows" in done.output and not out.exists()
    done = runner.invoke(app, ["export", str(tmp_path / "good.json"), "--to", "onnx", "-o", str(out)])
    assert (
        done.exit_code == 2 and "--to='onnx' is unknown; legal: vllm-omni, modelopt" in done.output and not out.exists()
    )
    done = runner.invoke(app, ["export", str(tmp_path / "good.json"), "--to", "modelopt", "-o", str(out)])
    assert done.exit_code == 0 and "lost: Canvases, devices" in done.output
    assert "skip_softmax" in out.read_text()


def test_skip_softmax_leaves_out_what_is_below_the_threshold(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 2, 64, 8, generator=generator) * s for s in (3.0, 3.0, 1.0))
    layout = Layout.of(Canvas((64,)))
    kept = []
    for threshold in (1.0, 0.1, 1e-3, 1e-30):
        method = MethodSpec("skip_softmax", {"threshold": threshold}, block=(8, 8), kind="route")
        out, plan, _ = method.run(q, k, v, SiteCall(Site("s", 0, 2, 8), layout, RunState()))
        kept.append((plan.kept, float((out - scaled_dot_product_attention(q, k, v)).abs().max())))
    assert [k for k, _ in kept] == sorted(k for k, _ in kept) and kept[0][0] < 1.0 == kept[-1][0]
    assert kept[-1][1] < 1e-5 and kept[2][1] < kept[0][1]
    with pytest.raises(ValueError, match="threshold=0; legal: above 0 and at most 1"):
        SkipSoftmax(8, 0)
