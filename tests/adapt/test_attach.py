"""Methods go into a model and out of it without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glocal.adapt import Method, SiteCall, attach, host_of, open_handles
from glocal.adapt.records import Core
from glocal.models.generation.video_dit import VideoDiT

from .conftest import EVERY, AtCore, AtForward, AtLayer, AtModule, AtStep, tiny

LEVEL = torch.tensor([0.5])


def instance_state(model: nn.Module) -> dict[str, Any]:
    """What the instances themselves hold, hooks included; attaching must not leave anything there."""
    return {
        f"{name}.{key}": dict(value) if key.endswith("_hooks") else value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key in ("forward", "core") or key.endswith("_hooks")
    }


@pytest.mark.parametrize("method", EVERY)
def test_undo_restores_bit_for_bit(method: type[Method], model: VideoDiT, clip: Tensor) -> None:
    before, parts = model(clip, LEVEL), instance_state(model)
    handle = attach(model, method())
    assert handle.attached
    assert not torch.equal(model(clip, LEVEL), before)
    handle.undo()
    assert not handle.attached
    assert torch.equal(model(clip, LEVEL), before)
    assert instance_state(model) == parts
    handle.undo()  # a second time does nothing


def test_every_point_does_what_it_says(model: VideoDiT, clip: Tensor) -> None:
    plain = model(clip, LEVEL)
    with attach(model, AtCore(1.0)):
        assert torch.equal(model(clip, LEVEL), plain)
    with attach(model, AtCore()), attach(model, AtModule()):
        torch.testing.assert_close(model(clip, LEVEL), plain)
    with attach(model, AtForward()), attach(model, AtForward()):
        torch.testing.assert_close(model(clip, LEVEL), plain)
    with attach(model, AtLayer()):
        empty = model(clip, LEVEL)
    layers, model.blocks = model.blocks, nn.ModuleList()
    torch.testing.assert_close(model(clip, LEVEL), empty)
    model.blocks = layers


def test_a_missing_point_is_named(model: VideoDiT) -> None:
    parts = instance_state(model)
    words = (
        "AtStep acts at point 'step', which the host of VideoDiT does not offer; it offers core, forward, layer, module"
    )
    with pytest.raises(ValueError, match=words):
        attach(model, AtStep())
    assert instance_state(model) == parts
    assert open_handles(model) == {}


def test_the_handle_attached_last_acts_first(model: VideoDiT, clip: Tensor) -> None:
    order: list[str] = []

    class Named(Method):
        def __init__(self, name: str) -> None:
            self.name = name

        def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
            order.append(self.name)
            return inner(q, k, v, call)

    with attach(model, Named("first")), attach(model, Named("second")):
        model(clip, LEVEL)
    assert order == ["second", "first"] * 2


def test_a_later_method_may_replace_an_earlier_one(model: VideoDiT, clip: Tensor) -> None:
    class Zero(Method):
        def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
            return torch.zeros_like(v)

    below = AtCore()
    with attach(model, below):
        with attach(model, Zero()):
            model(clip, LEVEL)
        assert below.calls == []
        model(clip, LEVEL)
        assert len(below.calls) == 2


def test_undo_out_of_order_names_the_open_handle(model: VideoDiT, clip: Tensor) -> None:
    plain = model(clip, LEVEL)
    first, second = attach(model, AtCore()), attach(model, AtModule())
    assert list(open_handles(model)) == ["AtCore", "AtModule"]
    words = "Handle of AtCore cannot be undone: AtModule was attached later to the same model and is still open"
    with pytest.raises(RuntimeError, match=words):
        first.undo()
    assert first.attached
    second.undo()
    first.undo()
    assert torch.equal(model(clip, LEVEL), plain)
    assert open_handles(model) == {}


def test_two_models_do_not_touch_each_other(clip: Tensor) -> None:
    a, b = tiny(0), tiny(1)
    plain = a(clip, LEVEL), b(clip, LEVEL)
    on_a = attach(a, AtCore())
    on_b = attach(b, AtModule())
    on_a.undo()  # the older handle, but of another model
    assert torch.equal(a(clip, LEVEL), plain[0])
    assert not torch.equal(b(clip, LEVEL), plain[1])
    on_b.undo()
    assert torch.equal(b(clip, LEVEL), plain[1])


def test_an_exception_passes_through_and_undo_still_works(model: VideoDiT, clip: Tensor) -> None:
    class Breaks(Method):
        def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
            if call.site.layer == 1:
                raise FloatingPointError("in layer 1")
            return inner(q, k, v, call)

    plain, parts = model(clip, LEVEL), instance_state(model)
    with pytest.raises(FloatingPointError, match="in layer 1"), attach(model, Breaks()):
        model(clip, LEVEL)
    assert torch.equal(model(clip, LEVEL), plain)
    assert instance_state(model) == parts


def test_a_method_that_fails_to_attach_leaves_nothing(model: VideoDiT, clip: Tensor) -> None:
    class Refuses(AtCore):
        def forward(self, original: Any, state: Any) -> Any:
            raise LookupError("no")

    parts = instance_state(model)
    with pytest.raises(LookupError):
        attach(model, Refuses())
    assert instance_state(model) == parts
    assert open_handles(model) == {}


def test_no_wanted_site_is_an_error(model: VideoDiT) -> None:
    class Joint(AtCore):
        def sites(self, sites: Any) -> Any:
            return tuple(s for s in sites if s.kind == "joint")

    with pytest.raises(ValueError, match="Joint found no attention site it wants in VideoDiT"):
        attach(model, Joint())


def test_an_unknown_model_names_the_nearest_and_the_ways_out() -> None:
    class VideoDit(nn.Module):
        pass

    words = (
        r"No host adapter for .*VideoDit\. Known: .*video_dit\.VideoDiT.*Write one with glocal\.adapt\.register_host, "
        r"or put glocal\.adapt\.site\(\) where the model computes attention"
    )
    with pytest.raises(ValueError, match=words):
        host_of(VideoDit())


def test_subclasses_have_the_host_of_their_base(clip: Tensor) -> None:
    class Mine(VideoDiT):
        pass

    assert host_of(Mine()) is host_of(tiny())


def test_gradients_pass_a_dense_method_untouched(model: VideoDiT, clip: Tensor) -> None:
    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(clip, LEVEL).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    with attach(model, AtCore(1.0)):
        attached = gradients()
    assert len(plain) == len(attached) > 10
    assert all(torch.equal(a, b) for a, b in zip(plain, attached, strict=True))


def test_attach_needs_no_change_of_parameters(model: VideoDiT) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with attach(model, AtCore()):
        assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
