"""vLLM-Omni: a plug-in of its entry point group `vllm_omni.sparse_attn`, and the parameters that carry a recipe there.

The plug-in is called as ``fn(query, key, value, params, is_causal, softmax_scale)`` on [B, N, H, D]; `params` bring the
step, their number and the grid, but no layer, component or branch: only recipes that are alike in all layers go this
way. Its attention strategies carry layers; whether the version that is installed takes a plug-in as a preset is asked
of it, and nothing is written where it cannot answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from glocal.adapt.records import RunState, Site, SiteCall
from glocal.advise.export.common import Exported, as_progress, layers_of, refuse, sparse_rules
from glocal.advise.methods import MethodSpec
from glocal.advise.recipe import Recipe, RecipeError
from glocal.canvas import Canvas, Layout

NAME = "vllm-omni"


def to_vllm_omni(recipe: Recipe) -> Exported:
    """`{"sparse_attn": {"name": "glocal", "params": ...}}` of a recipe that is alike in all layers, heads, branches.

    RecipeError names the rule that is not.
    """
    phases = []
    for number, rule in sparse_rules(recipe, NAME):
        if rule.heads != "all":
            raise refuse(NAME, number, f"names heads {list(rule.heads)}; its plug-ins are told no heads.")
        if rule.branch != "both":
            raise refuse(NAME, number, f"holds for the {rule.branch} branch; its plug-ins are told no branch.")
        components = {r.component for r in recipe.rules}
        if len(components) > 1:
            raise refuse(NAME, number, f"is of {rule.component}; its plug-ins are not told which of {len(components)}.")
        count = layers_of(recipe, rule.component)
        first, last = (rule.layers[0][0], rule.layers[-1][1]) if rule.layers else (0, -1)
        if first != 0 or len(rule.layers) != 1 or (count is not None and last != count - 1):
            raise refuse(NAME, number, f"names layers {[list(p) for p in rule.layers]}; {_strategies()}")
        start, end = as_progress(recipe, rule.phase, NAME, number)
        phases.append({"from": start, "to": end, "method": recipe.methods[rule.use].to_json()})
    params = {"recipe": recipe.id, "phases": sorted(phases, key=lambda p: p["from"])}
    params["min_tokens"] = recipe.fallback.min_tokens
    lost = [
        "Noise levels: phases are shares of the steps of a run.",
        "Weights, device and evidence are not checked there.",
    ]
    if layers_of(recipe, recipe.rules[0].component) is None:
        lost.append("The recipe does not say how many layers there are; all run alike.")
    return Exported({"sparse_attn": {"name": "glocal", "params": params}}, tuple(lost))


def _strategies() -> str:
    """Why the way that carries layers is closed, in the words of what is installed."""
    try:
        have = version(NAME)
    except PackageNotFoundError:
        return "its plug-ins are told no layer, and its attention strategies are not to be asked: it is not installed."
    try:
        module = import_module("vllm_omni.attention.strategies")
        takes = getattr(module, "accepts_plugin_preset", None)
    except ImportError:
        takes = None
    if takes is None:
        return f"its plug-ins are told no layer, and version {have} does not say that a preset may be a plug-in."
    return f"its plug-ins are told no layer; version {have} would take presets, whose form this library does not write."


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: Mapping[str, Any],
    is_causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """The plug-in: query, key, value [B, N, H, D] -> [B, N, H, D].

    params: those of `to_vllm_omni`, and `step`, `total`, `grid` of the call. Dense where no phase holds, the grid does
    not account for the tokens, or there are too few. RecipeError for params that are not ours.
    """
    if "phases" not in params:
        raise RecipeError(f"params has {sorted(params)}; legal: what glocal export --to {NAME} writes.")
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # [B, H, N, D]
    method = _method(params)
    layout = _layout(params.get("grid"), k.shape[2])
    if method is None or layout is None or is_causal or q.shape[2] != k.shape[2] or k.shape[2] < params["min_tokens"]:
        out = scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)
    site = Site("vllm_omni", 0, q.shape[1], q.shape[3], kv_heads=k.shape[1], scale=softmax_scale)
    with torch.no_grad():
        return method.run(q, k, v, SiteCall(site, layout, RunState()))[0].transpose(1, 2)


# What a caller may count on: no mask, every query sees keys of the whole sequence.
sparse_attention.capabilities = {"supports_attention_mask": False, "supports_full_attn_spans": False}  # type: ignore[attr-defined]


def _method(params: Mapping[str, Any]) -> MethodSpec | None:
    step, total = params.get("step"), params.get("total")
    at = 0.0 if step is None or not total else step / total
    for phase in params["phases"]:
        whole = phase["from"] <= 0 and phase["to"] >= 1
        if whole or (step is not None and total and phase["from"] <= at < phase["to"]):
            return MethodSpec.from_json(phase["method"])
    return None


def _layout(grid: Any, tokens: int) -> Layout | None:
    """Where the tokens lie: the grid, other tokens behind it."""
    if grid is None:
        return None
    shape = tuple(int(n) for n in grid)
    rest = tokens
    for n in shape:
        rest = rest if n else 0
    size = int(torch.tensor(shape).prod())
    return None if size > rest else Layout.of(Canvas(shape, after=tokens - size))
