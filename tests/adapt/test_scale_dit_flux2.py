"""Scale-DiT in a tiny FLUX.2: what it does with a small image, that it does nothing without, and both stages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glocal.adapt import scale_dit
from glocal.adapt.scale_dit import PRESETS, ScaleDiTSettings
from glocal.adapt.scale_dit_flux2 import position_ids, tunable
from glocal.adapt.scale_dit_run import Stages, generate
from glocal.adapt.scale_dit_run_flux2 import KLEIN, KLEIN_BASE, enlarged, packed
from glocal.nn.lora import LowRank, PartLora

from .hosts.sizes import FLUX2

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")

SETTINGS = replace(PRESETS["flux.2-klein-9b"].settings, window=(4, 4), block=(16, 8))
EVERYTHING = ScaleDiTSettings(
    window=(64, 64), phase="training", text_sees_low=True, block=None, scale_positions=False, ntk=1.0, tuned_image=False
)
SMALL = Stages(size=(32, 32), small=(8, 8), steps=4, guidance=2.0, last_steps=2, last_guidance=2.0, start=False)


@pytest.fixture
def flux() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.Flux2Transformer2DModel(**FLUX2).eval()


@pytest.fixture
def given(generator: torch.Generator) -> dict[str, Any]:
    words = torch.zeros(5, 4)
    words[:, 3] = torch.arange(5)
    return {
        "hidden_states": torch.randn(2, 8 * 12, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=generator),
        "timestep": torch.tensor([0.75, 0.75]),
        "img_ids": position_ids((8, 12), words),
        "txt_ids": words,
        "guidance": torch.full((2,), 3.5),
    }


def low(generator: torch.Generator) -> Tensor:
    return torch.randn(1, 4 * 6, 16, generator=generator)


def updates(model: nn.Module, generator: torch.Generator) -> PartLora:
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and tunable(path):
            a = torch.randn(2, layer.in_features, generator=generator)
            found[path] = LowRank(a, torch.randn(layer.out_features, 2, generator=generator) * 0.1)
    return PartLora(found)


def sample(model: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**given).sample


def test_without_a_small_image_and_after_undo_the_model_is_untouched(
    flux: nn.Module, given: dict[str, Any], generator: torch.Generator
) -> None:
    before = sample(flux, given)
    handle: Any = scale_dit(flux, settings=SETTINGS, lora=updates(flux, generator))
    assert torch.equal(sample(flux, given), before)
    handle.method.give(low(generator), (4, 6))
    assert not torch.allclose(sample(flux, given), before, atol=1e-3)
    handle.undo()
    assert torch.equal(sample(flux, given), before)
    assert not any("forward" in m.__dict__ for m in flux.modules())


def test_dense_with_noise_level_of_the_image_is_flux_with_more_tokens(
    flux: nn.Module, given: dict[str, Any], generator: torch.Generator
) -> None:
    """At noise level 0 all tokens have one modulation; words then see all, and low tokens alone see no image."""
    given["timestep"] = torch.zeros(2)
    small = low(generator)
    handle: Any = scale_dit(flux, settings=EVERYTHING)
    handle.method.give(small, (4, 6))
    ours = sample(flux, given)
    handle.undo()
    whole = {
        **given,
        "hidden_states": torch.cat((given["hidden_states"], small.expand(2, -1, -1)), 1),
        "img_ids": torch.cat((given["img_ids"], position_ids((4, 6), given["txt_ids"]))),
    }
    text, image = 5, 96
    mask = torch.ones(text + image + 24, text + image + 24, dtype=torch.bool)
    mask[text + image :, text : text + image] = False
    whole["joint_attention_kwargs"] = {"attention_mask": mask}
    torch.testing.assert_close(ours, sample(flux, whole)[:, :image], atol=1e-5, rtol=1e-4)


def test_updates_act_on_low_tokens_alone(flux: nn.Module, given: dict[str, Any], generator: torch.Generator) -> None:
    """Where nobody sees low tokens, updates change nothing."""
    lora = updates(flux, generator)
    found = []
    for settings, tuned in ((SETTINGS, PartLora({})), (SETTINGS, lora)):
        for guided in (True, False):
            with scale_dit(flux, settings=replace(settings, guided=guided, block=None), lora=tuned) as handle:
                method: Any = handle.method
                method.give(low(torch.Generator().manual_seed(1)), (4, 6))
                found.append(sample(flux, given))
    torch.testing.assert_close(found[1], found[3], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found[0], found[2], atol=1e-3)


@pytest.mark.parametrize("block", [(16, 8), None])
def test_low_tokens_may_run_once(
    block: tuple[int, int] | None, flux: nn.Module, given: dict[str, Any], generator: torch.Generator
) -> None:
    """Later forwards, with other words, noise and noise levels, equal those that compute them anew."""
    lora, small = updates(flux, generator), low(generator)
    given["encoder_hidden_states"] = torch.randn(2, 16, 32, generator=generator)  # 16 words and 96 tokens: whole blocks
    given["txt_ids"] = torch.zeros(16, 4)
    steps = [
        {
            **given,
            "hidden_states": torch.randn(2, 96, 16, generator=generator),
            "encoder_hidden_states": torch.randn(2, 16, 32, generator=generator),
            "timestep": torch.full((2,), level),
        }
        for level in (0.9, 0.5, 0.1)
    ]
    found, runs = [], []
    for cache in (False, True):
        with scale_dit(flux, settings=replace(SETTINGS, cache_low=cache, block=block), lora=lora) as handle:
            method: Any = handle.method
            method.give(small, (4, 6))
            count = [0]
            hook = flux.get_submodule("transformer_blocks.0.ff.act_fn").register_forward_pre_hook(
                lambda *_, count=count: count.__setitem__(0, count[0] + 1)
            )
            found.append([sample(flux, step) for step in steps])
            hook.remove()
            runs.append(count[0])
            method.give(low(torch.Generator().manual_seed(9)), (4, 6))
            assert not torch.allclose(sample(flux, steps[0]), found[-1][0], atol=1e-4)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, mine, atol=1e-5, rtol=1e-4)
    assert runs == [6, 4]  # image tokens at every step, low tokens once


@pytest.mark.parametrize(
    "changed",
    [
        {"local": "four"},
        {"window_first": False},
        {"block": None},
        {"scale_positions": False},
        {"ntk": 10.0},
        {"guided": False},
        {"text_sees_low": True},
        {"phase": "training"},
    ],
)
def test_every_switch_changes_the_image(
    changed: dict[str, Any], flux: nn.Module, given: dict[str, Any], generator: torch.Generator
) -> None:
    lora, small = updates(flux, generator), low(generator)
    found = []
    for settings in (SETTINGS, replace(SETTINGS, **changed)):
        with scale_dit(flux, settings=settings, lora=lora) as handle:
            method: Any = handle.method
            method.give(small, (4, 6))
            found.append(sample(flux, given))
    assert not torch.allclose(*found, atol=1e-5)


def test_updates_learn_through_the_model(flux: nn.Module, given: dict[str, Any], generator: torch.Generator) -> None:
    flux.requires_grad_(False)
    lora = updates(flux, generator)
    handle: Any = scale_dit(flux, settings=replace(SETTINGS, phase="training"), lora=lora)
    handle.method.give(low(generator), (4, 6))
    flux(**given).sample.square().mean().backward()
    silent = {path for path, u in lora.items() if u.b.grad is None or not bool((u.b.grad != 0).any())}
    assert silent == {"single_transformer_blocks.1.attn.to_out"}  # behind the last block nobody reads low tokens
    assert set(dict(lora.items())) == {
        *(f"transformer_blocks.{n}.attn.{layer}" for n in (0, 1) for layer in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"transformer_blocks.{n}.ff.linear_{end}" for n in (0, 1) for end in ("in", "out")),
        *(f"single_transformer_blocks.{n}.attn.{layer}" for n in (0, 1) for layer in ("to_qkv_mlp_proj", "to_out")),
    }


def test_the_class_of_the_model_finds_the_preset(flux: nn.Module) -> None:
    handle: Any = scale_dit(flux)
    assert handle.method.settings == ScaleDiTSettings(ntk=1.0, tuned_image=False)


@pytest.fixture
def pipe() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
        transformer = diffusers.Flux2Transformer2DModel(**{**FLUX2, "guidance_embeds": False}).eval()
        found = diffusers.Flux2KleinPipeline(
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae.eval(), None, None, transformer
        )
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def prompt(generator: torch.Generator) -> dict[str, Tensor]:
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: torch.randn(1, 5, 32, generator=generator) for name in names}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("guidance", [2.0, 1.0])
def test_both_stages_run_and_leave_the_pipeline_as_it_was(
    guidance: float, pipe: Any, prompt: dict[str, Tensor]
) -> None:
    def plain() -> Tensor:
        given = {"height": 8, "width": 8, "num_inference_steps": 2, "output_type": "latent", "generator": seeded()}
        return pipe(**prompt, **given).images

    before, levels = plain(), []
    stages = replace(SMALL, guidance=guidance, last_guidance=guidance)
    with scale_dit(pipe, window=(4, 4), block=(16, 8), cache_low=True) as handle:
        watch = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: levels.append(
                (kwargs["hidden_states"].shape[1], float(kwargs["timestep"][0]))
            ),
            with_kwargs=True,
        )
        image = generate(pipe, handle, prompt, stages, generator=seeded(), output_type="pt")
        watch.remove()
        assert torch.equal(plain(), before)
    assert torch.equal(plain(), before)
    assert image.shape == (1, 3, 32, 32)
    calls = 2 if guidance > 1 else 1
    assert [tokens for tokens, _ in levels] == [4] * 4 * calls + [64] * 2 * calls
    assert levels[4 * calls][1] == 1  # from noise


def test_the_large_image_may_start_from_the_small_one(pipe: Any, prompt: dict[str, Tensor]) -> None:
    with scale_dit(pipe, window=(4, 4), block=(16, 8)) as handle:
        found = [
            generate(pipe, handle, prompt, replace(SMALL, start=s), generator=seeded(), output_type="latent")
            for s in (True, False)
        ]
    assert found[0].shape == (1, 64, 16) and not torch.allclose(*found)
    grid = torch.arange(4.0).reshape(1, 4, 1)
    assert enlarged(grid, (2, 2), (4, 4)).shape == (1, 16, 1)
    torch.testing.assert_close(enlarged(torch.ones(1, 4, 3), (2, 2), (4, 4)), torch.ones(1, 16, 3))


def test_tokens_are_those_the_pipeline_ends_with(pipe: Any, prompt: dict[str, Tensor]) -> None:
    last: list[Tensor] = []

    def keep(pipe: Any, step: int, level: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        last.append(tensors["latents"])
        return {}

    image = pipe(
        **prompt, height=8, width=8, num_inference_steps=2, output_type="latent", callback_on_step_end=keep
    ).images
    torch.testing.assert_close(packed(pipe, image), last[-1], atol=1e-5, rtol=1e-4)


def test_the_pipeline_says_which_stages() -> None:
    assert (KLEIN.steps, KLEIN.last_steps, KLEIN.guidance, KLEIN.start) == (4, 4, 1.0, False)
    assert (KLEIN_BASE.steps, KLEIN_BASE.last_steps, KLEIN_BASE.last_guidance, KLEIN_BASE.start) == (50, 18, 4.0, False)
    assert KLEIN.size == (4096, 4096)


def test_refusals(flux: nn.Module, given: dict[str, Any], pipe: Any, generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"tuned_image=True in FLUX.2.*legal: tuned_image=False"):
        scale_dit(flux, tuned_image=True)
    with pytest.raises(ValueError, match="cache_low=True with phase='training'"):
        scale_dit(flux, cache_low=True, phase="training")
    with pytest.raises(ValueError, match="'flux.1-dev' is for FluxTransformer2DModel, this is Flux2Transformer2DModel"):
        scale_dit(flux, "flux.1-dev")
    odd = {f"transformer.x_embedder.lora_{n}.weight": torch.zeros(1, 1) for n in "AB"}
    with pytest.raises(ValueError, match="lora has an update of 'x_embedder'; legal: attn.to_q"):
        scale_dit(flux, lora=odd)
    with scale_dit(flux, settings=SETTINGS) as handle:
        method: Any = handle.method
        method.give(low(generator), (4, 6))
        with pytest.raises(ValueError, match="kv_cache_mode='extract' keeps a reference image"):
            sample(flux, {**given, "kv_cache_mode": "extract", "num_ref_tokens": 2})
    with scale_dit(pipe, settings=SETTINGS) as handle:
        with pytest.raises(ValueError, match=r"guidance=2.0 with prompt_embeds alone; legal: negative_prompt_embeds"):
            generate(pipe, handle, {"prompt_embeds": torch.zeros(1, 5, 32)}, SMALL)
        with pytest.raises(ValueError, match="prompt has 'pooled_prompt_embeds'; legal: prompt, prompt_embeds"):
            generate(pipe, handle, {"pooled_prompt_embeds": torch.zeros(1, 5)}, SMALL)
        with pytest.raises(ValueError, match=r"size=\(30, 32\) pixels; legal: multiples of 4"):
            generate(pipe, handle, {"prompt": "a heron"}, replace(SMALL, size=(30, 32)))
