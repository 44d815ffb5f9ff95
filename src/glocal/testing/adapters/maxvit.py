"""MaxViT (arXiv 2204.01697): partitions, resized tables, tiny models of the TensorFlow code, manifests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from glocal.models import create_model
from glocal.models.vision.maxvit import BlockSpec, MaxViT
from glocal.nn.blocks.layout import to_nchw
from glocal.nn.blocks.windows import from_windows, to_grid, to_windows
from glocal.nn.maxvit import AxisAttention
from glocal.testing.adapter import Adapter, Run
from glocal.testing.adapters._backbones import caught, expected, is_manifest, manifest_run, ready
from glocal.testing.case import Case
from glocal.testing.fill import fill_sorted


def run(case: Case, where: Run) -> Mapping[str, Tensor]:
    """Whatever the case is."""
    if is_manifest(case):
        return manifest_run(case.name.removesuffix(".keys"), case)
    with torch.no_grad():
        if "out.window" in case:
            sides = (case.config["size"],) * 2
            cut = {"out.window": to_windows(case["in.x"], sides), "out.grid": to_grid(case["in.x"], sides)}
            return {name: groups.flatten(0, 1).unflatten(1, sides) for name, groups in cut.items()}
        if "num_blocks" not in case.config and "variant" not in case.config:
            return _layer(case)
        return _full(case) if "variant" in case.config else _tiny(case)


def _layer(case: Case) -> dict[str, Tensor]:
    c = case.config
    side, dim = c["window"], c["hidden_size"]
    layer = AxisAttention(dim, dim // c["head_size"], "window", side, _trained(c, side), _shared(c))
    layer.load_state_dict(case.group("state"), strict=True)
    layer = layer.to(case["in.x"].device).eval()
    sides = (side, side)
    y = to_windows(layer(from_windows(case["in.x"][:, None], sides, sides)), sides)[:, 0]
    found = {"out.y": y, "mid.bias_full": layer.rel_pos(), "mid.bias_table_resized": layer.rel_pos.resized()}
    return {name: value for name, value in found.items() if name in case}


def _trained(c: Mapping[str, Any], side: int) -> int:
    """The side of windows that the table of a config is stored for."""
    large, small = map(int, c["scale_ratio"].split("/")) if c.get("scale_ratio") else (1, 1)
    return round(side * small / large)


def _shared(c: Mapping[str, Any]) -> bool:
    return c.get("rel_attn_type") == "2d_single_head"


def _tiny(case: Case) -> dict[str, Tensor]:
    c = case.config
    window, grid = c["window_size"], c["grid_size"]
    spec = BlockSpec(window, grid, c.get("head_size", 32), shared_bias=_shared(c), expansion=c.get("expansion_rate", 4))
    if c.get("scale_ratio"):
        spec = replace(spec, trained=_trained(c, window))
    made = MaxViT(tuple(c["hidden_size"]), tuple(c["num_blocks"]), tuple(c["stem_hsize"]), spec=spec,
                  num_classes=c["num_classes"])  # fmt: skip
    model = ready(made, case)
    maps = model.maps(case["in.x"])
    pooled = model.pool(maps[-1])
    found = {"out.logits": model.head(pooled), "out.pooled": pooled}
    found |= {f"out.stage{i + 1}": to_nchw(each) for i, each in enumerate(maps)}
    found |= {name: x.contiguous() for name, x in _pieces(model, case["in.x"]).items()}
    return {name: value for name, value in found.items() if name in case}


def _pieces(model: MaxViT, image: Tensor) -> dict[str, Tensor]:
    """Inside the first block."""
    block = model.get_submodule("stages.0.blocks.0")
    inside = {"mbconv": "conv", "block_attn": "attn_block.attn", "after_block_branch": "attn_block",
              "grid_attn": "attn_grid.attn"}  # fmt: skip
    parts = {f"mid.block00.{name}": block.get_submodule(place) for name, place in inside.items()}
    found = caught(model, {"mid.stem": model.stem, **parts}, lambda: model(image))
    return {name: to_nchw(x) for name, x in found.items() if name}


def _full(case: Case) -> dict[str, Tensor]:
    model = create_model(case.config["variant"])
    manifest = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model = ready(model, case, fill_sorted(manifest, case.config["seed"], extras=("tables", "gammas")))
    assert isinstance(model, MaxViT)
    maps = [model.stem(case["in.x"]), *model.maps(case["in.x"])]
    means = {f"out.p{i}_mean": each.mean((1, 2)) for i, each in enumerate(maps)}
    return {"out.logits": model.head(model.pool(maps[-1])), **means}


ADAPTER = Adapter("maxvit", run, expected=expected, attends=lambda case: False)
