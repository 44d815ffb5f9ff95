"""ModelOpt's `sparse_attention_config`, one for each component's config.json, read and written.

It holds one threshold a model: key blocks whose probabilities all lie below it are skipped (skip-softmax). No patterns,
no heads. Two forms are read: `config_groups.*.algorithm = skip_softmax` with `threshold_scale_factor` (divided by the
number of keys) or `threshold`, `ignore` and `initial_disabled_steps`; and the older `sparse_algo = softmax_skip` with a
top-level `threshold`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from glocal.adapt.records import Site
from glocal.advise.export.common import Exported, as_progress, layers_of, refuse, sparse_rules, steps_of
from glocal.advise.methods import MethodSpec
from glocal.advise.recipe import Phase, Recipe, RecipeError, Rule
from glocal.advise.rules import layer_ranges

KEY = "sparse_attention_config"
NEW, OLD = "skip_softmax", "softmax_skip"


def from_modelopt(
    config: Mapping[str, Any], sites: Sequence[Site], *, component: str = "transformer", steps: int | None = None
) -> Recipe:
    """The recipe, a candidate, that a `config.json` (or its `sparse_attention_config`) asks for.

    sites: of the component, so that `ignore` finds its layers. steps: of a run; needed where the first steps are
    disabled. RecipeError names the field, the value and what is legal.
    """
    found = config.get(KEY, config)
    groups = found.get("config_groups")
    if groups is None:
        if found.get("sparse_algo") != OLD:
            raise RecipeError(
                f"{KEY}.sparse_algo={found.get('sparse_algo')!r}; legal: {OLD!r}, or config_groups with algorithm "
                f"{NEW!r}."
            )
        groups = {"": {**found, "algorithm": NEW}}
    if len(groups) != 1:
        raise RecipeError(f"{KEY}.config_groups has {len(groups)} groups; legal: one, as a recipe reads one threshold.")
    name, group = next(iter(groups.items()))
    where = f"{KEY}.config_groups.{name}" if name else KEY
    if group.get("algorithm") != NEW:
        raise RecipeError(f"{where}.algorithm={group.get('algorithm')!r}; legal: {NEW!r}.")
    params = {k: float(group[k]) for k in ("threshold", "threshold_scale_factor") if k in group}
    if len(params) != 1 or not next(iter(params.values())) > 0:
        raise RecipeError(
            f"{where} has {params or 'no threshold'}; legal: exactly one of threshold and threshold_scale_factor, "
            "above 0."
        )
    method = MethodSpec("skip_softmax", params, kind="route")
    skipped = int(group.get("initial_disabled_steps", 0))
    phase = Phase()
    if skipped:
        if steps is None or not skipped < steps:
            raise RecipeError(
                f"{where}.initial_disabled_steps={skipped} with steps={steps}; legal: fewer than the steps."
            )
        phase = Phase("progress", skipped / steps, 1.0)
    globs = list(group.get("ignore", []))
    kept = [s for s in sites if s.kind != "cross" and not any(fnmatch(s.name, glob) for glob in globs)]
    rules = []
    for kind in ("self", "joint"):
        layers = sorted({s.layer for s in kept if s.kind == kind})
        if layers:
            rules.append(Rule(method.id, layer_ranges(layers), "all", phase, component, kind))
    if not rules:
        raise RecipeError(f"{where}.ignore={globs!r} leaves no attention site.")
    return Recipe("candidate", {method.id: method}, tuple(rules))


def to_modelopt(recipe: Recipe) -> Exported:
    """`sparse_attention_config` by component. RecipeError where a rule says more than one threshold a model."""
    target, lost = "modelopt", []
    made: dict[str, Any] = {}
    by_component: dict[str, list[tuple[int, Rule]]] = {}
    for number, rule in sparse_rules(recipe, target):
        method = recipe.methods[rule.use]
        if method.system != "skip_softmax":
            raise refuse(target, number, f"uses {method.words()}; it knows skip_softmax alone.")
        if rule.heads != "all":
            raise refuse(target, number, f"names heads {list(rule.heads)}; it knows no heads.")
        if rule.branch != "both":
            raise refuse(target, number, f"holds for the {rule.branch} branch; it knows no guidance branches.")
        by_component.setdefault(rule.component, []).append((number, rule))
    for component, rules in by_component.items():
        first_number, first = rules[0]
        start = 0.0
        for number, rule in rules:
            if (rule.use, rule.phase) != (first.use, first.phase):
                raise refuse(target, number, f"differs from rules[{first_number}]; it holds one threshold a model.")
            start, end = as_progress(recipe, rule.phase, target, number)
            if end < 1.0:
                raise refuse(target, number, f"ends at {end:.0%} of the run; it can only leave out first steps.")
        group: dict[str, Any] = {"algorithm": NEW, **recipe.methods[first.use].params}
        if start > 0:
            steps = steps_of(recipe)
            if steps is None:
                raise refuse(target, first_number, "begins late, and the recipe names no schedule to count steps in.")
            group["initial_disabled_steps"] = round(start * steps)
            lost.append(f"{component}: first steps are counted in the {steps} of the run the recipe was proven on.")
        count = layers_of(recipe, component)
        if count is None:
            count = 1 + max(last for _, rule in rules for _, last in rule.layers)
            lost.append(
                f"{component}: the recipe does not say how many layers there are; those above {count - 1} run sparse."
            )
        group["ignore"] = [f"*.{n}.*" for n in range(count) if not any(rule.covers(n) for _, rule in rules)]
        made[component] = {KEY: {"config_groups": {"group_0": group}}}
    lost += ["Canvases, devices, weights and evidence: the target runs its threshold anywhere.", *_queries(recipe)]
    return Exported(made, tuple(lost))


def _queries(recipe: Recipe) -> list[str]:
    return [] if recipe.queries.text == "as_media" else ["Queries of text tokens: they are no exception there."]
