"""TeaCache: forwards that change little are skipped, each branch on its own; nothing skipped is the untouched model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from glocal.adapt import attach, rectified_spaattn
from glocal.adapt.rectified_spaattn import SpaSettings
from glocal.adapt.teacache import PRESETS, TeaCache, TeaSettings, teacache
from glocal.models.generation.video_dit import VideoDiT

from .hosts import test_diffusers_sd3, test_diffusers_unet
from .hosts.exam import run
from .test_pipelines import generate, wan
from .test_sparse_methods import COGVIDEOX, FLUX, HUNYUAN, WAN, made

SD3, UNET = test_diffusers_sd3.TestSD3, test_diffusers_unet.TestSD15

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


@pytest.mark.parametrize("exam", [WAN, HUNYUAN, FLUX, COGVIDEOX])
def test_a_skipped_forward_adds_what_the_last_one_added(exam: Any, generator: torch.Generator) -> None:
    model, given = made(exam, generator)
    lower = {**given, "timestep": given["timestep"] * 0.99}
    method = TeaCache(ALWAYS if exam in (WAN, COGVIDEOX) else replace(ALWAYS, signal="modulated"))
    with torch.no_grad(), attach(model, method):
        first = run(model, given)
        second = run(model, lower)
        assert (method.skipped, method.computed) == (1, 1)
    # the same input at another time: blocks add the same, the head at the end knows the time
    assert not torch.equal(first, second)
    if exam in (WAN, COGVIDEOX):
        block = model.get_submodule("blocks.1" if exam is WAN else "transformer_blocks.1")
        outputs: list[Any] = []
        hook = block.register_forward_hook(lambda *call: outputs.append(call[-1]))
        with torch.no_grad(), attach(model, TeaCache(ALWAYS)):
            run(model, given)
            run(model, lower)
        hook.remove()
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)


def test_the_published_settings_and_the_change_that_adds_up(generator: torch.Generator) -> None:
    thresholds = {name: preset.settings.threshold for name, preset in PRESETS.items()}
    assert [thresholds[n] for n in ("hunyuanvideo", "flux", "wan2.1-t2v-14b", "wan2.2-i2v")] == [0.15, 0.8, 0.2, 0.3]
    model, given = made(HUNYUAN, generator)
    rising = TeaSettings((0.1,), 0.25)  # each step adds a tenth: two of three are skipped
    method = TeaCache(rising)
    with torch.no_grad(), attach(model, method):
        for n in range(7):
            run(model, {**given, "timestep": given["timestep"] - n})
    assert (method.skipped, method.computed) == (4, 3)
    with teacache(model) as handle:
        assert handle.method.settings == PRESETS["hunyuanvideo"].settings  # type: ignore[attr-defined]


def test_what_does_not_fit_is_refused_before_a_run(generator: torch.Generator) -> None:
    rising = TeaSettings((0.1,), 0.25)
    model, given = made(WAN, generator)
    plain = run(model, given)
    with pytest.raises(ValueError, match="signal='modulated': WanTransformerBlock modulates outside .* legal: 'time'"):
        attach(model, TeaCache(rising))
    for exam in (SD3, UNET):  # blocks that return their streams in another order, or stand at several sizes
        with pytest.raises(ValueError, match=r"block '[\w.]+' is a \w+; legal: models of Wan, HunyuanVideo, FLUX.1"):
            attach(made(exam, generator)[0], TeaCache(replace(rising, signal="time")))
    with pytest.raises(ValueError, match="signal='tim' is unknown; legal: modulated, time; nearest: time"):
        TeaSettings((1.0,), 0.1, signal="tim")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="polynomial=.. must have a coefficient"):
        TeaSettings((), 0.1)
    with pytest.raises(ValueError, match="teacache: treshold=1 is unknown; legal: .*; nearest: threshold"):
        teacache(model, treshold=1)
    assert torch.equal(run(model, given), plain)


def test_experts_of_a_pipeline_have_settings_of_their_own() -> None:
    pipe = wan(boundary_ratio=0.8)
    with teacache(pipe, polynomial=(0.0,)) as handle:
        assert handle.method.settings.first_steps == PRESETS["wan2.2-t2v"].settings.first_steps == 3  # type: ignore[attr-defined]
        generate(pipe, 8)
        counted = (handle.method.computed, handle.method.skipped)  # type: ignore[attr-defined]
    # Noise levels above 0.8 are 4 of the 8 steps: the first expert computes 3 of them, the second its first one.
    assert counted == (8, 8)
    single = PRESETS["wan2.1-t2v-14b"]
    assert not single.fits(pipe) and single.settings.first_steps == 5


def test_the_built_in_model(model: VideoDiT, clip: torch.Tensor) -> None:
    def steps(count: int) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([model(clip, torch.tensor([1 - n / 10])) for n in range(count)])

    plain = steps(3)
    with attach(model, TeaCache(NEVER)):
        assert torch.equal(steps(3), plain)
    method = TeaCache(ALWAYS)
    with attach(model, method):
        cached = steps(3)
    assert torch.equal(cached[0], plain[0]) and not torch.equal(cached[1:], plain[1:])
    assert (method.computed, method.skipped) == (1, 2)
    assert torch.equal(steps(3), plain)


def test_compiled_blocks(generator: torch.Generator) -> None:
    model, given = made(WAN, generator)
    lower = [{**given, "timestep": given["timestep"] - n} for n in range(12)]
    method = TeaCache(TeaSettings((0.1,), 0.25, signal="time"))
    with torch.no_grad(), attach(model, method):
        plain = [run(model, one) for one in lower]
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, backend="eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for one, want in zip(lower, plain, strict=True):
                torch.testing.assert_close(run(compiled, one), want, rtol=0, atol=1e-6)
    assert (method.computed, method.skipped) == (8, 16)


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
