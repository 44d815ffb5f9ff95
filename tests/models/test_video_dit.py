"""The built-in video model: any canvas, reachable attention sites, strict weights, a sampler that can be taken up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from glocal.models.generation import (
    AttentionSite,
    SampleSpec,
    SampleStep,
    VideoDiT,
    VideoDiTConfig,
    dense_core,
    draw_noise,
    load_demo,
    load_weights,
    noise_levels,
    sample,
    save_weights,
    to_pixels,
)
from glocal.models.generation.video_dit import patches, unpatch
from glocal.models.generation.weights import SHIPPED

FIELDS = (("colour", ("red", "blue")), ("shape", ("disc",)))


@pytest.fixture
def model() -> VideoDiT:
    torch.manual_seed(0)
    net = VideoDiT(VideoDiTConfig(dim=32, layers=2, heads=2, hidden=48, fields=FIELDS))
    torch.nn.init.normal_(net.final.weight, std=0.2)
    torch.nn.init.normal_(net.modulate.weight, std=0.2)
    return net.eval()


@pytest.mark.parametrize("size", [(1, 4, 4), (3, 8, 12), (5, 16, 4)])
def test_any_canvas(model: VideoDiT, size: tuple[int, int, int]):
    frames, height, width = size
    x = draw_noise(0, 2, frames, height, width)
    assert model(x, torch.tensor([0.3, 1.0])).shape == x.shape
    assert model.canvas(x) == (frames, height // 4, width // 4)


def test_patches_return():
    x = torch.randn(2, 3, 3, 8, 12)
    tokens = patches(x, 4)
    assert tokens.shape == (2, 3 * 2 * 3, 48)
    assert torch.equal(unpatch(tokens, (3, 2, 3), 4), x)
    assert torch.equal(tokens[0, 1].view(3, 4, 4), x[0, 0, :, :4, 4:8])


def test_left_out_frames_keep_their_times(model: VideoDiT):
    x = draw_noise(0, 1, 2, 8, 8)
    near, far = (model(x, torch.ones(1), times=torch.tensor(t)) for t in ([0, 1], [0, 9]))
    assert torch.equal(near, model(x, torch.ones(1)))
    assert not torch.allclose(near, far)
    moved = model(x, torch.ones(1), times=torch.tensor([5, 6]))
    assert torch.allclose(near, moved, atol=1e-4)  # positions are relative


def test_core_is_replaceable_and_contribution_splits_the_update(model: VideoDiT):
    seen: list[int] = []
    x = draw_noise(0, 2, 2, 8, 8)

    def watching(q: Tensor, k: Tensor, v: Tensor, *, site: AttentionSite) -> Tensor:
        seen.append(site.layer)
        out = dense_core(q, k, v, site=site)
        assert q.shape == (2, site.module.heads, 8, site.module.head_dim) and site.canvas == (2, 2, 2)
        whole = site.gate * site.module.proj(out.transpose(1, 2).flatten(2))
        assert torch.allclose(site.contribution(out).sum(1), whole, atol=1e-5)
        assert site.residual.shape == whole.shape
        return out

    before = model(x, torch.ones(2))
    for module in model.sites():
        module.core = watching
    assert torch.equal(model(x, torch.ones(2)), before)
    assert seen == [0, 1]


def test_condition_by_name(model: VideoDiT):
    given = model.condition(colour="blue")
    assert given.tolist() == [[2, 0]]
    x = draw_noise(0, 1, 1, 8, 8)
    assert not torch.equal(model(x, torch.ones(1), given), model(x, torch.ones(1)))
    assert torch.equal(model(x, torch.ones(1), model.condition()), model(x, torch.ones(1)))
    with pytest.raises(ValueError, match=r"colour='green': unknown value; legal are red, blue"):
        model.condition(colour="green")
    with pytest.raises(ValueError, match=r"size='big': unknown field; legal are colour, shape"):
        model.condition(size="big")
    with pytest.raises(ValueError, match=r"condition has shape \(1, 3\): need \[1, 2\]"):
        model(x, torch.ones(1), torch.zeros(1, 3, dtype=torch.long))


def test_bad_sizes_say_what_is_legal(model: VideoDiT):
    with pytest.raises(ValueError, match=r"10 x 8 px: sides must be multiples of patch=4; nearest is \(8, 8\)"):
        model(torch.zeros(1, 1, 3, 10, 8), torch.ones(1))
    with pytest.raises(ValueError, match=r"need \[B, T, 3, H, W\]"):
        model(torch.zeros(1, 3, 8, 8), torch.ones(1))
    with pytest.raises(ValueError, match=r"heads=5: must divide dim=32; nearest is heads=4"):
        VideoDiTConfig(dim=32, heads=5)
    with pytest.raises(ValueError, match=r"times has shape \(3,\): need one time for each of the 2 frames"):
        model(torch.zeros(1, 2, 3, 8, 8), torch.ones(1), times=torch.arange(3))


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_sampler_is_deterministic_and_resumes(model: VideoDiT, guidance: float | None):
    spec = SampleSpec(steps=4, guidance=guidance)
    steps: list[SampleStep] = []
    given = model.condition(shape="disc")
    whole = sample(model, draw_noise(1, 1, 2, 8, 8), given, spec, callback=steps.append)
    assert torch.equal(whole, sample(model, draw_noise(1, 1, 2, 8, 8), given, spec))
    assert [s.step for s in steps] == [0, 1, 2, 3] and steps[-1].next_sigma == 0
    for start in (1, 3):
        assert torch.equal(whole, sample(model, steps[start - 1].latent, given, spec, start=start))
    assert to_pixels(whole).min() >= 0 and to_pixels(whole).max() <= 1
    with pytest.raises(ValueError, match=r"start=4: must be a step in 0\.\.3; nearest is 3"):
        sample(model, whole, spec=spec, start=4)


def test_sampler_step_is_euler_on_the_velocity(model: VideoDiT):
    x, spec = draw_noise(2, 1, 1, 8, 8), SampleSpec(steps=2, shift=3.0)
    levels = noise_levels(spec)
    assert levels == pytest.approx((1.0, 0.75, 0.0))
    steps: list[SampleStep] = []
    sample(model, x, spec=spec, callback=steps.append)
    euler = x + (levels[1] - levels[0]) * model.velocity(x, torch.ones(1))
    assert torch.allclose(steps[0].latent, euler, atol=1e-5)
    with pytest.raises(ValueError, match="steps=0: at least 1 step"):
        SampleSpec(steps=0)


def test_weights_return_and_refuse(model: VideoDiT, tmp_path: Path):
    path = tmp_path / "w.safetensors"
    save_weights(model.half(), path)
    again = load_weights(path)
    assert again.config == model.config and not again.training
    for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value.float(), other), name
    with pytest.raises(FileNotFoundError, match="do not exist; train them with bench/train_demo.py"):
        load_weights(tmp_path / "none.safetensors")


def test_shipped_weights():
    assert SHIPPED.stat().st_size < 9 * 2**20
    net = load_demo()
    assert [s.layer for s in net.sites()] == list(range(net.config.layers))
    with torch.no_grad():
        out = net(draw_noise(0, 1, 2, 16, 16), torch.ones(1), net.condition(colour="red"))
    assert out.isfinite().all() and out.abs().max() < 3
