"""DuoFormer (arXiv 2506.12982): tokens of regions, attentions, blocks, both transformers, a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

import torch
from torch import Tensor, nn

from glocal.models.vision._duoformer import BlockSpec, FirstFormer, Former, MultiscaleFormer, ScaleBlock
from glocal.models.vision.duoformer import Shrink
from glocal.nn.blocks import to_nhwc
from glocal.nn.duoformer import GroupAttention, TwofoldAttention, region_tokens
from glocal.testing.adapter import Adapter, Run
from glocal.testing.adapters._backbones import expected, is_manifest, manifest_run, ready
from glocal.testing.case import Case


def run(case: Case, where: Run) -> Mapping[str, Tensor]:
    """Whatever the case is."""
    if is_manifest(case):
        return manifest_run(case.name.removesuffix(".keys"), case)
    with torch.no_grad():
        if "in.f0" in case:
            maps = [to_nhwc(case[f"in.f{k}"]) for k in (3, 2, 1, 0)]
            return {f"out.tokens{n}": region_tokens(maps[:n]) for n in (2, 3, 4)}
        if "out.logits" in case:
            return _former(case)
        if "in.cls" in case:
            return _twofold(case)
        if "state.conv1.weight" in case:
            count = sum(name.endswith("weight") for name in case.group("state"))
            return {"out.y": ready(Shrink(case["in.x"].shape[1], count), case)(case["in.x"])}
        return {"out.y": _layer(case)(case["in.x"])}


def _layer(case: Case) -> nn.Module:
    c = case.config
    bias = c.get("qkv_bias", True)
    if "state.norm1.weight" not in case:
        return ready(GroupAttention(c["dim"], c["num_heads"], None, bias), case)
    spec = BlockSpec(c.get("mlp_ratio", 4.0), bias, layer_scale=c.get("init_values"))
    return ready(ScaleBlock(c["dim"], c["num_heads"], spec), case)


def _twofold(case: Case) -> dict[str, Tensor]:
    layer = ready(
        TwofoldAttention(case.config["dim"], case.config["num_heads"], case.config.get("qkv_bias", True)), case
    )
    regions = case["in.x_region"][:, :, 0]  # the summary of each region
    first = layer.among(torch.cat((case["in.cls"][:, 0], regions), 1)[:, None] + case["in.pos"])
    again = layer.among(first)
    return {"out.scale": layer(case["in.x"]), "out.region_first": first[:, 0], "out.region_next": again[:, 0]}


def _former(case: Case) -> dict[str, Tensor]:
    c, x = case.config, case["in.x"]
    old = not any(name.startswith("scaleBlocks.") for name in case.group("state"))
    kind: type[FirstFormer] | type[MultiscaleFormer] = FirstFormer if old else MultiscaleFormer
    head = nn.Linear(c["embed_dim"], c["num_classes"])
    scaled = any(".ls1." in name for name in case.group("state"))
    start = c.get("init_values", 1e-5) if scaled else None
    spec = BlockSpec(c.get("mlp_ratio", 4.0), c.get("qkv_bias", True), layer_scale=start)
    former: Former = ready(
        kind(c["embed_dim"], c["depth"], c["num_heads"], x.shape[2], isqrt(x.shape[1]), spec, head), case
    )
    side = isqrt(x.shape[1])
    regions = former.regions(x, _call).unflatten(1, (side, side))
    return {"out.logits": former.head(former.among(regions, _call, slice(0, 1))[:, 0])}


def _call(block: nn.Module, *args: object) -> Tensor:
    return block(*args)


ADAPTER = Adapter("duoformer", run, expected=expected, attends=lambda case: False)
