"""FLUX.1 blocks with a third stream of low-resolution tokens (Scale-DiT, arXiv 2510.16325).

Words and image tokens go through a block as in diffusers. Low tokens go through the image side of the same weights,
modulated for noise level 0 and with the low-rank updates on; all three attend together under the mask of the method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glocal.nn.lora import PartLora, part_linear

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(eq=False)
class Guided:
    """What the blocks of one forward share. low [B, L, C]: the low tokens, which run from block to block.

    level [B, C]: their time embedding. rotary: table of [text, image, low]. attend(q, k, v): [B, H, N, D].
    lora: updates. image: whether image tokens (in single blocks words too) have the update of queries, keys, values.
    """

    low: Tensor
    level: Tensor
    rotary: tuple[Tensor, Tensor]
    attend: Attend
    lora: PartLora
    image: bool

    def linear(self, root: nn.Module, path: str, name: str, x: Tensor, on: bool | Tensor = True) -> Tensor:
        """The linear layer `name` of the block at `path`, with its update where it is on."""
        return part_linear(root.get_submodule(name), x, self.lora.get(f"{path}.{name}"), on)


def double_block(block: Any, path: str, image: Tensor, text: Tensor, level: Tensor, now: Guided) -> tuple[Tensor, ...]:
    """image [B, N, C], text [B, T, C], level: time embedding [B, C] -> (text, image) behind the block."""
    attn, low = block.attn, now.low
    x, gate, shift, scale, gate_ff = block.norm1(image, emb=level)
    t, gate_t, shift_t, scale_t, gate_ff_t = block.norm1_context(text, emb=level)
    changed = now.linear(block, path, "norm1.linear", block.norm1.silu(now.level))
    shift_l, scale_l, gate_l, shift_ff_l, scale_ff_l, gate_ff_l = changed[:, None].chunk(6, -1)
    y = block.norm1.norm(low) * (1 + scale_l) + shift_l

    both, tuned = torch.cat((x, y), 1), torch.ones(x.shape[1] + y.shape[1], dtype=torch.bool, device=x.device)
    tuned[: x.shape[1]] = now.image
    q, k, v = (_heads(now.linear(block, path, f"attn.to_{n}", both, tuned), attn) for n in "qkv")
    words = [_heads(getattr(attn, f"add_{n}_proj")(t), attn) for n in "qkv"]
    q = torch.cat((attn.norm_added_q(words[0]), attn.norm_q(q)), 1)
    k = torch.cat((attn.norm_added_k(words[1]), attn.norm_k(k)), 1)
    v = torch.cat((words[2], v), 1)
    t, x, y = _attended(q, k, v, now).split((text.shape[1], image.shape[1], low.shape[1]), 1)

    image = image + gate[:, None] * attn.to_out[1](attn.to_out[0](x))
    text = text + gate_t[:, None] * attn.to_add_out(t)
    low = low + gate_l * attn.to_out[1](now.linear(block, path, "attn.to_out.0", y))
    image = image + gate_ff[:, None] * block.ff(block.norm2(image) * (1 + scale[:, None]) + shift[:, None])
    t = block.norm2_context(text) * (1 + scale_t[:, None]) + shift_t[:, None]
    text = text + gate_ff_t[:, None] * block.ff_context(t)
    y = block.norm2(low) * (1 + scale_ff_l) + shift_ff_l
    y = block.ff.net[1](block.ff.net[0](y))
    now.low = _clipped(low + gate_ff_l * now.linear(block, path, "ff.net.2", y))
    return _clipped(text), image


def single_block(block: Any, path: str, image: Tensor, text: Tensor, level: Tensor, now: Guided) -> tuple[Tensor, ...]:
    """The same for a block in which words and image share all weights."""
    attn, low = block.attn, now.low
    joint = torch.cat((text, image), 1)
    x, gate = block.norm(joint, emb=level)
    changed = now.linear(block, path, "norm.linear", block.norm.silu(now.level))
    shift_l, scale_l, gate_l = changed[:, None].chunk(3, -1)
    y = block.norm.norm(low) * (1 + scale_l) + shift_l

    both = torch.cat((x, y), 1)
    tuned = torch.ones(both.shape[1], dtype=torch.bool, device=both.device)
    tuned[: x.shape[1]] = now.image
    q, k, v = (_heads(now.linear(block, path, f"attn.to_{n}", both, tuned), attn) for n in "qkv")
    out = _attended(attn.norm_q(q), attn.norm_k(k), v, now)
    tuned = torch.arange(both.shape[1], device=both.device) >= x.shape[1]
    wide = block.act_mlp(now.linear(block, path, "proj_mlp", both, tuned))
    out = now.linear(block, path, "proj_out", torch.cat((out, wide), 2), tuned)
    x, y = out.split((joint.shape[1], low.shape[1]), 1)
    now.low = _clipped(low + gate_l * y)
    joint = _clipped(joint + gate[:, None] * x)
    return joint[:, : text.shape[1]], joint[:, text.shape[1] :]


def _heads(x: Tensor, attn: Any) -> Tensor:
    """[B, N, H * D] -> [B, N, H, D]."""
    return x.unflatten(-1, (-1, attn.head_dim))


def _attended(q: Tensor, k: Tensor, v: Tensor, now: Guided) -> Tensor:
    """Rotary, then attention: [B, N, H, D] -> [B, N, H * D]."""
    from diffusers.models.embeddings import apply_rotary_emb

    table: Any = now.rotary  # diffusers declares another type
    turned: list[Any] = [apply_rotary_emb(x, table, sequence_dim=1) for x in (q, k)]
    out = now.attend(*(x.transpose(1, 2) for x in (*turned, v)))
    return out.transpose(1, 2).flatten(2).to(q.dtype)


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
