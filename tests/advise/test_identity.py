"""A recipe knows the model it was proven on: hashes that change with it, and a refusal that says what differs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from glocal.advise import Frames, MethodSpec, Mismatch, Recipe, RecipeError, Rule, Target, Workload, attach, validate
from glocal.advise.identity import components, config_sha256, host_record, quantisation, sampled_bytes, weights_sha256
from glocal.advise.recipe import Fallback
from glocal.models.generation import VideoDiT, VideoDiTConfig

HALF = MethodSpec("tile_windows", {"tile": [2, 4, 4], "window": [{"fraction": 0.5}] * 3}, {"tile": [2, 4, 4]}, (32, 32))


def recipe_of(model: VideoDiT) -> Recipe:
    host = host_record(model, (1.0, 0.5, 0.0), None)
    canvas = {"canvases": [{"shape": [4, 8, 8]}]}
    rules = (Rule("half", ((0, 1),)),)
    return Recipe("candidate", {"half": HALF}, rules, host=host, workload=canvas, fallback=Fallback(min_tokens=64))


def other(model: VideoDiT) -> VideoDiT:
    """The same model with one weight moved."""
    made = VideoDiT(model.config).eval()
    made.load_state_dict(model.state_dict())
    with torch.no_grad():
        next(made.parameters()).view(-1)[0] += 1
    return made


def test_weights_hash_sees_names_shapes_and_values() -> None:
    layer = nn.Linear(4, 4)
    base = weights_sha256(layer)
    assert weights_sha256(layer) == base
    with torch.no_grad():
        layer.bias[3] += 1
    assert weights_sha256(layer) != base
    assert weights_sha256(nn.Sequential(layer)) != weights_sha256(layer)
    with pytest.raises(ValueError, match="'bias' is on the meta device"):
        weights_sha256(nn.Linear(2, 2, device="meta"))


def test_large_tensors_are_sampled_at_both_ends() -> None:
    big = torch.zeros(100_000)
    assert len(sampled_bytes(big)) == 64 * 1024
    for place in (0, -1):
        changed = big.clone()
        changed[place] = 1
        assert sampled_bytes(changed) != sampled_bytes(big)
    assert sampled_bytes(torch.zeros(0)) == b"" and len(sampled_bytes(torch.zeros((), dtype=torch.bfloat16))) == 2


def test_config_hash_is_of_the_values(model: VideoDiT) -> None:
    assert config_sha256(model) == config_sha256(VideoDiT(model.config))
    assert config_sha256(model) != config_sha256(VideoDiT(replace(model.config, layers=1)))
    assert config_sha256(nn.Linear(1, 1)) is None


def test_notes_of_a_library_to_itself_are_no_part_of_a_configuration() -> None:
    """Diffusers lists what was left at its defaults in the order of a set, which differs from process to process."""

    def hashed(**config: Any) -> str | None:
        module = nn.Linear(1, 1)
        module.config = config  # type: ignore[assignment]
        return config_sha256(module)

    notes = {"_use_default_values": ["b", "a"], "_name_or_path": "/here", "transformers_version": "5.1"}
    assert hashed(heads=2) == hashed(heads=2, **notes) != hashed(heads=3)


def test_check_names_what_differs(model: VideoDiT) -> None:
    recipe = recipe_of(model)
    assert recipe.check(model) == []
    assert Recipe("dense").check(model) == []
    found = recipe.check(other(model))
    assert [m.field for m in found] == ["host.components[transformer].weights_sha256"]
    shallow = VideoDiT(VideoDiTConfig(dim=48, layers=1, heads=2, hidden=64))
    assert {m.field.rpartition(".")[2] for m in recipe.check(shallow)} == {"config_sha256", "weights_sha256"}
    half = VideoDiT(model.config)
    half.load_state_dict(model.state_dict())
    assert Mismatch("host.components[transformer].dtype", "float32", "float64") in recipe.check(half.double())
    moved = replace(recipe, host={"components": [{"name": "transformer_2"}]})
    assert [m.model for m in moved.check(model)] == ["no such component", "transformer"]


def test_attach_raises_or_warns_with_the_line_to_run(model: VideoDiT, tmp_path: Path) -> None:
    recipe_of(model).save(tmp_path / "mine.json")
    attach(model, tmp_path / "mine.json").undo()
    with pytest.raises(RecipeError, match=r"weights_sha256: .* glocal validate \S*mine.json MODEL --workload FILE"):
        attach(other(model), tmp_path / "mine.json")
    with pytest.warns(UserWarning, match="Prove it here: glocal validate"):
        attach(other(model), tmp_path / "mine.json", on_mismatch="warn").undo()
    soft = replace(recipe_of(model), fallback=Fallback(min_tokens=64, mismatch="warn"))
    with pytest.warns(UserWarning, match="weights_sha256"):
        attach(other(model), soft).undo()
    with pytest.raises(TypeError, match="attach: recipe is a dict; legal: a Recipe, or the path of a recipe.json"):
        attach(model, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_mismatch='ignore'; legal: raise, warn"):
        attach(model, soft, on_mismatch="ignore")  # type: ignore[arg-type]


def test_on_unseen_overrules_the_recipe(model: VideoDiT, workload: Workload) -> None:
    small = Frames(frames=2, height=32, width=32)
    for wanted, sparse in (("dense", False), ("run", True)):
        with attach(model, recipe_of(model), on_unseen=wanted) as handle:  # type: ignore[arg-type]
            small.run(model, workload.samples[0])
            stats = handle.method.stats.values()  # type: ignore[attr-defined]
            assert any(s.sparse for s in stats) == sparse
    with attach(model, recipe_of(model), on_unseen="raise"), pytest.raises(RuntimeError, match="not proven"):
        small.run(model, workload.samples[0])


def test_a_recipe_proven_again_belongs_to_the_other_weights(
    model: VideoDiT, workload: Workload, objective: Frames
) -> None:
    changed = other(model)
    recipe = recipe_of(model)
    advice = validate(changed, recipe, workload, objective=objective, target=Target(limits={"drift": 1e6}), pairs=2)
    assert advice.recipe.check(changed) == [] and len(advice.recipe.check(model)) == 1
    assert advice.recipe.objective == {"name": "frames", "version": 1, "limits": {"drift": 1e6}}
    assert advice.recipe.host["scheduler"]["sigmas"] == list(objective.levels)


def test_the_scale_of_an_adapter_is_part_of_a_model(model: VideoDiT) -> None:
    """An adapter that is not merged: its tensors and its scale, which is no tensor and so in no weights hash."""

    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.lora = nn.ModuleDict({"style": nn.Linear(4, 2), "other": nn.Linear(4, 2)})
            self.scaling = {"style": 1.0, "other": 0.5}

    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = copy.deepcopy(model)
        made.extra = Adapted()
    assert components(model)[0]["adapters"] == []
    made.peft_config = {"style": None, "other": None}  # type: ignore[assignment]
    recipe = recipe_of(made)
    found = recipe.host["components"][0]["adapters"]
    assert [(a["name"], a["scale"]) for a in found] == [("other", 0.5), ("style", 1.0)]
    assert found[0]["sha256"] != found[1]["sha256"] and recipe.check(made) == []
    made.extra.scaling["style"] = 0.7
    assert [m.field for m in recipe.check(made)] == ["host.components[transformer].adapters"]
    with pytest.raises(RecipeError, match="adapters: the recipe was proven on .*'scale': 1.0"):
        attach(made, recipe)


def test_quantised_weights_and_the_schedule_are_named() -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")
    from .fresh import built

    pipe, _ = built("wan")
    host = host_record(pipe, (1.0, 0.0), 4.0)
    assert host["scheduler"]["class"].endswith("FlowMatchEulerDiscreteScheduler")
    assert host["scheduler"]["boundary"] == 0.5 and len(host["scheduler"]["config_sha256"]) == 64
    assert [c["quantisation"] for c in host["components"]] == [None, None]
    module = nn.Linear(1, 1)
    module.config = {"quantization_config": {"quant_method": "bitsandbytes"}}  # type: ignore[assignment]
    assert quantisation(module) == "bitsandbytes"
