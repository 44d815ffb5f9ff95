"""A built-in image model with everything that drawing a picture takes: words in, pixels out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.models.generation.image_dit import ImageDiT
from glocal.models.generation.image_unet import ImageUNet
from glocal.models.generation.picture_model import SIDE, PictureModel, draw_picture_noise, to_pictures
from glocal.models.generation.picture_sampler import PICTURE_SPEC, sample_pictures
from glocal.models.generation.picture_weights import Kind, load_picture_model
from glocal.models.generation.sampler import SampleSpec


@dataclass(frozen=True, eq=False)
class Painter:
    """pictures: the trained model. `model`, its UNet or transformer, is what methods are attached to."""

    pictures: PictureModel

    @property
    def model(self) -> ImageUNet | ImageDiT:
        """Where methods are attached."""
        return self.pictures.net

    def generate(
        self,
        *,
        seed: int = 0,
        steps: int = PICTURE_SPEC.steps,
        guidance: float = 3.0,
        caption: str = "",
        size: int | str = SIDE,
    ) -> Tensor:
        """A picture [1, 3, size, size] in [0, 1] of a caption, such as "a striped red disc at the top left".

        size: pixels a side, a multiple of 4. Raises ValueError for another size and unknown words.
        """
        text = str(size)
        if not text.isdigit() or int(text) < 4 or int(text) % 4:
            raise ValueError(f"size={size!r} pixels; legal: a multiple of 4; the model was trained on {SIDE}")
        noise = draw_picture_noise([seed], int(text), int(text))
        spec = SampleSpec(steps, PICTURE_SPEC.shift, guidance)
        return to_pictures(sample_pictures(self.pictures, noise, self.pictures.tokens(caption), spec))


def load_painter(kind: Kind = "dit", device: torch.device | str = "cpu") -> Painter:
    """The shipped "dit" or "unet", ready to draw."""
    return Painter(load_picture_model(kind, device))
