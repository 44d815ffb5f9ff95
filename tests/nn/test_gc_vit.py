from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glocal.nn.gc_vit import FusedInvertedResidual, GlobalQueries, GlobalQueryAttention
from glocal.nn.mixer import begin, mixer
from glocal.nn.window_attention import WindowAttention, WindowSpec
from glocal.testing.layer_tester import LayerTester


class Stage(torch.nn.Module):
    """The two mixers of a stage and the queries they share."""

    def __init__(self) -> None:
        super().__init__()
        self.mixers = torch.nn.ModuleList([mixer("gc_vit", 8, 2, block=j, window=3, pools=1) for j in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        stage = begin(self.mixers, x)
        return self.mixers[1](self.mixers[0](x, stage), stage)


class TestStage(LayerTester):
    shapes = ((2, 7, 9, 8), (1, 3, 3, 8))

    def make(self) -> Stage:
        return Stage()

    def bad(self):
        layer = GlobalQueryAttention(8, 2, 3)
        return [
            (lambda: layer(torch.zeros(2, 6, 6, 8)), "stage=None must be global queries of shape (2, 1, 2, 9, 4)"),
            (lambda: layer(torch.zeros(2, 6, 6, 8), torch.zeros(1, 1, 2, 9, 4)), "a tensor of shape (1, 1, 2, 9, 4)"),
            (lambda: FusedInvertedResidual(3), "dim=3 must be at least 4"),
            (lambda: GlobalQueries(8, 2, pools=-1), "pools=-1 must be at least 0"),
        ]


def test_own_queries_make_it_local(generator: torch.Generator) -> None:
    """With one window and that window's projected queries, global attention is window attention."""
    local, over = WindowAttention(8, 2, 4, relative_bias=True), GlobalQueryAttention(8, 2, 4)
    x = torch.randn(2, 4, 4, 8, generator=generator)
    state = local.state_dict()
    over.load_state_dict({n: t[8:] if n.startswith("qkv.") else t for n, t in state.items()})
    queries = local.qkv(x.flatten(1, 2))[..., :8].reshape(2, 1, 16, 2, 4).transpose(2, 3)
    assert torch.allclose(over(x, queries), local(x), atol=1e-6)


def test_each_image_has_its_own_queries(generator: torch.Generator) -> None:
    layer = GlobalQueryAttention(8, 2, 2)
    x, queries = torch.randn(3, 4, 6, 8, generator=generator), torch.randn(3, 1, 2, 4, 4, generator=generator)
    alone = torch.cat([layer(x[i : i + 1], queries[i : i + 1]) for i in range(3)])
    assert torch.allclose(layer(x, queries), alone, atol=1e-6)


@pytest.mark.parametrize(("size", "pools"), [((24, 24), 3), ((5, 11), 1), ((3, 3), 0)])
def test_queries_fill_one_window(size: tuple[int, int], pools: int) -> None:
    assert GlobalQueries(8, 2, 3, pools)(torch.zeros(2, *size, 8)).shape == (2, 1, 2, 9, 4)


def test_the_whole_map_by_a_pattern_gives_the_same() -> None:
    torch.manual_seed(0)
    cut, whole = (GlobalQueryAttention(8, 2, 3, spec=WindowSpec(backend=name)) for name in (None, "auto"))
    whole.load_state_dict(cut.state_dict())
    x, queries = torch.randn(2, 5, 9, 8), torch.randn(2, 1, 2, 9, 4)
    assert torch.allclose(whole(x, queries), cut(x, queries), atol=1e-5)


def test_whole_maps_under_autocast() -> None:
    """The queries of a stage are float32 there, keys and values are not."""
    layer = GlobalQueryAttention(16, 2, 4, spec=WindowSpec(backend="auto"))
    x, queries = torch.randn(1, 8, 8, 16), torch.randn(1, 1, 2, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x, queries)
    assert torch.allclose(found.float(), layer(x, queries), atol=5e-2)
