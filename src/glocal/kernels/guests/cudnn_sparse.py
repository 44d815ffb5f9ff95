"""cuDNN frontend's block-sparse attention (package nvidia-cudnn-frontend): full blocks there, partial blocks on ours.

Blocks of 64 or 128, grouped heads in forward. Its backward takes bfloat16, equal head counts and head size 128, and
knows no gradient of the LSE: calls that want one are refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from glocal.kernels.call import Call, Grads
from glocal.kernels.capability import Capability, Sizes
from glocal.kernels.guests import compose
from glocal.kernels.guests.compose import Rows
from glocal.kernels.guests.prepare import Prepared
from glocal.kernels.guests.present import lacking

PACKAGES = (
    ("nvidia-cudnn-frontend", "1.32.0"),
    ("nvidia-cutlass-dsl", "4.8.0"),
    ("apache-tvm-ffi", "0.1.11"),
)
COMPUTE = (9,)
ALIGN = 128  # bytes, of the rows its kernels read

_RECORD = Capability(
    name="cudnn_sparse",
    needs="plan",
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16),
    note="cuDNN block-sparse kernels for full blocks, own kernels for partial ones, joined by LSE",
    head_dims=Sizes(64, 128, multiple=32),
    value_dims=Sizes(64, 128, multiple=32),
    block_sizes=Sizes(64, 128, multiple=64),
    equal_blocks=True,
    blocks=((128, 128), (64, 64)),
    bias=(),
    softcap=False,
    segments=False,
    empty=False,
    dense=False,
    deterministic=False,
    packages=PACKAGES,
    by_name_only="a guest: runs when named, or where it was measured to be fastest",
)
CAPABILITY = replace(
    _RECORD,
    training=replace(
        _RECORD,
        dtypes=(torch.bfloat16,),
        head_dims=Sizes(128, 128),
        value_dims=Sizes(128, 128),
        group_ratios=Sizes(1, 1),
        lse_grad=False,
    ),
)


def missing(device: str) -> str | None:
    """What this machine lacks."""
    return lacking(PACKAGES, COMPUTE, device)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq]."""
    return compose.forward(_Guest(), q, k, v, call)


def backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Grads:
    """Gradients through out; the record refuses calls whose LSE is differentiated."""
    return compose.backward(_Guest(), Rows(grad_out, torch.zeros_like(grad_lse), out, lse), q, k, v, call)


class _Guest:
    name = "cudnn_sparse"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Prepared, scale: float) -> tuple[Tensor, Tensor]:
        from cudnn.block_sparse_attention import block_sparse_attention_forward  # pyright: ignore[reportMissingImports]

        rows = q.shape[2]
        found = block_sparse_attention_forward(
            _whole(q, plan.blocks[0]), aligned(k), aligned(v), allow_empty_block_nums=plan.empty is not None,
            softmax_scale=scale, **_lists(plan, q),
        )  # fmt: skip
        return found["o_tensor"][:, :, :rows], found["lse_tensor"][:, :, :rows]

    def backward(self, rows: Rows, qkv: tuple[Tensor, ...], plan: Prepared, scale: float) -> tuple[Tensor, ...]:
        from cudnn.block_sparse_attention import block_sparse_attention_backward  # pyright: ignore[reportMissingImports]

        if plan.repeats:
            raise ValueError(
                f"backend={self.name!r}: a list of this plan repeats a key block, which its backward cannot count; "
                "legal: lists without repeats, or another backend."
            )
        q, k, v = qkv
        count, size = q.shape[2], plan.blocks[0]
        found = block_sparse_attention_backward(
            _whole(rows.grad_out, size), _whole(q, size), aligned(k), aligned(v), _whole(rows.out, size),
            _whole(rows.lse, size), softmax_scale=scale, **_lists(plan, q),
        )  # fmt: skip
        return found["dq_tensor"][:, :, :count], found["dk_tensor"], found["dv_tensor"]


def aligned(t: Tensor) -> Tensor:
    """Rows contiguous, start and strides on whole lines."""
    fits = t.stride(-1) == 1 and all(s * t.element_size() % ALIGN == 0 for s in t.stride()[:-1])
    return t if fits and t.data_ptr() % ALIGN == 0 else t.contiguous()


def _whole(t: Tensor, block: int) -> Tensor:
    """Rows padded to whole blocks: zeros, which no gradient comes from."""
    extra = -t.shape[2] % block
    if extra == 0:
        return aligned(t) if t.dim() == 4 else t.contiguous()
    return pad(t, (0, extra)) if t.dim() == 3 else pad(t, (0, 0, 0, extra))


def _lists(plan: Prepared, q: Tensor) -> dict[str, Any]:
    """Lists for every sample and head, and the keys in each block where the last one is cut short."""
    heads = q.shape[1]
    count, index = plan.count, plan.index
    if count.shape[1] not in (1, heads):
        count, index = (t.repeat_interleave(heads // t.shape[1], 1) for t in (count, index))
    sizes = None
    short = -plan.k.slots % plan.blocks[1]
    if short:
        sizes = torch.full((-(-plan.k.slots // plan.blocks[1]),), plan.blocks[1], dtype=torch.int32, device=q.device)
        sizes[-1] -= short
    lead = (q.shape[0], heads)
    # Lists of one length take a faster kernel, which reads no counts.
    return {
        "q2k_block_index": index.expand(*lead, -1, -1).contiguous(),
        "q2k_block_nums": None if plan.equal is not None else count.expand(*lead, -1).contiguous(),
        "block_sparse_num": plan.equal,
        "block_sizes": sizes,
        "sparse_block_size": plan.blocks[1],
    }
