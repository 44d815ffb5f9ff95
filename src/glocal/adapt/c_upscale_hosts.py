"""What C-Upscale (arXiv 2505.16976) needs of a generator: pictures to latents and back, words, one step of a schedule.

`denoiser_of(pipe)` knows the pipelines of Stable Diffusion 1.5, XL and PixArt, and the built-in image models; any
object with the methods of `Denoiser` may stand in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from glocal.adapt.tiled_vae import TiledVae
from glocal.models.generation.picture_model import PictureModel

LARGE = 2048
"""Pixels a side beyond which a VAE works tile by tile."""


@dataclass(frozen=True, eq=False)
class Words:
    """Encoded prompts. embeds [B, words, C]; mask [B, words], None: all count; pooled [B, C'] where the model has it.

    content: bool [B, words], words that name something (no start, end or padding); None: not known.
    """

    embeds: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    content: Tensor | None = None

    def rows(self, index: Sequence[int]) -> Words:
        """Some rows, in this order."""
        return self._each(lambda t: t[list(index)])

    def then(self, other: Words) -> Words:
        """The words of `other` behind these, row by row; pooled ones stay."""
        masks = None if self.mask is None or other.mask is None else torch.cat([self.mask, other.mask], 1)
        return replace(self, embeds=torch.cat([self.embeds, other.embeds], 1), mask=masks, content=None)

    @staticmethod
    def stack(parts: Sequence[Words]) -> Words:
        """Rows of all parts."""

        def joined(name: str) -> Tensor | None:
            found = [getattr(part, name) for part in parts]
            return None if any(t is None for t in found) else torch.cat(found)

        return Words(torch.cat([p.embeds for p in parts]), joined("mask"), joined("pooled"), joined("content"))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Words:
        more = {name: getattr(self, name) for name in ("mask", "pooled", "content")}
        return Words(change(self.embeds), **{name: None if t is None else change(t) for name, t in more.items()})


class Denoiser(Protocol):
    """One generator. model: what methods attach to. window: rows and columns of latents it was trained at. side: pixels
    that sides of a picture are multiples of; factor: pixels a latent.
    """

    model: Any
    window: tuple[int, int]
    side: int
    factor: int

    def encode(self, picture: Tensor, generator: torch.Generator | None) -> Tensor:
        """picture [B, 3, H, W] in [-1, 1] -> latents; the mean without a generator where the encoder draws."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> picture [B, 3, H, W] in [-1, 1]."""
        ...

    def words(self, prompts: Sequence[str]) -> Words:
        """Prompts encoded, all equally long."""
        ...

    def levels(self, steps: int, run: int) -> Sequence[Any]:
        """Noise levels of the last `run` of `steps` steps; begins a run."""
        ...

    def noised(self, latents: Tensor, noise: Tensor, level: Any) -> Tensor:
        """Clean latents with noise of a level."""
        ...

    def predict(self, latents: Tensor, level: Any, words: Words) -> Tensor:
        """What the model gives for noisy latents [B, C, h, w]; averages of it are meaningful."""
        ...

    def step(self, prediction: Tensor, level: Any, latents: Tensor) -> Tensor:
        """Latents of the next level."""
        ...


class _Diffusers:
    """What the pipelines share: a VAE and a scheduler, of which each run has its own."""

    def __init__(self, pipe: Any, model: Any, patch: int) -> None:
        self.pipe, self.model = pipe, model
        self.factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        self.side = self.factor * patch
        size = model.config.sample_size
        self.window: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        # A copy: `from_config` would lose what pipelines correct in a scheduler they are given.
        self.scheduler: Any = deepcopy(pipe.scheduler)
        for name in ("step", "set_timesteps"):  # what a method put over them acts on the pipeline's own
            vars(self.scheduler).pop(name, None)

    def encode(self, picture: Tensor, generator: torch.Generator | None) -> Tensor:
        """Tile by tile beyond 2048 pixels."""
        with TiledVae(self.pipe.vae, tiled=max(picture.shape[-2:]) > LARGE, exact=True) as vae:
            found = vae.encode(picture.to(self.model.device, vae.dtype)).latent_dist
            latents = found.mode() if generator is None else found.sample(generator)
        return (latents * vae.config.scaling_factor).to(self.model.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Tile by tile beyond 2048 pixels."""
        with TiledVae(self.pipe.vae, tiled=max(latents.shape[-2:]) * self.factor > LARGE, exact=True) as vae:
            return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]

    def levels(self, steps: int, run: int) -> Sequence[Any]:
        """Timesteps of the scheduler."""
        self.scheduler.set_timesteps(steps, device=self.model.device)
        first = (steps - run) * getattr(self.scheduler, "order", 1)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return list(self.scheduler.timesteps[first:])

    def noised(self, latents: Tensor, noise: Tensor, level: Any) -> Tensor:
        """As the scheduler does."""
        return self.scheduler.add_noise(latents, noise, torch.as_tensor(level)[None])

    def step(self, prediction: Tensor, level: Any, latents: Tensor) -> Tensor:
        """As the scheduler does."""
        return self.scheduler.step(prediction, level, latents, return_dict=False)[0]

    def scaled(self, latents: Tensor, level: Any) -> Tensor:
        """What the model is given."""
        return self.scheduler.scale_model_input(latents, level).to(self.model.dtype)

    def content(self, prompts: Sequence[str], tokenizer: Any, length: int) -> Tensor | None:
        """Which tokens are no start, end or padding."""
        if tokenizer is None:
            return None
        given = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
        special = set(tokenizer.all_special_ids)
        rows = [[token not in special for token in row] for row in given["input_ids"]]
        return torch.tensor(rows, device=self.model.device)


class StableDiffusion(_Diffusers):
    """Pipelines of Stable Diffusion 1.5 and 2 (UNet, one text encoder)."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe, pipe.unet, 1)

    def words(self, prompts: Sequence[str]) -> Words:
        """As the pipeline encodes them."""
        embeds = self.pipe.encode_prompt(list(prompts), self.model.device, 1, False)[0]
        return Words(embeds, content=self.content(prompts, self.pipe.tokenizer, embeds.shape[1]))

    def predict(self, latents: Tensor, level: Any, words: Words) -> Tensor:
        """Noise, or velocity."""
        return self.model(
            self.scaled(latents, level),
            level,
            encoder_hidden_states=words.embeds,
            added_cond_kwargs=self.conditions(words),
            return_dict=False,
        )[0]

    def conditions(self, words: Words) -> Mapping[str, Tensor] | None:
        """None here."""
        return None


class StableDiffusionXL(StableDiffusion):
    """Pipelines of Stable Diffusion XL: every region says that it is a whole picture of the trained size."""

    def words(self, prompts: Sequence[str]) -> Words:
        """Of both text encoders."""
        given = self.pipe.encode_prompt(list(prompts), device=self.model.device, do_classifier_free_guidance=False)
        embeds, pooled = given[0], given[2]
        return Words(embeds, None, pooled, self.content(prompts, self.pipe.tokenizer, embeds.shape[1]))

    def conditions(self, words: Words) -> Mapping[str, Tensor] | None:
        """Pooled words; size, crop at 0, target size."""
        if words.pooled is None:
            raise ValueError(
                "c_upscale: the words of Stable Diffusion XL need pooled embeddings; legal: Words(embeds, pooled=...)."
            )
        height, width = (n * self.factor for n in self.window)
        ids = torch.tensor([[height, width, 0, 0, height, width]], device=words.pooled.device, dtype=words.pooled.dtype)
        return {"text_embeds": words.pooled, "time_ids": ids.expand(len(words.pooled), -1)}


class PixArt(_Diffusers):
    """Pipelines of PixArt-alpha and Sigma: a transformer, words with a mask, half of the output is a variance."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe, pipe.transformer, pipe.transformer.config.patch_size)

    def words(self, prompts: Sequence[str]) -> Words:
        """As the pipeline encodes them."""
        embeds, mask, *_ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.model.device
        )
        return Words(embeds, mask, content=self.content(prompts, self.pipe.tokenizer, embeds.shape[1]))

    def predict(self, latents: Tensor, level: Any, words: Words) -> Tensor:
        """Noise."""
        rows = len(latents)
        more: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            size = torch.tensor([n * self.factor for n in latents.shape[-2:]], dtype=latents.dtype)
            more["resolution"] = size.to(latents.device).expand(rows, -1)
            more["aspect_ratio"] = (more["resolution"][:, :1] / more["resolution"][:, 1:]).to(latents)
        found = self.model(
            self.scaled(latents, level),
            encoder_hidden_states=words.embeds,
            encoder_attention_mask=words.mask,
            timestep=torch.as_tensor(level, device=latents.device).expand(rows),
            added_cond_kwargs=more,
            return_dict=False,
        )[0]
        channels = latents.shape[1]
        return found[:, :channels] if found.shape[1] == 2 * channels else found


def denoiser_of(pipe: Any) -> Denoiser:
    """The denoiser of a pipeline; ValueError for another."""
    unet, transformer = getattr(pipe, "unet", None), getattr(pipe, "transformer", None)
    if type(unet).__name__ == "UNet2DConditionModel" and hasattr(pipe, "vae"):
        large = unet.config.addition_embed_type == "text_time"  # type: ignore[union-attr]
        return StableDiffusionXL(pipe) if large else StableDiffusion(pipe)
    if type(transformer).__name__ == "PixArtTransformer2DModel":
        return PixArt(pipe)
    pictures = getattr(pipe, "pictures", pipe)  # of a painter
    if isinstance(pictures, PictureModel):
        from glocal.adapt.c_upscale_pictures import PictureDenoiser

        return PictureDenoiser(pictures)
    if all(hasattr(pipe, name) for name in ("predict", "encode", "levels", "noised", "step")):
        return pipe
    raise ValueError(
        f"c_upscale: {type(pipe).__name__} is no generator it knows; legal: pipelines of Stable Diffusion 1.5, 2, XL "
        "and PixArt, the built-in image models, or an object with the methods of glocal.adapt.c_upscale_hosts.Denoiser."
    )
