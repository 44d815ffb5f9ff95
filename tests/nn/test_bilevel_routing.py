from __future__ import annotations

from dataclasses import replace
from math import ceil, prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.nn.biformer import ConvAttention, LepeAttention
from glocal.nn.bilevel_routing import BiLevelRoutingAttention, GridRoutingAttention, RoutingSpec, _kernel_size
from glocal.testing._common import close, draw
from glocal.testing.layer_tester import LayerTester


def gathered(layer: BiLevelRoutingAttention, x: Tensor) -> Tensor:
    """The definition, with a copy of the keys for every region that reads them."""
    (b, height, width, _), s, spec = x.shape, layer.regions, layer.spec
    h, w = ceil(height / s), ceil(width / s)
    x = F.pad(x, (0, 0, 0, w * s - width, 0, h * s - height))
    cells = x.reshape(b, s, h, s, w, -1).transpose(2, 3).reshape(b, s * s, h * w, -1)
    q, k, v = layer.qkv["qkv"](cells).split((layer.qk_dim, layer.qk_dim, layer.dim), -1)
    scores = (q.mean(2) * layer.scale) @ k.mean(2).transpose(-1, -2)
    if not spec.differentiable:
        scores = scores.detach()
    best, index = scores.topk(layer.top, -1)
    weight = best.softmax(-1)
    batch = torch.arange(b)[:, None, None]
    out = torch.zeros(b, s * s, h * w, layer.dim, dtype=x.dtype)
    keys, values = k[batch, index], v[batch, index]  # [b, regions, top, tokens, channels]
    if spec.soft:
        keys, values = (t * weight[..., None, None] for t in (keys, values))
    keys, values = keys.flatten(2, 3), values.flatten(2, 3)
    dk, dv = layer.qk_dim // layer.heads, layer.dim // layer.heads
    heads = []
    for i in range(layer.heads):
        a, c = slice(i * dk, i * dk + dk), slice(i * dv, i * dv + dv)
        p = (layer.scale * q[..., a] @ keys[..., a].transpose(-1, -2)).softmax(-1)
        heads.append(p @ values[..., c])
    out = torch.cat(heads, -1)
    whole = [t.reshape(b, s, s, h, w, -1).transpose(2, 3).reshape(b, s * h, s * w, -1) for t in (out, v)]
    assert layer.lepe is not None
    local = layer.lepe(whole[1].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return layer.wo((whole[0] + local)[:, :height, :width])


class Routed(LayerTester):
    """Choices follow the data: no single graph, and low precision may choose otherwise."""

    shapes = ((2, 10, 13, 8), (1, 3, 4, 8))

    def test_bfloat16(self) -> None:
        x = draw(self.shapes[0], 0, torch.bfloat16)
        exact, low = self.layer(torch.float64), self.layer(torch.bfloat16)
        for layer in (exact, low):  # rounding moves choices that are nearly equal: read every region
            assert isinstance(layer, BiLevelRoutingAttention | GridRoutingAttention)
            layer.top = prod(layer._cut(*x.shape[1:3])[0])
        close(low(x).double(), exact(x.double()), 0.05, "bfloat16")

    def test_compiles_in_one_graph(self) -> None:
        """Not in one: the choice stands between two."""
        layer = self.layer()
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager")
        x = draw(self.shapes[0], 0, torch.float32)
        a, b = (x.clone().requires_grad_() for _ in range(2))
        eager, other = layer(a), compiled(b)
        close(other, eager, 1e-5, "compiled")
        for y in (eager, other):
            y.backward(draw(y.shape, 1, torch.float32))
        assert a.grad is not None and b.grad is not None
        close(b.grad, a.grad, 1e-5, "compiled gradient")


class TestReleased(Routed):
    def make(self) -> BiLevelRoutingAttention:
        return BiLevelRoutingAttention(8, 2, regions=3, top=4, spec=RoutingSpec(lepe=3))

    def bad(self):
        return [
            (lambda: BiLevelRoutingAttention(8, 2, 2, 5), "top=5 must lie in [1, 4]"),
            (lambda: BiLevelRoutingAttention(8, 3), "heads=3 must divide dim=8"),
            (lambda: RoutingSpec(pooling="median"), "pooling='median'; legal: 'none'"),  # type: ignore[arg-type]
            (lambda: RoutingSpec(differentiable=True), "differentiable=True needs soft=True"),
            (lambda: RoutingSpec(lepe=4), "lepe=4 must be odd or 0, for example 5"),
        ]


class TestSoft(Routed):
    def make(self) -> BiLevelRoutingAttention:
        spec = RoutingSpec(qk_dim=4, lepe=3, soft=True, differentiable=True)
        return BiLevelRoutingAttention(8, 2, regions=3, top=4, spec=spec)


class TestPooled(Routed):
    def make(self) -> BiLevelRoutingAttention:
        return BiLevelRoutingAttention(8, 2, 3, 4, RoutingSpec(lepe=3, pooling="adaptive_max", pool=2))


class TestRefactored(Routed):
    def make(self) -> GridRoutingAttention:
        return GridRoutingAttention(8, 2, regions=3, top=4, spec=RoutingSpec(lepe=3))

    def bad(self):
        layer = self.make()
        return [
            (lambda: layer(torch.zeros(1, 2, 9, 8)), "map of 2 x 9 tokens has fewer than regions=3 a side"),
            (lambda: GridRoutingAttention(8, 2, spec=RoutingSpec(soft=True)), "spec may set scale, lepe and backend"),
        ]


class TestLepe(LayerTester):
    shapes = ((2, 7, 9, 8), (1, 3, 1, 8))

    def make(self) -> LepeAttention:
        return LepeAttention(8, 2)


class TestLepeOfValues(LayerTester):
    shapes = ((2, 7, 9, 8), (1, 3, 1, 8))

    def make(self) -> LepeAttention:
        return LepeAttention(8, 2, of_values=True, convs=True)


class TestConvolutions(LayerTester):
    shapes = ((2, 7, 9, 8), (1, 3, 1, 8))

    def make(self) -> ConvAttention:
        return ConvAttention(8)


SPECS = {
    "hard": RoutingSpec(lepe=3),
    "soft": RoutingSpec(lepe=3, soft=True),
    "soft with gradients": RoutingSpec(lepe=3, soft=True, differentiable=True),
    "other width": RoutingSpec(lepe=3, qk_dim=4, soft=True),
    "in blocks": RoutingSpec(lepe=3, block=16),
    "soft in blocks": RoutingSpec(lepe=3, block=16, soft=True, differentiable=True),
}


@pytest.mark.parametrize("name", SPECS)
def test_equals_the_gathered_definition(name: str, generator: torch.Generator) -> None:
    torch.manual_seed(0)
    layer = BiLevelRoutingAttention(8, 2, regions=3, top=4, spec=SPECS[name]).double()
    x = torch.randn(2, 10, 14, 8, generator=generator, dtype=torch.float64).requires_grad_()
    wanted, ours = gathered(layer, x), layer(x)
    assert torch.allclose(ours, wanted, atol=1e-10)
    grad = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    inputs = (x, layer.qkv["qkv"].weight)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True):  # type: ignore[arg-type]
        assert torch.allclose(a, b, atol=1e-9)


