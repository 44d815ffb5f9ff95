from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from glocal.models import create_model
from glocal.models.checkpoints import fill
from glocal.models.vision._duoformer import BlockSpec, FirstFormer, MultiscaleFormer
from glocal.models.vision.base import VisionBackbone
from glocal.models.vision.duoformer import DuoFormer
from glocal.testing import check
from glocal.testing._common import draw
from glocal.testing.backbone_tester import BackboneTester

SHAPE: dict[str, Any] = {"trunk": "resnet18", "dim": 16, "depth": 2, "heads": 2}


class TestDuoFormer(BackboneTester):
    unused = ("fc_norm.weight", "fc_norm.bias")
    # Attention without a norm makes rounding larger, how much depends on the processor: in float64 it stays small.
    dtype = torch.float64
    tolerance = 1e-9

    def make(self, **keywords: Any) -> DuoFormer:
        return DuoFormer(**SHAPE, **keywords)

    def model(self, **keywords: Any) -> VisionBackbone:
        """With batch norms that have seen images: without, values explode and attention without norm is a maximum."""
        model = super().model(**keywords).train()
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = None
        with torch.no_grad():
            model(draw((2, model.in_chans, 64, 64), 1, torch.float32))
        return model.eval()

    def bad(self):
        return [
            (lambda: DuoFormer(scales=5), "scales=5; legal: 2, 3, 4"),
            (lambda: DuoFormer(depth=0), "depth=0 must be at least 1"),
            (lambda: DuoFormer(token="learned"), "token='learned'; legal: 'channel', 'random'"),  # type: ignore[arg-type]
        ]


class TestLikeThePaper(BackboneTester):
    common = ((97, 131),)

    def make(self, **keywords: Any) -> DuoFormer:
        spec = BlockSpec(bare=False, norm=True, layer_scale=1e-5)
        return DuoFormer(**SHAPE, scales=4, token="random", spec=spec, **keywords)


class TestFirstVersion(BackboneTester):
    common = ((97, 131),)

    def make(self, **keywords: Any) -> DuoFormer:
        return DuoFormer(**SHAPE, scales=2, token="random", spec=BlockSpec(generation="first"), **keywords)


CASES = (
    "tokenise",
    "channel_projector_layer1",
    "scale_attention_p9_t22",
    "scale_block_t22",
    "multiscale_former_s3",
    "multiscale_former_s4",
    "multiscale_attention_t6",
    "multiscale_transformer_old_s2",
)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_code(case: str, golden: Callable[[str], Path]) -> None:
    found = check(golden(f"duoformer/{case}.safetensors"))
    assert found.passed, found.why or found.skipped


@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    [("duoformer_r50_2scales", 113.45e6, 26.5), ("duoformer_r50_3scales", 113_462_018, 93.5),
     ("duoformer_r50_4scales", 113_511_170, 366.1)],
)  # fmt: skip
def test_size_of_the_transformer(name: str, params: float, gmacs: float) -> None:
    """The published order of work computes all tokens in the last block of each kind; ours only those that are read."""
    with torch.device("meta"):
        model: Any = create_model(name)
        former = model.vision_transformer
        tokens, dim = former.pos_embed_for_scale.shape[2], 768
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            former.among(former.regions(torch.empty(1, 49, tokens, dim), call).unflatten(1, (7, 7)), call, slice(0, 1))
    assert sum(p.numel() for p in former.parameters()) == pytest.approx(params, rel=1e-4 if tokens == 6 else 0)
    saved = 49 * (tokens - 1) * (10 * dim**2 + 2 * tokens * dim)  # queries, output, feed-forward part, attention
    saved += 49 * (2 * dim**2 + 2 * 50 * dim)
    assert (counter.get_total_flops() / 2 + saved) / 1e9 == pytest.approx(gmacs, rel=0.02)


def call(block: Any, *args: Any) -> torch.Tensor:
    return block(*args)


def test_reads_torchvisions_names_in_the_trunk() -> None:
    model = DuoFormer(**SHAPE)
    wanted = {name: value + 1 for name, value in model.state_dict().items()}
    theirs = dict(enumerate(("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")))
    state = {}
    for name, value in wanted.items():
        for i, other in theirs.items():
            name = name.replace(f"resnet_projector.{i}.", f"resnet_projector.{other}.", 1)
        state[name] = value
    fill(model, state)
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_equal_regions_stay_equal(generator: torch.Generator) -> None:
    former = MultiscaleFormer(16, 2, 2, 6, spec=BlockSpec())
    torch.nn.init.zeros_(former.pos_embed)
    former.cls_token.data = torch.randn(1, 1, 16, generator=generator)
    out = former.among(former.cls_token.data[:, None].expand(2, 7, 7, 16), call)
    assert torch.allclose(out, out[:, :1].expand_as(out), atol=1e-6)


def test_the_first_version_reads_two_attentions_among_regions(generator: torch.Generator) -> None:
    model = FirstFormer(16, 4, 2, 6, head=torch.nn.Linear(16, 3))
    x = torch.randn(1, 49, 6, 16, generator=generator)
    model.head(model.among(model.regions(x, call).unflatten(1, (7, 7)), call, slice(0, 1))[:, 0]).sum().backward()
    read = [block.attn.qkv.weight.grad is not None for block in model.blocks]  # type: ignore[union-attr]
    assert read == [True, False, False, True]
