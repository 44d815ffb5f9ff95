"""HiLo and LITv2 (arXiv 2205.13213): attention layers, merging, blocks, tiny and full models, manifests."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from glocal.models import create_model
from glocal.models.checkpoints import fill
from glocal.models.vision.hilo import Block, BlockSpec, LITv2
from glocal.nn.blocks.deformable import DeformableMerge
from glocal.nn.hilo import HiLo
from glocal.testing.adapter import Adapter, Run
from glocal.testing.adapters._backbones import caught, contiguous_convs, expected, is_manifest, manifest_run, ready
from glocal.testing.case import Case
from glocal.testing.fill import fill_sorted


def run(case: Case, where: Run) -> Mapping[str, Tensor]:
    """Whatever the case is."""
    if is_manifest(case):
        return manifest_run(case.name.removesuffix(".keys"), case)
    if "window_size" in case.config:
        return _layer(case)
    with torch.no_grad():
        if "input_resolution" in case.config:
            return _merge(case)
        if "H" in case.config:
            block = ready(
                Block(case.config["dim"], None, BlockSpec(mlp_ratio=case.config.get("mlp_ratio", 4.0)), 0.0), case
            )
            return {"out.y": block(case["in.x"].unflatten(1, (case.config["H"], -1))).flatten(1, 2)}
        return _full(case) if "variant" in case.config else _tiny(case)


def _layer(case: Case) -> dict[str, Tensor]:
    c = case.config
    shape = (c["dim"], c["num_heads"], c["window_size"], c["alpha"])
    layer = ready(HiLo(*shape, c.get("qkv_bias", False), c.get("qk_scale")), case)
    x = case["in.x"].clone().requires_grad_()
    y = layer(x.unflatten(1, (c["H"], c["W"]))).flatten(1, 2)
    if "in.cotangent" not in case:
        return {"out.y": y.detach()}
    y.backward(case["in.cotangent"])
    assert x.grad is not None
    return {"out.y": y.detach(), "grad.x": x.grad}


def _merge(case: Case) -> dict[str, Tensor]:
    layer = ready(DeformableMerge(case.config["dim"], 2 * case.config["dim"]), case)
    x = case["in.x"].unflatten(1, tuple(case.config["input_resolution"]))
    found = caught(layer, {"mid.offset": layer.dconv.conv_offset}, lambda: layer(x))
    return {"mid.offset": found["mid.offset"], "out.y": found[""].flatten(1, 2)}


def _tiny(case: Case) -> dict[str, Tensor]:
    c = case.config
    given = {name: c[name] for name in ("mlp_ratio", "qkv_bias") if name in c}
    spec = BlockSpec(windows=tuple(c["local_ws"]), alpha=c["alpha"], **given)
    shape = (c["embed_dim"], tuple(c["depths"]), tuple(c["num_heads"]))
    state = case.group("state")
    norms = {name.removeprefix("dense."): value for name, value in state.items() if name.startswith("dense.")}
    trunk = {name: value for name, value in state.items() if not name.startswith("dense.")}
    found = {}
    if "in.x" in case:
        model = LITv2(*shape, spec=spec, num_classes=c["num_classes"])
        fill(model, trunk, case.name)
        contiguous_convs(model)
        found["out.logits"] = model.to(case["in.x"].device).eval()(case["in.x"])
    if "in.x_dense" in case:
        dense = LITv2(*shape, spec=spec, features_only=True)
        fill(dense, trunk | norms, case.name)
        contiguous_convs(dense)
        maps = dense.to(case["in.x_dense"].device).eval()(case["in.x_dense"])
        found |= {f"out.p{i}": each for i, each in enumerate(maps)}
    return found


def _full(case: Case) -> dict[str, Tensor]:
    model = create_model(case.config["variant"])
    manifest = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model = ready(model, case, fill_sorted(manifest, case.config["seed"]))
    assert isinstance(model, LITv2)
    contiguous_convs(model)
    maps = model.maps(case["in.x"])
    means = {f"out.p{i}_mean": each.mean((1, 2)) for i, each in enumerate(maps)}
    return {"out.logits": model.head(model.pool(maps[-1])), **means}


ADAPTER = Adapter("hilo", run, expected=expected, attends=lambda case: False)
