"""Every host of diffusers on a GPU: the same examination with model and inputs there, and refusals in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")

from glocal.adapt import attach, gna, hidiffusion, paro
from glocal.adapt.paro_plan import ParoPlan

from . import test_diffusers_cogvideox as cogvideox
from . import test_diffusers_cosmos as cosmos
from . import test_diffusers_flux as flux
from . import test_diffusers_flux2 as flux2
from . import test_diffusers_hunyuan_video as hunyuan_video
from . import test_diffusers_ltx as ltx
from . import test_diffusers_mochi as mochi
from . import test_diffusers_pixart as pixart
from . import test_diffusers_sd3 as sd3
from . import test_diffusers_unet as unet
from . import test_diffusers_wan as wan
from .exam import AtCore, AtForward, AtLayer, AtModule, HostExam, Inputs, run

EXAMS = [
    cogvideox.TestCogVideoX, cosmos.TestCosmos, flux.TestFlux, flux2.TestFlux2, hunyuan_video.TestHunyuanVideo,
    ltx.TestLTX, mochi.TestMochi, pixart.TestPixArt, sd3.TestSD3, unet.TestSD15, wan.TestWan,
]  # fmt: skip


def moved(value: Any, device: str) -> Any:
    """Every tensor of the inputs on `device`."""
    if isinstance(value, tuple):
        return tuple(moved(v, device) for v in value)
    return value.to(device) if torch.is_tensor(value) else value


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=EXAMS, ids=lambda exam: exam.__name__.removeprefix("Test"))
def exam(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> HostExam:
    """The examination of a host, its inputs on the device."""
    found: HostExam = request.param()
    there = found.inputs

    def inputs(generator: torch.Generator, batch: int = 1) -> Inputs:
        return {name: moved(value, device) for name, value in there(generator, batch).items()}

    monkeypatch.setattr(found, "inputs", inputs)
    return found


@pytest.fixture
def model(exam: HostExam, device: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return exam.build().eval().to(device)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
class TestOnCuda:
    def test_attaching_and_undoing(self, exam: HostExam, model: nn.Module, generator: torch.Generator) -> None:
        given = exam.inputs(generator)
        exam.test_the_stock_core_changes_no_bit(model, given)
        for method in (AtCore, AtModule, AtLayer, AtForward):
            exam.test_undo_restores_bit_for_bit(method, model, given)
        exam.test_handles_nest(model, given)
        exam.test_two_models_do_not_leak(model, given)

    def test_a_dense_plan(self, exam: HostExam, model: nn.Module, generator: torch.Generator) -> None:
        exam.test_dense_attention_of_ours_equals_the_host(generator, model)

    def test_a_sparse_plan(self, exam: HostExam, model: nn.Module, generator: torch.Generator) -> None:
        if isinstance(exam, unet.TestSD15):
            pytest.skip("the grids of a UNet's levels differ")
        exam.test_a_sparse_recipe_equals_the_masked_reference(model, generator)


def test_what_does_not_fit_is_refused_in_words(exam: HostExam, model: nn.Module, generator: torch.Generator) -> None:
    given = exam.inputs(generator)
    plain = run(model, given)
    plan = ParoPlan(torch.zeros(9, 2, dtype=torch.long), torch.zeros(1, 9, 2, 50, 7, dtype=torch.uint8), 50, 1, 8)
    with paro(model, plan), pytest.raises(ValueError, match=r"paro: .* but the plan has"):  # of a larger picture
        run(model, given)
    with gna(model, window=(99, 99)), pytest.raises(ValueError, match=r"window"):
        run(model, given)
    with pytest.raises(ValueError, match="AtCore found no attention site it wants"):
        attach(model, AtCore(kinds=("no such kind",)))
    if not isinstance(exam, unet.TestSD15):
        with pytest.raises(ValueError, match="legal: a UNet"):
            hidiffusion(model)
    assert torch.equal(run(model, given), plain)
