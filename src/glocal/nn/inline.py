"""InLine attention (arXiv 2412.06590): linear attention normalised by subtraction, plus a local part.

Weights are q . k less their mean plus 1/N, so that different queries have different rows; they sum to one and may be
negative. The local part is a 3 x 3 depthwise convolution of the values whose kernel is made from the mean of the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from glocal.nn._heads import check_heads, check_map
from glocal.nn.blocks.layout import conv, pad_multiple
from glocal.nn.blocks.windows import from_windows, to_windows
from glocal.nn.mixer import register_mixer
from glocal.ops.dynamic_conv import dynamic_conv
from glocal.ops.linear import FEATURES, Normaliser, Ratio, Subtract, features, linear_attention

Norm = Literal["subtract", "ratio"]


@dataclass(frozen=True)
class InLineSpec:
    """What is rarely changed.

    feature: elementwise map of q and k, a name of `glocal.ops.linear.FEATURES`. normaliser: "subtract", or "ratio" for
    usual linear attention (with a feature that is not negative, such as "relu" or "elu"). local: the local part.
    split_kv: keys `q` and `kv` instead of `qkv`. mask: in rolled windows, tokens from opposite borders stay apart;
    published code lets them mix.
    """

    feature: str = "identity"
    normaliser: Norm = "subtract"
    local: bool = True
    qkv_bias: bool = True
    split_kv: bool = False
    mask: bool = False

    def __post_init__(self) -> None:
        for name, legal in (("feature", tuple(FEATURES)), ("normaliser", get_args(Norm))):
            if getattr(self, name) not in legal:
                words = ", ".join(map(repr, legal))
                raise ValueError(f"InLineSpec: {name}={getattr(self, name)!r}; legal: {words}.")

    @property
    def norm(self) -> Normaliser:
        """The normaliser of `glocal.ops.linear`."""
        return Subtract() if self.normaliser == "subtract" else Ratio()


class LocalKernels(nn.Sequential):
    """A 3 x 3 kernel for each channel from the mean of the tokens: two grouped layers, keys `0`, `2`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(nn.Conv1d(dim, dim, 1, groups=heads), nn.GELU(), nn.Conv1d(dim, 9 * dim, 1, groups=heads))

    def forward(self, input: Tensor) -> Tensor:
        """Means [B, dim] -> kernels [B, dim, 3, 3]."""
        first, act, last = self
        return _grouped(last, act(_grouped(first, input))).reshape(*input.shape, 3, 3)


def _grouped(layer: nn.Module, x: Tensor) -> Tensor:
    """A grouped convolution of one place, x: [B, C], as products: torch's kernels for it are made for many places."""
    assert isinstance(layer, nn.Conv1d) and layer.bias is not None
    parts = x.unflatten(1, (layer.groups, -1)).transpose(0, 1)  # [groups, B, C / groups]
    weight, bias = (t.unflatten(0, (layer.groups, -1)) for t in (layer.weight[..., 0], layer.bias))
    return torch.baddbmm(bias[:, None], parts, weight.mT).transpose(0, 1).flatten(1)


