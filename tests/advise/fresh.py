"""Tiny real models of every host that advice is asked for, the same in every process; and a recipe in a fresh one.

    python -m tests.advise.fresh HOST FOLDER

builds the model of HOST anew, attaches FOLDER/recipe.json, runs the first sample before, with it and behind its undo,
and leaves what it found in FOLDER/found.pt. Then it begins an advice with its state in FOLDER/state, and kills itself
once the ladder is being measured.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from glocal.advise import (
    Advice,
    AdviseOptions,
    Effort,
    MethodSpec,
    Objective,
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
from glocal.advise.next_token import NextToken
from glocal.advise.pipeline import Pipeline
from glocal.advise.state import State
from glocal.data import make_text

from ..adapt.hosts.sizes import COGVIDEOX, FLUX, HUNYUAN_VIDEO, WAN
from .test_run import times_by_pairs

VIDEO: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 9}
PIPELINES = ("wan", "hunyuan", "flux", "cogvideox")
DECODERS = ("llama", "qwen3", "gemma3")
TOKENS = 600
SHAPES = {"wan": (3, 2, 3), "hunyuan": (3, 4, 6), "flux": (8, 12), "cogvideox": (3, 2, 3)}
TILES = {"wan": (1, 2, 3), "hunyuan": (1, 2, 3), "flux": (2, 3), "cogvideox": (1, 2, 3)}
EFFORT = Effort("tiny", 2, 8, 1, (0.7,), pairs=2, rounds=1, steps_a_bucket=1, published=1, rungs=1)


def wan() -> Any:
    """Two experts: the second one takes over below half of the noise."""
    diffusers: Any = importlib.import_module("diffusers")

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
    diffusers: Any = importlib.import_module("diffusers")

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
    diffusers: Any = importlib.import_module("diffusers")

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
    diffusers: Any = importlib.import_module("diffusers")

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


MAKERS = {"wan": wan, "hunyuan": hunyuan, "flux": flux, "cogvideox": cogvideox}


def text(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(name: str, n: int) -> dict[str, Any]:
    """The call of sample `n`; texts of pipelines are embeddings, as those have no encoders."""
    if name in DECODERS:
        return {"text": make_text(TOKENS, n)}
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


def sample(name: str, n: int) -> Sample:
    """Sample `n` of a host."""
    return Sample(f"s{n}", n, arguments(name, n))


def built(name: str) -> tuple[Any, Objective]:
    """The model of a host and how it runs: the same weights every time, and attention that reaches the output."""
    if name in DECODERS:
        from ..adapt.hosts.test_transformers_decoders import make

        objective = NextToken(lambda text: list(text.encode()), tokens=TOKENS, scored=24, window=64, sinks=8)
        return make(name), objective
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = MAKERS[name]()
        for part in (pipe.transformer, getattr(pipe, "transformer_2", None)):
            if part is not None:
                part.eval()
                for parameter in part.parameters():
                    if parameter.dim() > 1 and float(parameter.detach().std()) < 0.05:
                        torch.nn.init.normal_(parameter, std=0.2)
    pipe.set_progress_bar_config(disable=True)
    return pipe, Pipeline(pipe)


def methods_of(name: str) -> tuple[MethodSpec, ...]:
    """Candidates for the grid of a host."""
    if name in PIPELINES:
        return tuple(candidates(SHAPES[name], tile_shape=TILES[name])[:4])
    windows = [{"window": {"fraction": f}, "sinks": 16} for f in (0.25, 0.5)]
    return tuple(MethodSpec("causal_window", window, block=(32, 32)) for window in windows)


def accepted(runs: Any, target: Any) -> Any:
    """The pairs as they are, and a verdict that does not hang on the time of so small a model."""
    found = VERDICT(runs, target)
    return replace(found, verdict=replace(found.verdict, accepted=True, failures=()))


VERDICT = climb.verdict_over


def settle(put: Callable[[Any, str, Any], None]) -> None:
    """What depends on the clock is settled by `put` (object, attribute, value), so that samples alone decide."""
    put(inside, "times_of", times_by_pairs)
    put(climb, "refined", lambda times, found: times)
    put(run, "_refusal", lambda *args: None)
    put(climb, "winners", lambda measured, anchors, target: (list(measured), ""))
    put(climb, "verdict_over", accepted)
    # At this size the text refiner weighs as much as the blocks.
    put(importlib.import_module("glocal.advise.preflight"), "MOST_UNKNOWN", 1.0)


def advised(name: str, model: Any, objective: Objective, state: Path | None = None, *, resume: bool = False) -> Advice:
    """The advice of a host over four samples."""
    workload = Workload(tuple(sample(name, n) for n in range(4)))
    objective.check(model, workload)
    options = AdviseOptions(candidates=methods_of(name), min_tokens=8, state=state, resume=resume)
    effort = EFFORT if name in PIPELINES else replace(EFFORT, buckets=1, published=0)
    target = Target(limits={"drift": 1e6})
    return advise(model, workload, objective=objective, target=target, effort=effort, options=options)


def kill_at_the_ladder() -> None:
    """The process dies where the first rung would be kept."""
    keep = State.save

    def save(self: State, name: str, value: Any) -> None:
        if name.startswith("rung"):
            os.kill(os.getpid(), signal.SIGKILL)
        keep(self, name, value)

    State.save = save  # type: ignore[method-assign]


@torch.no_grad()
def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    model, objective = built(name)
    one = sample(name, 0)
    before = objective.run(model, one).tensor
    handle = attach(model, folder / "recipe.json")
    during = objective.run(model, one).tensor
    stats = {site: (s.sparse, s.kept) for site, s in handle.stats().items()}
    handle.undo()
    after = objective.run(model, one).tensor
    torch.save({"before": before, "during": during, "after": after, "stats": stats}, folder / "found.pt")
    settle(setattr)
    kill_at_the_ladder()
    advised(name, model, objective, folder / "state")


if __name__ == "__main__":
    main()
