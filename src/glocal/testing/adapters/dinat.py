"""DiNAT and NAT (arXiv 2209.15001, 2204.07143): the attention layers; the models are not built yet."""

from __future__ import annotations

from torch import Tensor

from glocal.nn import NeighborhoodAttention2d, NeighborhoodSpec
from glocal.testing.adapter import Adapter, Run
from glocal.testing.adapters._maps import run_layer
from glocal.testing.case import Case


def run(case: Case, where: Run) -> dict[str, Tensor]:
    """A layer with relative bias that pads small maps before the projection."""
    config = case.config
    spec = NeighborhoodSpec(small_maps="pad", scale=config.get("qk_scale"), backend=where.backend)
    made = NeighborhoodAttention2d(
        config["dim"],
        config["num_heads"],
        config["kernel_size"],
        dilation=config["dilation"],
        relative_bias=True,
        spec=spec,
    )
    return run_layer(case, made)


def layer(case: Case) -> bool:
    """Whether the case is one attention layer."""
    return "state.qkv.weight" in case


def skip(case: Case) -> str | None:
    """Whole models and their manifests."""
    return None if layer(case) else "the models NAT, DiNAT and DiNAT_s are not built yet"


ADAPTER = Adapter("dinat", run, skip=skip, attends=layer)
