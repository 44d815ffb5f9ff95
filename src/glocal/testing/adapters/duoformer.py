"""DuoFormer (arXiv 2506.12982): tokens of regions, attentions, blocks, both transformers, a manifest."""

from __future__ import annotations

from collections.abc import Mapping

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
        if case.name == "tokenise":
            maps = [to_nhwc(case[f"in.f{k}"]) for k in (3, 2, 1, 0)]
            return {f"out.tokens{n}": region_tokens(maps[:n]) for n in (2, 3, 4)}
        if case.name.startswith("channel_projector"):
            return {"out.y": ready(Shrink(case["in.x"].shape[1], 2), case)(case["in.x"])}
        if case.name.startswith("scale_"):
            return {"out.y": _layer(case)(case["in.x"])}
        if case.name.startswith("multiscale_attention"):
            return _twofold(case)
        return _former(case)


def _layer(case: Case) -> nn.Module:
    dim, heads = case.config["dim"], case.config["num_heads"]
    if case.name.startswith("scale_attention"):
        return ready(GroupAttention(dim, heads), case)
    return ready(ScaleBlock(dim, heads, BlockSpec(layer_scale=case.config["init_values"])), case)


def _twofold(case: Case) -> dict[str, Tensor]:
    layer = ready(TwofoldAttention(case.config["dim"], case.config["num_heads"]), case)
    regions = case["in.x_region"][:, :, 0]  # the summary of each region
    first = layer.among(torch.cat((case["in.cls"][:, 0], regions), 1)[:, None] + case["in.pos"])
    again = layer.among(first)
    return {"out.scale": layer(case["in.x"]), "out.region_first": first[:, 0], "out.region_next": again[:, 0]}


def _former(case: Case) -> dict[str, Tensor]:
    c, x = case.config, case["in.x"]
    old = "_old_" in case.name
    kind: type[FirstFormer] | type[MultiscaleFormer] = FirstFormer if old else MultiscaleFormer
    head = nn.Linear(c["embed_dim"], c["num_classes"])
    former: Former = ready(kind(c["embed_dim"], c["depth"], c["num_heads"], x.shape[2], head=head), case)
    regions = former.regions(x, _call).unflatten(1, (7, 7))
    return {"out.logits": former.head(former.among(regions, _call, slice(0, 1))[:, 0])}


def _call(block: nn.Module, *args: object) -> Tensor:
    return block(*args)


ADAPTER = Adapter("duoformer", run, expected=expected, attends=lambda case: False)
