"""Rectified SpaAttn in tiny hosts: exact where it must be, along the curve, with padded words, several samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glocal import attention
from glocal.adapt import RunState, Site, SiteCall, rectified_spaattn
from glocal.adapt.rectified_spaattn import PRESETS, RectifiedSpaAttn, SpaSettings, route_call
from glocal.canvas import Canvas, Layout
from glocal.models.generation.video_dit import VideoDiT
from glocal.ops import attend

from .hosts import test_diffusers_flux2
from .hosts.exam import run
from .test_pipelines import generate, wan
from .test_sparse_methods import COGVIDEOX, FLUX, HUNYUAN, MOCHI, WAN, made

ALL = SpaSettings(drop=0.0, mass=0.0, block=8, neighbours=False)
FEW = SpaSettings(drop=0.7, mass=0.0, block=8, neighbours=False)


def call_of(layout: Layout, heads: int, dim: int) -> SiteCall:
    return SiteCall(Site("here", 0, heads, dim), layout, RunState())


@pytest.mark.parametrize("exam", [WAN, HUNYUAN, FLUX, COGVIDEOX, MOCHI, test_diffusers_flux2.TestFlux2])
def test_everything_kept_is_dense_attention(exam: Any, generator: torch.Generator) -> None:
    model, given = made(exam, generator)
    plain = run(model, given)
    with torch.no_grad(), rectified_spaattn(model, settings=ALL) as handle:
        torch.testing.assert_close(run(model, given), plain, rtol=0, atol=2e-5)
        assert handle.method.kept == 1.0  # type: ignore[attr-defined]
    assert torch.equal(run(model, given), plain)


@pytest.mark.parametrize("exam", [WAN, HUNYUAN, FLUX, COGVIDEOX, MOCHI])
def test_tokens_run_once_along_the_curve_or_every_plan_does(exam: Any, generator: torch.Generator) -> None:
    class EveryPlan(RectifiedSpaAttn):
        """Leaves the tokens of the model in raster order."""

        def order(self, axes: tuple[int, ...]) -> None:
            return None

    from glocal.adapt import attach

    model, given = made(exam, generator)
    settings = SpaSettings(drop=0.7, mass=0.2, block=4, first_frame=True, neighbours=False)
    plain = run(model, given)
    with torch.no_grad():
        with rectified_spaattn(model, settings=settings) as handle:
            once = run(model, given)
            assert 0 < handle.method.kept < 1  # type: ignore[attr-defined]
        with attach(model, EveryPlan(settings)):
            torch.testing.assert_close(run(model, given), once, rtol=0, atol=2e-5)
    assert not torch.allclose(once, plain, rtol=0, atol=1e-4)


def test_block_constant_tokens_lose_nothing(generator: torch.Generator) -> None:
    """Means stand exactly for blocks of equal tokens, so sparse and rectified is dense."""
    layout = Layout.of(Canvas((4, 4, 4), after=5))
    q, k, v = (torch.randn(2, 3, 8, 16, generator=generator).repeat_interleave(8, 2) for _ in "qkv")
    words = (torch.randn(2, 3, 5, 16, generator=generator) for _ in "qkv")
    q, k, v = (torch.cat([t, w], 2) for t, w in zip((q, k, v), words, strict=True))
    settings = SpaSettings(drop=0.99, mass=0.0, block=8, neighbours=False, curve="raster")
    method = RectifiedSpaAttn(settings)
    out = method.core(q, k, v, call_of(layout, 3, 16), lambda *_: torch.empty(0))
    assert method.kept < 0.5
    torch.testing.assert_close(out, attention(q, k, v), rtol=0, atol=1e-5)
    plain = RectifiedSpaAttn(SpaSettings(drop=0.99, mass=0.0, block=8, neighbours=False, curve="raster", rectify=False))
    bare = plain.core(q, k, v, call_of(layout, 3, 16), lambda *_: torch.empty(0))
    assert not torch.allclose(bare, out, rtol=0, atol=1e-2)


def test_rectification_helps_on_smooth_tokens(generator: torch.Generator) -> None:
    shape = (8, 8, 8)
    layout = Layout.of(Canvas(shape))

    def smooth() -> Tensor:
        coarse = torch.randn(1, 2 * 16, 3, 3, 3, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, shape, mode="trilinear", align_corners=True)
        field = fine.flatten(2).unflatten(1, (2, 16)).transpose(2, 3)
        return field + 0.1 * torch.randn(field.shape, generator=generator)

    q, k, v = (smooth() for _ in "qkv")
    q = q / 2  # attention that is spread, where dropping costs
    dense, errors = attention(q, k, v), {}
    for rectify in (False, True):
        settings = SpaSettings(drop=0.85, mass=0.0, block=16, neighbours=False, rectify=rectify)
        method = RectifiedSpaAttn(settings)
        out = method.core(q, k, v, call_of(layout, 2, 16), lambda *_: torch.empty(0))
        errors[rectify] = float((out - dense).norm() / dense.norm())
    assert errors[True] < 0.8 * errors[False]


def test_padded_words_count_for_nothing(generator: torch.Generator) -> None:
    model, given = made(HUNYUAN, generator)
    with torch.no_grad(), rectified_spaattn(model, settings=FEW):
        first = run(model, given)
        other = given["encoder_hidden_states"].clone()
        other[0, 3:] = torch.randn(2, 16, generator=generator)
        torch.testing.assert_close(run(model, given, encoder_hidden_states=other), first, rtol=0, atol=1e-5)


def test_samples_do_not_touch(generator: torch.Generator) -> None:
    model, given = made(HUNYUAN, generator)
    single = {n: v[:1] if torch.is_tensor(v) else v for n, v in given.items()}
    with torch.no_grad(), rectified_spaattn(model, settings=FEW):
        torch.testing.assert_close(run(model, single), run(model, given)[:1], rtol=0, atol=1e-5)


def test_words_see_everything_and_are_seen(generator: torch.Generator) -> None:
    layout = Layout.of(Canvas((2, 4, 4), before=5))
    q, k = (torch.randn(1, 2, 37, 8, generator=generator) for _ in "qk")
    routed = route_call(q, k, call_of(layout, 2, 8), (2, 4, 4), FEW)
    seen = attend(q, k, k, routed.plan, canvas=layout, backend="reference").counts
    assert seen is not None
    assert bool((seen[..., :5, :] > 0).all()) and bool((seen[..., :5] > 0).all())
    assert float((seen[..., 5:, 5:] > 0).double().mean()) == 0.25  # one media block of four


def test_the_built_in_model(model: VideoDiT, clip: Tensor) -> None:
    with torch.no_grad():
        plain = model(clip, torch.tensor([0.5]))
        with rectified_spaattn(model, settings=SpaSettings(drop=0.0, mass=1.0, block=4)):
            torch.testing.assert_close(model(clip, torch.tensor([0.5])), plain, rtol=0, atol=1e-4)
        with rectified_spaattn(model, settings=SpaSettings(drop=0.7, mass=0.0, block=4, neighbours=False)) as handle:
            assert not torch.equal(model(clip, torch.tensor([0.5])), plain)
            assert handle.method.kept < 1  # type: ignore[attr-defined]


def test_experts_of_a_pipeline() -> None:
    pipe = wan(boundary_ratio=0.8)
    plain = generate(pipe)
    changed = {"block": 4, "drop": 0.9, "mass": 0.0, "dense_layers": 0, "neighbours": False}
    with rectified_spaattn(
        pipe, "wan2.2-t2v", **changed, expert_steps={"transformer": 1, "transformer_2": 1}
    ) as handle:
        assert not torch.equal(generate(pipe), plain)
        dense = {place: dict(r.dense) for place, r in handle.method.ran.items()}  # type: ignore[attr-defined]
    assert dense["transformer", "blocks.0.attn1"] == dense["transformer_2", "blocks.0.attn1"] == {"first steps": 2}
    assert torch.equal(generate(pipe), plain)


def test_published_settings_and_refusals(generator: torch.Generator) -> None:
    assert PRESETS["flux-4k"].settings.layers == frozenset(range(37, 57))
    assert PRESETS["wan2.2-t2v"].settings.expert_steps == {"transformer": 3, "transformer_2": 1}  # 6 and 2 calls
    model, given = made(FLUX, generator)
    with pytest.raises(
        ValueError, match=r"preset='hunyuanvideo' is for HunyuanVideo\w+, this is Flux\w+; for it: flux-4k"
    ):
        rectified_spaattn(model, "hunyuanvideo")
    with pytest.raises(ValueError, match=r"drop=1\.5 must lie between 0 \(dense\) and 1"):
        rectified_spaattn(model, drop=1.5)
    with pytest.raises(ValueError, match=r"rectified_spaattn: top_k=3 is unknown; legal: drop, mass"):
        rectified_spaattn(model, top_k=3)
    with pytest.raises(ValueError, match=r"curve='hilbert'; legal: 'gilbert', 'raster'"):
        rectified_spaattn(model, curve="hilbert")
    given["img_ids"] = given["img_ids"].flip(0)
    with (
        rectified_spaattn(model, settings=FEW),
        pytest.raises(ValueError, match="only those of one grid can be reorder"),
    ):
        run(model, given)
