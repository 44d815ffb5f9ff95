"""STViT (arXiv 2211.11167): super token attention, a block, tiny models, a full one by weight rule, manifests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glocal.models import create_model
from glocal.models.vision.stvit import Block, BlockSpec, STViT
from glocal.nn.blocks import to_nchw, to_nhwc
from glocal.nn.super_tokens import Refine, SuperTokenAttention
from glocal.testing.adapter import Adapter, Run
from glocal.testing.adapters._backbones import is_manifest, manifest_expected, manifest_run, ready
from glocal.testing.case import Case
from glocal.testing.fill import fill_sorted

FIXED = "fold.weights"  # ends both names of the fixed kernels
SCALES = {"pos_embed.conv.weight": 0.25, "mlp2.conv.conv.weight": 0.25, "mlp2.fc2.weight": 0.5, "running_var": 2.0}


def run(case: Case, where: Run) -> Mapping[str, Tensor]:
    """Whatever the case is."""
    if is_manifest(case):
        return manifest_run(case.name.removesuffix(".keys"), case)
    if "variant" in case.config:
        return _full(case)
    if "out.logits" in case:
        return _tiny(case)
    return _block(case) if "layerscale" in case.config else _attention(case)


def _weights(case: Case) -> dict[str, Tensor]:
    """The state of a layer without the fixed kernels."""
    return {name: value for name, value in case.group("state").items() if not name.endswith(FIXED)}


def _refine(c: Mapping[str, Any]) -> Refine:
    """What the authors' switches `refine` and `refine_attention` mean together."""
    if not c.get("refine", True):
        return "none"
    return "attention" if c.get("refine_attention", True) else "convolution"


def _made(c: Mapping[str, Any]) -> SuperTokenAttention:
    """The attention of a config."""
    cell, bias = (c["stoken_size"][0], c["stoken_size"][1]), c.get("qkv_bias", False)
    return SuperTokenAttention(c["dim"], c["num_heads"], cell, c["n_iter"], _refine(c), bias, c.get("qk_scale"))


def _attention(case: Case) -> dict[str, Tensor]:
    c = case.config
    layer = ready(_made(c), case, _weights(case))
    x = case["in.x"].clone().requires_grad_()
    y = to_nchw(layer(to_nhwc(x)))
    found = {"out.y": y.detach()}
    if "in.cotangent" in case:
        found["grad.x"] = torch.autograd.grad(y, x, case["in.cotangent"])[0]
    if "mid.affinity" in case:
        made = layer.associate(to_nhwc(x.detach()))
        found |= {"mid.affinity": made.affinity, "mid.super_tokens": to_nchw(made.tokens)}
    return found


def _block(case: Case) -> dict[str, Tensor]:
    c = case.config
    block = Block(c["dim"], _made(c), c["layerscale"], BlockSpec(c["mlp_ratio"]), 0.0)
    block = ready(block, case, _weights(case))
    with torch.no_grad():
        return {"out.y": to_nchw(block(to_nhwc(case["in.x"])))}


def _tiny(case: Case) -> dict[str, Tensor]:
    c = case.config
    names = ("embed_dim", "depths", "num_heads", "stoken_size", "n_iter", "layerscale")
    dims, depths, heads, cells, iterations, scales = (tuple(c[name]) for name in names)
    spec = BlockSpec(c["mlp_ratio"], c["qkv_bias"], c["init_values"], _refine(c))
    model = STViT(
        dims, depths, heads, cells, iterations, spec, c["num_classes"], layer_scales=scales, projection=c["projection"]
    )
    model = ready(model, case)
    with torch.no_grad():
        maps = model.maps(case["in.x"])
        return {
            "out.logits": model.head(model.pool(maps[-1])),
            "mid.patch_embed": to_nchw(model.patch_embed(to_nhwc(case["in.x"]))),
            **{f"out.p{i}": to_nchw(each) for i, each in enumerate(maps)},
        }


def _full(case: Case) -> dict[str, Tensor]:
    model = create_model(case.config["variant"])
    assert isinstance(model, STViT)
    manifest = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    blocks = [name.removesuffix("stoken_refine.proj.bias") for name in manifest if "stoken_refine.proj.bias" in name]
    manifest |= {f"{name}{kind}fold.weights": (9, 1, 3, 3) for name in blocks for kind in ("", "un")}
    state = fill_sorted(manifest, case.config["seed"], extras=("gammas",), keep=lambda name: name.endswith(FIXED))
    for ending, factor in SCALES.items():
        state |= {name: factor * value for name, value in state.items() if name.endswith(ending)}
    model = ready(model, case, state)
    with torch.no_grad():
        maps = model.maps(case["in.x"])
        means = {f"out.p{i}_mean": each.mean((1, 2)) for i, each in enumerate(maps)}
        return {"out.logits": model.head(model.pool(maps[-1])), **means}


def expected(case: Case) -> dict[str, Tensor]:
    """The published results; a manifest counts the fixed kernels as parameters, which ours are not."""
    if not is_manifest(case):
        return case.results()
    found = manifest_expected(case)
    fixed = sum(int(shape.prod()) for name, shape in found.items() if name.endswith(FIXED))
    return found | {"params": found["params"] - fixed}


ADAPTER = Adapter("stvit", run, expected=expected, attends=lambda case: False)
