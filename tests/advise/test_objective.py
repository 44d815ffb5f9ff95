"""Objectives: runs repeat and go on from a cached latent, distances begin with the main error, ceilings differ."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from glocal.advise.capture import CallInfo, CapturedCall, save_capture
from glocal.advise.objective import Frames, Latents, Operator, Output, main_error, other_seed
from glocal.advise.workload import Sample, Workload
from glocal.models.generation import SampleSpec, SampleStep, VideoDiT, VideoDiTConfig

FIELDS = (("colour", ("red", "blue")),)


@pytest.fixture
def model() -> VideoDiT:
    torch.manual_seed(0)
    made = VideoDiT(VideoDiTConfig(dim=24, layers=1, heads=2, hidden=32, fields=FIELDS))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return made.eval()


SPEC = SampleSpec(steps=4, guidance=2.0)
ONE = Sample("a", 3, {"colour": "red"})


def test_runs_repeat_and_go_on(model: VideoDiT) -> None:
    objective = Frames(SPEC, frames=2, height=12, width=16)
    steps: list[SampleStep] = []
    whole = objective.run(model, ONE, on_step=steps.append)
    assert [s.step for s in steps] == [0, 1, 2, 3] and objective.levels[0] == 1 and objective.levels[-1] == 0
    assert torch.equal(whole.tensor, objective.run(model, ONE).tensor)
    rest = objective.run(model, ONE, start=2, latent=steps[1].latent)
    assert torch.equal(whole.tensor, rest.tensor)
    assert whole.frames is not None and whole.frames.shape == (2, 3, 12, 16)
    with pytest.raises(ValueError, match="start=2 and latent=none: a later start needs the latent"):
        objective.run(model, ONE, start=2)


def test_distances_begin_with_the_main_error(model: VideoDiT) -> None:
    objective = Frames(SPEC, frames=2, height=12, width=16)
    whole, other = objective.run(model, ONE), objective.ceiling(model, ONE)
    found = objective.distance(whole, other)
    assert list(found) == ["relative_l2", "psnr", "ssim", "flicker_difference"]
    assert main_error(found) == pytest.approx(float((other.tensor - whole.tensor).norm() / whole.tensor.norm()))
    same = objective.distance(whole, whole)
    assert same["relative_l2"] == 0 and same["psnr"] == math.inf and same["ssim"] == pytest.approx(1.0)
    assert list(Latents().distance(whole, other)) == ["relative_l2"]
    small = Output(whole.tensor, torch.zeros(1, 3, 4, 4))
    assert list(objective.distance(small, small)) == ["relative_l2", "psnr"]
    with pytest.raises(ValueError, match=r"both outputs need frames; use Latents\(\)"):
        objective.distance(Output(whole.tensor), other)


def test_the_ceiling_is_another_seed(model: VideoDiT) -> None:
    objective = Latents(SPEC, frames=2, height=8, width=8)
    assert other_seed(3) == other_seed(3) != other_seed(4)
    other = objective.run(model, Sample("b", other_seed(3), ONE.args))
    assert torch.equal(objective.ceiling(model, ONE).tensor, other.tensor)


def test_samples_set_sizes_and_are_checked(model: VideoDiT) -> None:
    objective = Latents(SPEC)
    assert objective.run(model, Sample("a", 0, {"frames": 1, "height": 4, "width": 8})).tensor.shape == (1, 1, 3, 4, 8)
    for args, text in (
        (
            {"color": "red"},
            "sample 'a': argument 'color' is unknown; legal: colour, frames, height, width; nearest: 'colour'",
        ),
        ({"colour": "pink"}, "sample 'a': colour='pink': unknown value; legal are red, blue"),
        ({"height": 0}, "sample 'a': height=0; legal: whole numbers from 1"),
        ({"height": 5}, "sample 'a': x is 5 x 64 px: sides must be multiples of patch=4"),
    ):
        with pytest.raises(ValueError, match=text):
            objective.check(model, Workload((Sample("a", 0, args),)))
    objective.check(model, Workload((ONE,)))


def test_results_that_are_not_finite_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="relative_l2 is nan; the result holds NaN or infinity"):
        main_error({"relative_l2": math.nan, "psnr": 1.0})


def test_operator(tmp_path: Path, generator: torch.Generator) -> None:
    q, k, v = (torch.randn(1, h, 6, 8, generator=generator) for h in (4, 2, 2))
    info = CallInfo("x", (2, 3), site="blocks.0", layer=5, step=1, total=4, sigma=0.75, branch="cond", scale=0.2)
    save_capture(tmp_path / "c.safetensors", [CapturedCall(info, q, k, v)])
    (sample,) = Workload.from_tensors(tmp_path / "c.safetensors").samples
    objective = Operator()
    out = objective.run(objective.dense, sample)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.2, enable_gqa=True)
    assert torch.allclose(out.tensor, expected, atol=1e-5)
    *_, found = objective.inputs(sample)
    assert (found.site.name, found.site.layer, found.state.branch, found.state.timestep) == (
        "blocks.0",
        5,
        "cond",
        0.75,
    )
    assert found.layout.kv.grid.axes == (2, 3)
    half = Output(out.tensor * torch.tensor([1.0, 1.0, 1.0, 0.5])[None, :, None, None])
    distance = objective.distance(out, half)
    assert list(distance) == ["relative_l2", "worst_head"] and distance["worst_head"] == pytest.approx(0.5)
    flat = objective.ceiling(objective.dense, sample)
    assert torch.allclose(flat.tensor[:, :, 0], out.tensor.mean(2)) and objective.name == "operator"
    with pytest.raises(ValueError, match="Operator needs file and call"):
        objective.run(objective.dense, Sample("a", 0, {"prompt": "x"}))
