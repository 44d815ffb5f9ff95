"""TeaCache: forwards that change little are skipped, each branch on its own; nothing skipped is the untouched model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from glocal.adapt import attach, rectified_spaattn
from glocal.adapt.rectified_spaattn import SpaSettings
from glocal.adapt.teacache import PRESETS, TeaCache, TeaSettings, teacache

from .hosts.exam import run
from .test_pipelines import generate, wan
from .test_sparse_methods import FLUX, HUNYUAN, WAN, made

NEVER = TeaSettings((0.0, 1.0), -1.0, signal="time")
ALWAYS = TeaSettings((0.0, 0.0), 1.0, signal="time")


def test_nothing_skipped_changes_nothing() -> None:
    pipe = wan(boundary_ratio=0.8)
    plain, method = generate(pipe), TeaCache(NEVER)
    with attach(pipe, method):
        assert torch.equal(generate(pipe), plain)
    assert (method.skipped, method.computed) == (0, 8)


def test_the_first_and_last_step_are_computed() -> None:
    pipe = wan()
    plain, method = generate(pipe, 6), TeaCache(ALWAYS)
    with attach(pipe, method):
        assert not torch.equal(generate(pipe, 6), plain)
        assert (method.skipped, method.computed) == (8, 4)  # two calls a step: four steps of six are skipped
        again = generate(pipe, 6)
        assert torch.equal(generate(pipe, 6), again)  # a run begins without memory
    assert torch.equal(generate(pipe, 6), plain)


@pytest.mark.parametrize("exam", [WAN, HUNYUAN, FLUX])
def test_a_skipped_forward_adds_what_the_last_one_added(exam: Any, generator: torch.Generator) -> None:
    model, given = made(exam, generator)
    lower = {**given, "timestep": given["timestep"] * 0.99}
    method = TeaCache(ALWAYS if exam is WAN else replace(ALWAYS, signal="modulated"))
    with torch.no_grad(), attach(model, method):
        first = run(model, given)
        second = run(model, lower)
        assert (method.skipped, method.computed) == (1, 1)
    # the same input at another time: blocks add the same, the head at the end knows the time
    assert not torch.equal(first, second)
    if exam is WAN:
        block = model.get_submodule("blocks.1")
        outputs: list[torch.Tensor] = []
        hook = block.register_forward_hook(lambda *call: outputs.append(call[-1]))
        with torch.no_grad(), attach(model, TeaCache(ALWAYS)):
            run(model, given)
            run(model, lower)
        hook.remove()
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)


def test_the_published_settings_and_the_change_that_adds_up(generator: torch.Generator) -> None:
    assert [p.settings.threshold for p in PRESETS.values()] == [0.15, 0.8, 0.2, 0.3]
    model, given = made(HUNYUAN, generator)
    rising = TeaSettings((0.1,), 0.25)  # each step adds a tenth: two of three are skipped
    method = TeaCache(rising)
    with torch.no_grad(), attach(model, method):
        for n in range(7):
            run(model, {**given, "timestep": given["timestep"] - n})
    assert (method.skipped, method.computed) == (4, 3)
    wan_model, inputs = made(WAN, generator)
    with attach(wan_model, TeaCache(rising)), pytest.raises(ValueError, match="signal='modulated': .* legal: 'time'"):
        run(wan_model, inputs)
    with teacache(model) as handle:
        assert handle.method.settings == PRESETS["hunyuanvideo"].settings  # type: ignore[attr-defined]


def test_it_goes_with_tokens_along_a_curve() -> None:
    pipe = wan()
    spec = SpaSettings(drop=0.5, block=4)
    with rectified_spaattn(pipe, settings=spec):
        alone = generate(pipe)
        with attach(pipe, TeaCache(NEVER)):
            assert torch.equal(generate(pipe), alone)
        with attach(pipe, TeaCache(ALWAYS)):
            assert not torch.equal(generate(pipe), alone)
        assert torch.equal(generate(pipe), alone)
