"""Scale-DiT in a tiny FLUX.1: what it does with a small image, and that it does nothing without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glocal.adapt import scale_dit
from glocal.adapt.scale_dit import ScaleDiTSettings
from glocal.adapt.scale_dit_flux import tunable
from glocal.nn.lora import LowRank, PartLora

from .hosts.sizes import FLUX
from .hosts.test_diffusers_flux import positions

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")

SETTINGS = ScaleDiTSettings(window=(4, 4), block=(16, 8))
EVERYTHING = ScaleDiTSettings(
    window=(64, 64), phase="training", text_sees_low=True, block=None, scale_positions=False, ntk=1.0
)


@pytest.fixture
def flux() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.FluxTransformer2DModel(**FLUX).eval()


@pytest.fixture
def given(generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 8 * 12, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=generator),
        "pooled_projections": torch.randn(2, 24, generator=generator),
        "timestep": torch.full((2,), 0.75),
        "img_ids": positions(8, 12),
        "txt_ids": torch.zeros(5, 3),
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
    handle.method.give(None)
    assert torch.equal(sample(flux, given), before)
    handle.method.give(low(generator), (4, 6))
    handle.undo()
    assert torch.equal(sample(flux, given), before)
    assert not any("forward" in m.__dict__ for m in flux.modules())


def test_dense_with_noise_level_of_the_image_is_flux_with_more_tokens(
    flux: nn.Module, given: dict[str, Any], generator: torch.Generator
) -> None:
    """At noise level 0 all tokens have one time embedding; words then see all, and low tokens alone see no image."""
    given["timestep"] = torch.zeros(2)
    small = low(generator)
    handle: Any = scale_dit(flux, settings=EVERYTHING)
    handle.method.give(small, (4, 6))
    ours = sample(flux, given)
    handle.undo()
    whole = {
        **given,
        "hidden_states": torch.cat((given["hidden_states"], small.expand(2, -1, -1)), 1),
        "img_ids": torch.cat((given["img_ids"], positions(4, 6))),
    }
    text, image = 5, 96
    mask = torch.ones(text + image + 24, text + image + 24, dtype=torch.bool)
    mask[text + image :, text : text + image] = False
    whole["joint_attention_kwargs"] = {"attention_mask": mask}
    torch.testing.assert_close(ours, sample(flux, whole)[:, :image], atol=1e-5, rtol=1e-4)


def test_the_order_of_image_tokens_does_not_matter(
    flux: nn.Module, given: dict[str, Any], generator: torch.Generator
) -> None:
    handle: Any = scale_dit(flux, settings=SETTINGS, lora=updates(flux, generator))
    handle.method.give(low(generator), (4, 6))
    order = torch.randperm(96, generator=generator)
    moved = {**given, "hidden_states": given["hidden_states"][:, order], "img_ids": given["img_ids"][order]}
    torch.testing.assert_close(sample(flux, moved), sample(flux, given)[:, order], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changed",
    [
        {"local": "four"},
        {"window_first": False},
        {"block": None},
        {"scale_positions": False},
        {"ntk": 1.0},
        {"tuned_image": False},
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
    # Behind the last block low tokens are not read any more.
    silent = {path for path, u in lora.items() if u.b.grad is None or not bool((u.b.grad != 0).any())}
    assert silent == {"single_transformer_blocks.1.proj_mlp", "single_transformer_blocks.1.proj_out"}


def test_the_class_of_the_model_finds_the_preset(flux: nn.Module) -> None:
    handle: Any = scale_dit(flux, window=(8, 8))
    assert handle.method.settings == ScaleDiTSettings(window=(8, 8))


def test_refusals(flux: nn.Module, given: dict[str, Any], generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="Linear is not built; legal: FluxTransformer2DModel"):
        scale_dit(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="wndow=3 is unknown; legal: window, local"):
        scale_dit(flux, wndow=3)
    odd = {
        "transformer.proj_out.lora_A.weight": torch.zeros(1, 1),
        "transformer.proj_out.lora_B.weight": torch.zeros(1, 1),
    }
    with pytest.raises(ValueError, match="lora has an update of 'proj_out'; legal: x_embedder, norm1.linear"):
        scale_dit(flux, lora=odd)
    with pytest.raises(ValueError, match="update of 'x_embedder' maps 1 to 1 channels; legal: 16 to"):
        scale_dit(flux, lora={name.replace("proj_out", "x_embedder"): t for name, t in odd.items()})
    handle: Any = scale_dit(flux, settings=SETTINGS)
    with pytest.raises(ValueError, match=r"latents of shape \(1, 24, 16\) with size=\(4, 5\); legal: \[batch, rows"):
        handle.method.give(low(generator), (4, 5))
    handle.method.give(low(generator).expand(3, -1, -1), (4, 6))
    with pytest.raises(ValueError, match="3 small images for a batch of 2; legal: 1 or as many"):
        sample(flux, given)
    handle.method.give(low(generator), (4, 6))
    with pytest.raises(ValueError, match="img_ids of 96 tokens fill no image of 8 x 12"):
        sample(flux, {**given, "img_ids": given["img_ids"].clamp(min=1)})
    with pytest.raises(
        ValueError, match="joint_attention_kwargs with ip_hidden_states; legal with a small image: none"
    ):
        sample(flux, {**given, "joint_attention_kwargs": {"ip_hidden_states": []}})
    flux.enable_gradient_checkpointing()  # type: ignore[operator]
    with pytest.raises(ValueError, match="gradient checkpointing loses the low tokens"):
        flux(**given)
