"""Attention inside windows (Swin, arXiv 2103.14030): plain or rolled, with or without a relative bias.

Maps are padded with zeros at the bottom and the right to multiples of the window; the padding comes before the qkv
projection and its tokens are ordinary keys, as in the published models that use it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glocal.nn._canvas import canvas_of, small_windows
from glocal.nn._groups import attend_groups
from glocal.nn._heads import check_heads, split_heads
from glocal.nn.blocks.layout import pad_multiple
from glocal.nn.blocks.relative import relative_index, window_bias
from glocal.nn.blocks.windows import from_windows, rolled_visible, to_windows
from glocal.nn.mixer import register_mixer
from glocal.ops import Relative, Score, attention
from glocal.patterns import Pattern, Windows

# Tokens of the largest window for the kernels of small windows: those of one tile, and more where they were measured to
# be faster, which is for 16-bit numbers in heads of up to 32 channels (results/small_windows.csv).
_TILE, _LARGE = 64, 196


@dataclass(frozen=True)
class WindowSpec:
    """What is rarely changed.

    scale: of the logits, None is head size ** -0.5. mask: whether tokens that rolling brought together from opposite
    borders stay apart. attn_drop, proj_drop: dropout of attention weights and of the output, in training.
    backend: None takes the kernels of small windows where they can run, and elsewhere cuts the map into windows for
        torch's attention; "auto" or a name of
        `glocal.kernels.registry.names()` hands the whole map and a pattern to `glocal.ops.attention`, without rolling
        or cutting. The results are the same.
    """

    qkv_bias: bool = True
    scale: float | None = None
    mask: bool = True
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    backend: str | None = None


class WindowAttention(nn.Module):
    """Multi-head attention inside windows of a map, x: [B, H, W, dim].

    window: side of a window. shift: the map is rolled by -shift on both axes first, and back after. relative_bias: a
    learned `relative_position_bias_table` [(2 window - 1)**2, heads], looked up by query minus key.
    """

    index: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int = 7,
        shift: int = 0,
        relative_bias: bool = False,
        spec: WindowSpec = WindowSpec(),
    ) -> None:
        super().__init__()
        check_heads(type(self).__name__, dim, heads)
        if not 0 <= shift < window:
            raise ValueError(f"WindowAttention: shift={shift} must lie in [0, window={window}); usual: {window // 2}.")
        self.dim, self.heads, self.window, self.shift, self.spec = dim, heads, window, shift, spec
        self.windows: Pattern = Windows(window, roll=shift, masked=spec.mask)  # one object: plans are found by it
        self.qkv = nn.Linear(dim, 3 * dim, bias=spec.qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(spec.proj_drop)
        self.relative_position_bias_table: nn.Parameter | None = None
        if relative_bias:
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
            self.register_buffer("index", relative_index(window, window), persistent=False)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape; `stage` is unused."""
        height, width = x.shape[1:3]
        x = pad_multiple(x, self.window)
        size = (x.shape[1], x.shape[2])
        backend = self.backend(x, (height, width))
        if backend is not None:
            whole = self.by_pattern(x, (height, width), stage, backend)
            return self.proj_drop(self.proj(whole[:, :height, :width]))
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        groups = self.cut(x)  # [B, groups, N, dim]
        b, n = groups.shape[0], groups.shape[2]
        q, k, v = self.split(groups, stage)
        dropout = self.spec.attn_drop if self.training else 0.0
        bias = self.bias(q, (height, width), size)
        out = attend_groups(q, k, v, bias, dropout=dropout, scale=self.spec.scale)
        out = self.join(out.transpose(1, 2).reshape(b, groups.shape[1], n, self.dim), size)
        if self.shift:
            out = out.roll((self.shift, self.shift), (1, 2))
        return self.proj_drop(self.proj(out[:, :height, :width]))

    def backend(self, x: Tensor, real: tuple[int, int]) -> str | None:
        """What attends over the whole map x: [B, *size, dim]: that of the spec, the kernels of small windows where they
        can and a window is not too large for them, or None for windows that are cut.
        """
        most = _LARGE if x.element_size() == 2 and self.dim // self.heads <= 32 else _TILE
        if self.spec.backend is not None or self.window**2 > most or not self.whole((x.shape[1], x.shape[2]), real):
            return self.spec.backend
        dropout = self.spec.attn_drop if self.training else 0.0
        pattern = self.pattern((x.shape[1], x.shape[2]), real)
        return "windows" if small_windows(x, self.dim // self.heads, pattern, dropout) else None

    def whole(self, size: tuple[int, int], real: tuple[int, int]) -> bool:
        """Whether a pattern says all that the layer does on a map of `size`, of which `real` is no padding.

        Tokens that rolling brought together have the bias of their places in the window, not of those on the map.
        """
        return not self.shift or self.spec.mask or self.table() is None

    def on_map(self, x: Tensor, stage: object) -> tuple[Tensor, ...]:
        """x: [B, H, W, dim] -> queries, keys and values of the whole map, [B, heads, H * W, head size] each."""
        return split_heads(self.qkv(x).flatten(1, 2), 3, self.heads)

    def by_pattern(self, x: Tensor, real: tuple[int, int], stage: object, backend: str) -> Tensor:
        """Attention of x: [B, *size, dim] on the whole map, of which `real` is no padding -> the same shape."""
        height, width = x.shape[1:3]
        q, k, v = self.on_map(x, stage)
        table = self.relative((height, width))
        dropout = self.spec.attn_drop if self.training else 0.0
        score = Score(self.spec.scale, bias=() if table is None else (table,), dropout=dropout)
        pattern, canvas = self.pattern((height, width), real), canvas_of(height, width)
        out = attention(q, k, v, pattern, canvas=canvas, score=score, backend=backend)
        return out.transpose(1, 2).reshape(x.shape)

    def pattern(self, size: tuple[int, int], real: tuple[int, int]) -> Pattern:
        """Who sees whom on a map of `size`, of which `real` is no padding; ValueError where no pattern says it all."""
        if not self.whole(size, real):
            raise ValueError(
                f"WindowAttention: backend={self.spec.backend!r} with shift={self.shift}, mask=False and a relative "
                "bias; legal: backend=None, or mask=True."
            )
        return self.windows

    def relative(self, size: tuple[int, int]) -> Relative | None:
        """The bias of the whole map."""
        table, side = self.table(), 2 * self.window - 1
        return None if table is None else Relative(table.T.reshape(self.heads, side, side), sign=-1, within=True)

    def table(self) -> Tensor | None:
        """The bias of every offset, query minus key, [(2 window - 1) ** 2, heads]; None for none."""
        return self.relative_position_bias_table

    def cut(self, x: Tensor) -> Tensor:
        """x: [B, *size, dim] -> the groups of tokens that see each other, [B, groups, N, dim]."""
        return to_windows(x, (self.window, self.window))

    def join(self, groups: Tensor, size: tuple[int, int]) -> Tensor:
        """The inverse of `cut`."""
        return from_windows(groups, size, (self.window, self.window))

    def split(self, groups: Tensor, stage: object) -> tuple[Tensor, Tensor, Tensor]:
        """groups: [B, groups, N, dim] -> queries, keys and values [B * groups, heads, N, head size]."""
        q, k, v = self.project(groups, 3)
        return q, k, v

    def project(self, groups: Tensor, count: int) -> tuple[Tensor, ...]:
        """The `count` parts that the layer `qkv` makes of groups: [B, groups, N, dim], as in `split`."""
        return split_heads(self.qkv(groups).flatten(0, 1), count, self.heads)

    def bias(self, q: Tensor, real: tuple[int, int], size: tuple[int, int]) -> Tensor | None:
        """What is added to the logits of q: [B * groups, heads, N, head size] on a map of `real` tokens, `size` padded.

        None, [1, heads, N, N], or [B * groups, heads | 1, N, N].
        """
        bias, table = None, self.table()
        if table is not None:
            bias = window_bias(table, self.index).to(q.dtype)[None].contiguous()
        if not (self.shift and self.spec.mask):
            return bias
        sides = (self.window, self.window)
        seen = rolled_visible(size, sides, (self.shift, self.shift), q.device)  # [windows, N, N]
        return hide(q, seen, bias)

    def extra_repr(self) -> str:
        """The settings, for printing a model."""
        return f"dim={self.dim}, heads={self.heads}, window={self.window}, shift={self.shift}"


def hide(q: Tensor, seen: Tensor, bias: Tensor | None) -> Tensor:
    """`bias` [1, heads, N, N] (None: zero), and -inf where `seen`, bool [groups, N or 1, N], is False.

    q: [B * groups, heads, N, head size]. Returns [B * groups, heads | 1, N, N or 1].
    """
    hidden = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)[:, None]
    both = hidden if bias is None else hidden + bias
    return both[None].expand(q.shape[0] // both.shape[0], *both.shape).flatten(0, 1)


@register_mixer("swin")
def swin(dim: int, heads: int, block: int = 0, window: int = 7) -> WindowAttention:
    """Swin's attention of one block: relative bias, windows rolled by half their side in odd blocks."""
    return WindowAttention(dim, heads, window, shift=window // 2 if block % 2 else 0, relative_bias=True)
