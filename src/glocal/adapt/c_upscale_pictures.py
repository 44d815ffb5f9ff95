"""The built-in image models as generators for C-Upscale (arXiv 2505.16976): rectified flow, latents without a VAE."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from glocal.adapt.c_upscale_hosts import Words
from glocal.models.generation.picture_model import PIXELS, SIDE, PictureModel, to_latents, to_pictures
from glocal.models.generation.picture_sampler import PICTURE_SPEC
from glocal.models.generation.picture_words import COMMA
from glocal.models.generation.sampler import SampleSpec, noise_levels

Level = tuple[float, float]
"""Noise level now and after the step."""


class Pictures:
    """A `PictureModel`; see `glocal.adapt.c_upscale_hosts.Denoiser`. shift: of its schedule."""

    factor = PIXELS
    side = 2 * PIXELS
    window: tuple[int, int] = (SIDE // PIXELS, SIDE // PIXELS)

    def __init__(self, pictures: PictureModel, shift: float = PICTURE_SPEC.shift) -> None:
        self.pictures, self.model, self.shift = pictures, pictures.net, shift
        self._like = next(pictures.parameters())

    def encode(self, picture: Tensor, generator: torch.Generator | None) -> Tensor:
        """Nothing is drawn."""
        return to_latents((picture + 1) / 2).to(self._like)

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse."""
        return to_pictures(latents) * 2 - 1

    def words(self, prompts: Sequence[str]) -> Words:
        """Captions; padding and commas are no content."""
        tokens = self.pictures.tokens(*prompts).to(self._like.device)
        return Words(self.pictures.encoder(tokens), content=tokens > COMMA)

    def levels(self, steps: int, run: int) -> Sequence[Level]:
        """Pairs of noise levels."""
        found = noise_levels(SampleSpec(steps, self.shift))
        return list(pairwise(found))[-run:]

    def noised(self, latents: Tensor, noise: Tensor, level: Level) -> Tensor:
        """A mix of both."""
        return (1 - level[0]) * latents + level[0] * noise

    def predict(self, latents: Tensor, level: Level, words: Words) -> Tensor:
        """Clean latents."""
        return self.pictures(latents, torch.full((len(latents),), level[0], device=latents.device), words.embeds)

    def step(self, prediction: Tensor, level: Level, latents: Tensor) -> Tensor:
        """Towards the clean latents."""
        return prediction + (level[1] / level[0]) * (latents - prediction)
