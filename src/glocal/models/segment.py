"""A dense head for segmentation on any backbone: the levels are brought to one width and size, summed and classified.

The plainest head that uses all levels (panoptic feature pyramids, arXiv 1901.02446, with one convolution a level).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from glocal.models.vision.base import VisionBackbone


class Segmenter(nn.Module):
    """backbone: made with features_only=True. classes: of a pixel. width: channels of the head.

    `forward` gives logits [B, classes, H, W] at the size of the image.
    """

    def __init__(self, backbone: VisionBackbone, classes: int, width: int = 128) -> None:
        super().__init__()
        if not backbone.features_only:
            raise ValueError(f"Segmenter: {type(backbone).__name__} must be made with features_only=True.")
        if classes < 2:
            raise ValueError(f"Segmenter: classes={classes} must be at least 2.")
        self.backbone = backbone
        self.lateral = nn.ModuleList([nn.Conv2d(channels, width, 1) for channels in backbone.channels])
        self.mix = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU())
        self.classify = nn.Conv2d(width, classes, 1)

    @property
    def in_chans(self) -> int:
        """Channels of the image."""
        return self.backbone.in_chans

    def forward(self, image: Tensor) -> Tensor:
        """image: [B, in_chans, H, W] -> logits [B, classes, H, W]."""
        maps = self.backbone(image)
        size = maps[0].shape[2:]
        total = self.lateral[0](maps[0])
        for layer, level in zip(list(self.lateral)[1:], maps[1:], strict=True):
            total = total + F.interpolate(layer(level), size=size, mode="bilinear", align_corners=False)
        logits = self.classify(self.mix(total))
        return F.interpolate(logits, size=image.shape[2:], mode="bilinear", align_corners=False)
