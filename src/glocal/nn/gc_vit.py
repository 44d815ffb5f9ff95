"""Global query attention (GC ViT, arXiv 2206.09959).

A small convolution net pools the map at the entrance of a stage to one window of queries. Blocks with even index are
plain window attention; in those with odd index the pooled queries, the same for all windows of an image, meet the keys
and values of each window. They are used as they are: no projection, norm or bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.nn._heads import check_heads, split_heads
from glocal.nn.blocks.layout import conv
from glocal.nn.mixer import register_mixer
from glocal.nn.window_attention import WindowAttention, WindowSpec

_PLAIN = WindowSpec()


class ChannelGate(nn.Module):
    """x: [B, C, H, W] * sigmoid(fc(mean of x)), without biases; keys `fc.0`, `fc.2`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        squeeze, excite = nn.Linear(dim, dim // 4, bias=False), nn.Linear(dim // 4, dim, bias=False)
        self.fc = nn.Sequential(squeeze, nn.GELU(), excite, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W] -> the same shape."""
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class FusedInvertedResidual(nn.Module):
    """x + pointwise(gate(gelu(depthwise(x)))), without norms and biases; keys `conv.0`, `conv.2.fc`, `conv.3`.

    dim: channels, at least 4. pool: a 3 x 3 maximum of stride 2 follows.
    """

    def __init__(self, dim: int, pool: bool = False) -> None:
        super().__init__()
        if dim < 4:
            raise ValueError(f"FusedInvertedResidual: dim={dim} must be at least 4, its gate has a quarter of it.")
        depthwise, pointwise = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim, bias=False), nn.Conv2d(dim, dim, 1, bias=False)
        self.conv = nn.Sequential(depthwise, nn.GELU(), ChannelGate(dim), pointwise)
        self.pool = nn.MaxPool2d(3, 2, 1) if pool else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> the same shape, or [B, ceil(H / 2), ceil(W / 2), dim] with `pool`."""
        y = x
        for layer in self.conv:
            y = layer(y) if isinstance(layer, nn.GELU) else conv(layer, y)
        x = x + y
        return x if self.pool is None else conv(self.pool, x)


class GlobalQueries(nn.Module):
    """The queries of a stage, from x: [B, H, W, dim]; keys `to_q_global.{k}`.

    pools: how often the sides are halved, each time after a residual; 0 is one residual and no halving. A result that
    is not window x window is resized bicubically, which published classifiers never need.
    """

    def __init__(self, dim: int, heads: int, window: int = 7, pools: int = 0) -> None:
        super().__init__()
        check_heads(type(self).__name__, dim, heads)
        if pools < 0:
            raise ValueError(f"GlobalQueries: pools={pools} must be at least 0.")
        self.heads, self.window = heads, window
        self.to_q_global = nn.Sequential(*(FusedInvertedResidual(dim, pools > 0) for _ in range(max(pools, 1))))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim] -> [B, 1, heads, window ** 2, head size]."""
        y = self.to_q_global(x)
        sides = (self.window, self.window)
        if tuple(y.shape[1:3]) != sides:
            down, across = (_bicubic(y, axis, self.window) for axis in (1, 2))
            y = torch.einsum("mh,bhwc,nw->bmnc", down, y, across)
        return y.reshape(y.shape[0], 1, self.window**2, self.heads, y.shape[-1] // self.heads).transpose(2, 3)


def _bicubic(y: Tensor, axis: int, size: int) -> Tensor:
    """Bicubic interpolation of an axis of y to `size` as a matrix [size, length]: torch's own kernel for maps uses as
    many threads of a GPU as there are pixels, and there are few.
    """
    unit = torch.eye(y.shape[axis], device=y.device)[None, :, :, None]
    return F.interpolate(unit, size=(size, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T.to(y.dtype)


class GlobalQueryAttention(WindowAttention):
    """Window attention whose queries are those of the stage; `qkv` makes keys and values alone.

    Maps are padded as in `WindowAttention`. Arguments as there; there is no shift.
    """

    def __init__(
        self, dim: int, heads: int, window: int = 7, relative_bias: bool = True, spec: WindowSpec = _PLAIN
    ) -> None:
        super().__init__(dim, heads, window, relative_bias=relative_bias, spec=spec)
        self.qkv = nn.Linear(dim, 2 * dim, bias=spec.qkv_bias)

    def split(self, groups: Tensor, stage: object) -> tuple[Tensor, Tensor, Tensor]:
        """groups: [B, windows, N, dim], stage: queries [B, 1, heads, N, head size] -> as in `WindowAttention`.

        Raises ValueError where `stage` is not such a tensor.
        """
        b, windows = groups.shape[:2]
        queries = self._queries(stage, b)
        k, v = self.project(groups, 2)
        # Windows lie image by image, so each image's queries are repeated in a row, not tiled over the batch.
        return queries.expand(b, windows, *queries.shape[2:]).reshape(k.shape), k, v

    def on_map(self, x: Tensor, stage: object) -> tuple[Tensor, ...]:
        """As in `WindowAttention`: the same queries in every window of an image."""
        b, height, width, _ = x.shape
        side, size = self.window, self.dim // self.heads
        queries = self._queries(stage, b).reshape(b, self.heads, side, side, size)
        q = queries.repeat(1, 1, height // side, width // side, 1).flatten(2, 3)
        k, v = split_heads(self.qkv(x).flatten(1, 2), 2, self.heads)
        return q.to(k.dtype), k, v  # under autocast the queries of a stage are float32

    def _queries(self, stage: object, batch: int) -> Tensor:
        wanted = (batch, 1, self.heads, self.window**2, self.dim // self.heads)
        if not isinstance(stage, Tensor) or tuple(stage.shape) != wanted:
            found = f"a tensor of shape {tuple(stage.shape)}" if isinstance(stage, Tensor) else repr(stage)
            raise ValueError(
                f"GlobalQueryAttention: stage={found} must be global queries of shape {wanted}; "
                f"make them once a stage: stage = begin(mixers, x)."
            )
        return stage


class LocalAttention(WindowAttention):
    """Window attention of a block 0 that makes the global queries of its stage; they are under `queries`."""

    def __init__(self, dim: int, heads: int, window: int = 7, pools: int = 0) -> None:
        super().__init__(dim, heads, window, relative_bias=True)
        self.queries = GlobalQueries(dim, heads, window, pools)

    def begin(self, x: Tensor) -> Tensor:
        """x: [B, H, W, dim], the entrance of the stage -> its queries."""
        return self.queries(x)


@register_mixer("gc_vit")
def global_context(dim: int, heads: int, block: int = 0, window: int = 7, pools: int = 0) -> WindowAttention:
    """Attention of one block, x: [B, H, W, dim]: windows in even blocks, global queries in odd ones.

    window: side of the windows. pools: of the queries of the stage, as in `GlobalQueries`; block 0 makes them.
    """
    if block % 2:
        return GlobalQueryAttention(dim, heads, window)
    return (
        WindowAttention(dim, heads, window, relative_bias=True) if block else LocalAttention(dim, heads, window, pools)
    )
