"""BiFormer (arXiv 2303.08810): both routing operators, dense attention with LePE, tiny models, manifests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from glocal.models.vision.biformer import BiFormer, BiFormerSTL, BlockSpec
from glocal.nn.biformer import LepeAttention
from glocal.nn.bilevel_routing import BiLevelRoutingAttention, GridRoutingAttention, RoutingSpec
from glocal.nn.blocks import to_nchw, to_nhwc
from glocal.testing.adapter import Adapter, Run
from glocal.testing.adapters._backbones import expected, is_manifest, manifest_run, ready
from glocal.testing.case import Case

POOLING = {
    "identity": "none", "ada_avgpool": "adaptive_mean", "ada_maxpool": "adaptive_max", "avgpool": "mean",
    "maxpool": "max",
}  # fmt: skip


ATTENDS = {"topk", "topks"}  # what a config with routed attention has


def run(case: Case, where: Run) -> Mapping[str, Tensor]:
    """Whatever the case is."""
    if is_manifest(case):
        return manifest_run(case.name.removesuffix(".keys"), case)
    if "out.logits" in case:
        return _model(case, where)
    return _routed(case, where) if "topk" in case.config else _dense(case)


def _routed(case: Case, where: Run) -> dict[str, Tensor]:
    c, first = case.config, "state.qkv_linear.weight" in case
    spec = _routing(c, where, qk_dim=c.get("qk_dim"), pool=c.get("kv_per_win"))
    kind = GridRoutingAttention if first else BiLevelRoutingAttention
    layer = ready(kind(c["dim"], c["num_heads"], c["n_win"], c["topk"], spec), case)
    x = case["in.x"].clone().requires_grad_()
    tokens = to_nhwc(x) if first else x
    y = layer(tokens)
    y = to_nchw(y) if first else y
    weight = layer.qkv_linear.weight if isinstance(layer, GridRoutingAttention) else layer.qkv["qkv"].weight
    name = "qkv_linear" if first else "qkv.qkv"
    along = case["in.grad_out"] if "in.grad_out" in case else torch.zeros_like(y)
    grads = torch.autograd.grad(y, (x, weight), along)  # type: ignore[arg-type]
    routes = layer.routes(tokens.detach())
    found = {
        "out.y": y.detach(),
        "grad.x": grads[0],
        f"grad.{name}.weight": grads[1],
        "mid.routing_index": routes.index,
        "mid.routing_weight": routes.weight,
        "mid.attn": routes.attention,
    }
    return {name: value.detach() for name, value in found.items() if name in case}


def _routing(c: Mapping[str, Any], where: Run, qk_dim: int | None, pool: int | None) -> RoutingSpec:
    """The settings of a config; `pool` tokens a side, if it is more than the ratio beside it."""
    ratio = c.get("kv_downsample_ratio", 4)
    return RoutingSpec(
        qk_dim=qk_dim,
        scale=c.get("qk_scale"),
        lepe=c.get("side_dwconv", 5),
        out_proj=c.get("param_attention", "qkvo") == "qkvo",
        pooling=POOLING[c.get("kv_downsample_mode", "identity")],  # type: ignore[arg-type]
        pool=ratio if pool is None or pool < 1 else pool,
        soft=c.get("soft_routing", False),
        differentiable=c.get("diff_routing", False),
        backend=where.backend,
    )


def _dense(case: Case) -> dict[str, Tensor]:
    c = case.config
    first = case["state.qkv.weight"].dim() == 4
    layer = ready(LepeAttention(c["dim"], c["num_heads"], c["side_dwconv"], of_values=first, convs=first), case)
    with torch.no_grad():
        return {"out.y": to_nchw(layer(to_nhwc(case["in.x"]))) if first else layer(case["in.x"])}


def _model(case: Case, where: Run) -> dict[str, Tensor]:
    c = case.config
    count = len(c["embed_dim"])
    widths, pools = c.get("qk_dims", [None] * count), c.get("kv_per_wins", [None] * count)
    routing = tuple(_routing(c, where, width, pool) for width, pool in zip(widths, pools, strict=True))
    start = c.get("layer_scale_init_value", -1)
    spec = BlockSpec(
        c.get("n_win", 7),
        tuple(c["mlp_ratios"]),
        c["head_dim"],
        position=c.get("before_attn_dwconv", 3),
        mlp_dwconv=c.get("mlp_dwconv", False),
        layer_scale=start if start is not None and start > 0 else None,
        pre_norm=c.get("pre_norm", True),
        routing=routing,
    )
    shape = (tuple(c["embed_dim"]), tuple(c["depth"]), tuple(c["topks"]))
    if "n_wins" in c:
        batch = "state.norm.running_mean" in case
        spec = replace(spec, regions=c["n_wins"][0], position=0, form="nchw", norm="batch" if batch else "layer")
        model: nn.Module = BiFormerSTL(*shape, spec=spec, num_classes=c["num_classes"])
    else:
        model = BiFormer(*shape, spec=spec, num_classes=c["num_classes"])
    model = ready(model, case)
    with torch.no_grad():
        maps = model.maps(case["in.x"])
        return {"out.logits": model(case["in.x"]), **{f"mid.stage{i}": to_nchw(each) for i, each in enumerate(maps)}}


ADAPTER = Adapter(
    "biformer",
    run,
    expected=expected,
    attends=lambda case: not is_manifest(case) and ATTENDS & set(case.config) != set(),
)
