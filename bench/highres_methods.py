"""Ways to draw a large picture with a built-in image model trained on small ones; `highres.py` compares them.

A way takes the model, captions and noise of the large size, and the small latents of the same seeds, and gives clean
large latents. "naive" draws from noise at the large size with the model as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.adapt.c_upscale_hosts import Words
from glocal.adapt.c_upscale_pictures import PictureDenoiser
from glocal.adapt.c_upscale_run import upscale
from glocal.adapt.freeswim import freeswim
from glocal.adapt.hidiffusion import hidiffusion
from glocal.adapt.scale_dit import scale_dit
from glocal.adapt.tile_windows import tile_windows
from glocal.adapt.ultragen import UltraGenSettings, ultragen
from glocal.data.captions import COLUMNS, ROWS
from glocal.data.objects import COLOURS
from glocal.measure import find_objects
from glocal.models.generation import (
    PICTURE_SPEC,
    PictureModel,
    load_picture_model,
    sample_pictures,
    to_latents,
    to_pictures,
)
from glocal.models.generation.sampler import noise_levels

ULTRAGEN = UltraGenSettings(rank=16, conv="depthwise")
"""A dense convolution would outweigh the whole model."""
STRENGTH = 0.7
"""Share of the steps that runs again on an enlarged picture (FreeSwim's published value)."""


@dataclass(frozen=True, eq=False)
class Job:
    """model, tokens [B, L], noise [B, 12, h, w] of the large size, small [B, 12, 32, 32] clean latents of the seeds."""

    model: PictureModel
    tokens: Tensor
    noise: Tensor
    small: Tensor

    @property
    def factor(self) -> int:
        """Large side over small side."""
        return self.noise.shape[-1] // self.small.shape[-1]


Way = Callable[[Job], Tensor]


def enlarged(job: Job) -> Tensor:
    """The small picture, bicubic."""
    side = [n * 2 for n in job.noise.shape[-2:]]
    picture = F.interpolate(to_pictures(job.small), side, mode="bicubic", antialias=True).clamp(0, 1)
    return to_latents(picture)


def naive(job: Job) -> Tensor:
    """From noise, the model as it is."""
    return sample_pictures(job.model, job.noise, job.tokens, PICTURE_SPEC)


def again(job: Job) -> Tensor:
    """The enlarged small picture, noised part of the way and denoised (SDEdit, arXiv 2108.01073)."""
    start = round((1 - STRENGTH) * PICTURE_SPEC.steps)
    level = noise_levels(PICTURE_SPEC)[start]
    mixed = (1 - level) * enlarged(job) + level * job.noise.to(job.small)
    return sample_pictures(job.model, mixed, job.tokens, PICTURE_SPEC, start=start)


def within(put: Callable[[Job], AbstractContextManager[Any]], way: Way) -> Way:
    """`way` with a method in the model."""

    def run(job: Job) -> Tensor:
        with put(job):
            return way(job)

    return run


def _guided(lora: Path | None, backend: str) -> Callable[[Job], AbstractContextManager[Any]]:
    def put(job: Job) -> AbstractContextManager[Any]:
        handle = scale_dit(job.model.net, lora=lora, backend="mask" if backend == "reference" else backend)
        handle.method.give(job.small)  # type: ignore[attr-defined]
        return handle

    return put


def described(region: Tensor, prompt: str) -> str:
    """What C-Upscale's language model would do: the colours in a region [3, h, w] and where they are in it."""
    found = find_objects(region[None].cpu(), torch.tensor(list(COLOURS.values())))[0][:3]
    names = list(COLOURS)
    return ", ".join(f"a {names[o.colour]} at the {ROWS[int(o.y * 3)]} {COLUMNS[int(o.x * 3)]}" for o in found)


def regions(**more: Any) -> Way:
    """C-Upscale from the small picture; `more` goes to `upscale`."""

    def run(job: Job) -> Tensor:
        denoiser = PictureDenoiser(job.model)
        tokens = job.tokens.to(job.small.device)
        words = Words(job.model.encoder(tokens), content=tokens > 1)
        silent = Words(job.model.encoder(torch.zeros_like(tokens)), content=tokens > 1)
        side = job.noise.shape[-1] * denoiser.factor
        settings = {"steps": PICTURE_SPEC.steps, "guidance": PICTURE_SPEC.guidance, "output_type": "latent"} | more
        draw = torch.Generator().manual_seed(int(job.noise[0, 0, 0, 0].abs() * 1e6))  # another one for each batch
        return upscale(denoiser, to_pictures(job.small), side, side, words, negative=silent, generator=draw, **settings)

    return run


def _regional() -> dict[str, Way]:
    """Ways that work region by region."""
    return {
        "c_upscale": regions(region_batch=16),
        "regions, no priors": regions(rap="off", structure=0.0, region_batch=16),
        "c_upscale, regional prompts": regions(prompter=described, region_batch=16),
    }


def ways(kind: str, parts: Path | None, backend: str = "auto") -> Mapping[str, Way]:
    """Every way of a kind of model by name. parts: folder of trained parts, None where there is none.

    backend: of sparse attention; "reference" is the definition, which needs no compiler.
    """
    found: dict[str, Way] = {"naive": naive, "enlarged": enlarged, "enlarged, again": again}
    if kind == "unet":
        steps = PICTURE_SPEC.steps
        found["hidiffusion"] = within(lambda j: hidiffusion(j.model.net, steps=steps), naive)
        found["hidiffusion, RAU-Net alone"] = within(
            lambda j: hidiffusion(j.model.net, steps=steps, window_attention=False), naive
        )
        return found | _regional()
    found["tile_windows"] = within(
        lambda j: tile_windows(j.model.net, tile=(1, 8, 8), window=(1, 3, 3), backend=backend), naive
    )
    found["freeswim"] = within(lambda j: freeswim(j.model.net, backend=backend), again)
    found["scale_dit, untrained"] = within(_guided(None, backend), naive)
    found["freeswim, from noise"] = within(lambda j: freeswim(j.model.net, backend=backend), naive)
    found["freeswim, windows alone"] = within(lambda j: freeswim(j.model.net, dual_steps=0, backend=backend), naive)
    found["ultragen, untrained"] = within(lambda j: ultragen(j.model.net, settings=ULTRAGEN, backend=backend), naive)
    file = None if parts is None else parts / "image_dit_scale_dit.safetensors"
    if file is not None and file.is_file():
        found["scale_dit"] = within(_guided(file, backend), naive)
        found["scale_dit, enlarged"] = within(_guided(file, backend), again)
    file = None if parts is None else parts / "image_dit_ultragen.safetensors"
    if file is not None and file.is_file():
        found["ultragen"] = within(lambda j: ultragen(j.model.net, parts=file, backend=backend), naive)
        found["ultragen, enlarged"] = within(lambda j: ultragen(j.model.net, parts=file, backend=backend), again)
    whole = None if parts is None else parts / "image_dit_ultragen_own.safetensors"
    if whole is not None and whole.is_file():
        tuned = whole.with_name("image_dit_ultragen_own_model.safetensors")
        found["ultragen, whole model"] = _tuned(tuned, whole, backend, naive)
        found["ultragen, whole model, enlarged"] = _tuned(tuned, whole, backend, again)
    return found | _regional()


def _tuned(file: Path, parts: Path, backend: str, way: Way) -> Way:
    """`way` with UltraGen in a model whose own weights were trained with its parts."""

    def run(job: Job) -> Tensor:
        model = load_picture_model(file, job.small.device)
        with ultragen(model.net, parts=parts, backend=backend):
            return way(replace(job, model=model))

    return run


def detail(pictures: Tensor, side: int) -> Tensor:
    """How much of each picture [B, 3, H, W] is lost when it is reduced to `side`: mean absolute difference, [B]."""
    small = F.interpolate(pictures, (side, side), mode="bilinear", antialias=True)
    back = F.interpolate(small, pictures.shape[-2:], mode="bilinear")
    return (pictures - back).abs().mean((1, 2, 3))


def drawn(model: PictureModel, tokens: Tensor, noise: Tensor) -> Tensor:
    """Clean latents by the model as it is."""
    return sample_pictures(model, noise, tokens, PICTURE_SPEC)
