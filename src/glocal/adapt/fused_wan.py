"""A block of Wan as diffusers computes it, with what stands between its branches in one pass each
(`glocal.ops.stream`): the model converts the stream to float32 and back, norms, scales, shifts and gates in passes of
their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from glocal.ops.stream import joined


def wan_block(block: Any, name: str) -> Callable[..., Tensor]:
    """The forward of a WanTransformerBlock; ValueError, naming the site, for another one."""
    legal = type(block).__name__ == "WanTransformerBlock"
    norms = [getattr(block, n, None) for n in ("norm1", "norm2", "norm3")]
    if not legal or any(type(n).__name__ not in ("FP32LayerNorm", "Identity") for n in norms):
        raise ValueError(
            f"fused_norms: site {name!r} stands in a {type(block).__name__} with {norms!r}; legal: WanTransformerBlock "
            "with norms of FP32LayerNorm."
        )

    def forward(hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
        """hidden_states [B, N, C]; temb [B, 6, C], or [B, N, 6, C] where tokens have levels of their own."""
        axis = temb.dim() - 2
        six = (block.scale_shift_table.unsqueeze(0) if axis == 2 else block.scale_shift_table) + temb.float()
        shift, scale, gate, c_shift, c_scale, c_gate = (
            t.squeeze(2) if axis == 2 else t for t in six.chunk(6, axis)
        )  # [B, 1 or N, C]
        x = hidden_states
        _, normed = joined(x, **_of(block.norm1), change=(scale, shift))
        out = block.attn1(normed, None, None, rotary_emb)
        x, normed = joined(x, out, gate, **_of(block.norm2))
        out = block.attn2(x if normed is None else normed, encoder_hidden_states, None, None)
        x, normed = joined(x, out, **_of(block.norm3), change=(c_scale, c_shift))
        return joined(x, block.ffn(normed), c_gate, eps=None)[0]

    return forward


def _of(norm: nn.Module) -> dict[str, Any]:
    """Arguments of `joined` for a layer norm; no norm for an identity."""
    if isinstance(norm, nn.Identity):
        return {"eps": None}
    parts: Sequence[Tensor | None] = (norm.weight, norm.bias)  # type: ignore[assignment]
    return {"eps": norm.eps, "norm": None if parts[0] is None else parts}
