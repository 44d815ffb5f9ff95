"""The whole of C-Upscale (arXiv 2505.16976): a small picture enlarged, noised part of the way and denoised region by
region, under the guidance of what the small picture knows.

``upscale(pipe, picture, 4096, 4096, "a heron in the reeds")``. At every step: the small picture, noised alike, goes
through the model and what it reads of the words is kept; its low frequencies pull the large latents towards its layout;
overlapping regions are denoised with crops of that and their own prompts, and mixed. All share one field of noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from glocal.adapt.c_upscale import CUpscale, CUpscaleSettings, Row, c_upscale
from glocal.adapt.c_upscale_hosts import Denoiser, Words, denoiser_of
from glocal.adapt.maps import Box
from glocal.adapt.presets import changed_in
from glocal.ops.frequency import low_pass
from glocal.ops.tiles import Tile, blend, tiles

Prompter = Callable[[Tensor, str], str | Words]
"""A region of the enlarged picture [3, h, w] in [0, 1] and the global prompt -> the prompt of the region."""


@dataclass(frozen=True, eq=False)
class _Run:
    """What all steps share. clean, small: latents of the enlarged and of the small picture; noise, small_noise: one
    field; prompt, negative: words, one row a picture; regional: words of each tile, [tiles * pictures] rows, or None.
    """

    denoiser: Denoiser
    settings: CUpscaleSettings
    method: CUpscale
    clean: Tensor
    small: Tensor
    noise: Tensor
    small_noise: Tensor
    prompt: Words
    negative: Words
    regional: Words | None
    generator: torch.Generator


def upscale(
    pipe: Any,
    picture: Tensor | Any,
    height: int,
    width: int,
    prompt: str | Words,
    *,
    negative: str | Words = "",
    prompter: Prompter | None = None,
    settings: CUpscaleSettings | None = None,
    generator: torch.Generator | None = None,
    output_type: str = "pt",
    **changed: Any,
) -> Tensor:
    """Pictures [B, 3, height, width] in [0, 1]; output_type "latent": latents.

    pipe: a pipeline of Stable Diffusion 1.5, 2, XL or PixArt, a built-in `PictureModel` or `Painter`, or a `Denoiser`;
    it is left as it was. picture: [3, h, w] or [B, 3, h, w] in [0, 1], or an image of PIL; of the size the model was
    trained for. prompt, negative: text, or words that are encoded already (one row, or one a picture). prompter: writes
    the prompt of each region; None: the global one. settings, changed: see `CUpscaleSettings`. generator: of all noise,
    on the CPU or the model's device.
    Raises ValueError for sizes, words or settings that do not fit.
    """
    denoiser = denoiser_of(pipe)
    settings = changed_in("c_upscale", CUpscaleSettings() if settings is None else settings, changed)
    if output_type not in ("pt", "latent"):
        raise ValueError(f"upscale: output_type={output_type!r}; legal: 'pt', 'latent'.")
    given = pictures_of(picture)
    _sizes(denoiser, given, (height, width))
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    with torch.no_grad(), c_upscale(denoiser.model) as handle:
        method = handle.method
        assert isinstance(method, CUpscale)
        large = given
        if given.shape[-2:] != (height, width):
            large = interpolate(given, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)
        clean = denoiser.encode(large * 2 - 1, generator)
        noise = torch.randn(clean.shape, generator=generator, device=generator.device).to(clean)
        small = denoiser.encode(given * 2 - 1, None)
        if small.shape[-2:] == clean.shape[-2:]:
            small = clean
        words = _words(denoiser, prompt, len(given), "prompt")
        silent = _words(denoiser, negative, len(given), "negative")
        _alike(silent, words, "the negative words")
        run = _Run(
            denoiser,
            settings,
            method,
            clean,
            small,
            noise,
            interpolate(noise, small.shape[-2:], mode="nearest-exact"),
            words,
            silent,
            _regional(denoiser, settings, large, clean, (prompt, words), prompter),
            generator,
        )
        latents = _denoised(run)
        if output_type == "latent":
            return latents
        return (denoiser.decode(latents).float() / 2 + 0.5).clamp(0, 1)


def pictures_of(picture: Tensor | Any) -> Tensor:
    """Pictures as [B, 3, h, w], float32 in [0, 1]; ValueError for another shape."""
    if isinstance(picture, Tensor):
        found = picture.float()
    else:
        import numpy as np

        found = torch.from_numpy(np.asarray(picture)).movedim(-1, 0).float() / 255
    found = found[None] if found.dim() == 3 else found
    if found.dim() != 4 or found.shape[1] != 3:
        raise ValueError(f"upscale: picture of shape {tuple(found.shape)}; legal: [3, h, w], [B, 3, h, w] in colour.")
    return found


def _sizes(denoiser: Denoiser, given: Tensor, size: tuple[int, int]) -> None:
    for what, sides in (("height, width", size), ("picture", tuple(given.shape[-2:]))):
        if any(n < denoiser.side or n % denoiser.side for n in sides):
            near = tuple(max(round(n / denoiser.side), 1) * denoiser.side for n in sides)
            raise ValueError(f"upscale: {what}={sides} pixels; legal: multiples of {denoiser.side}, nearest: {near}.")
    if any(n < m for n, m in zip(size, given.shape[-2:], strict=True)):
        raise ValueError(
            f"upscale: height, width={size} is smaller than the picture of {tuple(given.shape[-2:])}; legal: as large "
            "or larger."
        )


def _words(denoiser: Denoiser, prompt: str | Words, count: int, name: str) -> Words:
    words = denoiser.words([prompt]) if isinstance(prompt, str) else prompt
    if len(words.embeds) not in (1, count):
        raise ValueError(f"upscale: {name} has {len(words.embeds)} rows for {count} pictures; legal: 1 or as many.")
    return words if len(words.embeds) == count else words.rows([0] * count)


def _alike(words: Words, prompt: Words, name: str) -> None:
    """ValueError for words that cannot stand beside the prompt's."""
    mine, theirs = (tuple(w.embeds.shape[1:]) for w in (words, prompt))
    if mine != theirs:
        raise ValueError(f"upscale: {name} are {mine}, the prompt's {theirs}; legal: as many of the same size.")
    for part in ("mask", "pooled"):
        if (getattr(words, part) is None) != (getattr(prompt, part) is None) and (part == "mask" or "negative" in name):
            has = "no" if getattr(words, part) is None else "a"
            raise ValueError(f"upscale: {name} have {has} {part}, unlike the prompt's; legal: both or neither.")


