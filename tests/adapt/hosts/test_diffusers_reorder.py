"""Media tokens taken through all blocks in another order: the output is that of the raster, the sites see the order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from glocal.adapt import attach
from glocal.canvas import Order
from glocal.canvas.curves import gilbert

from . import (
    test_diffusers_cogvideox,
    test_diffusers_flux,
    test_diffusers_flux2,
    test_diffusers_hunyuan_video,
    test_diffusers_mochi,
    test_diffusers_wan,
)
from .exam import AtCore, Inputs, run
from .sizes import COGVIDEOX, HUNYUAN_VIDEO

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")


class AlongACurve(AtCore):
    """Watches, and lets the tokens run along a Gilbert curve."""

    def order(self, axes: tuple[int, ...]) -> Order | None:
        return Order("gilbert", gilbert(axes))


class Raster(AtCore):
    """Chooses no order."""

    def order(self, axes: tuple[int, ...]) -> Order | None:
        return None


def made(exam: Any, generator: torch.Generator, batch: int = 2) -> tuple[nn.Module, Inputs]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return exam().build().eval(), exam().inputs(generator, batch)


@pytest.mark.parametrize(
    "exam",
    [
        test_diffusers_wan.TestWan,
        test_diffusers_hunyuan_video.TestHunyuanVideo,
        test_diffusers_flux.TestFlux,
        test_diffusers_cogvideox.TestCogVideoX,
        test_diffusers_mochi.TestMochi,
    ],
)
def test_the_output_stays_and_the_sites_see_the_order(exam: Any, generator: torch.Generator) -> None:
    model, given = made(exam, generator)
    plain, watched, method = run(model, given), AtCore(), AlongACurve()
    with attach(model, watched):
        run(model, given)
    with attach(model, method):
        torch.testing.assert_close(run(model, given), plain, rtol=0, atol=1e-5)  # sums run in another order
    assert torch.equal(run(model, given), plain)
    raster = watched.calls[0].layout.q
    start = int(raster.indices(raster.grid.name)[0])
    curve = gilbert(raster.grid.axes) + start
    for before, after, call in zip(watched.queries, method.queries, method.calls, strict=True):
        assert call.layout.q.arrives == "gilbert" and not call.layout.q.grids
        assert call.state.forward.raster.q.grid.axes == raster.grid.axes
        moved = after[:, :, start : start + curve.numel()]
        torch.testing.assert_close(moved, before[:, :, curve], rtol=0, atol=1e-4)


def test_no_order_leaves_a_forward_alone(generator: torch.Generator) -> None:
    model, given = made(test_diffusers_wan.TestWan, generator)
    plain, method = run(model, given), Raster()
    with attach(model, method):
        assert torch.equal(run(model, given), plain)
    assert method.calls[0].layout.q.arrives == "raster"


def test_a_host_that_cannot_leaves_the_tokens_as_they_lie(generator: torch.Generator) -> None:
    model, given = made(test_diffusers_flux2.TestFlux2, generator)
    plain, method = run(model, given), AlongACurve()
    with attach(model, method):
        assert torch.equal(run(model, given), plain)
    assert method.calls[0].layout.q.arrives == "raster"


def test_rotary_positions_of_cogvideox_go_along(generator: torch.Generator) -> None:
    model = diffusers.CogVideoXTransformer3DModel(**{**COGVIDEOX, "use_rotary_positional_embeddings": True}).eval()
    given = test_diffusers_cogvideox.TestCogVideoX().inputs(generator)
    angles = torch.rand(72, 16, generator=generator)
    given["image_rotary_emb"] = (angles.cos(), angles.sin())
    plain = run(model, given)
    with attach(model, AlongACurve()):
        torch.testing.assert_close(run(model, given), plain, rtol=0, atol=1e-5)


def test_what_a_controlnet_adds_goes_along(generator: torch.Generator) -> None:
    model, given = made(test_diffusers_flux.TestFlux, generator)
    given["controlnet_block_samples"] = [torch.randn(2, 24, 32, generator=generator)]
    given["controlnet_single_block_samples"] = [torch.randn(2, 24, 32, generator=generator)]
    plain = run(model, given)
    with attach(model, AlongACurve()):
        torch.testing.assert_close(run(model, given), plain, rtol=0, atol=1e-5)


def test_noise_levels_of_single_tokens_go_along(generator: torch.Generator) -> None:
    model, given = made(test_diffusers_wan.TestWan, generator, batch=1)
    each = torch.rand(1, 72, generator=generator) * 900
    plain = run(model, given, timestep=each)
    with attach(model, AlongACurve()):
        torch.testing.assert_close(run(model, given, timestep=each), plain, rtol=0, atol=1e-5)


def test_a_second_order_is_refused(generator: torch.Generator) -> None:
    model, given = made(test_diffusers_wan.TestWan, generator)
    plain = run(model, given)
    with attach(model, AlongACurve()):
        with pytest.raises(ValueError, match=r"WanTransformer3DModel: another method has its tokens in an order"):
            attach(model, AlongACurve())
    assert torch.equal(run(model, given), plain)


def test_methods_attached_later_see_the_order_too(generator: torch.Generator) -> None:
    model, given = made(test_diffusers_wan.TestWan, generator)
    late = AtCore()
    with attach(model, AlongACurve()), attach(model, late):
        run(model, given)
    assert {c.layout.q.arrives for c in late.calls} == {"gilbert"}


def test_first_frames_that_are_replaced_keep_the_raster(generator: torch.Generator) -> None:
    model = diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN_VIDEO, image_condition_type="token_replace").eval()
    given = test_diffusers_hunyuan_video.TestHunyuanVideo().inputs(generator)
    plain, method = run(model, given), AlongACurve()
    with attach(model, method):
        assert torch.equal(run(model, given), plain)
    assert method.calls[0].layout.q.arrives == "raster"
