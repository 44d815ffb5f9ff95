from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glocal.models import create_model
from glocal.models.checkpoints import fill
from glocal.models.vision.dinat import (
    DENSE_DILATIONS,
    NAT,
    BlockSpec,
    DiNATs,
    IsotropicNAT,
    gradual_dilations,
    largest_dilations,
)
from glocal.testing import check
from glocal.testing.backbone_tester import BackboneTester

TINY = {"depths": (2, 1), "heads": (2, 4), "drop_path": 0.1}


class TestNAT(BackboneTester):
    common = ((97, 131),)

    def make(self, **keywords: Any) -> NAT:
        return NAT(8, spec=BlockSpec(window=3, layer_scale=0.5), **TINY, **keywords)

    def bad(self):
        return [
            (lambda: NAT(8, (1, 1), (2,)), "NAT: heads=(2,) has 1 entries; it needs 2, one a stage"),
            (lambda: NAT(8, (1, 2), (2, 2), ((1,), (1,))), "dilations[1]=(1,) has 1 entries; level 1 has 2 blocks"),
            (lambda: NAT(9, (1,), (2,)), "heads=2 must divide dim=9"),
        ]


class TestDiNAT(BackboneTester):
    def make(self, **keywords: Any) -> NAT:
        return NAT(8, dilations=((1, 4), (2,)), spec=BlockSpec(window=3), **TINY, **keywords)


class TestDiNATs(BackboneTester):
    def make(self, **keywords: Any) -> DiNATs:
        return DiNATs(8, dilations=((1, 4), (2,)), spec=BlockSpec(window=3), **TINY, **keywords)


class TestIsotropic(BackboneTester):
    def make(self, **keywords: Any) -> IsotropicNAT:
        return IsotropicNAT(8, 2, 2, (1, 2), 0.1, BlockSpec(window=3), **keywords)


class TestFull(BackboneTester):
    sizes = ((48, 48),)
    common = ()

    def make(self, **keywords: Any) -> IsotropicNAT:
        return IsotropicNAT(8, 1, 2, None, 0.1, BlockSpec(window=3), full=True, **keywords)

    def bad(self):
        return [(lambda: self.make()(torch.zeros(1, 3, 64, 48)), "has a table for 3 x 3; give 48 x 48 px")]


@pytest.mark.parametrize("case", ["dinat_tiny_model", "nat_layerscale_model", "dinat_s_model"])
def test_equals_the_published_models(case: str, golden: Callable[[str], Path]) -> None:
    found = check(golden(f"dinat/{case}.safetensors"))
    assert found.passed and len(found.compared) >= 4, found.why or found.skipped


def test_all_dilations_one_is_nat() -> None:
    torch.manual_seed(0)
    nat = NAT(8, spec=BlockSpec(window=3), **TINY).eval()
    dinat = NAT(8, dilations=((1, 1), (1,)), spec=BlockSpec(window=3), **TINY).eval()
    dinat.load_state_dict(nat.state_dict())
    image = torch.randn(1, 3, 40, 52, generator=torch.Generator().manual_seed(1))
    assert torch.equal(nat(image), dinat(image))


def test_dilation_opens_the_whole_map() -> None:
    """Two blocks of window 7 on a 28 x 28 map: dilations (1, 1) reach 13 x 13 tokens, (1, 4) all of them."""
    reach = {}
    for dilation in (1, 4):
        torch.manual_seed(0)
        model = NAT(4, (2,), (2,), ((1, dilation),), 0.0).eval()
        tokens = torch.randn(1, 28, 28, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model.maps_of(tokens)[0][0, 14, 14].sum().backward()
        assert tokens.grad is not None
        seen = (tokens.grad[0].abs().sum(-1) > 0).nonzero()
        reach[dilation] = tuple((seen.max(0).values - seen.min(0).values + 1).tolist())
    assert reach == {1: (13, 13), 4: (28, 28)}


TRANSFORMERS = (
    ("patch_embed.proj", "dinat.embeddings.patch_embeddings.projection"),
    ("patch_embed.norm", "dinat.embeddings.norm"),
    ("levels", "dinat.encoder.levels"),
    ("blocks", "layers"),
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attn.proj", "attention.output.dense"),
    ("attn", "attention.self"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
    ("head", "classifier"),
)


def test_reads_the_layout_of_transformers() -> None:
    model = NAT(8, spec=BlockSpec(window=3, layer_scale=0.5), num_classes=3, **TINY)
    state, other = model.state_dict(), {}
    for name, value in state.items():
        renamed = "dinat.layernorm" + name[4:] if name.startswith("norm.") else name
        for ours, theirs in TRANSFORMERS:
            renamed = renamed.replace(ours, theirs, 1)
        if ".qkv." in renamed:
            for part, piece in zip(("query", "key", "value"), (value + 1).chunk(3)):
                other[renamed.replace("qkv", part)] = piece
        elif "gamma1" in renamed:
            both = torch.stack((value, state[name.replace("gamma1", "gamma2")])) + 1
            other[renamed.replace("gamma1", "layer_scale_parameters")] = both
        elif "gamma2" not in renamed:
            other[renamed] = value + 1
    wanted = {name: value + 1 for name, value in state.items()}
    fill(model, other)
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_gradual_dilations_take_turns() -> None:
    assert gradual_dilations((3, 4, 6, 5), DENSE_DILATIONS["detection"])[2] == (1, 3, 1, 5, 1, 7)


def test_largest_dilations_alternate() -> None:
    assert largest_dilations((3, 2), (8, 4)) == ((1, 8, 1), (1, 4))


def test_other_token_mixers_fit_in(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import torch\n\nclass Mine(torch.nn.Linear):\n    def __init__(self, dim, heads):\n"
                    "        super().__init__(dim, dim)\n\n    def forward(self, x, stage=None):\n"
                    "        return super().forward(x)\n")  # fmt: skip
    model: Any = create_model("nat_mini", num_classes=3, spec=BlockSpec(mixer=f"{file}:Mine"))
    assert type(model.levels[0].blocks[0].attn).__name__ == "Mine"
