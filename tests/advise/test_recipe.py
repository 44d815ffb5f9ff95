"""Recipes: what is written comes back, what is broken is named, phases mean noise levels and not step numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glocal.advise.effort import AdviseOptions
from glocal.advise.methods import MethodSpec
from glocal.advise.recipe import LIMIT, Expected, Fallback, Phase, Queries, Recipe, RecipeError, Rule
from glocal.models.generation import SampleSpec, noise_levels

LOCAL = MethodSpec("gna", {"window": [{"fraction": 0.5}] * 3, "stride": [4, 4, 4]}, {"tile": [4, 4, 4]})
ROUTED = MethodSpec("pooled_topk", {"keep": 0.25}, kind="route")


def make() -> Recipe:
    return Recipe(
        "candidate",
        {"local": LOCAL, "routed": ROUTED},
        (
            Rule("local", ((0, 2), (4, 4)), (0, 2), Phase("sigma", 0.5, 0.9), expected=Expected(0.25, 0.9, 0.01, 0.4)),
            Rule("routed", ((0, 2),), (1,), Phase("progress", 0.25, 1.0), branch="cond"),
            Rule("routed", ((5, 5),), "all", Phase("prefill", 1024, 8192), component="text_model"),
            Rule("dense", ((3, 3),)),
        ),
        workload={"canvases": [{"shape": [16, 16, 16]}]},
        queries=Queries(text="as_media"),
        fallback=Fallback(min_tokens=64),
        evidence={"drift": {"mean": 0.05}},
    )


def test_round_trip(tmp_path: Path) -> None:
    recipe = make()
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
    text = (tmp_path / "recipe.json").read_text()
    assert Recipe.loads(text).dumps() == text
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.json"]


def test_the_id_covers_everything_but_the_evidence() -> None:
    recipe = make()
    more = recipe.with_evidence(created="today")
    assert more.id == recipe.id and more.evidence == {"drift": {"mean": 0.05}, "created": "today"}
    for other in (
        replace(recipe, status="validated"),
        replace(recipe, rules=recipe.rules[:-1]),
        replace(recipe, workload={}),
        replace(recipe, fallback=Fallback()),
    ):
        assert other.id != recipe.id


def edited(change: Callable[[dict[str, Any]], Any]) -> str:
    data = json.loads(make().dumps())
    change(data)
    return json.dumps(data)


def put(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (put("glocal.recipe/2", "schema"), r"r: schema='glocal.recipe/2'; this version reads 'glocal.recipe/1'"),
        (put(1, "rule"), r"r: field 'rule' is unknown; nearest: 'rules'"),
        (put("proven", "status"), r"status='proven'; legal: validated, candidate, dense"),
        (put("gnaa", "methods", "local", "system"), r"system='gnaa' is unknown; legal: dense, gna, .*; nearest: gna"),
        (put(3, "methods", "local", "params", "windw"), r"parameter 'windw' of system 'gna' is unknown; legal: window"),
        (put(3, "methods", "local", "blok"), r"field 'blok' is unknown; legal: .*; nearest: block"),
        (put("lokal", "rules", 0, "use"), r"rules\[0\].use='lokal' names no method; nearest: 'local'"),
        (put(1, "rules", 0, "laiers"), r"rules\[0\].laiers is unknown; nearest: 'layers'"),
        (put([3], "rules", 0, "layers"), r"rules\[0\]: needs use, layers as \[\[first, last\]\]"),
        (put("sometimes", "rules", 0, "phase"), r"rules\[0\].phase='sometimes'; legal: 'always' or"),
        (put({"coordinate": "sigma", "from": 0.1, "to": 0.9}, "rules", 0, "phase"), r"is empty: sigma falls"),
        (put({"coordinate": "sigma", "from": 0.1}, "rules", 0, "phase"), r"needs numbers from and to"),
        (put("left", "rules", 0, "branch"), r"rules\[0\].branch='left'; legal: both, cond, uncond"),
        (put("cross", "rules", 0, "site"), r"rules\[0\].site='cross'; legal: self, joint"),
        (put(1, "rules", 0, "expected", "time"), r"rules\[0\].expected.time is unknown; .* nearest: 'time_ratio'"),
        (put(1, "queries", "texts"), r"queries.texts is unknown; legal: text, registers"),
        (put(1, "fallback", "min_token"), r"fallback.min_token is unknown; .* nearest: 'min_tokens'"),
        (put([1, 2], "rules", 1, "heads"), r"rules\[0\] and rules\[1\] overlap: layers .*; rules must be disjoint"),
        (put(4096, "fallback", "min_tokens"), r"id='[0-9a-f]+' does not match its content .* edited by hand"),
        (put(None, "id"), r"id=None does not match its content"),
    ],
)
def test_broken_recipes_are_refused_by_name(change: Callable[[dict[str, Any]], None], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        Recipe.loads(edited(change), "r")


def test_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"recipe '.*none.json' does not exist"):
        Recipe.load(tmp_path / "none.json")
    with pytest.raises(RecipeError, match="r is not JSON"):
        Recipe.loads("{", "r")
    with pytest.raises(RecipeError, match="r: schema='list'"):
        Recipe.loads("[]", "r")
    with pytest.raises(RecipeError, match="r: schema=None"):
        Recipe.loads("{}", "r")


def test_overlap_is_judged_by_all_coordinates() -> None:
    base = Rule("local", ((0, 4),), (0, 1), Phase("sigma", 0.2, 0.6))
    for other in (
        replace(base, layers=((5, 9),)),
        replace(base, heads=(2,)),
        replace(base, phase=Phase("sigma", 0.6, 1.0)),
        replace(base, component="transformer_2"),
        replace(base, site="joint"),
    ):
        Recipe("candidate", {"local": LOCAL}, (base, other))
    cond, uncond = replace(base, branch="cond"), replace(base, branch="uncond")
    Recipe("candidate", {"local": LOCAL}, (cond, uncond))
    for other in (replace(base, heads="all"), replace(base, phase=Phase()), cond):
        with pytest.raises(RecipeError, match="overlap"):
            Recipe("candidate", {"local": LOCAL}, (base, other))


def at(recipe: Recipe, sigma: float | None, progress: float | None = None, layer: int = 0, head: int = 0) -> str:
    return recipe.method_at(
        layer, head, component="transformer", kind="self", branch="cond", sigma=sigma, progress=progress
    )


@pytest.mark.parametrize("steps", [4, 8, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_phases_map_to_other_step_counts_and_schedules(steps: int, shift: float) -> None:
    recipe = make()
    for sigma in noise_levels(SampleSpec(steps=steps, shift=shift))[:-1]:
        assert (at(recipe, sigma) == "local") == (0.5 < sigma <= 0.9)


def test_ranges_are_half_open_and_unknown_coordinates_do_not_hold() -> None:
    recipe = make()
    assert [at(recipe, s) for s in (0.5, 0.5001, 0.9, 0.9001)] == ["dense", "local", "local", "dense"]
    assert [at(recipe, None, p, head=1) for p in (0.2499, 0.25, 0.999)] == ["dense", "routed", "routed"]
    assert at(recipe, None) == "dense"
    assert at(recipe, 0.7, layer=9) == "dense" and at(recipe, 0.7, head=3) == "dense"
    assert Phase("prefill", 10, 20).holds(sigma=None, progress=None, tokens=10)
    assert not Phase("prefill", 10, 20).holds(sigma=None, progress=None, tokens=20)


def test_a_recipe_has_a_size_limit(tmp_path: Path) -> None:
    big = replace(make(), host={"notes": "x" * LIMIT})
    with pytest.raises(RecipeError, match=rf"recipe.json would have \d+ bytes; the limit is {LIMIT}"):
        big.save(tmp_path / "recipe.json")
    assert not list(tmp_path.iterdir())


def test_a_level_at_an_edge_stays_on_its_side_in_float32() -> None:
    for number in range(1, 50):
        edge = 6 * (number / 50) / (1 + 5 * number / 50)
        seen = float(torch.tensor(edge))
        below, above = Phase("sigma", 0.0, edge), Phase("sigma", edge, 1.0)
        assert below.holds(sigma=seen, progress=None) and not above.holds(sigma=seen, progress=None)
    assert Phase("sigma", 0.5, 1.0).holds(sigma=1.0, progress=None)


@pytest.mark.parametrize(
    ("kind", "given", "named", "told"),
    [
        (Phase, ("sigmaa", 0, 1), {}, "phase.coordinate='sigmaa'; legal: always, sigma, progress, prefill"),
        (Phase, ("sigma", 1, 0), {}, "phase.low=1 lies above high=0; low is the smaller, of sigma too"),
        (Rule, ("w", ((0, 1),)), {"branch": "conditional"}, "rule.branch='conditional'; legal: both, cond, uncond"),
        (Rule, ("w", (0, 1)), {}, r"rule.layers=\(0, 1\); legal: inclusive ranges, such as \(\(0, 5\), \(8, 8\)\)"),
        (Rule, ("w", ((3, 1),)), {}, r"rule.layers=\(\(3, 1\),\); legal: inclusive ranges"),
        (MethodSpec, ("radial",), {"kind": "rout"}, "methods: kind='rout' is unknown; legal: pattern, route, masks"),
        (AdviseOptions, (), {"keep_dense": "blocks.0*"}, r"keep_dense='blocks.0\*'; legal: a tuple of words"),
    ],
)
def test_records_made_in_python_are_checked_as_those_of_files(
    kind: Callable[..., object], given: tuple[Any, ...], named: dict[str, Any], told: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        kind(*given, **named)
