"""GC ViT (arXiv 2206.09959): attention layers, query maker, stage, tiny, dense and full models, table resizing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import log2
from typing import Any

import torch
from torch import Tensor, nn

from glocal.models import create_model
from glocal.models.vision.gc_vit import BlockSpec, GCViT, Level
from glocal.nn.blocks import resize_flat_table
from glocal.nn.blocks.windows import from_windows, to_windows
from glocal.nn.gc_vit import GlobalQueries, GlobalQueryAttention
from glocal.nn.window_attention import WindowAttention, WindowSpec
from glocal.testing.adapter import Adapter, Run
from glocal.testing.adapters._backbones import expected, is_manifest, manifest_run, ready
from glocal.testing.case import Case
from glocal.testing.fill import fill_sorted


def run(case: Case, where: Run) -> Mapping[str, Tensor]:
    """Whatever the case is."""
    if is_manifest(case):
        return manifest_run(case.name.removesuffix(".keys"), case)
    if "in.table" in case:
        return {"out.table": resize_flat_table(case["in.table"], case.config["window_size"])}
    if "in.cotangent" in case or "state.relative_position_bias_table" in case:
        return _layer(case)
    with torch.no_grad():
        if "out.q" in case:
            dim, heads, window = (case.config[name] for name in ("dim", "num_heads", "window_size"))
            made = _filled(GlobalQueries(dim, heads, window, _pools(case.config)), case)
            return {"out.q": made(case["in.x"].permute(0, 2, 3, 1))}
        if "depth" in case.config:
            return _stage(case)
        return _full(case) if "variant" in case.config else _tiny(case)


def _pools(c: Mapping[str, Any]) -> int:
    """How often the authors' query maker halves a map of `input_resolution` in an image of `image_resolution`."""
    deep = round(log2(c["image_resolution"] / c["input_resolution"])) - 2  # 0 for the first stage
    if deep < 2:
        return 3 - deep
    return 1 if deep == 2 and c["window_size"] != c["input_resolution"] else 0


def _spec(c: Mapping[str, Any]) -> BlockSpec:
    """What the blocks of a stage or a model share."""
    attention = WindowSpec(qkv_bias=c.get("qkv_bias", True), scale=c.get("qk_scale"))
    return BlockSpec(
        c["mlp_ratio"], c.get("layer_scale"), relative_bias=c.get("use_rel_pos_bias", True), attention=attention
    )


def _filled(layer: Any, case: Case, prefix: str = "") -> Any:
    """A layer with the case's weights; indices that the authors' constructor makes are left out."""
    state = {f"{prefix}{n}": t for n, t in case.group("state").items() if not n.endswith("relative_position_index")}
    layer.load_state_dict(state, strict=True)
    return layer.to(case["in.x"].device).eval()


def _layer(case: Case) -> dict[str, Tensor]:
    """Windows are put side by side to images: [B * windows, N, C] -> maps of one row of windows."""
    dim, heads, side = (case.config[name] for name in ("dim", "num_heads", "window_size"))
    kind = GlobalQueryAttention if case["state.qkv.weight"].shape[0] == 2 * dim else WindowAttention
    spec = WindowSpec(qkv_bias=case.config.get("qkv_bias", True), scale=case.config.get("qk_scale"))
    layer = _filled(kind(dim, heads, side, relative_bias=True, spec=spec), case)
    x = case["in.x"].clone().requires_grad_()
    queries = case["in.q_global"].clone().requires_grad_() if "in.q_global" in case else None
    b = 1 if queries is None else queries.shape[0]
    size, sides = (side, side * x.shape[0] // b), (side, side)
    y = layer(from_windows(x.unflatten(0, (b, -1)), size, sides), queries)
    y = to_windows(y, sides).flatten(0, 1)
    if "in.cotangent" not in case:
        return {"out.y": y.detach()}
    y.backward(case["in.cotangent"])
    given = {"grad.x": x.grad, "grad.q_global": None if queries is None else queries.grad}
    return {"out.y": y.detach(), **{name: t for name, t in given.items() if t is not None}}


def _stage(case: Case) -> dict[str, Tensor]:
    c = case.config
    down, pools = c.get("downsample", True), _pools(c)
    count = 2 if down else 1  # the last level of a model has no downsampler
    spec = replace(_spec(c), pools=(pools,) * count)
    depths, heads, windows = (c["depth"], 1), (c["num_heads"],) * count, (c["window_size"],) * count
    level = GCViT(c["dim"], depths[:count], heads, windows, spec=spec).levels[0]
    assert isinstance(level, Level)
    level = _filled(level, case)
    x = case["in.x"]
    stage = level.begin(x)
    for block in level.blocks:
        x = block(x, stage)
    return {"out.y": x if level.downsample is None else level.downsample(x), "mid.q_global": stage}


def _tiny(case: Case) -> dict[str, Tensor]:
    c = case.config
    dense = "out.logits" not in case
    shape = (c["dim"], tuple(c["depths"]), tuple(c["num_heads"]), tuple(c["window_size"]))
    sides = (c["resolution"] // 4 >> i for i in range(len(c["depths"])))
    sizes = ({"window_size": w, "input_resolution": n} for w, n in zip(c["window_size"], sides, strict=True))
    pools = tuple(_pools({"image_resolution": c["resolution"], **size}) for size in sizes)
    spec = replace(_spec(c), pools=pools)
    if dense:
        model = ready(GCViT(*shape, spec=spec, features_only=True), case)
        return {f"out.p{i}": each for i, each in enumerate(model(case["in.x"]))}
    model = ready(GCViT(*shape, spec=spec, num_classes=c["num_classes"]), case)
    maps = model.maps(case["in.x"])
    features = model.pool(maps[-1])
    found = {"mid.patch_embed": model.patch_embed(case["in.x"]), "out.features": features}
    return {**found, "out.logits": model.head(features), **_behind(model, maps, "mid.level{}")}


def _full(case: Case) -> dict[str, Tensor]:
    model = create_model(case.config["variant"])
    manifest = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tables = [name for name in manifest if name.endswith("relative_position_bias_table")]
    indices = {name.replace("bias_table", "index"): (1, 1) for name in tables}  # counted by the rule, never filled
    weights = fill_sorted(manifest | indices, case.config["seed"], extras=("tables", "gammas"), integers=indices)
    model = ready(model, case, weights)
    assert isinstance(model, GCViT)
    maps = model.maps(case["in.x"])
    behind = _behind(model, maps, "out.p{}_mean")
    return {"out.logits": model.head(model.pool(maps[-1])), **{name: x.mean((1, 2)) for name, x in behind.items()}}


def _behind(model: GCViT, maps: list[Tensor], name: str) -> dict[str, Tensor]:
    """Maps behind the downsampler of their level."""
    downs: list[nn.Module | None] = [level.downsample for level in model.levels]  # type: ignore[misc]
    return {name.format(i): x if d is None else d(x) for i, (x, d) in enumerate(zip(maps, downs, strict=True))}


ADAPTER = Adapter("gc_vit", run, expected=expected, attends=lambda case: False)
