"""Blocks of the built-in image model with a second stream of low-resolution tokens (Scale-DiT, arXiv 2510.16325)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glocal.adapt.scale_dit_flux import Guided
from glocal.models.generation.image_dit import turned

TUNED = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.2")
"""Layers of a block that have updates."""


def tunable(path: str) -> bool:
    """Whether the method has an update for the linear layer at `path`."""
    return path.startswith("blocks.") and path.split(".", 2)[2] in TUNED


def guided_block(
    block: Any, path: str, image: Tensor, words: Tensor, temb: Tensor, now: Guided, low_words: Tensor | None
) -> Tensor:
    """image [B, N, C], words [B, T, C], temb [B, 6, C] -> image behind the block; `now.low` goes on likewise.

    low_words: what low tokens look at in cross attention; None: nothing.
    """
    attn, low = block.attn1, now.low
    shift, scale, gate, shift_f, scale_f, gate_f = (block.scale_shift_table + temb).chunk(6, 1)
    shift_l, scale_l, gate_l, shift_fl, scale_fl, gate_fl = (block.scale_shift_table + now.level).chunk(6, 1)
    x, y = block.norm1(image) * (1 + scale) + shift, block.norm1(low) * (1 + scale_l) + shift_l
    both, tuned = torch.cat((x, y), 1), torch.ones(x.shape[1] + y.shape[1], dtype=torch.bool, device=x.device)
    tuned[: x.shape[1]] = now.image
    q, k, v = (now.linear(block, path, f"attn1.to_{n}", both, tuned) for n in "qkv")
    q, k, v = (t.unflatten(2, (attn.heads, -1)) for t in (attn.norm_q(q), attn.norm_k(k), v))  # [B, N + L, H, D]
    q, k = turned(q, now.rotary), turned(k, now.rotary)
    out = now.attend(*(t.to(v.dtype).transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
    x, y = out.split((image.shape[1], low.shape[1]), 1)

    image = image + gate * attn.to_out[0](x)
    image = image + block.attn2(block.norm2(image), words, None, None)
    image = image + gate_f * block.ffn(block.norm3(image) * (1 + scale_f) + shift_f)

    low = low + gate_l * now.linear(block, path, "attn1.to_out.0", y)
    if low_words is not None:
        low = low + block.attn2(block.norm2(low), low_words, None, None)
    wide = block.ffn.net[0](block.norm3(low) * (1 + scale_fl) + shift_fl)
    now.low = low + gate_fl * now.linear(block, path, "ffn.net.2", wide)
    return image
