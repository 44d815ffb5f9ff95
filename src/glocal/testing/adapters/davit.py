"""DaViT (arXiv 2204.03645): attention layers, blocks, tiny and full models, manifests of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glocal.models import create_model
from glocal.models.vision.davit import Block, BlockSpec, DaViT
from glocal.nn.channel_attention import ChannelAttention, ChannelForm
from glocal.nn.window_attention import WindowAttention, WindowSpec
from glocal.testing.adapter import Adapter, Run
from glocal.testing.adapters._backbones import expected, is_manifest, manifest_run, ready
from glocal.testing.case import Case
from glocal.testing.fill import fill_sorted


def run(case: Case, where: Run) -> Mapping[str, Tensor]:
    """Whatever the case is."""
    if is_manifest(case):
        return manifest_run(case.name.removesuffix(".keys").lower(), case)
    if "dim" in case.config:
        return _block(case) if "state.norm1.weight" in case else _layer(case)
    return _full(case) if "variant" in case.config else _tiny(case)


def _layer(case: Case) -> dict[str, Tensor]:
    c = case.config
    form, bias, dynamic = _form(c), c.get("qkv_bias", True), c.get("dynamic_scale", True)
    layer = ready(ChannelAttention(c["dim"], c["num_heads"], form, bias, dynamic), case)
    x = case["in.x"].clone().requires_grad_()
    y = layer(x)
    if "in.cotangent" not in case:
        return {"out.y": y.detach()}
    y.backward(case["in.cotangent"])
    assert x.grad is not None
    return {"out.y": y.detach(), "grad.x": x.grad}


def _form(config: Mapping[str, Any]) -> ChannelForm:
    """Which channel attention a config asks for; only the second form knows of a dynamic scale."""
    return "v2" if "dynamic_scale" in config or config.get("channel_attn_v2", False) else "v1"


def _block(case: Case) -> dict[str, Tensor]:
    c = case.config
    dim, heads, (height, width), bias = c["dim"], c["num_heads"], c["size"], c.get("qkv_bias", True)
    attn: nn.Module = ChannelAttention(dim, heads, _form(c), bias)
    if "window_size" in c:
        attn = WindowAttention(dim, heads, c["window_size"], spec=WindowSpec(qkv_bias=bias))
    ffn = "state.mlp.fc1.weight" in case
    spec = BlockSpec(mlp_ratio=c.get("mlp_ratio", 4.0), ffn=ffn, cpe_act=c.get("cpe_act", False))
    block = ready(Block(dim, attn, spec, 0.0), case)
    with torch.no_grad():
        y = block(case["in.x"].unflatten(1, (height, width)))
    return {"out.y": y.flatten(1, 2)}


def _tiny(case: Case) -> dict[str, Tensor]:
    c = case.config
    shape = (tuple(c["embed_dims"]), tuple(c["depths"]), tuple(c["num_heads"]), c["overlapped_patch"])
    given = {name: c[name] for name in ("mlp_ratio", "qkv_bias", "ffn", "cpe_act") if name in c}
    types = tuple(c.get("attention_types", ("spatial", "channel")))
    spec = BlockSpec(window=c["window_size"], channel=_form(c), types=types, **given)
    state = case.group("state")
    norms = {name.removeprefix("dense."): value for name, value in state.items() if name.startswith("dense.")}
    trunk = {name: value for name, value in state.items() if not name.startswith("dense.")}
    model = ready(DaViT(*shape, spec=spec, num_classes=c["num_classes"]), case, trunk)
    x = case["in.x"]
    with torch.no_grad():
        found = {"out.logits": model(x)}
        if norms:
            dense = ready(DaViT(*shape, spec=spec, features_only=True), case, trunk | norms)
            found |= {f"out.p{i}": each for i, each in enumerate(dense(x))}
        return {name: value for name, value in found.items() if name in case}


def _full(case: Case) -> dict[str, Tensor]:
    model = create_model(case.config["variant"].lower())
    manifest = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model = ready(model, case, fill_sorted(manifest, case.config["seed"]))
    assert isinstance(model, DaViT)
    with torch.no_grad():
        maps = model.maps(case["in.x"])
        means = {f"out.p{i}_mean": each.mean((1, 2)) for i, each in enumerate(maps)}
        return {"out.logits": model.head(model.pool(maps[-1])), **means}


ADAPTER = Adapter("davit", run, expected=expected, attends=lambda case: False)
