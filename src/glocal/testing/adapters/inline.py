"""InLine attention (arXiv 2412.06590): the layer in its three forms, tiny models of the four shapes, manifests."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from glocal.models.vision.inline import BlockSpec, InLineCSWin, InLineDeiT, InLinePVT, InLineSwin
from glocal.nn.inline import InLineAttention, InLineSpec, global_part
from glocal.ops.linear import features, linear_weights
from glocal.testing.adapter import Adapter, Run
from glocal.testing.adapters._backbones import expected, is_manifest, manifest_run, ready
from glocal.testing.case import Case

SIZES = {"_t": "_tiny", "_s": "_small", "_m": "_medium", "_b": "_base", "_l": "_large"}


def run(case: Case, where: Run) -> Mapping[str, Tensor]:
    """Whatever the case is."""
    if is_manifest(case):
        name = case.name.removesuffix(".keys")
        return manifest_run(re.sub(r"_[tsmbl](?=_|$)", lambda size: SIZES[size[0]], name), case)
    if "out.logits" in case:
        model = ready(_model(case), case)
        with torch.no_grad():
            return {"out.logits": model(case["in.x"])}
    return _layer(case)


def _layer(case: Case) -> dict[str, Tensor]:
    c = case.config
    lead = 1 if "window" in c else 0
    size = tuple(c["size"] if "size" in c else c.get("window_size", (c.get("window"),) * 2))
    split, bias = "state.kv.weight" in case, c.get("qkv_bias", True)
    spec = InLineSpec(c.get("kernel_func", "identity"), split_kv=split, qkv_bias=bias)
    layer = ready(InLineAttention(c["dim"], c["num_heads"], spec=spec), case)
    x = case["in.x"].clone().requires_grad_()
    y = layer.proj(layer.tokens(x, (size[0], size[1]), lead))
    found = {"out.y": y.detach()}
    if "grad.x" in case:
        weight = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
        found["grad.x"] = torch.autograd.grad((y * weight).sum(), x)[0]
    if "mid.attention_matrix" in case:
        found |= _inside(layer, x.detach())
    return found


@torch.no_grad()
def _inside(layer: InLineAttention, x: Tensor) -> dict[str, Tensor]:
    q, k, v = layer.project(x)
    a, b = (features(layer.spec.feature, t).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for t in (q, k))
    assert layer.residual is not None
    return {
        "mid.attention_matrix": linear_weights(a, b, layer.spec.norm),
        "mid.global_part_before_proj": global_part(q, k, v, layer.heads, layer.spec),
        "mid.kernel3x3": layer.residual(x.mean(1)),
    }


def _inline_blocks(words: str, depths: tuple[int, ...]) -> tuple[int, ...]:
    """How many blocks of each stage have InLine attention: all for I, none for S, for M the next of the digits behind
    the letters.
    """
    letters, digits = words[: len(depths)], iter(words[len(depths) :])
    found = {"I": lambda depth: depth, "S": lambda depth: 0, "M": lambda depth: int(next(digits))}
    return tuple(found[letter](depth) for letter, depth in zip(letters, depths, strict=True))


def _model(case: Case) -> nn.Module:
    c = case.config
    classes = c["num_classes"]
    if "InLineSwin" in case.source:
        depths = tuple(c["depths"])
        count = _inline_blocks(c["attn_type"], depths)
        shape = (c["embed_dim"], depths, tuple(c["num_heads"]), count, c["window_size"], BlockSpec(c["mlp_ratio"]))
        return InLineSwin(*shape, classes, img_size=c["img_size"])
    if "inline_pvt" in case.source:
        spec = BlockSpec(tuple(c["mlp_ratios"]), InLineSpec(split_kv=True, qkv_bias=c["qkv_bias"]))
        dims, depths, heads = (tuple(c[name]) for name in ("embed_dims", "depths", "num_heads"))
        kinds = tuple(letter == "I" for letter in c["attn_type"])
        return InLinePVT(
            dims, depths, heads, c["img_size"], spec=spec, num_classes=classes, inline=kinds,
            reductions=tuple(c["sr_ratios"]),
        )  # fmt: skip
    if "inline_deit" in case.source:
        shape = (c["embed_dim"], c["depth"], c["num_heads"], c["img_size"], c["patch_size"])
        return InLineDeiT(*shape, BlockSpec(c["mlp_ratio"]), classes)
    kinds = tuple(letter == "I" for letter in c["attn_type"])
    splits = (*c["split_size"][:-1], None)
    shape = (c["embed_dim"], tuple(c["depth"]), tuple(c["num_heads"]), kinds, splits, BlockSpec(c["mlp_ratio"]))
    return InLineCSWin(*shape, classes)


ADAPTER = Adapter("inline", run, expected=expected, attends=lambda case: False)
