"""Super token attention (STViT, arXiv 2211.11167): cluster softly, attend among clusters, give back.

Every cell of a map has one super token. Pixels are assigned to the nine around them by softmax; super tokens are the
weighted means, attend to one another, and return to the pixels by the same weights. The assignment has no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.nn._heads import check_heads
from glocal.nn.blocks.layout import conv, pad_multiple
from glocal.nn.blocks.windows import from_windows, to_windows
from glocal.ops import cells

Refine = Literal["attention", "convolution", "none"]


@dataclass(frozen=True, eq=False)
class Association:
    """What a layer made of an input.

    affinity: [B, cells, pixels of a cell, 9], neighbours row by row. tokens: super tokens before they are refined,
    [B, rows, columns, dim].
    """

    affinity: Tensor
    tokens: Tensor


class GlobalAttention(nn.Module):
    """Dense attention over a map by 1 x 1 convolutions; keys `qkv`, `proj`. Channels of `qkv` are, head after head, the
    head's queries, keys and values. scale: of the logits, None is head size ** -0.5.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True, scale: float | None = None) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=qkv_bias)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> the same shape."""
        parts = conv(self.qkv, x).flatten(1, 2).unflatten(-1, (self.heads, 3, -1))  # [B, N, heads, 3, head size]
        q, k, v = parts.permute(3, 0, 2, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return conv(self.proj, out.transpose(1, 2).reshape(x.shape))


class SuperTokenAttention(nn.Module):
    """x: [B, H, W, dim] of any size; keys `stoken_refine.*`.

    cell: pixels of a cell, one side or (height, width); 1 is dense attention over all pixels. iterations: how often
    pixels are assigned. refine: how super tokens exchange, by "attention", by "convolution" (1 x 1, 5 x 5 depthwise,
    1 x 1), or "none". scale: of the logits among super tokens, as in `GlobalAttention`; pixels are assigned by dim **
    -0.5. Maps that cells do not divide are padded with zeros at the bottom and the right; the padding is
    clustered like pixels, as published.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        cell: int | tuple[int, int] = 4,
        iterations: int = 1,
        refine: Refine = "attention",
        qkv_bias: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        check_heads("SuperTokenAttention", dim, heads)
        self.cell = (cell, cell) if isinstance(cell, int) else (cell[0], cell[1])
        if min(self.cell) < 1 or iterations < 1:
            raise ValueError(f"SuperTokenAttention: cell={cell}, iterations={iterations}; both must be at least 1.")
        if refine not in get_args(Refine):
            raise ValueError(f"SuperTokenAttention: refine={refine!r}; legal: 'attention', 'convolution', 'none'.")
        self.dim, self.heads, self.iterations = dim, heads, iterations
        self.stoken_refine = _refiner(dim, heads, refine, qkv_bias, scale)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape; `stage` is unused."""
        if self.cell == (1, 1):
            return self._refined(x)
        height, width = x.shape[1:3]
        x = pad_multiple(x, self.cell)
        found = self._associated(x)
        rows, columns = found.tokens.shape[1:3]
        weights = found.affinity.unflatten(1, (rows, columns))
        out = cells.gather(self._refined(found.tokens), weights).flatten(1, 2)  # [B, cells, pixels, dim]
        return from_windows(out, (x.shape[1], x.shape[2]), self.cell)[:, :height, :width]

    def associate(self, x: Tensor) -> Association:
        """Which pixels of x: [B, H, W, dim] form which super tokens. Raises ValueError for cells of one pixel."""
        if self.cell == (1, 1):
            raise ValueError("SuperTokenAttention: cell=1 forms no super tokens; there is nothing to associate.")
        return self._associated(pad_multiple(x, self.cell))

    def _associated(self, x: Tensor) -> Association:
        rows, columns = x.shape[1] // self.cell[0], x.shape[2] // self.cell[1]
        pixels = to_windows(x, self.cell).unflatten(1, (rows, columns))  # [B, rows, columns, pixels, dim]
        with torch.no_grad():
            centres = pixels.mean(3)
            weights = cells.affinity(pixels, centres, self.dim**-0.5)
            for _ in range(self.iterations - 1):
                weights = cells.affinity(pixels, cells.scatter(pixels, weights), self.dim**-0.5)
        return Association(weights.flatten(1, 2), cells.scatter(pixels, weights))

    def _refined(self, tokens: Tensor) -> Tensor:
        if isinstance(self.stoken_refine, nn.Sequential):
            for layer in self.stoken_refine:
                tokens = conv(layer, tokens)
            return tokens
        return self.stoken_refine(tokens)

    def extra_repr(self) -> str:
        """The settings, for printing a model."""
        return f"dim={self.dim}, heads={self.heads}, cell={self.cell}, iterations={self.iterations}"


def _refiner(dim: int, heads: int, refine: Refine, qkv_bias: bool, scale: float | None) -> nn.Module:
    if refine == "attention":
        return GlobalAttention(dim, heads, qkv_bias, scale)
    if refine == "none":
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 5, padding=2, groups=dim), nn.Conv2d(dim, dim, 1))
