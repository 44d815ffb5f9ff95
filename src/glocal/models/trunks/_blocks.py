"""What trunks share: the block of a pre-norm transformer over a map, a level, and a walk through it."""

from __future__ import annotations

from torch import Tensor, nn

from glocal.models.vision.base import VisionBackbone
from glocal.nn.blocks import DropPath, LayerNorm, Mlp
from glocal.nn.mixer import begin


class Block(nn.Module):
    """x += attn(norm1(x)); x += mlp(norm2(x)). eps: of the norms."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] (or tokens [B, N, dim], if the attention takes them) -> the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x), stage))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class NormLastBlock(Block):
    """x += norm1(attn(x)); x += norm2(mlp(x)), as in Swin V2 (arXiv 2111.09883)."""

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """As in `Block`."""
        x = x + self.drop_path(self.norm1(self.attn(x, stage)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class Level(nn.Module):
    """The blocks of one stage, and the merging behind them (None after the last)."""

    def __init__(self, blocks: list[Block], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


def through(model: VisionBackbone, x: Tensor, blocks: nn.Module) -> Tensor:
    """x: [B, H, W, C] through the blocks of a stage."""
    stage = begin((block.attn for block in blocks.children() if hasattr(block, "attn")), x)  # type: ignore[misc]
    for block in blocks.children():
        x = model.run(block, x, stage)
    return x
