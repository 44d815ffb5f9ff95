"""The attentions of SG-Former (arXiv 2308.12216): one measures which tokens matter, the next merges the others.

A hybrid layer gives half of the heads a coarse view of the whole map and the other half 7 x 7 windows. How much
attention a token receives in both is its significance. The self-guided layer after it sorts tokens by significance and
merges runs of them into keys and values: many insignificant tokens into one, few significant ones. The authors sort the
map row by row for one half of the heads and column by column for the other; both orders are the same, so ours sorts
once.

Maps that windows or cells do not divide are padded with zeros; no query sees the padding of windows, and it counts in
no mean. Where runs do not divide the tokens, the sorted sequence is stretched to the next length that fits by repeating
tokens. Both rules are ours and change nothing at sides that 7 times the reduction divides.
"""

from __future__ import annotations

from math import gcd, lcm
from typing import Any

import torch
from torch import Tensor, nn

from glocal.nn._heads import check_heads, check_map
from glocal.nn.blocks.layout import conv, pad_multiple, pad_to
from glocal.nn.blocks.norm import LayerNorm
from glocal.nn.blocks.windows import from_windows, to_windows
from glocal.nn.mixer import register_mixer

Significance = dict[int, Tensor]  # block -> map [B, H, W], float32, made by that block
Parts = tuple[tuple[int, int], ...]
# Reduction -> parts of the sorted tokens, least significant first: (parts in N, tokens in a run).
PARTS: dict[int, tuple[Parts, int]] = {
    8: (((1, 196), (2, 56), (1, 28)), 4),
    4: (((1, 49), (2, 14), (1, 7)), 4),
    2: (((1, 2), (1, 1)), 2),
}


