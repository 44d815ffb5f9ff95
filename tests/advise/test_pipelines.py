"""Real pipelines of diffusers, tiny and random: advice, a recipe, and the recipe in a pipeline built anew."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glocal.advise import (
    AdviseOptions,
    Effort,
    Recipe,
    RecipeError,
    Sample,
    Target,
    Workload,
    advise,
    attach,
    candidates,
    climb,
    inside,
    run,
)
from glocal.advise.identity import host_record
from glocal.advise.pipeline import Pipeline

from ..adapt.hosts.sizes import COGVIDEOX, FLUX, HUNYUAN_VIDEO, WAN
from .test_run import times_by_pairs

REASON = "is not installed: pip install 'glocal[diffusers,transformers]'"
diffusers = pytest.importorskip("diffusers", reason=f"diffusers {REASON}")
pytest.importorskip("transformers", reason=f"transformers, without which diffusers has no pipelines, {REASON}")

EFFORT = Effort("tiny", 2, 8, 1, (0.7,), pairs=2, rounds=1, steps_a_bucket=1, published=1, rungs=1)
VIDEO: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 9}


def wan() -> Any:
    """Two experts: the second one takes over below half of the noise."""
    sizes = {**WAN, "in_channels": 16, "out_channels": 16}
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=diffusers.WanTransformer3DModel(**sizes),
        transformer_2=diffusers.WanTransformer3DModel(**sizes),
        boundary_ratio=0.5,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
    )


def hunyuan() -> Any:
    vae = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN_VIDEO),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
    )


def flux() -> Any:
    vae = diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=diffusers.FluxTransformer2DModel(**FLUX),
        text_encoder_2=None,
        tokenizer_2=None,
    )


def cogvideox() -> Any:
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        layers_per_block=1,
    )
    return diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=diffusers.CogVideoXTransformer3DModel(**COGVIDEOX),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def text(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(name: str, n: int) -> dict[str, Any]:
    """The call of sample `n`; texts are embeddings, as the pipelines have no encoders."""
    steps: dict[str, Any] = {"num_inference_steps": 4}
    if name == "wan":
        pair = {"prompt_embeds": text(n, 1, 5, 16), "negative_prompt_embeds": text(99, 1, 5, 16)}
        return {**steps, **VIDEO, **pair, "guidance_scale": 4.0}
    if name == "hunyuan":
        mask = torch.tensor([[1, 1, 1, n % 2, 0]])
        more = {"pooled_prompt_embeds": text(n + 50, 1, 8), "prompt_attention_mask": mask}
        return {**steps, **VIDEO, "prompt_embeds": text(n, 1, 5, 16), **more}
    if name == "flux":
        more = {"pooled_prompt_embeds": text(n + 50, 1, 24), "height": 32, "width": 48}
        return {**steps, "prompt_embeds": text(n, 1, 5, 32), **more}
    pair = {"prompt_embeds": text(n, 1, 5, 8), "negative_prompt_embeds": text(99, 1, 5, 8)}
    return {**steps, **VIDEO, **pair, "guidance_scale": 6.0}


def built(make: Callable[[], Any]) -> Any:
    """The same pipeline every time: same weights, and attention that reaches the output."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = make()
        for part in (pipe.transformer, getattr(pipe, "transformer_2", None)):
            if part is not None:
                part.eval()
                for parameter in part.parameters():
                    if parameter.dim() > 1 and float(parameter.std()) < 0.05:
                        torch.nn.init.normal_(parameter, std=0.2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "kind", "tile"),
    [(wan, "self", (1, 2, 3)), (hunyuan, "joint", (1, 2, 3)), (flux, "joint", (2, 3)), (cogvideox, "joint", (1, 2, 3))],
    ids=["wan", "hunyuan", "flux", "cogvideox"],
)
def test_advice_for_a_pipeline_and_its_recipe_in_a_new_one(
    make: Callable[[], Any], kind: str, tile: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = make.__name__
    monkeypatch.setattr(inside, "times_of", times_by_pairs)
    monkeypatch.setattr(run, "_refusal", lambda *args: None)
    monkeypatch.setattr(climb, "winners", lambda measured, anchors, target: (list(measured), ""))
    # At this size the text refiner weighs as much as the blocks.
    monkeypatch.setattr(importlib.import_module("glocal.advise.preflight"), "MOST_UNKNOWN", 1.0)
    pipe = built(make)
    objective = Pipeline(pipe)
    workload = Workload(tuple(Sample(f"s{n}", n, arguments(name, n)) for n in range(4)))
    objective.check(pipe, workload)
    shape = {"hunyuan": (3, 4, 6), "flux": (8, 12)}.get(name, (3, 2, 3))
    methods = tuple(candidates(shape, tile_shape=tile)[:4])
    options = AdviseOptions(candidates=methods, min_tokens=8)
    found = advise(
        pipe,
        workload,
        objective=objective,
        target=Target(limits={"drift": 1e6}),
        effort=EFFORT,
        options=options,
    )
    assert found.preflight.shape == shape and len(found.preflight.levels) == 5
    rung = next(r for r in found.ladder if r.kind == "allocation")
    assert {r.site for r in rung.recipe.rules} == {kind}
    components = {"transformer", "transformer_2"} if name == "wan" else {"transformer"}
    assert {r.component for r in found.records} == components
    single = next((r for r in found.ladder if r.kind == "single"), rung)
    assert found.validation is not None and found.validation.pairs[0].error > 0
    recipe = found.chosen.recipe  # type: ignore[union-attr]
    canvas = recipe.workload["canvases"][0]
    assert canvas["shape"] == list(shape) and (canvas["before"] + canvas["after"] > 0) == (kind == "joint")
    saved = replace(single.recipe, workload=recipe.workload, host=host_record(pipe, found.preflight.levels, None))
    saved.save(tmp_path / "recipe.json")
    fresh = built(make)
    sample = workload.samples[0]
    other = Pipeline(fresh)
    dense = other.run(fresh, sample).tensor
    with attach(fresh, tmp_path / "recipe.json") as handle:
        sparse = other.run(fresh, sample).tensor
        stats = handle.method.stats  # type: ignore[attr-defined]
    assert sum(s.sparse for s in stats.values()) > 0 and not torch.equal(dense, sparse)
    assert torch.equal(dense, other.run(fresh, sample).tensor)
    with torch.no_grad():
        next(fresh.transformer.parameters()).add_(1)
    with pytest.raises(RecipeError, match=r"host.components\[transformer\].weights_sha256: the recipe was proven on"):
        attach(fresh, Recipe.load(tmp_path / "recipe.json"))


def test_an_argument_the_pipeline_does_not_take_is_named() -> None:
    objective = Pipeline(built(flux))
    with pytest.raises(ValueError, match="sample 'a': FluxPipeline takes no 'promt'; legal: .*prompt"):
        objective.check(None, Workload((Sample("a", 0, {"promt": "x"}),)))
    with pytest.raises(ValueError, match="start=1: FluxPipeline begins at its first step; legal: 0"):
        objective.run(None, Sample("a", 0, {}), start=1)
