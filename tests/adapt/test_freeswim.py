"""FreeSwim in tiny Wan models: windows by the published rule, both branches, the cache, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from glocal.adapt import Method, SiteCall, attach, freeswim
from glocal.adapt.freeswim import PRESETS, FreeSwimSettings, reach_of
from glocal.adapt.records import Core, Site
from glocal.canvas import Canvas, Layout
from glocal.models.generation.video_dit import VideoDiT

from .hosts.exam import Inputs, run
from .hosts.sizes import WAN as SIZES
from .test_pipelines import generate, wan
from .test_sparse_methods import FLUX, WAN, made

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")

NEAR = FreeSwimSettings(reach=(1, 1))
CACHED = FreeSwimSettings(reach=(1, 1), cache_steps=2)


def published_mask(frames: int, height: int, width: int, reach: tuple[int, int]) -> Tensor:
    """Who sees whom, by the rule as it is printed: what a border cuts off on one side is added on the other."""

    def axis(length: int, d: int) -> Tensor:
        seen = torch.zeros(length, length, dtype=torch.bool)
        for y in range(length):
            below, above = max(d - y, 0), max(d + y - length + 1, 0)
            seen[y, max(y - d - above, 0) : y + d + below + 1] = True
        return seen

    rows, columns = axis(height, reach[0]), axis(width, reach[1])
    whole = torch.ones(frames, frames)
    return torch.kron(torch.kron(whole, rows.float()), columns.float()).bool()


@pytest.mark.parametrize(
    ("shape", "reach"), [((2, 9, 11), (2, 3)), ((1, 7, 6), (3, 1)), ((2, 5, 6), (3, 2)), ((1, 4, 5), (0, 9))]
)
def test_windows_follow_the_printed_rule(shape: tuple[int, int, int], reach: tuple[int, int]) -> None:
    mask = FreeSwimSettings(reach).pattern(shape[0]).mask(Layout.of(Canvas(shape)))[0]
    assert torch.equal(mask, published_mask(*shape, reach))


class AsPublished(Method):
    """Both rows computed always, on a batch that was doubled outside: row 0 the window, row 1 the full branch."""

    def __init__(self, every: int | None) -> None:
        self.every, self.refresh, self.guided = every, True, True
        self.cache: dict[str, Tensor] = {}

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return sites

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        full = self.every is None or (self.guided and self.refresh)
        if call.site.kind == "self":
            scale = math.sqrt(math.log(3120, 1560) / q.shape[-1])
            mask = published_mask(*call.layout.q.grid.axes, (1, 1))  # type: ignore[misc]
            mine = scaled_dot_product_attention(q[:1], k[:1], v[:1], mask, scale=scale)
            theirs = scaled_dot_product_attention(q[1:], k[1:], v[1:], scale=scale) if full else mine
            return torch.cat([mine, theirs])
        if full:
            self.cache[call.site.name] = inner(q[1:], k[1:], v[1:], call)
        elif not self.guided:
            return inner(q, k, v, call)
        return self.cache[call.site.name].expand_as(q)


def steps_of(given: Inputs, count: int, generator: torch.Generator) -> list[Inputs]:
    """The same text at falling noise levels."""
    return [
        {
            **given,
            "hidden_states": torch.randn(given["hidden_states"].shape, generator=generator),
            "timestep": torch.full_like(given["timestep"], 900.0 - 100 * step),
        }
        for step in range(count)
    ]


@pytest.mark.parametrize("every", [None, 1, 2, 3])
def test_steps_equal_the_published_computation(every: int | None, generator: torch.Generator) -> None:
    model, given = made(WAN, generator, batch=1)
    other = torch.randn(1, 5, 16, generator=generator)
    steps, naive = steps_of(given, 4, generator), AsPublished(every)
    wanted: list[Tensor] = []
    with attach(model, naive):
        for number, step in enumerate(steps):
            naive.refresh = every is None or number % every == 0
            for naive.guided, text in ((True, step["encoder_hidden_states"]), (False, other)):
                twice = {n: torch.cat([t, t]) for n, t in {**step, "encoder_hidden_states": text}.items()}
                wanted.append(run(model, twice)[:1])
    rows: list[int] = []
    hook = model.get_submodule("blocks.0").register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with freeswim(model, settings=NEAR, cache_steps=every):
        ours = [
            run(model, {**s, "encoder_hidden_states": t})
            for s in steps
            for t in (given["encoder_hidden_states"], other)
        ]
    hook.remove()
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    dual = [2, 2] * 4 if every is None else [n for s in range(4) for n in (2 if s % every == 0 else 1, 1)]
    assert rows == dual  # rows that would be computed twice are left out


def test_windows_of_the_whole_map_are_the_scaled_model(generator: torch.Generator) -> None:
    class Scaled(Method):
        def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
            return scaled_dot_product_attention(q, k, v, scale=math.sqrt(math.log(3120, 1560) / q.shape[-1]))

    model, given = made(WAN, generator)
    plain = run(model, given)
    with attach(model, Scaled()):
        scaled = run(model, given)
    for settings, wanted in ((FreeSwimSettings(), scaled), (FreeSwimSettings(scale_tokens=None), plain)):
        with freeswim(model, settings=settings) as handle:
            torch.testing.assert_close(run(model, given), wanted, rtol=0, atol=1e-5)
            torch.testing.assert_close(handle.method.full_branch, wanted, rtol=0, atol=1e-5)  # type: ignore[attr-defined]
    assert not torch.allclose(scaled, plain, rtol=0, atol=1e-5)
    assert torch.equal(run(model, given), plain)


@pytest.mark.parametrize("settings", [NEAR, CACHED, FreeSwimSettings((1, 1), cache_steps=2, offload=True)])
def test_guidance_in_one_batch_equals_two_calls(settings: FreeSwimSettings, generator: torch.Generator) -> None:
    model, given = made(WAN, generator, batch=2)
    other = torch.randn(2, 5, 16, generator=generator)
    steps = steps_of(given, 3, generator)
    with freeswim(model, settings=settings if not settings.offload else CACHED):
        apart = [(run(model, s), run(model, s, encoder_hidden_states=other)) for s in steps]
    with freeswim(model, settings=settings):
        for (cond, uncond), step in zip(apart, steps, strict=True):
            both = {n: torch.cat([t, t]) for n, t in step.items()}
            both["encoder_hidden_states"] = torch.cat([other, step["encoder_hidden_states"]])
            torch.testing.assert_close(run(model, both), torch.cat([uncond, cond]), rtol=0, atol=1e-5)


def test_samples_do_not_touch(generator: torch.Generator) -> None:
    model, given = made(WAN, generator, batch=2)
    single = {n: t[:1] for n, t in given.items()}
    with freeswim(model, settings=CACHED):
        torch.testing.assert_close(run(model, given)[:1], run(model, single), rtol=0, atol=1e-5)


def test_images_are_overridden_too(generator: torch.Generator) -> None:
    model: nn.Module = diffusers.WanTransformer3DModel(**SIZES, image_dim=8, added_kv_proj_dim=24).eval()
    text = torch.randn(1, 512, 16, generator=generator)
    given = {**WAN().inputs(generator), "encoder_hidden_states": text}
    given["encoder_hidden_states_image"] = torch.randn(1, 4, 8, generator=generator)
    with freeswim(model, settings=CACHED) as handle:
        first = run(model, given)
        kept = [key for key in handle.state.store if key[0]]
        assert len(kept) == 4  # two layers, words and image each
        assert not torch.equal(run(model, {**given, "timestep": given["timestep"] - 100}), first)


def test_dual_steps_end_the_full_branch(generator: torch.Generator) -> None:
    model, given = made(WAN, generator, batch=1)
    first, second = steps_of(given, 2, generator)
    with freeswim(model, settings=NEAR, dual_steps=0):
        run(model, first)
        alone = run(model, second)
    with freeswim(model, settings=NEAR, dual_steps=1) as handle:
        run(model, first)
        assert handle.method.full_branch is not None  # type: ignore[attr-defined]
        assert torch.equal(run(model, second), alone)
        assert handle.method.full_branch is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("preset", [None, "wan2.1-1.3b-cached"])
def test_a_pipeline_runs_and_is_given_back(preset: str | None) -> None:
    pipe = wan()
    pipe.transformer_2 = None
    plain = generate(pipe)
    with freeswim(pipe, preset, reach=(0, 0)) as handle:
        out = generate(pipe)
        assert torch.equal(generate(pipe), out)  # a run of its own
        ran = handle.method.ran["transformer", "blocks.0.attn1"]  # type: ignore[attr-defined]
        assert ran.dense["full branch"] == (16 if preset is None else 4)  # two runs of four steps
    assert not torch.equal(out, plain)
    assert torch.equal(generate(pipe), plain)


def test_experts_have_caches_of_their_own() -> None:
    pipe = wan(boundary_ratio=0.8)
    plain = generate(pipe)
    with freeswim(pipe, settings=FreeSwimSettings((0, 0), cache_steps=3)) as handle:
        generate(pipe)
        dense = {place: r.dense["full branch"] for place, r in handle.method.ran.items()}  # type: ignore[attr-defined]
    assert dense["transformer", "blocks.0.attn1"] == 1
    assert dense["transformer_2", "blocks.0.attn1"] == 2  # when it begins, and at step 3
    assert torch.equal(generate(pipe), plain)


def test_compiled_models(generator: torch.Generator) -> None:
    model, given = made(WAN, generator, batch=1)
    steps = steps_of(given, 3, generator)
    with freeswim(model, settings=CACHED):
        eager = [run(model, s) for s in steps]
        compiled: Any = torch.compile(model, backend="eager")
        for step, wanted in zip(steps, eager, strict=True):
            torch.testing.assert_close(run(compiled, step), wanted, rtol=0, atol=1e-5)


def test_published_settings_and_refusals(model: VideoDiT, generator: torch.Generator) -> None:
    assert reach_of(480, 832) == (15, 26) and PRESETS["wan2.1-14b"].settings.reach == (22, 40)
    assert FreeSwimSettings().scale(128) == pytest.approx(math.sqrt(1.09427 / 128), rel=1e-5)
    large = diffusers.WanTransformer3DModel(**{**SIZES, "num_layers": 40})
    with freeswim(large) as handle:
        assert handle.method.settings.reach == (22, 40)  # type: ignore[attr-defined]
    for wrong, name in ((model, "VideoDiT"), (made(FLUX, generator)[0], "FluxTransformer2DModel")):
        with pytest.raises(ValueError, match=rf"freeswim: {name} is no Wan; legal: WanTransformer3DModel"):
            freeswim(wrong, settings=NEAR)
    small, _ = made(WAN, generator)
    with pytest.raises(ValueError, match=r"freeswim: steps=3 is unknown; legal: reach, cache_steps"):
        freeswim(small, steps=3)
    with pytest.raises(ValueError, match=r"freeswim: cache_steps=0 must be None or at least 1\."):
        freeswim(small, cache_steps=0)
    with pytest.raises(ValueError, match=r"freeswim: reach=\(-1, 2\); legal: \(rows, columns\), neither negative\."):
        freeswim(small, reach=(-1, 2))
    with pytest.raises(
        ValueError, match=r"preset='wan2\.1' is unknown; legal: wan2\.1-1\.3b, .*; nearest: wan2\.1-14b"
    ):
        freeswim(small, "wan2.1")
