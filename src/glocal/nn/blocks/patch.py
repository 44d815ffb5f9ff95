"""From pixels to tokens and from many tokens to fewer: patch embeddings and mergings.

Everything returns channels-last maps [B, H, W, C]. Sizes that a stride does not divide are padded with zeros at the
bottom and the right, as published code does; convolutions that reach over their stride need no padding of ours.
"""

from __future__ import annotations

from torch import Tensor, nn

from glocal.nn.blocks.layout import conv, pad_multiple, to_nhwc
from glocal.nn.blocks.norm import LayerNorm


class PatchEmbed(nn.Module):
    """A convolution of stride `patch` over the image, then LayerNorm; keys `proj`, `norm`.

    in_chans, dim: channels before and after. kernel: None is `patch` (patches do not overlap); larger kernels overlap
    and are padded by (kernel - 1) // 2. norm: False leaves the norm out.
    """

    def __init__(self, in_chans: int, dim: int, patch: int = 4, kernel: int | None = None, norm: bool = True) -> None:
        super().__init__()
        kernel = patch if kernel is None else kernel
        self.patch = patch
        self.proj = nn.Conv2d(in_chans, dim, kernel, patch, 0 if kernel == patch else (kernel - 1) // 2)
        self.norm = LayerNorm(dim) if norm else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        """image: [B, in_chans, H, W] -> [B, ceil(H / patch), ceil(W / patch), dim]."""
        return self.norm(conv(self.proj, pad_multiple(to_nhwc(image), self.patch)))


class StridedConvEmbed(nn.Module):
    """Two 3 x 3 convolutions of stride 2 with nothing between, then LayerNorm; keys `proj.0`, `proj.1`, `norm`."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        first = nn.Conv2d(in_chans, dim // 2, 3, 2, 1)
        self.proj = nn.Sequential(first, nn.Conv2d(dim // 2, dim, 3, 2, 1))
        self.norm = LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        """image: [B, in_chans, H, W] -> [B, ceil(H / 4), ceil(W / 4), dim]."""
        return self.norm(conv(self.proj, to_nhwc(image)))


class StridedConvMerge(nn.Module):
    """A 3 x 3 convolution of stride 2 without bias, then LayerNorm; keys `reduction`, `norm`."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out, 3, 2, 1, bias=False)
        self.norm = LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> [B, ceil(H / 2), ceil(W / 2), out]."""
        return self.norm(conv(self.reduction, x))


class PatchMerge(nn.Module):
    """Swin's merging (arXiv 2103.14030): 2 x 2 tokens side by side, LayerNorm, Linear; keys `norm`, `reduction`.

    The four come in the order (row, column) = (0, 0), (1, 0), (0, 1), (1, 1). norm_last: the norm comes behind the
    Linear (Swin V2).
    """

    def __init__(self, dim: int, out: int, norm_last: bool = False) -> None:
        super().__init__()
        self.norm_last = norm_last
        self.norm = LayerNorm(out if norm_last else 4 * dim)
        self.reduction = nn.Linear(4 * dim, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> [B, ceil(H / 2), ceil(W / 2), out]."""
        x = pad_multiple(x, 2)
        quad = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, h, 2, w, 2, dim]
        quad = quad.permute(0, 1, 3, 4, 2, 5).flatten(3)  # one copy, and one in backward
        return self.norm(self.reduction(quad)) if self.norm_last else self.reduction(self.norm(quad))


class NormConvMerge(nn.Module):
    """LayerNorm, then a convolution of stride 2 with bias; keys `norm`, `proj`.

    overlapped: a 3 x 3 convolution with padding 1 instead of 2 x 2.
    """

    def __init__(self, dim: int, out: int, overlapped: bool = False) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.proj = nn.Conv2d(dim, out, 3, 2, 1) if overlapped else nn.Conv2d(dim, out, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> [B, ceil(H / 2), ceil(W / 2), out]."""
        return conv(self.proj, pad_multiple(self.norm(x), 2))
