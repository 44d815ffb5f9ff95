"""DiNAT and NAT (arXiv 2209.15001, 2204.07143): attention layers, whole models, parameter manifests."""

from __future__ import annotations

from torch import Tensor

from glocal.nn import NeighborhoodAttention2d, NeighborhoodSpec
from glocal.testing.adapter import Adapter, Run
from glocal.testing.adapters._backbones import expected, is_manifest, manifest_run
from glocal.testing.adapters._dinat_models import run_model
from glocal.testing.adapters._maps import run_layer
from glocal.testing.case import Case


def run(case: Case, where: Run) -> dict[str, Tensor]:
    """Our results of one case."""
    if is_manifest(case):
        return manifest_run(case.name.removesuffix(".keys"), case)
    return layer(case, where) if "state.qkv.weight" in case else run_model(case, where.backend)


def layer(case: Case, where: Run) -> dict[str, Tensor]:
    """A layer with relative bias that pads small maps before the projection."""
    config = case.config
    made = NeighborhoodAttention2d(
        config["dim"],
        config["num_heads"],
        config["kernel_size"],
        dilation=config["dilation"],
        relative_bias="state.rpb" in case,
        spec=NeighborhoodSpec(
            small_maps="pad",
            qkv_bias=config.get("qkv_bias", True),
            scale=config.get("qk_scale"),
            backend=where.backend,
        ),
    )
    return run_layer(case, made)


ADAPTER = Adapter("dinat", run, expected=expected, attends=lambda case: not is_manifest(case))