def _regional(
    denoiser: Denoiser,
    settings: CUpscaleSettings,
    large: Tensor,
    clean: Tensor,
    prompt: tuple[str | Words, Words],
    prompter: Prompter | None,
) -> Words | None:
    """The words of every tile and picture; None where they are the global ones."""
    if prompter is None or max(settings.mix) == 0:
        return None
    said, words = prompt
    factor = denoiser.factor
    found: list[Words] = []
    for tile in _tiles(denoiser, settings, clean, None):
        for number, one in enumerate(large):
            region = Tile(tile.top * factor, tile.left * factor, tile.height * factor, tile.width * factor).of(one)
            text = prompter(region, said if isinstance(said, str) else "")
            here = denoiser.words([text]) if isinstance(text, str) else text
            _alike(here, words, "the prompter's words")
            found.append(replace(here, pooled=None if words.pooled is None else words.pooled[number : number + 1]))
    return Words.stack(found)


def _tiles(
    denoiser: Denoiser, settings: CUpscaleSettings, latents: Tensor, generator: torch.Generator | None
) -> tuple[Tile, ...]:
    window = denoiser.window if settings.window is None else settings.window
    unit = denoiser.side // denoiser.factor
    size = tuple(latents.shape[-2:])
    # Transformers cut patches: regions begin and end where patches do.
    steps = (
        tuple(max(n // unit, 1) for n in size),
        tuple(max(min(w, n) // unit, 1) for w, n in zip(window, size, strict=True)),
    )
    stride = tuple(max(round(w * (1 - settings.overlap)), 1) for w in steps[1])
    found = tiles(steps[0], steps[1], stride, generator)  # type: ignore[arg-type]
    return tuple(Tile(*(unit * n for n in (t.top, t.left, t.height, t.width))) for t in found)


def _denoised(run: _Run) -> Tensor:
    settings, denoiser = run.settings, run.denoiser
    levels = denoiser.levels(settings.steps, settings.run_steps)
    z = denoiser.noised(run.clean, run.noise, levels[0])
    size = z.shape[-2:]
    band = tuple(settings.cutoff * n / m for n, m in zip(run.small.shape[-2:], size, strict=True))
    for step, level in enumerate(levels):
        weight = settings.structure_weight(step)
        if weight:
            known = denoiser.noised(run.clean, run.noise, level)
            z = z + weight * low_pass(known - z, band, settings.filter)  # type: ignore[arg-type]
        if settings.rap != "off" and step % settings.capture_every == 0:
            with run.method.whole(settings.rap):
                denoiser.predict(denoiser.noised(run.small, run.small_noise, level), level, run.prompt)
        places = _tiles(denoiser, settings, z, run.generator if settings.jitter else None)
        found = blend(_regions(run, z, places, level, step), places, (size[0], size[1]))
        z = denoiser.step(found, level, z)
    return z


def _regions(run: _Run, z: Tensor, places: Sequence[Tile], level: Any, step: int) -> list[Tensor]:
    """The guided prediction of every tile, [B, C, h, w] each."""
    settings, pictures, size = run.settings, z.shape[0], z.shape[-2:]
    share = settings.regional_share(step)
    found: list[Tensor] = []
    for first in range(0, len(places), settings.region_batch):
        part = places[first : first + settings.region_batch]
        each = [(tile, picture) for tile in range(len(part)) for picture in range(pictures)]
        latents = torch.stack([part[tile].of(z[picture]) for tile, picture in each])
        pictures_in = [picture for _, picture in each]
        silent, words = run.negative.rows(pictures_in), run.prompt.rows(pictures_in)
        if run.regional is not None and share > 0:
            regional = run.regional.rows([(first + tile) * pictures + picture for tile, picture in each])
            words, silent = words.then(regional), silent.then(silent)
        rows = [
            Row(picture, _box(part[tile], size), None if run.prompt.content is None else run.prompt.content[picture])
            for tile, picture in each
        ]
        with run.method.regions(rows, run.prompt.embeds.shape[1], share, settings.rap):
            free, guided = run.denoiser.predict(
                torch.cat([latents, latents]), level, Words.stack([silent, words])
            ).chunk(2)
        mixed = free + settings.guidance * (guided - free)
        found += list(mixed.unflatten(0, (len(part), pictures)))
    return found


def _box(tile: Tile, size: Sequence[int]) -> Box:
    height, width = size
    return Box(
        tile.left / width, tile.top / height, (tile.left + tile.width) / width, (tile.top + tile.height) / height
    )