def test_all_regions_are_dense_attention(generator: torch.Generator) -> None:
    layer = BiLevelRoutingAttention(8, 2, regions=2, top=4, spec=RoutingSpec(lepe=0))
    x = torch.randn(1, 6, 4, 8, generator=generator)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in layer.qkv["qkv"](x.flatten(1, 2)).chunk(3, -1))
    dense = F.scaled_dot_product_attention(q, k, v, scale=8**-0.5).transpose(1, 2).reshape(x.shape)
    assert torch.allclose(layer(x), layer.wo(dense), atol=1e-5)


def test_both_operators_agree_where_regions_divide_the_map(generator: torch.Generator) -> None:
    spec = RoutingSpec(lepe=3)
    one, other = BiLevelRoutingAttention(8, 2, 3, 4, spec), GridRoutingAttention(8, 2, 3, 4, spec)
    state = {n.replace("qkv.qkv", "qkv_linear").replace("wo", "output_linear"): t for n, t in one.state_dict().items()}
    other.load_state_dict({n: t if "lepe" in n or t.dim() == 1 else t[:, :, None, None] for n, t in state.items()})
    x = torch.randn(2, 9, 12, 8, generator=generator)
    assert torch.allclose(one(x), other(x), atol=1e-5)


def test_moving_regions_moves_the_output(generator: torch.Generator) -> None:
    layer = BiLevelRoutingAttention(8, 2, regions=3, top=2, spec=RoutingSpec(lepe=0))
    x = torch.randn(1, 9, 6, 8, generator=generator)
    assert torch.allclose(layer(x.roll(3, 1)), layer(x).roll(3, 1), atol=1e-5)


@pytest.mark.parametrize("pooling", ["none", "adaptive_mean", "adaptive_max", "mean", "max"])
def test_routes_give_the_attention_that_ran(pooling, generator: torch.Generator) -> None:
    spec = RoutingSpec(lepe=0, pooling=pooling, pool=2)
    layer = BiLevelRoutingAttention(8, 2, regions=2, top=3, spec=spec)
    x = torch.randn(2, 8, 6, 8, generator=generator)
    found = layer.routes(x)
    keys = {"none": 12, "adaptive_mean": 4, "adaptive_max": 4}.get(pooling, 2)
    assert found.index.shape == (2, 4, 3) and found.attention.shape == (2, 2, 4, 12, 3 * keys)
    assert torch.allclose(found.weight.sum(-1), torch.ones(2, 4))
    v = layer._split(x).v.unflatten(-1, (2, 4))  # [B, regions, keys, heads, 4]
    values = v[torch.arange(2)[:, None, None], found.index].flatten(2, 3)
    out = torch.einsum("bhsnt,bsthd->bsnhd", found.attention, values).flatten(3)
    whole = out.reshape(2, 2, 2, 4, 3, 8).transpose(2, 3).reshape(x.shape)
    assert torch.allclose(layer.wo(whole), layer(x), atol=1e-5)


def test_blocks_for_kernels_pad_little() -> None:
    found = {tokens: _kernel_size(tokens) for tokens in (4, 16, 49, 64, 100, 361, 1369)}
    assert found == {4: 16, 16: 16, 49: 64, 64: 64, 100: 128, 361: 128, 1369: 128}


def test_pooling_larger_than_a_region_is_refused() -> None:
    layer = BiLevelRoutingAttention(8, 2, 3, 4, replace(SPECS["hard"], pooling="mean", pool=4))
    with pytest.raises(ValueError, match="pool=4 is more than a region of 2 x 3 tokens; largest: 2"):
        layer(torch.zeros(1, 6, 9, 8))
