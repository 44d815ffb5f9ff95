"""`site` in a model of one's own: dense until a method is attached to the model that runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from glocal.adapt import Method, RunState, Site, SiteCall, attach, discover, site
from glocal.adapt.records import Core
from glocal.canvas import Canvas, Layout

from .conftest import AtCore, AtForward, AtLayer

CANVAS = Canvas((3, 4))
CANVAS_LAYOUT = Layout.of(CANVAS)


class Private(nn.Module):
    """Two attentions of 4 query heads and 2 key heads on a canvas of 3 x 4 tokens."""

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.level: float | None = None

    def forward(self, x: Tensor) -> Tensor:  # [B, 4, 12, 8]
        told = RunState(timestep=self.level)
        for name in ("first", "second"):
            call = SiteCall(Site(name, 7, 4, 8, scale=self.scale, kv_heads=2), CANVAS_LAYOUT, told)
            x = x + site(name, x, x[:, :2], x[:, 2:], canvas=CANVAS, call=call)
        return x


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return site("only", x, x, x, canvas=CANVAS)


@pytest.fixture
def x(generator: torch.Generator) -> Tensor:
    return torch.randn(1, 4, 12, 8, generator=generator)


def test_dense_until_attached(x: Tensor) -> None:
    assert torch.equal(site("a", x, x, x, canvas=CANVAS), scaled_dot_product_attention(x, x, x))
    assert torch.equal(Plain()(x), scaled_dot_product_attention(x, x, x))


def test_discover_lists_sites_in_order(x: Tensor) -> None:
    assert [(s.name, s.layer, s.heads, s.head_dim) for s in discover(Plain(), x)] == [("only", 0, 4, 8)]
    found = discover(Private(scale=0.5), x)
    assert [(s.name, s.layer, s.kv_heads, s.scale) for s in found] == [("first", 7, 2, 0.5), ("second", 7, 2, 0.5)]


def test_attach_and_undo(x: Tensor) -> None:
    model = Private(scale=0.5)
    plain = model(x)
    discover(model, x)
    assert torch.equal(model(x), plain)
    method = AtCore()
    handle = attach(model, method)
    assert not torch.equal(model(x), plain)
    assert [c.site.name for c in method.calls] == ["first", "second"]
    assert method.calls[0].layout.q == CANVAS
    assert method.calls[0].state is handle.state
    with attach(model, AtForward()):
        assert model(x.flip(1)).shape == x.shape
    handle.undo()
    assert torch.equal(model(x), plain)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_only_the_attached_model_changes(x: Tensor) -> None:
    a, b = Plain(), Plain()
    discover(a, x)
    plain = b(x)
    with attach(a, AtCore()):
        assert torch.equal(b(x), plain)
        assert torch.equal(site("only", x, x, x, canvas=CANVAS), plain)
        assert torch.equal(a(x), plain * 2)


def test_a_model_inside_another_keeps_its_own_sites(x: Tensor) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Plain()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + site("only", x, x, x, canvas=CANVAS)

    model = Outer()
    discover(model.inner, x)
    plain = model(x)
    with attach(model.inner, AtCore()):
        torch.testing.assert_close(model(x), plain * 1.5)  # inner doubled, outer as it was


def test_an_exception_leaves_no_model_running(x: Tensor) -> None:
    class Breaks(Method):
        def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
            raise FloatingPointError("no")

    model = Plain()
    discover(model, x)
    with attach(model, Breaks()), pytest.raises(FloatingPointError):
        model(x)
    assert torch.equal(site("only", x, x, x, canvas=CANVAS), scaled_dot_product_attention(x, x, x))


def test_state(x: Tensor) -> None:
    model = Private()
    discover(model, x)
    with attach(model, AtCore()) as handle:
        steps = []
        for level in (1.0, 0.5, 0.2, 1.0):
            model.level = level
            model(x)
            steps.append((handle.state.step, handle.state.timestep))
            handle.state.store["first", level] = 1
        assert steps == [(0, 1.0), (1, 0.5), (2, 0.2), (0, 1.0)]
        assert list(handle.state.store) == [("first", 1.0)]
        model.level = None  # nothing said: every forward is a run
        model(x)
        assert (handle.state.step, handle.state.store) == (0, {})


def test_errors(x: Tensor) -> None:
    with pytest.raises(ValueError, match="called no site in this run; put glocal.adapt.site"):
        discover(nn.Identity(), x)
    model = Plain()
    with pytest.raises(ValueError, match="show it once to glocal.adapt.discover"):
        attach(model, AtCore())
    discover(model, x)
    with pytest.raises(ValueError, match="AtLayer acts at point 'layer'.*offers core, forward"):
        attach(model, AtLayer())
    capped = SiteCall(Site("a", 0, 4, 8, softcap=30.0), CANVAS_LAYOUT, RunState())
    with pytest.raises(ValueError, match="site 'a': softcap=30.0 is nothing scaled_dot_product_attention computes"):
        site("a", x, x, x, canvas=CANVAS, call=capped)


def test_causal_and_scale_of_the_site(x: Tensor) -> None:
    call = SiteCall(Site("a", 0, 4, 8, causal=True, scale=0.1), CANVAS_LAYOUT, RunState())
    found = site("a", x, x, x, canvas=CANVAS, call=replace(call))
    assert torch.equal(found, scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.1))
