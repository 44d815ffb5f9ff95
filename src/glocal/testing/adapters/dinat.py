"""DiNAT and NAT (arXiv 2209.15001, 2204.07143): attention layers, whole models, parameter manifests."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.models import create_model
from glocal.models.vision.dinat import NAT, BlockSpec, DiNATs
from glocal.nn import NeighborhoodAttention2d, NeighborhoodSpec
from glocal.testing.adapter import Adapter, Run
from glocal.testing.adapters._maps import run_layer
from glocal.testing.adapters._models import manifest_of, published, with_state
from glocal.testing.case import Case


def run(case: Case, where: Run) -> dict[str, Tensor]:
    """Our results of one case."""
    if case.record is not None:
        with torch.device("meta"):
            made = create_model(case.name.removesuffix(".keys"))
        return manifest_of(made)
    return layer(case, where) if "state.qkv.weight" in case else model(case, where)


def layer(case: Case, where: Run) -> dict[str, Tensor]:
    """A layer with relative bias that pads small maps before the projection."""
    config = case.config
    made = NeighborhoodAttention2d(
        config["dim"],
        config["num_heads"],
        config["kernel_size"],
        dilation=config["dilation"],
        relative_bias=True,
        spec=NeighborhoodSpec(small_maps="pad", scale=config.get("qk_scale"), backend=where.backend),
    )
    return run_layer(case, made)


def model(case: Case, where: Run) -> dict[str, Tensor]:
    """A small model: logits, pooled features, and the map behind every level."""
    config = case.config
    spec = BlockSpec(
        config["kernel_size"], config["mlp_ratio"], config.get("layer_scale"), scale=config.get("qk_scale")
    )
    dilations = config["dilations"] and tuple(map(tuple, config["dilations"]))
    kind = DiNATs if "state.patch_embed.proj.weight" in case else NAT
    made = kind(
        config["embed_dim"],
        tuple(config["depths"]),
        tuple(config["num_heads"]),
        dilations,
        spec=spec,
        num_classes=config["num_classes"],
    )
    with_state(made, case, where.backend)
    with torch.no_grad():
        maps = made.maps(case["in.x"])
        features = made.pool(maps[-1])
        found = {"out.logits": made(case["in.x"]), "mid.features": features}
        for i, (level, x) in enumerate(zip(getattr(made, made.parts), maps, strict=True)):
            found[f"mid.level{i}"] = x if level.downsample is None else level.downsample(x)
    return found


def expected(case: Case) -> dict[str, Tensor]:
    """The published results; of a manifest, its names, shapes and number of parameters."""
    return case.results() if case.record is None else published(case)


ADAPTER = Adapter("dinat", run, expected=expected, attends=lambda case: case.record is None)
