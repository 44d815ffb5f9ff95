"""An image model that draws pictures from captions: caption encoder and UNet or transformer, trained together.

Pictures are drawn as latents: two by two pixels lie in the channels of one, losslessly, where other models have an
autoencoder. The model predicts the clean latents from a mix (1 - sigma) * data + sigma * noise (rectified flow,
arXiv 2209.03003), as the video model does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.models.generation.image_dit import ImageDiT
from glocal.models.generation.image_layers import CaptionEncoder
from glocal.models.generation.image_unet import ImageUNet
from glocal.models.generation.picture_words import read_caption

PIXELS = 2
"""Pixels a side of a latent."""
SIDE = 64
"""Pixels a side of the pictures the shipped models were trained on."""


class PictureModel(nn.Module):
    """forward(latents [B, 12, h, w], sigma [B], words [B, L, C]) -> clean latents of the same shape.

    net: an `ImageUNet` or `ImageDiT`, what methods are attached to. encoder: `CaptionEncoder` of its words.
    vocabulary: the words that captions may use, in the order of the encoder's table.
    """

    def __init__(self, net: ImageUNet | ImageDiT, vocabulary: Sequence[str], length: int) -> None:
        super().__init__()
        self.net, self.vocabulary, self.length = net, tuple(vocabulary), length
        dim = net.config.text_dim if isinstance(net, ImageDiT) else net.config.cross_attention_dim
        self.encoder = CaptionEncoder(len(self.vocabulary), length, dim)

    def tokens(self, *captions: str) -> Tensor:
        """Captions as tokens [len(captions), L]; see `read_caption`."""
        return torch.cat([read_caption(text, self.vocabulary, self.length) for text in captions])

    def forward(self, latents: Tensor, sigma: Tensor, words: Tensor) -> Tensor:
        """See the class."""
        timestep = sigma * 1000
        if isinstance(self.net, ImageDiT):
            return self.net(
                hidden_states=latents[:, :, None], timestep=timestep, encoder_hidden_states=words
            )[0].squeeze(2)  # fmt: skip
        return self.net(sample=latents, timestep=timestep, encoder_hidden_states=words)[0]


def to_latents(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> [B, 12, H / 2, W / 2] in [-1, 1]; sides are even."""
    return F.pixel_unshuffle(pictures * 2 - 1, PIXELS)


def to_pictures(latents: Tensor) -> Tensor:
    """[B, 12, h, w] -> [B, 3, 2 h, 2 w] in [0, 1], clipped."""
    return (F.pixel_shuffle(latents.float(), PIXELS) * 0.5 + 0.5).clamp(0, 1)


def draw_picture_noise(seeds: Sequence[int], height: int = SIDE, width: int = SIDE) -> Tensor:
    """First latents [len(seeds), 12, H / 2, W / 2], one stream a seed, always drawn on the CPU."""
    if height % (2 * PIXELS) or width % (2 * PIXELS):
        raise ValueError(f"a picture of {height} x {width} px; legal: multiples of {2 * PIXELS}")
    shape = (3 * PIXELS**2, height // PIXELS, width // PIXELS)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