class InLineAttention(nn.Module):
    """x: [B, H, W, dim]; keys `qkv` (or `q`, `kv`), `proj`, `residual`.

    window: side of the windows; None, or a map with a side of at most `window`, is one group. shift: the map is rolled
    by -shift on both axes where it has several windows. Maps that windows do not divide are padded with zeros at the
    bottom and the right before the projection; the padding takes part like any token (a rule of ours: published sizes
    need none).
    """

    def __init__(
        self, dim: int, heads: int, window: int | None = None, shift: int = 0, spec: InLineSpec = InLineSpec()
    ) -> None:
        super().__init__()
        check_heads("InLineAttention", dim, heads)
        if window is not None and not 0 <= shift < window:
            raise ValueError(f"InLineAttention: shift={shift} must lie in [0, window={window}); usual: {window // 2}.")
        self.dim, self.heads, self.window, self.shift, self.spec = dim, heads, window, shift, spec
        if spec.split_kv:
            self.q = nn.Linear(dim, dim, bias=spec.qkv_bias)
            self.kv = nn.Linear(dim, 2 * dim, bias=spec.qkv_bias)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=spec.qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.residual = LocalKernels(dim, heads) if spec.local else None

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape; `stage` is unused."""
        check_map(self, x, self.dim)
        height, width = x.shape[1:3]
        if self.window is None or min(height, width) <= self.window:
            return self.proj(self._inside(x, (height, width)))
        x = pad_multiple(x, self.window)
        if self.shift and self.spec.mask:
            out = self._apart(x)
        elif self.shift:
            out = self._inside(x.roll((-self.shift, -self.shift), (1, 2)), (self.window, self.window))
            out = out.roll((self.shift, self.shift), (1, 2))
        else:
            out = self._inside(x, (self.window, self.window))
        return self.proj(out[:, :height, :width])

    def tokens(self, x: Tensor, size: tuple[int, int], lead: int = 0) -> Tensor:
        """One group of tokens, x: [B, lead + h * w, dim] -> global plus local part of the same shape, not projected.

        size: (h, w). lead: tokens before the map (class tokens); they take part in all but the local part.
        """
        q, k, v = self.project(x)
        local = None
        if self.residual is not None:
            local = dynamic_conv(v[:, lead:].unflatten(1, size), self.residual(x.mean(1))).flatten(1, 2)
            local = nn.functional.pad(local, (0, 0, lead, 0)) if lead else local
        return global_part(q, k, v, self.heads, self.spec, local)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [..., dim] of x: [..., dim], before their feature maps."""
        if self.spec.split_kv:
            k, v = self.kv(x).chunk(2, -1)
            return self.q(x), k, v
        q, k, v = self.qkv(x).chunk(3, -1)
        return q, k, v

    def _inside(self, x: Tensor, sides: tuple[int, int]) -> Tensor:
        """x: [B, H, W, dim] window by window."""
        groups = to_windows(x, sides)  # [B, windows, N, dim]
        out = self.tokens(groups.flatten(0, 1), sides).reshape(groups.shape)
        return from_windows(out, (x.shape[1], x.shape[2]), sides)

    def _apart(self, x: Tensor) -> Tensor:
        """Rolled windows cut where the border of the map runs through them: smaller windows at the borders."""
        assert self.window is not None
        out = x.new_zeros(x.shape)
        spans = []
        for length in x.shape[1:3]:
            ends = (0, self.shift, length - self.window + self.shift, length)
            spans.append([(a, b) for a, b in pairwise(ends) if b > a])
        for top, bottom in spans[0]:
            for left, right in spans[1]:
                part = x[:, top:bottom, left:right]
                sides = (min(self.window, bottom - top), min(self.window, right - left))
                out[:, top:bottom, left:right] = self._inside(part, sides)
        return out

    def extra_repr(self) -> str:
        """The settings, for printing a model."""
        return f"dim={self.dim}, heads={self.heads}, window={self.window}, shift={self.shift}"


class InLineBranch(nn.Module):
    """InLine attention over a whole map with LePE, a 3 x 3 depthwise convolution of the values (CSWin's form).

    Projections and the mean that makes the kernel come from the block. Keys `get_v`, `residual`.
    """

    def __init__(self, dim: int, heads: int, spec: InLineSpec = InLineSpec()) -> None:
        super().__init__()
        self.heads, self.spec = heads, spec
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.residual = LocalKernels(dim, heads) if spec.local else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mean: Tensor) -> Tensor:
        """q, k, v: [B, H, W, dim], mean: [B, dim] of the block's input before its norm -> [B, H, W, dim]."""
        local = conv(self.get_v, v)
        if self.residual is not None:
            local = local + dynamic_conv(v, self.residual(mean))
        q, k, tokens, local = (t.flatten(1, 2) for t in (q, k, v, local))
        return global_part(q, k, tokens, self.heads, self.spec, local).reshape(v.shape)


def global_part(q: Tensor, k: Tensor, v: Tensor, heads: int, spec: InLineSpec, local: Tensor | None = None) -> Tensor:
    """q, k, v: [B, N, C] before their feature maps -> [B, N, C], `local` of that shape added."""
    q, k = features(spec.feature, q), features(spec.feature, k)
    parts = (q, k, v) if local is None else (q, k, v, local)
    q, k, v, *plus = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in parts)  # [B, heads, N, head size]
    return linear_attention(q, k, v, spec.norm, *plus).transpose(1, 2).flatten(2)


@register_mixer("inline")
def inline(
    dim: int, heads: int, window: int | None = None, feature: str = "identity", normaliser: Norm = "subtract"
) -> InLineAttention:
    """InLine attention over the whole map, or inside windows. normaliser "ratio" is usual linear attention."""
    return InLineAttention(dim, heads, window, spec=InLineSpec(feature, normaliser))
