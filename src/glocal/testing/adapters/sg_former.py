"""SG-Former (arXiv 2308.12216): pairs of attentions, block, stem and merging, tiny and full models, manifests.

Tokens are sorted by numbers that differ in their last digit: rounding alone changes their order, and with it the
result. Self-guided layers are given the stored map. In the full model the convolutions read contiguous maps, as the
authors' do, which gives the same order in the first stage; rounding of attention changes it from the second stage on,
so that the later levels only have to come out alike.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from glocal.models import create_model
from glocal.models.vision.sg_former import Block, BlockSpec, Merge, SGFormer, Stem
from glocal.nn.sg_former import HybridScaleAttention, PlainAttention, SelfGuidedAttention
from glocal.testing.adapter import Adapter, Run
from glocal.testing.adapters._backbones import expected, is_manifest, manifest_run, ready
from glocal.testing.case import Case
from glocal.testing.fill import fill_sorted
from glocal.testing.tolerance import FLOAT32


def run(case: Case, where: Run) -> Mapping[str, Tensor]:
    """Whatever the case is."""
    if is_manifest(case):
        return manifest_run(case.name.removesuffix(".keys"), case)
    with torch.no_grad():
        if case.name.startswith("attention_pair"):
            return _pair(case)
        if case.name.startswith("stem_merge"):
            return _stem_merge(case)
        if case.name.startswith("model"):
            return _tiny(case)
        return _full(case) if "variant" in case.config else _single(case)


def _map(case: Case, name: str) -> Tensor:
    """Tokens [B, H W, ...] of a case as a map."""
    side = case.name.rsplit("_", 1)[1].split("x")
    return case[name].unflatten(1, (int(side[0]), int(side[1])))


def _part(case: Case, name: str) -> dict[str, Tensor]:
    start = f"{name}."
    return {key.removeprefix(start): t for key, t in case.group("state").items() if key.startswith(start)}


def _pair(case: Case) -> dict[str, Tensor]:
    shape = (case.config["dim"], case.config["num_heads"], case.config["sr_ratio"])
    hybrid = ready(HybridScaleAttention(*shape), case, _part(case, "hybrid"))
    guided = ready(SelfGuidedAttention(*shape), case, _part(case, "guided"))
    y, significance = hybrid.measure(_map(case, "in.x"))
    after = guided.guided(_map(case, "in.x_guided"), _map(case, "mid.mask_rows"))
    return {
        "out.y": y.flatten(1, 2),
        "out.y_guided": after.flatten(1, 2),
        "mid.mask_rows": significance.flatten(1),
        "mid.mask_cols": significance.mT.flatten(1),
    }


def _single(case: Case) -> dict[str, Tensor]:
    """Plain attention, or a block with hybrid attention."""
    dim, heads = case.config["dim"], case.config["num_heads"]
    if case.name.startswith("attention_sr1"):
        return {"out.y": ready(PlainAttention(dim, heads), case)(_map(case, "in.x")).flatten(1, 2)}
    hybrid = HybridScaleAttention(dim, heads, case.config["sr_ratio"])
    block: nn.Module = ready(Block(dim, hybrid, BlockSpec(case.config["mlp_ratio"]), 0.0), case)
    x = _map(case, "in.x")
    stage = hybrid.begin(x)
    return {"out.y": block(x, stage).flatten(1, 2), "mid.mask_rows": stage[0].flatten(1)}


def _stem_merge(case: Case) -> dict[str, Tensor]:
    n = case.config["n"]
    stem, merge = ready(Stem(3, n), case, _part(case, "stem")), ready(Merge(n, 2 * n), case, _part(case, "merge"))
    x = stem(case["in.x"])
    return {"out.stem": x.flatten(1, 2), "out.merge": merge(x).flatten(1, 2)}


def _tiny(case: Case) -> dict[str, Tensor]:
    c = case.config
    dims, depths, heads, reductions = (tuple(c[n]) for n in ("embed_dims", "depths", "num_heads", "sr_ratios"))
    model = SGFormer(dims, depths, heads, reductions, num_classes=c["num_classes"])
    places = model.pos_embed.detach().clone()
    model = ready(model, case, {**case.group("state"), "pos_embed": places})
    maps = model.maps(case["in.x"])
    return {
        "mid.pos_embed_sample": model.pos_embed[0, ::97],
        "mid.p2": maps[2].flatten(1, 2),
        "out.p3": maps[3].flatten(1, 2),
        "out.logits": model.head(model.pool(maps[3])),
    }


def _full(case: Case) -> dict[str, Tensor]:
    model = create_model(case.config["variant"])
    manifest = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    weights = fill_sorted(manifest, case.config["seed"], keep=lambda name: name == "pos_embed")
    model = ready(model, case, {**weights, "pos_embed": model.state_dict()["pos_embed"].clone()})
    assert isinstance(model, SGFormer)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(lambda _layer, inputs: (inputs[0].contiguous(),))
    maps = model.maps(case["in.x"])
    means = {f"out.p{i}_mean": each.mean((1, 2)) for i, each in enumerate(maps)}
    return {"out.logits": model.head(model.pool(maps[-1])), **means}


def _tolerance(case: Case, name: str) -> float:
    if not case.name.startswith("full") or name == "out.p0_mean":
        return FLOAT32
    return 0.03 if name == "out.p1_mean" else 0.2  # another order of near-equal tokens, see above


ADAPTER = Adapter("sg_former", run, tolerance=_tolerance, expected=expected, attends=lambda case: False)
