"""NAT, DiNAT and DiNAT_s with the weights of a golden case: logits, levels behind their downsamplers, features."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from glocal.models.vision.dinat import NAT, BlockSpec, DiNATs
from glocal.nn import NeighborhoodAttention2d
from glocal.testing.adapters._backbones import caught, ready
from glocal.testing.case import Case


def run_model(case: Case, backend: str = "auto") -> dict[str, Tensor]:
    """The case's `out.logits`, `mid.level{i}` and `mid.features`."""
    config = case.config
    spec = BlockSpec(
        window=config["kernel_size"],
        mlp_ratio=config["mlp_ratio"],
        layer_scale=config.get("layer_scale"),
        scale=config.get("qk_scale"),
    )
    make = DiNATs if ":DiNAT_s" in case.source else NAT
    model = make(
        config["embed_dim"],
        tuple(config["depths"]),
        tuple(config["num_heads"]),
        config["dilations"],
        spec=spec,
        num_classes=config["num_classes"],
    )
    model = ready(model, case)
    for part in model.modules():
        if isinstance(part, NeighborhoodAttention2d):
            part.spec = replace(part.spec, backend=backend)
    levels = getattr(model, model.parts)
    parts = {f"mid.level{i}": level.downsample for i, level in enumerate(levels) if level.downsample is not None}
    found = caught(model, parts, lambda: model(case["in.x"]))
    with torch.no_grad():
        last = model.maps(case["in.x"])[-1]
        found |= {f"mid.level{len(levels) - 1}": last, "mid.features": model.pool(last), "out.logits": found.pop("")}
    return found
