"""DaViT (arXiv 2204.03645): attention layers, blocks, tiny and full models, manifests of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from glocal.models import create_model
from glocal.models.vision.davit import Block, BlockSpec, DaViT
from glocal.nn.channel_attention import ChannelAttention
from glocal.nn.window_attention import WindowAttention
from glocal.testing.adapter import Adapter, Run
from glocal.testing.adapters._backbones import expected, is_manifest, manifest_run, ready
from glocal.testing.case import Case
from glocal.testing.fill import fill_sorted


def run(case: Case, where: Run) -> Mapping[str, Tensor]:
    """Whatever the case is."""
    if is_manifest(case):
        return manifest_run(case.name.removesuffix(".keys").lower(), case)
    if case.name.startswith("channel_attention"):
        return _layer(case)
    if "_block_" in case.name:
        return _block(case)
    return _full(case) if "variant" in case.config else _tiny(case)


def _layer(case: Case) -> dict[str, Tensor]:
    form = "v2" if "dynamic_scale" in case.config else "v1"
    layer = ready(ChannelAttention(case.config["dim"], case.config["num_heads"], form), case)
    x = case["in.x"].clone().requires_grad_()
    y = layer(x)
    if "in.cotangent" not in case:
        return {"out.y": y.detach()}
    y.backward(case["in.cotangent"])
    assert x.grad is not None
    return {"out.y": y.detach(), "grad.x": x.grad}


def _block(case: Case) -> dict[str, Tensor]:
    dim, heads, (height, width) = (case.config[name] for name in ("dim", "num_heads", "size"))
    spatial = case.name.startswith("spatial")
    attn: nn.Module = (
        WindowAttention(dim, heads, case.config["window_size"]) if spatial else ChannelAttention(dim, heads)
    )
    block = ready(Block(dim, attn, BlockSpec(), 0.0), case)
    with torch.no_grad():
        y = block(case["in.x"].unflatten(1, (height, width)))
    return {"out.y": y.flatten(1, 2)}


def _tiny(case: Case) -> dict[str, Tensor]:
    c = case.config
    shape = (tuple(c["embed_dims"]), tuple(c["depths"]), tuple(c["num_heads"]), c["overlapped_patch"])
    spec = BlockSpec(window=c["window_size"])
    state = case.group("state")
    norms = {name.removeprefix("dense."): value for name, value in state.items() if name.startswith("dense.")}
    trunk = {name: value for name, value in state.items() if not name.startswith("dense.")}
    model = ready(DaViT(*shape, spec=spec, num_classes=c["num_classes"]), case, trunk)
    dense = ready(DaViT(*shape, spec=spec, features_only=True), case, trunk | norms)
    with torch.no_grad():
        maps = dense(case["in.x"])
        return {"out.logits": model(case["in.x"]), **{f"out.p{i}": each for i, each in enumerate(maps)}}


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
