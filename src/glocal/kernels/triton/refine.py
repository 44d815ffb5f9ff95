"""Cut the blocks of a plan into smaller ones: for wide heads, whose tiles would not fit in shared memory, and float32.

Orders stay as they are, since a block is a run of slots; lists and bit masks are split.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from glocal.kernels.call import Call, PlanTensors

TILE_BYTES = 1 << 15  # of one tile, block times padded head size: kernels compiled for sm_90 then need up to 225 KiB
FLOAT32_TOKENS = 32  # products in full float32 are unrolled; larger tiles take minutes to compile
_LEAST = 32  # a smaller tile would cut words of the mask


def refined(call: Call, width: int, itemsize: int) -> Call:
    """The same call with blocks whose tiles of `width` entries of `itemsize` bytes fit."""
    plan = call.plan
    assert plan is not None
    most = max(_LEAST, TILE_BYTES // (width * itemsize))
    if itemsize == 4:
        most = min(most, FLOAT32_TOKENS)
    q, k = -(-call.q_block // most), -(-call.kv_block // most)  # parts of each block
    if q == k == 1:
        return call
    return replace(call, plan=cut(plan, q, k), q_block=call.q_block // q, kv_block=call.kv_block // k)


def cut(plan: PlanTensors, q: int, k: int) -> PlanTensors:
    """The same plan with each query block in q parts and each key block in k; parts of keys hold whole mask words."""
    m, rows, words = plan.masks.shape
    masks = plan.masks.reshape(m, q, rows // q, k, words // k).transpose(2, 3).reshape(m * q * k, rows // q, words // k)
    return replace(
        plan,
        full_count=plan.full_count.repeat_interleave(q, 1) * k,
        full_index=_split(plan.full_index, q, k, rows=False),
        part_count=plan.part_count.repeat_interleave(q, 1) * k,
        part_index=_split(plan.part_index, q, k, rows=False),
        part_mask=_split(plan.part_mask, q, k, rows=True),
        masks=masks,
    )


def _split(index: Tensor, q: int, k: int, *, rows: bool) -> Tensor:
    """[U, blocks, most] -> [U, blocks * q, most * k]; rows: numbers count masks, which are split by query parts too."""
    u, blocks, most = index.shape
    part = torch.arange(k, device=index.device, dtype=index.dtype)
    fine = index[:, :, None, :, None] * (q * k if rows else k) + part  # [U, blocks, 1, most, k]
    if rows:
        fine = fine + k * torch.arange(q, device=index.device, dtype=index.dtype)[:, None, None]
    return fine.expand(u, blocks, q, most, k).reshape(u, blocks * q, most * k)
