"""FLUX.2 blocks with a third stream of low-resolution tokens (Scale-DiT, second generation of arXiv 2510.16325).

As in FLUX.1, but the modulation is one for all blocks, the updates act on low tokens alone, and low tokens, which see
nobody else and keep their noise level, may be computed once: `Guided2.kept` then holds their keys and values by block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glocal.adapt.scale_dit_flux import Guided, attended, clipped, heads
from glocal.nn.lora import PartLora

TUNED = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.linear_in", "ff.linear_out", "attn.to_qkv_mlp_proj",
    "attn.to_out",
)  # fmt: skip

Kept = dict[str, tuple[Tensor, Tensor]]


@dataclass(eq=False)
class Guided2(Guided):
    """double, single [B, 1, ...]: modulation of low tokens in double and single blocks. words: how many come first.

    kept: keys and values of low tokens by block, before rotary, None where every forward computes them. ready: they are
    there, and low tokens run no further.
    """

    double: Tensor
    single: Tensor
    words: int
    kept: Kept | None = None
    ready: bool = False

    def keys(self, path: str, k: Tensor, v: Tensor) -> None:
        """Keep what later forwards need of a block."""
        if self.kept is not None:
            self.kept[path] = (k, v)


def begin(
    model: Any,
    given: Mapping[str, Any],
    latents: Tensor,
    rotary: tuple[Tensor, Tensor],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    lora: PartLora,
    *,
    kept: Kept | None = None,
) -> Guided2:
    """What the blocks of a forward share; given: its arguments by name; latents [B, L, C]: low tokens."""
    low = model.x_embedder(latents)
    guidance = given.get("guidance")
    more = None if guidance is None else guidance.to(low.dtype) * 1000
    level = model.time_guidance_embed(torch.zeros_like(given["timestep"]).to(low.dtype), more)
    double, single = (m(level)[:, None] for m in (model.double_stream_modulation_img, model.single_stream_modulation))
    words = given["encoder_hidden_states"].shape[1]
    return Guided2(low, level, rotary, attend, lora, False, double, single, words, kept, bool(kept))


def block_of(name: str) -> Callable[[nn.Module, str, Mapping[str, Any], Guided], Any]:
    """What stands in place of the block `name`: (module, path, arguments, shared) -> its output."""
    return single_block if name.startswith("single_") else double_block  # type: ignore[return-value]


def double_block(block: Any, path: str, given: Mapping[str, Any], now: Guided2) -> tuple[Tensor, Tensor]:
    """Arguments of the block: hidden_states [B, N, C], encoder_hidden_states [B, T, C] -> (text, image)."""
    image, text, attn = given["hidden_states"], given["encoder_hidden_states"], block.attn
    shift, scale, gate, shift_ff, scale_ff, gate_ff = _parts(given["temb_mod_img"], 6)
    shift_t, scale_t, gate_t, shift_ff_t, scale_ff_t, gate_ff_t = _parts(given["temb_mod_txt"], 6)
    shift_l, scale_l, gate_l, shift_ff_l, scale_ff_l, gate_ff_l = now.double.chunk(6, -1)

    x = (1 + scale) * block.norm1(image) + shift
    t = (1 + scale_t) * block.norm1_context(text) + shift_t
    words = [heads(getattr(attn, f"add_{n}_proj")(t), attn) for n in "qkv"]
    mine = [heads(getattr(attn, f"to_{n}")(x), attn) for n in "qkv"]
    q, k = attn.norm_q(mine[0]), attn.norm_k(mine[1])
    if now.ready:
        assert now.kept is not None
        k_low, v_low = now.kept[path]
        q_low = k_low  # nobody reads what low tokens would see
    else:
        y = (1 + scale_l) * block.norm1(now.low) + shift_l
        q_low, k_low, v_low = (heads(now.linear(block, path, f"attn.to_{n}", y), attn) for n in "qkv")
        q_low, k_low = attn.norm_q(q_low), attn.norm_k(k_low)
        now.keys(path, k_low, v_low)
    q = torch.cat((attn.norm_added_q(words[0]), q, q_low), 1)
    k = torch.cat((attn.norm_added_k(words[1]), k, k_low), 1)
    v = torch.cat((words[2], mine[2], v_low), 1)
    t, x, y = attended(q, k, v, now).split((text.shape[1], image.shape[1], now.low.shape[1]), 1)

    image = image + gate * attn.to_out[1](attn.to_out[0](x))
    image = image + gate_ff * block.ff(block.norm2(image) * (1 + scale_ff) + shift_ff)
    text = text + gate_t * attn.to_add_out(t)
    text = text + gate_ff_t * block.ff_context(block.norm2_context(text) * (1 + scale_ff_t) + shift_ff_t)
    if not now.ready:
        low = now.low + gate_l * attn.to_out[1](now.linear(block, path, "attn.to_out.0", y))
        wide = now.linear(block, path, "ff.linear_in", block.norm2(low) * (1 + scale_ff_l) + shift_ff_l)
        now.low = low + gate_ff_l * now.linear(block, path, "ff.linear_out", block.ff.act_fn(wide))
    return clipped(text), image


def single_block(block: Any, path: str, given: Mapping[str, Any], now: Guided2) -> Tensor | tuple[Tensor, Tensor]:
    """hidden_states [B, T + N, C] -> the same, or (text, image) where the block is asked to part them."""
    joint, text, attn = given["hidden_states"], given.get("encoder_hidden_states"), block.attn
    joint = joint if text is None else torch.cat((text, joint), 1)
    shift, scale, gate = _parts(given["temb_mod"], 3)
    shift_l, scale_l, gate_l = now.single.chunk(3, -1)
    widths = (3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor)

    mine, wide = attn.to_qkv_mlp_proj((1 + scale) * block.norm(joint) + shift).split(widths, -1)
    q, k, v = (heads(part, attn) for part in mine.chunk(3, -1))
    wide_low = None
    if now.ready:
        assert now.kept is not None
        k_low, v_low = now.kept[path]
        q_low = k_low
    else:
        y = (1 + scale_l) * block.norm(now.low) + shift_l
        theirs, wide_low = now.linear(block, path, "attn.to_qkv_mlp_proj", y).split(widths, -1)
        q_low, k_low, v_low = (heads(part, attn) for part in theirs.chunk(3, -1))
        q_low, k_low = attn.norm_q(q_low), attn.norm_k(k_low)
        now.keys(path, k_low, v_low)
    q, k = torch.cat((attn.norm_q(q), q_low), 1), torch.cat((attn.norm_k(k), k_low), 1)
    x, y = attended(q, k, torch.cat((v, v_low), 1), now).split((joint.shape[1], now.low.shape[1]), 1)
    joint = clipped(joint + gate * attn.to_out(torch.cat((x, attn.mlp_act_fn(wide)), -1)))
    if wide_low is not None:
        y = torch.cat((y, attn.mlp_act_fn(wide_low)), -1)
        now.low = clipped(now.low + gate_l * now.linear(block, path, "attn.to_out", y))
    if given.get("split_hidden_states"):
        return joint[:, : now.words], joint[:, now.words :]
    return joint


def _parts(modulation: Tensor, count: int) -> tuple[Tensor, ...]:
    """[B, count * C] or [B, 1, count * C] -> count tensors [B, 1, C]."""
    return (modulation[:, None] if modulation.dim() == 2 else modulation).chunk(count, -1)


def tunable(path: str) -> bool:
    """Whether the method has an update for the linear layer at `path`."""
    root, _, inside = path.partition(".")
    inside = inside.partition(".")[2]
    single = ("attn.to_qkv_mlp_proj", "attn.to_out")
    if root == "single_transformer_blocks":
        return inside in single
    return root == "transformer_blocks" and inside in TUNED and inside not in single


def position_ids(size: tuple[int, int], like: Tensor) -> Tensor:
    """Position ids [rows * columns, 4] of a raster: 0, row, column, 0."""
    rows, columns = size
    ids = torch.zeros(rows, columns, 4, device=like.device, dtype=like.dtype)
    ids[..., 1] = torch.arange(rows, device=like.device)[:, None]
    ids[..., 2] = torch.arange(columns, device=like.device)
    return ids.flatten(0, 1)
