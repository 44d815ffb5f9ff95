"""FlashAttention-4 (CuTe DSL, package flash-attn-4) on block lists: full blocks there, partial blocks on ours.

Hopper kernels take key blocks of 128 (forward also 64) and mask the end of the sequence themselves. Backward reads
lists of query blocks for each key block and the gradient of the LSE.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from glocal.kernels.call import Call, Grads
from glocal.kernels.capability import Capability, Sizes
from glocal.kernels.guests import compose
from glocal.kernels.guests.compose import Rows
from glocal.kernels.guests.prepare import Prepared
from glocal.kernels.guests.present import lacking, on

PACKAGES = (
    ("flash-attn-4", "4.0.0b36"),
    ("nvidia-cutlass-dsl", "4.7"),
    ("quack-kernels", "0.5.3"),
    ("apache-tvm-ffi", "0.1.11"),
    ("torch-c-dlpack-ext", "0.1"),
)
COMPUTE = (9,)

CAPABILITY = Capability(
    name="fa4",
    needs="plan",
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16),
    note="FlashAttention-4 block lists for full blocks, own kernels for partial ones, joined by LSE",
    head_dims=Sizes(8, 128, multiple=8),
    value_dims=Sizes(8, 128, multiple=8),
    block_sizes=Sizes(64, 128, multiple=64),
    blocks=((128, 128),),
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
    CAPABILITY, training=replace(CAPABILITY, block_sizes=Sizes(128, 128, multiple=128), equal_dims=False)
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
    """Gradients through out and LSE."""
    return compose.backward(_Guest(), Rows(grad_out, grad_lse, out, lse), q, k, v, call)


class _Guest:
    name = "fa4"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Prepared, scale: float) -> tuple[Tensor, Tensor]:
        from flash_attn.cute.interface import _flash_attn_fwd  # pyright: ignore[reportMissingImports]

        lists = _lists(plan.count, plan.index, q.shape[1], plan.blocks)
        with on(q):
            # Query heads are packed only where all heads share a list; lists of their own are the rule here.
            found = _flash_attn_fwd(
                *_by_token(q, k, v), softmax_scale=scale, block_sparse_tensors=lists, return_lse=True, pack_gqa=False
            )
        return found[0].transpose(1, 2), found[1]

    def backward(self, rows: Rows, qkv: tuple[Tensor, ...], plan: Prepared, scale: float) -> tuple[Tensor, ...]:
        from flash_attn.cute.interface import _flash_attn_bwd  # pyright: ignore[reportMissingImports]

        lists = _lists(*plan.transposed, qkv[0].shape[1], plan.blocks)
        with on(qkv[0]):
            found = _flash_attn_bwd(
                *_by_token(*qkv), *_by_token(rows.out, rows.grad_out), rows.lse,
                softmax_scale=scale, block_sparse_tensors=lists, dlse=rows.grad_lse,
            )  # fmt: skip
        return tuple(t.transpose(1, 2) for t in found[:3])


def _by_token(*tensors: Tensor) -> list[Tensor]:
    """[B, H, N, D] -> [B, N, H, D] in a layout that TMA reads: rows contiguous, strides of 16 bytes."""
    out = []
    for t in tensors:
        t = t.transpose(1, 2)
        whole = (
            t.stride(3) == 1 and t.data_ptr() % 16 == 0 and all(s * t.element_size() % 16 == 0 for s in t.stride()[:3])
        )
        out.append(t if whole else t.contiguous())
    return out


def _lists(count: Tensor, index: Tensor, heads: int, blocks: tuple[int, int]):
    """All listed blocks are full; the list of partial blocks must be there, and is empty."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch  # pyright: ignore[reportMissingImports]

    if count.shape[1] not in (1, heads):
        count, index = (t.repeat_interleave(heads // t.shape[1], 1) for t in (count, index))
    return BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(count),
        mask_block_idx=torch.zeros_like(index[..., :1]).contiguous(),
        full_block_cnt=count,
        full_block_idx=index,
        block_size=blocks,
    )