class PositionedAttention(nn.Module):
    """What all three layers have: a convolution that tells places, and the output layer.

    The result is proj(attention + lepe_conv(lepe_linear(x))). fused: False computes the softmax in the open, with the
    rounding of the authors' code: later layers sort tokens by numbers that differ in their last digit.
    """

    fused = True

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        check_heads(type(self).__name__, dim, heads)
        self.dim, self.heads, self.scale = dim, heads, (dim // heads) ** -0.5
        self.lepe_linear = nn.Linear(dim, dim)
        self.lepe_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def finish(self, x: Tensor, out: Tensor) -> Tensor:
        """x: the layer's input, out: of its attention, both [B, H, W, dim] -> the result."""
        return self.proj(out + conv(self.lepe_conv, self.lepe_linear(x)))

    def split(self, x: Tensor, heads: int) -> Tensor:
        """x: [B, N, heads * head size] -> [B, heads, N, head size]."""
        return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [B, heads, N, head size], k, v: [B, heads, M, head size] -> [B, N, heads * head size]."""
        if self.fused:
            out = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            out = (q @ k.mT * self.scale).softmax(-1) @ v
        return out.transpose(1, 2).flatten(2)


class PlainAttention(PositionedAttention):
    """Dense attention over all tokens, for the last stage; keys `q`, `kv`."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__(dim, heads)
        self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)

    def forward(self, x: Tensor, stage: object = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape; `stage` is unused."""
        tokens = x.flatten(1, 2)
        k, v = self.kv(tokens).chunk(2, -1)
        out = self.attend(*(self.split(t, self.heads) for t in (self.q(tokens), k, v)))
        return self.finish(x, out.reshape(x.shape))


class HybridScaleAttention(PositionedAttention):
    """Half of the heads see cells of `reduction` x `reduction` tokens, half a window.

    Keys `q1`, `kv1`, `sr`, `norm` of the cells, `q2`, `kv2` of the windows.

    block: index under which the significance map is stored in the memory of the stage. window: side of the windows.
    """

    def __init__(
        self, dim: int, heads: int, reduction: int = 2, block: int = 0, window: int = 7, qkv_bias: bool = True
    ) -> None:
        super().__init__(dim, heads)
        _even(type(self).__name__, heads)
        if reduction < 1:
            raise ValueError(f"HybridScaleAttention: reduction={reduction} must be at least 1.")
        self.reduction, self.block, self.window = reduction, block, window
        self.sr = nn.Conv2d(dim, dim, reduction, reduction)
        self.norm = LayerNorm(dim)
        self.act = nn.GELU()
        self.q1, self.kv1 = nn.Linear(dim, dim // 2, bias=qkv_bias), nn.Linear(dim, dim, bias=qkv_bias)
        self.q2, self.kv2 = nn.Linear(dim, dim // 2, bias=qkv_bias), nn.Linear(dim, dim, bias=qkv_bias)

    def begin(self, x: Tensor) -> Significance:
        """The memory of a stage: no maps yet."""
        return {}

    def forward(self, x: Tensor, stage: Any = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape; the significance map goes to `stage`, if there is one."""
        check_map(self, x, self.dim)
        y, significance = self.measure(x)
        if isinstance(stage, dict):
            stage[self.block] = significance
        return y

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, H, W, dim] -> the result, and the significance of each token, float32 [B, H, W] without gradient."""
        coarse, seen_coarse = self._coarse(x)
        local, seen_local = self._local(x)
        return self.finish(x, torch.cat((coarse, local), -1)), seen_coarse + seen_local

    def _coarse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        (b, height, width, _), r, heads = x.shape, self.reduction, self.heads // 2
        cells = self.act(self.norm(conv(self.sr, pad_multiple(x, r))))  # [B, h, w, dim]
        k, v = (self.split(t, heads) for t in self.kv1(cells.flatten(1, 2)).chunk(2, -1))
        q = self.split(self.q1(x.flatten(1, 2)), heads)
        weights = (q @ k.mT * self.scale).softmax(-1)  # [B, heads, N, h * w]
        out = (weights @ v).transpose(1, 2).reshape(b, height, width, self.dim // 2)
        received = weights.detach().float().mean(1).mean(1).reshape(cells.shape[:3])
        return out, received.repeat_interleave(r, 1).repeat_interleave(r, 2)[:, :height, :width]

    def _local(self, x: Tensor) -> tuple[Tensor, Tensor]:
        (b, height, width, _), heads, side = x.shape, self.heads // 2, self.window
        padded = pad_multiple(x, side)
        size, sides = (padded.shape[1], padded.shape[2]), (side, side)
        groups = to_windows(padded, sides)  # [B, windows, side ** 2, dim]
        windows = groups.shape[1]
        k, v = (self.split(t, heads) for t in self.kv2(groups.flatten(0, 1)).chunk(2, -1))
        q = self.split(self.q2(groups.flatten(0, 1)), heads)  # [B * windows, heads, side ** 2, head size]
        logits = (q @ k.mT * self.scale).unflatten(0, (b, windows))
        real = None
        if size != (height, width):
            inside = pad_to(x.new_ones(1, height, width, 1), *size)
            real = to_windows(inside, sides)[..., 0]  # [1, windows, side ** 2]
            logits = logits.masked_fill(real[:, :, None, None] == 0, -torch.inf)
        weights = logits.softmax(-1)  # [B, windows, heads, side ** 2, side ** 2]
        out = (weights.flatten(0, 1) @ v).transpose(1, 2).reshape(b, windows, side**2, self.dim // 2)
        given = weights.detach().float()
        if real is None:
            received = given.mean(2).mean(2)
        else:
            asking = real.float()[:, :, None, :, None]
            received = (given * asking).sum((2, 3)) / (heads * asking.sum((2, 3)))
        received = from_windows(received[..., None], size, sides)[..., 0]
        return from_windows(out, size, sides)[:, :height, :width], received[:, :height, :width]


class SelfGuidedAttention(PositionedAttention):
    """All tokens ask a short sequence, merged by significance; keys `q`, `kv1`, `kv2`, `f1`, `f2`, `f3`.

    reduction: 8, 4 or 2, how strongly tokens are merged (`PARTS`). block: index of the layer; it uses the map of the
    block before.
    """

    def __init__(self, dim: int, heads: int, reduction: int = 2, block: int = 1, qkv_bias: bool = True) -> None:
        super().__init__(dim, heads)
        _even(type(self).__name__, heads)
        if reduction not in PARTS:
            raise ValueError(f"SelfGuidedAttention: reduction={reduction}; legal: {', '.join(map(str, PARTS))}.")
        self.reduction, self.block = reduction, block
        self.parts, self.whole = PARTS[reduction]
        self.unit = lcm(*(self.whole * run // gcd(share, run) for share, run in self.parts))
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv1, self.kv2 = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, dim, bias=qkv_bias)
        for i, (_, run) in enumerate(self.parts, 1):
            self.add_module(f"f{i}", nn.Linear(run, 1))

    def forward(self, x: Tensor, stage: Any = None) -> Tensor:
        """x: [B, H, W, dim] -> the same shape. Raises ValueError where `stage` has no map for it."""
        check_map(self, x, self.dim)
        found = stage.get(self.block - 1) if isinstance(stage, dict) else None
        if not isinstance(found, Tensor) or found.shape != x.shape[:3]:
            raise ValueError(
                f"SelfGuidedAttention: block {self.block} needs a significance map of shape {tuple(x.shape[:3])}, made "
                f"by a hybrid layer in block {self.block - 1} with the same stage: stage = begin(mixers, x)."
            )
        return self.guided(x, found)

    def guided(self, x: Tensor, significance: Tensor) -> Tensor:
        """x: [B, H, W, dim], significance: [B, H, W] -> the same shape as x."""
        tokens, half = x.flatten(1, 2), self.heads // 2
        merged = self.merge(tokens, significance.flatten(1))  # [B, M, dim]
        first, second = (layer(merged).chunk(2, -1) for layer in (self.kv1, self.kv2))
        k, v = (torch.cat([self.split(t, half) for t in pair], 1) for pair in zip(first, second, strict=True))
        out = self.attend(self.split(self.q(tokens), self.heads), k, v)
        return self.finish(x, out.reshape(x.shape))

    def merge(self, tokens: Tensor, significance: Tensor) -> Tensor:
        """tokens: [B, N, dim], significance: [B, N] -> the short sequence [B, M, dim], least significant first."""
        count = tokens.shape[1]
        order = significance.argsort(1)  # ascending
        length = -(-count // self.unit) * self.unit
        if length != count:
            order = order[:, torch.arange(length, device=order.device) * count // length]
        ranked = tokens.take_along_dim(order[..., None], 1)
        merged, start = [], 0
        for i, (share, run) in enumerate(self.parts, 1):
            size = length * share // self.whole
            part = ranked[:, start : start + size].unflatten(1, (size // run, run))
            merged.append(self.get_submodule(f"f{i}")(part.mT)[..., 0])  # [B, runs, dim]
            start += size
        return torch.cat(merged, 1)


def _even(layer: str, heads: int) -> None:
    if heads % 2:
        raise ValueError(f"{layer}: heads={heads} must be even, half of them work differently; nearest: {heads + 1}.")


@register_mixer("sg_former")
def self_guided(
    dim: int, heads: int, block: int = 0, reduction: int = 2, qkv_bias: bool = True
) -> HybridScaleAttention | SelfGuidedAttention | PlainAttention:
    """Attention of one block, x: [B, H, W, dim]: hybrid in even blocks, self-guided in odd ones.

    reduction: 8, 4 or 2; 1 is dense attention in every block.
    """
    if reduction == 1:
        return PlainAttention(dim, heads, qkv_bias)
    if block % 2:
        return SelfGuidedAttention(dim, heads, reduction, block, qkv_bias)
    return HybridScaleAttention(dim, heads, reduction, block, qkv_bias=qkv_bias)
