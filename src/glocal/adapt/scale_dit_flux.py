"""FLUX.1 blocks with a third stream of low-resolution tokens (Scale-DiT, arXiv 2510.16325).

Words and image tokens go through a block as in diffusers. Low tokens go through the image side of the same weights,
modulated for noise level 0 and with the low-rank updates on; all three attend together under the mask of the method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glocal.nn.lora import PartLora, part_linear

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

TUNED = (
    "x_embedder", "norm1.linear", "norm.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2",
    "proj_mlp", "proj_out",
)  # fmt: skip


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


def begin(
    model: Any,
    given: Mapping[str, Any],
    latents: Tensor,
    rotary: tuple[Tensor, Tensor],
    attend: Attend,
    lora: PartLora,
    *,
    image: bool,
) -> Guided:
    """What the blocks of a forward share; given: its arguments by name; latents [B, L, C]: low tokens."""
    low = part_linear(model.x_embedder, latents, lora.get("x_embedder"))
    more = [] if given.get("guidance") is None else [given["guidance"].to(low.dtype) * 1000]
    level = model.time_text_embed(torch.zeros_like(given["timestep"]).to(low.dtype), *more, given["pooled_projections"])
    return Guided(low, level, rotary, attend, lora, image)


def block_of(name: str) -> Callable[[nn.Module, str, Mapping[str, Any], Guided], Any]:
    """What stands in place of the block `name`: (module, path, arguments, shared) -> its output."""
    return single_block if name.startswith("single_") else double_block


def double_block(block: Any, path: str, given: Mapping[str, Any], now: Guided) -> tuple[Tensor, ...]:
    """hidden_states [B, N, C], encoder_hidden_states [B, T, C], time embedding temb [B, C] -> (text, image)."""
    image, text, level = given["hidden_states"], given["encoder_hidden_states"], given["temb"]
    attn, low = block.attn, now.low
    x, gate, shift, scale, gate_ff = block.norm1(image, emb=level)
    t, gate_t, shift_t, scale_t, gate_ff_t = block.norm1_context(text, emb=level)
    changed = now.linear(block, path, "norm1.linear", block.norm1.silu(now.level))
    shift_l, scale_l, gate_l, shift_ff_l, scale_ff_l, gate_ff_l = changed[:, None].chunk(6, -1)
    y = block.norm1.norm(low) * (1 + scale_l) + shift_l

    both, tuned = torch.cat((x, y), 1), torch.ones(x.shape[1] + y.shape[1], dtype=torch.bool, device=x.device)
    tuned[: x.shape[1]] = now.image
    q, k, v = (heads(now.linear(block, path, f"attn.to_{n}", both, tuned), attn) for n in "qkv")
    words = [heads(getattr(attn, f"add_{n}_proj")(t), attn) for n in "qkv"]
    q = torch.cat((attn.norm_added_q(words[0]), attn.norm_q(q)), 1)
    k = torch.cat((attn.norm_added_k(words[1]), attn.norm_k(k)), 1)
    v = torch.cat((words[2], v), 1)
    t, x, y = attended(q, k, v, now).split((text.shape[1], image.shape[1], low.shape[1]), 1)

    image = image + gate[:, None] * attn.to_out[1](attn.to_out[0](x))
    text = text + gate_t[:, None] * attn.to_add_out(t)
    low = low + gate_l * attn.to_out[1](now.linear(block, path, "attn.to_out.0", y))
    image = image + gate_ff[:, None] * block.ff(block.norm2(image) * (1 + scale[:, None]) + shift[:, None])
    t = block.norm2_context(text) * (1 + scale_t[:, None]) + shift_t[:, None]
    text = text + gate_ff_t[:, None] * block.ff_context(t)
    y = block.norm2(low) * (1 + scale_ff_l) + shift_ff_l
    y = block.ff.net[1](block.ff.net[0](y))
    now.low = clipped(low + gate_ff_l * now.linear(block, path, "ff.net.2", y))
    return clipped(text), image


def single_block(block: Any, path: str, given: Mapping[str, Any], now: Guided) -> tuple[Tensor, ...]:
    """The same for a block in which words and image share all weights."""
    image, text, level = given["hidden_states"], given["encoder_hidden_states"], given["temb"]
    attn, low = block.attn, now.low
    joint = torch.cat((text, image), 1)
    x, gate = block.norm(joint, emb=level)
    changed = now.linear(block, path, "norm.linear", block.norm.silu(now.level))
    shift_l, scale_l, gate_l = changed[:, None].chunk(3, -1)
    y = block.norm.norm(low) * (1 + scale_l) + shift_l

    both = torch.cat((x, y), 1)
    tuned = torch.ones(both.shape[1], dtype=torch.bool, device=both.device)
    tuned[: x.shape[1]] = now.image
    q, k, v = (heads(now.linear(block, path, f"attn.to_{n}", both, tuned), attn) for n in "qkv")
    out = attended(attn.norm_q(q), attn.norm_k(k), v, now)
    tuned = torch.arange(both.shape[1], device=both.device) >= x.shape[1]
    wide = block.act_mlp(now.linear(block, path, "proj_mlp", both, tuned))
    out = now.linear(block, path, "proj_out", torch.cat((out, wide), 2), tuned)
    x, y = out.split((joint.shape[1], low.shape[1]), 1)
    now.low = clipped(low + gate_l * y)
    joint = clipped(joint + gate[:, None] * x)
    return joint[:, : text.shape[1]], joint[:, text.shape[1] :]


def tunable(path: str) -> bool:
    """Whether the method has an update for the linear layer at `path`: the image side of blocks, and the embedder."""
    inside = path.split(".", 2)[2] if path.startswith(("transformer_blocks.", "single_transformer_blocks.")) else path
    return inside in TUNED and (inside != path or path == "x_embedder")


def position_ids(size: tuple[int, int], like: Tensor) -> Tensor:
    """Position ids [rows * columns, 3] of a raster: 0, row, column."""
    row = torch.arange(size[0], device=like.device)[:, None].expand(size).flatten()
    column = torch.arange(size[1], device=like.device).expand(size).flatten()
    return torch.stack((torch.zeros_like(row), row, column), 1).to(like.dtype)


def heads(x: Tensor, attn: Any) -> Tensor:
    """[B, N, H * D] -> [B, N, H, D]."""
    return x.unflatten(-1, (-1, attn.head_dim))


def attended(q: Tensor, k: Tensor, v: Tensor, now: Guided) -> Tensor:
    """Rotary, then attention: [B, N, H, D] -> [B, N, H * D]."""
    from diffusers.models.embeddings import apply_rotary_emb

    table: Any = now.rotary  # diffusers declares another type
    turned: list[Any] = [apply_rotary_emb(x, table, sequence_dim=1) for x in (q, k)]
    out = now.attend(*(x.transpose(1, 2) for x in (*turned, v)))
    return out.transpose(1, 2).flatten(2).to(q.dtype)


def clipped(x: Tensor) -> Tensor:
    """Within what float16 holds."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
