"""Pipelines as hosts: one state over two experts, the number of steps, the place between forwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.adapt import Method, RunState, Site, attach, open_handles
from glocal.adapt.records import Core, SiteCall

from .hosts.exam import AtCore, AtForward, AtLayer, AtModule, run
from .hosts.sizes import SD15, WAN

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")


def wan(**more: Any) -> Any:
    def transformer() -> Any:
        return diffusers.WanTransformer3DModel(**{**WAN, "in_channels": 16, "out_channels": 16}).eval()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
        pipe = diffusers.WanPipeline(
            tokenizer=None,
            text_encoder=None,
            transformer=transformer(),
            transformer_2=transformer(),
            vae=vae,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            **more,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, steps: int = 4) -> Tensor:
    text = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    return pipe(
        prompt_embeds=text[:1],
        negative_prompt_embeds=text[1:],
        guidance_scale=4.0,
        height=16,
        width=16,
        num_frames=5,
        num_inference_steps=steps,
        output_type="latent",
        generator=torch.Generator().manual_seed(1),
    )[0]


class Notes(Method):
    """Writes down where the run is at the first layer of every forward."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        if call.site.layer == 0:
            state = call.state
            self.seen.append((state.step, state.total, state.branch, state.expert, call.site.component))
        return inner(q, k, v, call)


def test_two_experts_are_one_run() -> None:
    pipe = wan(boundary_ratio=0.8)
    plain, method = generate(pipe), Notes()
    with attach(pipe, method):
        assert torch.equal(generate(pipe), plain)
        assert torch.equal(generate(pipe), plain)  # a run of its own
        expert = [(0, "transformer"), (1, "transformer"), (2, "transformer_2"), (3, "transformer_2")]
        run = [(s, 4, b, name, name) for s, name in expert for b in ("cond", "uncond")]
        assert method.seen == run * 2
        generate(pipe, steps=2)
        assert method.seen[-1][:2] == (1, 2)
    assert torch.equal(generate(pipe), plain)
    assert len(method.seen) == 20


def test_undo_leaves_pipeline_and_scheduler_as_they_were() -> None:
    pipe = wan(boundary_ratio=0.8)
    kept = [dict(vars(x)) for x in (pipe, pipe.scheduler)]
    with attach(pipe, Notes()):
        words = list(inspect.signature(pipe.scheduler.set_timesteps).parameters)
        assert "num_inference_steps" in words and "sigmas" in words  # pipelines look for them
    assert [dict(vars(x)) for x in (pipe, pipe.scheduler)] == kept
    assert not pipe.transformer._forward_pre_hooks and not pipe.transformer_2._forward_pre_hooks


def test_handles_of_pipelines_and_models_share_an_order() -> None:
    pipe = wan(boundary_ratio=0.8)
    first = attach(pipe, Notes())
    second = attach(pipe.transformer_2, Notes())
    assert list(open_handles(pipe)) == ["Notes"]
    with pytest.raises(RuntimeError, match="Notes was attached later to the same model and is still open"):
        first.undo()
    second.undo()
    first.undo()
    assert not open_handles(pipe)


def test_a_step_acts_on_latents_between_forwards() -> None:
    class Halve(Method):
        def step(self, original: Callable[..., Any], state: RunState) -> Callable[..., Any]:
            def step(noise: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
                steps.append((state.step, tuple(sample.shape)))
                return original(noise, timestep, sample / 2, *args, **kwargs)

            return step

    pipe, steps = wan(boundary_ratio=0.8), []
    plain = generate(pipe)
    with attach(pipe, Halve()):
        assert not torch.equal(generate(pipe), plain)
    assert [s for s, _ in steps] == [0, 1, 2, 3]
    assert torch.equal(generate(pipe), plain)
    with pytest.raises(ValueError, match=r"offers core, forward, layer, module\. Attach to the pipeline for 'step'\."):
        attach(pipe.transformer, Halve())


def test_solvers_that_look_twice_at_a_level_count_it_once() -> None:
    vae = diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=diffusers.UNet2DConditionModel(**SD15).eval(),
        scheduler=diffusers.HeunDiscreteScheduler(),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    method = Notes()
    text = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    arguments = {"prompt_embeds": text[:1], "negative_prompt_embeds": text[1:], "output_type": "latent"}
    with attach(pipe, method):
        pipe(**arguments, height=32, width=32, num_inference_steps=3)
        assert [s[:2] for s in method.seen] == [(0, 3), (1, 3), (1, 3), (2, 3), (2, 3)]
        method.seen.clear()
        image = diffusers.StableDiffusionImg2ImgPipeline(**{**pipe.components, **parts})
        image.set_progress_bar_config(disable=True)
    with attach(image, method):
        image(**arguments, image=torch.rand(1, 3, 32, 32), num_inference_steps=4, strength=0.5)
    assert {s[1] for s in method.seen} == {2}  # a run from an image leaves the first levels out
    assert {s[3:] for s in method.seen} == {("unet", "unet")}


def test_sites_of_all_experts_are_offered() -> None:
    class Second(Notes):
        def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
            found.extend((s.component, s.name) for s in sites if s.kind == "self")
            return tuple(s for s in sites if s.kind == "self" and s.component == "transformer_2")

    found: list[tuple[str, str]] = []
    pipe, method = wan(boundary_ratio=0.8), Second()
    with attach(pipe, method):
        generate(pipe)
    assert [c for c, _ in found] == ["transformer"] * 2 + ["transformer_2"] * 2
    assert {s[4] for s in method.seen} == {"transformer_2"}


def test_a_model_whose_weights_wait_elsewhere() -> None:
    accelerate = pytest.importorskip(
        "accelerate", reason="accelerate is not installed: pip install 'glocal[diffusers]'"
    )
    model = wan().transformer
    x = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    given = (x, torch.tensor([900.0]), torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1)))

    def run() -> Tensor:
        with torch.no_grad():
            return model(*given, return_dict=False)[0]

    plain, method = run(), Notes()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.blocks[0].attn1.to_q.weight.is_meta
    with attach(model, method):
        assert torch.equal(run(), plain)
    assert len(method.seen) == 1
    assert torch.equal(run(), plain)


@pytest.mark.parametrize("method", [AtModule, AtLayer, AtForward])
def test_offloading_that_comes_later_outlives_the_method(method: type[AtCore]) -> None:
    accelerate = pytest.importorskip(
        "accelerate", reason="accelerate is not installed: pip install 'glocal[diffusers]'"
    )
    model = wan().transformer
    given = {
        "hidden_states": torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1)),
    }
    plain = run(model, given)
    with attach(model, method(0.5)):
        once = run(model, given)
        with attach(model, method(2.0)):
            assert torch.equal(run(model, given), plain)  # powers of two
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
            assert model.blocks[0].scale_shift_table.is_meta and torch.equal(run(model, given), plain)
        assert torch.equal(run(model, given), once)
    assert torch.equal(run(model, given), plain)
    assert model.blocks[0].scale_shift_table.is_meta
    accelerate.hooks.remove_hook_from_submodules(model)
