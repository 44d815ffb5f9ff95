"""Static masks in a recipe: PARO's plan by file, head by head, found beside the recipe wherever that lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glocal.adapt import attach
from glocal.adapt.paro import Paro
from glocal.adapt.paro_plan import ParoPlan
from glocal.advise import Frames, Workload, advise, inside, run
from glocal.advise.apply import RecipeMethod
from glocal.advise.calibrated import paro_candidates
from glocal.advise.effort import AdviseOptions, Effort
from glocal.advise.methods import MethodSpec
from glocal.advise.recipe import Fallback, Recipe, Rule
from glocal.models.generation import VideoDiT

from .test_run import times_by_pairs

ANY = Fallback(min_tokens=16)


def recipe_of(uses: Sequence[tuple[MethodSpec, tuple[int, ...]]]) -> Recipe:
    """Which method each choice of heads uses in all layers."""
    rules = tuple(Rule(m.id, ((0, 9),), heads) for m, heads in uses)
    return Recipe("candidate", {m.id: m for m, _ in uses}, rules, fallback=ANY)


def output(model: VideoDiT, objective: Frames, workload: Workload, recipe: Recipe) -> Tensor:
    with torch.no_grad(), attach(model, RecipeMethod(recipe)) as handle:
        found = objective.run(model, workload.samples[1]).tensor
        assert all(s.sparse and not s.dense for s in handle.method.stats.values())  # type: ignore[attr-defined]
    return found


def found_on(
    model: VideoDiT, objective: Frames, workload: Workload, folder: Path, *densities: float
) -> list[MethodSpec]:
    with torch.no_grad():
        run = lambda: objective.run(model, workload.samples[0])  # noqa: E731
        return paro_candidates(model, run, folder, densities, block=16)


def test_masks_run_as_the_method_of_paro(
    model: VideoDiT, objective: Frames, workload: Workload, tmp_path: Path
) -> None:
    few, most = found_on(model, objective, workload, tmp_path, 0.3, 0.8)
    assert few.resolution == "exact" and few.masks != most.masks
    alone = output(model, objective, workload, recipe_of([(few, (0, 1))]))
    plan = ParoPlan.load(str(few.masks))
    assert plan.levels is not None and len(plan.levels) == objective.spec.steps  # masks of steps without their number
    with torch.no_grad(), attach(model, Paro(plan)) as handle:
        handle.state.total = objective.spec.steps
        want = objective.run(model, workload.samples[1]).tensor
    torch.testing.assert_close(alone, want)
    mixed = output(model, objective, workload, recipe_of([(few, (1,)), (most, (0,))]))
    assert not torch.allclose(mixed, alone, atol=1e-4)


def test_heads_of_a_recipe_have_the_masks_of_their_number(
    model: VideoDiT, objective: Frames, workload: Workload, tmp_path: Path
) -> None:
    """The same masks head by head, once as one method and once as two with equal files."""
    (few,) = found_on(model, objective, workload, tmp_path, 0.3)
    again = replace(few, version=2)
    whole = output(model, objective, workload, recipe_of([(few, (0, 1))]))
    apart = output(model, objective, workload, recipe_of([(few, (0,)), (again, (1,))]))
    torch.testing.assert_close(apart, whole, rtol=0, atol=1e-5)


def test_a_recipe_takes_its_masks_along(model: VideoDiT, objective: Frames, workload: Workload, tmp_path: Path) -> None:
    (few,) = found_on(model, objective, workload, tmp_path / "made", 0.3)
    recipe = recipe_of([(few, (0, 1))])
    (tmp_path / "there").mkdir()
    recipe.save(tmp_path / "there" / "recipe.json")
    for file in (tmp_path / "made").iterdir():
        file.unlink()
    (tmp_path / "there").rename(tmp_path / "moved")
    loaded = Recipe.load(tmp_path / "moved" / "recipe.json")
    assert loaded.id == recipe.id and str(tmp_path) not in (tmp_path / "moved" / "recipe.json").read_text()
    assert output(model, objective, workload, loaded).isfinite().all()


def test_other_masks_and_other_canvases_are_refused(
    model: VideoDiT, objective: Frames, workload: Workload, tmp_path: Path
) -> None:
    few, most = found_on(model, objective, workload, tmp_path, 0.3, 0.8)
    larger = replace(objective, height=48)
    with torch.no_grad(), attach(model, RecipeMethod(recipe_of([(few, (0, 1))]))):
        with pytest.raises(ValueError, match="blocks of 16, but the masks have 16; they serve the resolution"):
            larger.run(model, workload.samples[1])
    swapped = Path(str(most.masks)).replace(tmp_path / Path(str(few.masks)).with_name("paro-0123.safetensors").name)
    with pytest.raises(ValueError, match="does not hold the masks that its name says"):
        output(model, objective, workload, recipe_of([(replace(few, masks=str(swapped)), (0, 1))]))
    with pytest.raises(ValueError, match="kind='masks' with masks=None"):
        MethodSpec("paro", {"density": 0.3}, kind="masks")


def test_advise_calibrates_masks_where_asked(
    model: VideoDiT, objective: Frames, workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_refusal", lambda *args: None)  # attention's share of so small a model is noise
    monkeypatch.setattr(inside, "times_of", times_by_pairs)
    monkeypatch.setattr("glocal.advise.climb.refined", lambda times, found: times)
    with pytest.raises(ValueError, match="'paro' alone gives no gains of layers"):
        advise(model, workload, objective=objective, options=AdviseOptions(methods=("paro",), min_tokens=64))
    effort = Effort("test", 2, 4, 1, (0.9,), 2, 2, 1, 0, show=True, rungs=1)
    options = AdviseOptions(methods=("paro", "tile_windows"), min_tokens=64, state=tmp_path / "state")
    found = advise(model, workload, objective=objective, effort=effort, options=options)
    assert {m.system for m in found.methods.values()} == {"paro", "tile_windows"}
    assert any(found.methods[r.method].system == "paro" for r in found.records)
    assert len(list((tmp_path / "state" / "masks").glob("paro-*.safetensors"))) == 5
