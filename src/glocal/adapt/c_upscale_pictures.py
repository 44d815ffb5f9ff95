"""The built-in image models as generators for C-Upscale (arXiv 2505.16976)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from glocal.adapt.c_upscale_hosts import Words
from glocal.models.generation import ImageDiT, ImageUNet, PictureModel, SampleSpec, noise_levels
from glocal.models.generation.picture_model import PIXELS, SIDE, to_latents
from glocal.models.generation.picture_sampler import PICTURE_SPEC

Level = tuple[float, float]
"""Noise level of a step, and the one behind it."""


class PictureDenoiser:
    """A `Denoiser`: ``upscale(PictureDenoiser(pictures), picture, 256, 256, "a red disc at the top left")``.

    Predictions are clean latents; levels are those of the model's own sampler, moved by `shift`.
    """

    window: tuple[int, int] = (SIDE // PIXELS, SIDE // PIXELS)
    side = 2 * PIXELS
    factor = PIXELS

    def __init__(self, pictures: PictureModel, shift: float = PICTURE_SPEC.shift) -> None:
        self.pictures, self.shift = pictures, shift
        self.model: ImageUNet | ImageDiT = pictures.net

    @property
    def _device(self) -> torch.device:
        return next(self.pictures.parameters()).device

    def encode(self, picture: Tensor, generator: torch.Generator | None) -> Tensor:
        """picture [B, 3, H, W] in [-1, 1] -> latents; nothing is drawn."""
        return to_latents(picture / 2 + 0.5).to(self._device)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> picture [B, 3, H, W] in about [-1, 1]."""
        return torch.nn.functional.pixel_shuffle(latents, PIXELS)

    def words(self, prompts: Sequence[str]) -> Words:
        """Captions, encoded; padding and commas name nothing."""
        tokens = self.pictures.tokens(*prompts).to(self._device)
        return Words(self.pictures.encoder(tokens), content=tokens > 1)

    def levels(self, steps: int, run: int) -> Sequence[Level]:
        """The last `run` of `steps` steps."""
        every = noise_levels(SampleSpec(steps, self.shift))
        return list(pairwise(every))[-run:]

    def noised(self, latents: Tensor, noise: Tensor, level: Level) -> Tensor:
        """Clean latents with noise of a level."""
        return (1 - level[0]) * latents + level[0] * noise

    def predict(self, latents: Tensor, level: Level, words: Words) -> Tensor:
        """Clean latents."""
        sigma = torch.full((len(latents),), level[0], device=latents.device)
        return self.pictures(latents, sigma, words.embeds)

    def step(self, prediction: Tensor, level: Level, latents: Tensor) -> Tensor:
        """An Euler step: the noise is kept, the shares change."""
        return prediction + (level[1] / level[0]) * (latents - prediction)
