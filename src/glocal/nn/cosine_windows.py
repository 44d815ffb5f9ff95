"""Window attention by cosines with a bias from log-spaced offsets (Swin V2, arXiv 2111.09883).

Logits are cosines of queries and keys times a learned factor of each head, at most 100, plus 16 sigmoid(MLP(offset)): a
small network reads offsets as sign(d) log2(1 + 8 |d|) / 3, d over the side of the window that it was trained with, so
that weights carry over to other windows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.nn._heads import split_heads
from glocal.nn.blocks.relative import relative_index
from glocal.nn.mixer import register_mixer
from glocal.nn.window_attention import WindowAttention, WindowSpec

_MOST = math.log(100.0)  # of the logarithm of the factor


class CosineWindowAttention(WindowAttention):
    """x: [B, H, W, dim]; keys `logit_scale`, `cpb_mlp.0`, `cpb_mlp.2`, `qkv.weight`, `q_bias`, `v_bias`, `proj`.

    window, shift: as in `WindowAttention`. trained: side of the window that the network of the bias was trained with,
    None is `window`. hidden: its inner width. Keys have no bias.
    """

    offsets: Tensor

    def __init__(
        self, dim: int, heads: int, window: int = 8, shift: int = 0, trained: int | None = None, hidden: int = 512
    ) -> None:
        super().__init__(dim, heads, window, shift, spec=WindowSpec(qkv_bias=False, scale=1.0))
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, heads, bias=False))
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        self.register_buffer("index", relative_index(window, window), persistent=False)
        self.register_buffer("offsets", spaced(window, window if trained is None else trained), persistent=False)

    def table(self) -> Tensor:
        """The bias of every offset, query minus key, [(2 window - 1) ** 2, heads]."""
        return 16 * self.cpb_mlp(self.offsets).sigmoid()

    def on_map(self, x: Tensor, stage: object) -> tuple[Tensor, ...]:
        """As in `WindowAttention`: unit keys, and unit queries times the factor."""
        return self.project(x.flatten(1, 2), 3)

    def project(self, groups: Tensor, count: int) -> tuple[Tensor, ...]:
        """As in `WindowAttention`: unit keys, and unit queries times the factor."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        rows = groups.reshape(-1, *groups.shape[-2:])
        q, k, v = split_heads(F.linear(rows, self.qkv.weight, bias), count, self.heads)
        factor = self.logit_scale.clamp(max=_MOST).exp()
        return (F.normalize(q, dim=-1) * factor).to(v.dtype), F.normalize(k, dim=-1).to(v.dtype), v


def spaced(window: int, trained: int) -> Tensor:
    """Log-spaced offsets of a window, [(2 window - 1) ** 2, 2], rows first."""
    away = 8 * torch.arange(1 - window, window, dtype=torch.float32, device="cpu") / max(trained - 1, 1)
    away = away.sign() * (away.abs() + 1).log2() / 3
    return torch.stack(torch.meshgrid(away, away, indexing="ij"), -1).flatten(0, 1)


@register_mixer("swin_v2")
def swin_v2(dim: int, heads: int, block: int = 0, window: int = 8) -> CosineWindowAttention:
    """Swin V2's attention of one block: windows rolled by half their side in odd blocks."""
    return CosineWindowAttention(dim, heads, window, window // 2 if block % 2 else 0)
