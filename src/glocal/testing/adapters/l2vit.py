"""L2ViT (arXiv 2501.16182): linear attention, convolutions, both blocks, a tiny model, manifests."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from glocal.models.vision.l2vit import BlockSpec, GlobalBlock, L2ViT, LocalBlock
from glocal.nn.linear_attention import EnhancedLinearAttention, LocalConcentration
from glocal.nn.window_attention import WindowAttention, WindowSpec
from glocal.testing.adapter import Adapter, Run
from glocal.testing.adapters._backbones import expected, is_manifest, manifest_run, ready
from glocal.testing.case import Case


def run(case: Case, where: Run) -> Mapping[str, Tensor]:
    """Whatever the case is."""
    if is_manifest(case):
        return manifest_run(case.name.removesuffix(".keys"), case)
    if "out.logits" in case:
        return _model(case)
    return _on_a_map(case) if "size" in case.config else _linear(case)


def _linear(case: Case) -> dict[str, Tensor]:
    c = case.config
    layer = ready(EnhancedLinearAttention(c["dim"], c["num_heads"], qkv_bias=c.get("qkv_bias", True)), case)
    x = case["in.x"].clone().requires_grad_()
    y = layer(x)
    weight = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    grads = torch.autograd.grad((y * weight).sum(), (x, layer.temperature))
    q, k, _ = layer.projected(x.detach())
    total = (q @ k.sum(-2)[..., None]).detach()  # [B, heads, N, 1]
    return {
        "out.y": y.detach(),
        "grad.x": grads[0],
        "grad.temperature": grads[1],
        "mid.denominator_before_clamp": total,
    }


def _on_a_map(case: Case) -> dict[str, Tensor]:
    c = case.config
    bias = c.get("qkv_bias", True)
    local = c.get("kernel_size", 7) if c.get("enhanced", True) else 0
    spec = BlockSpec(mlp_ratio=c.get("mlp_ratio", 4.0), qkv_bias=bias, local=local)
    if "in_features" in c:
        layer: nn.Module = LocalConcentration(c["in_features"], c["kernel_size"])
    elif "state.attn.temperature" in case:
        attn = EnhancedLinearAttention(c["dim"], c["num_heads"], qkv_bias=bias)
        layer = GlobalBlock(c["dim"], attn, spec, 0.0)
    else:
        window = WindowAttention(c["dim"], c["num_heads"], c["window_size"], spec=WindowSpec(qkv_bias=bias))
        layer = LocalBlock(c["dim"], window, spec, 0.0)
    with torch.no_grad():
        return {"out.y": ready(layer, case)(case["in.x"].unflatten(1, c["size"])).flatten(1, 2)}


def _model(case: Case) -> dict[str, Tensor]:
    c = case.config
    ratio = c["mlp_ratio"][0]
    dims, depths, heads = (tuple(c[name]) for name in ("dims", "depths", "num_heads"))
    spec = BlockSpec(window=c["window_size"], mlp_ratio=ratio)
    model = ready(L2ViT(dims, depths, heads, spec=spec, num_classes=c["num_classes"]), case)
    with torch.no_grad():
        found = {"out.logits": model(case["in.x"]), "out.features": model.pool(model.maps(case["in.x"])[-1])}
        return {name: value for name, value in found.items() if name in case}


ADAPTER = Adapter("l2vit", run, expected=expected, attends=lambda case: False)
