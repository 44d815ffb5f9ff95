"""Calls of the quantised kernel of warp groups: descriptors of tiles, one program a multiprocessor."""

from __future__ import annotations

from math import log2
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from glocal.kernels.call import Call
from glocal.kernels.gluon.masks import by_query
from glocal.kernels.quant import WEIGHT
from glocal.kernels.quantised.hopper import hopper_kernel
from glocal.kernels.quantised.launch import Rounded, Tuning, plan_row
from glocal.kernels.quantised.work import Work

_TYPES = {
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
}
# By query block: programs of a multiprocessor, and registers of a thread before the warps share them out.
_SHARES = {64: (2, 128), 128: (1, 168)}


def warp_groups(given: Rounded, like: Tensor, call: Call, work: Work, tuning: Tuning) -> tuple[Tensor, Tensor]:
    """out [B, Hq, rows, wide Dv] and lse [B, Hq, rows] by slot. like: q, for its type and heads."""
    b, h = like.shape[:2]
    plan, quant, d = work.plan, work.quant, given.q.shape[3]
    by_channel = quant.pv != "none"
    size = given.v.shape[2] if by_channel else given.v.shape[3]
    out = torch.empty(b, h, work.rows, size, dtype=like.dtype, device=like.device)
    lse = torch.empty(b, h, work.rows, dtype=torch.float32, device=like.device)
    blocks = work.rows // call.q_block
    tiles = b * h * blocks
    if tiles == 0:
        return out, lse
    each, registers = _SHARES[call.q_block]
    programs = min(tiles, each * torch.cuda.get_device_properties(like.device).multi_processor_count)
    box = (size, call.kv_block) if by_channel else (call.kv_block, size)
    full = (plan.full_count, plan.full_index, plan.full_index.shape[-1])
    part = (plan.part_count, plan.part_index, plan.part_index.shape[-1], plan.part_mask)
    kernel: Any = hopper_kernel
    kernel[(programs,)](
        _tiles(given.q, 64, d), _tiles(given.k, call.kv_block, d), _tiles(given.v, *box), (out, lse),
        (plan_row(plan.owner, h), full, part, plan.masks.shape[0]), by_query(plan.masks, call.kv_block),
        (given.q_scale, given.k_scale, given.v_scale, float(call.scale)),
        (h, blocks, h // given.k.shape[1], work.columns, tiles),
        BQ=call.q_block, BK=call.kv_block, STAGES=tuning.stages,
        EXTRA=(*quant.group, quant.qk == "int8", by_channel, log2(WEIGHT[quant.pv]), work.masked, tuning.emulate),
        REGISTERS=240, num_warps=4, maxnreg=registers,
    )  # fmt: skip
    return out, lse


def _tiles(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles [rows, columns] of t [..., D] by row."""
    layout: Any = gl.NVMMASharedLayout.get_default_for([rows, columns], _TYPES[t.dtype])
    return TensorDescriptor.from_tensor(t.view(-1, t.shape[-1]), [rows, columns], layout)
