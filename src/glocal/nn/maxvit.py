"""Multi-axis attention (MaxViT, arXiv 2204.01697): windows of near tokens, then grids of far ones.

A grid of G x G tokens takes one token of each cell of a map cut into G x G cells, so that every group spans the whole
map. Each attention has a relative table [heads, 2w - 1, 2w - 1], looked up by key minus query.

The published code refuses maps that windows and grids do not divide. Ours pads them at the bottom and the right and
hides the padding from all tokens; at fitting sizes nothing changes.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from glocal.nn.blocks.layout import pad_to
from glocal.nn.blocks.relative import relative_index, resize_table, window_bias
from glocal.nn.blocks.windows import from_grid, to_grid
from glocal.nn.mixer import register_mixer
from glocal.nn.window_attention import WindowAttention, WindowSpec, hide
from glocal.ops import Relative
from glocal.patterns import Grid, Pattern, Windows

Groups = Literal["window", "grid"]
_PLAIN = WindowSpec()


class RelativeTable(nn.Module):
    """A table [heads, 2t - 1, 2t - 1] under `relative_position_bias_table`, read for windows of another side.

    window: side of the windows. trained: t, the side that the table is stored for; it is resized bilinearly in every
    call. shared: one table [2t - 1, 2t - 1] for all heads.
    """

    index: Tensor

    def __init__(self, heads: int, window: int, trained: int, shared: bool = False) -> None:
        super().__init__()
        side = 2 * trained - 1
        self.window = window
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros(side, side) if shared else torch.zeros(heads, side, side)
        )
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("index", relative_index(window, window).T.contiguous(), persistent=False)

    def resized(self) -> Tensor:
        """The table for the side of the windows, [heads | 1, 2 window - 1, 2 window - 1]."""
        side = 2 * self.window - 1
        table = self.relative_position_bias_table
        return resize_table(table if table.dim() == 3 else table[None], (side, side), "bilinear")

    def forward(self) -> Tensor:
        """The bias of the logits, [heads | 1, window ** 2, window ** 2]."""
        return window_bias(self.resized().flatten(1).T, self.index)


class AxisAttention(WindowAttention):
    """Attention inside windows or grids, x: [B, H, W, dim]; keys `qkv`, `rel_pos`, `proj`.

    groups: "window" or "grid". window: side of either. trained: side that the table is stored for, None is `window`;
    fine-tuned TensorFlow checkpoints keep the one of their pre-training. shared_bias: one table for all heads.
    spec: as of `WindowAttention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        groups: Groups = "window",
        window: int = 7,
        trained: int | None = None,
        shared_bias: bool = False,
        spec: WindowSpec = _PLAIN,
    ) -> None:
        super().__init__(dim, heads, window, spec=spec)
        if groups not in get_args(Groups):
            raise ValueError(f"AxisAttention: groups={groups!r}; legal: 'window', 'grid'.")
        self.groups = groups
        self.windows = Windows(window) if groups == "window" else Grid(window)
        self.rel_pos = RelativeTable(heads, window, window if trained is None else trained, shared_bias)

    def whole(self, size: tuple[int, int], real: tuple[int, int]) -> bool:
        """Padding is hidden, which the pattern does not say."""
        return size == real

    def pattern(self, size: tuple[int, int], real: tuple[int, int]) -> Pattern:
        """Windows or grids; ValueError for a padded map, whose padding no pattern hides."""
        if size != real:
            raise ValueError(
                f"AxisAttention: backend={self.spec.backend!r} on a map of {real}, which {self.window} does not "
                f"divide; legal: {size}, or backend=None."
            )
        return self.windows

    def relative(self, size: tuple[int, int]) -> Relative:
        """The bias of the whole map; places of a grid count in its steps."""
        step = (1, 1) if self.groups == "window" else (size[0] // self.window, size[1] // self.window)
        return Relative(self.rel_pos.resized(), step, within=True)

    def cut(self, x: Tensor) -> Tensor:
        """x: [B, *size, dim] -> windows or grids, [B, groups, N, dim]."""
        return super().cut(x) if self.groups == "window" else to_grid(x, (self.window, self.window))

    def join(self, groups: Tensor, size: tuple[int, int]) -> Tensor:
        """The inverse of `cut`."""
        if self.groups == "window":
            return super().join(groups, size)
        return from_grid(groups, size, (self.window, self.window))

    def bias(self, q: Tensor, real: tuple[int, int], size: tuple[int, int]) -> Tensor | None:
        """The relative bias [1, heads | 1, N, N]; on padded maps [B * groups, heads | 1, N, N], padding at -inf."""
        bias = self.rel_pos().to(q.dtype)[None].contiguous()  # torch's fused kernels refuse a view
        if real == size:
            return bias
        ours = pad_to(torch.ones(1, *real, 1, device=q.device), *size)
        return hide(q, self.cut(ours)[0, :, None, :, 0] > 0, bias)

    def extra_repr(self) -> str:
        """The settings, for printing a model."""
        return f"dim={self.dim}, heads={self.heads}, groups={self.groups!r}, window={self.window}"


@register_mixer("maxvit")
def multi_axis(dim: int, heads: int, block: int = 0, window: int = 7) -> AxisAttention:
    """Attention of one block: windows in even blocks, grids in odd ones, both `window` a side."""
    return AxisAttention(dim, heads, "grid" if block % 2 else "window", window)
