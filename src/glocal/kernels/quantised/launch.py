"""Calls of the quantised kernels: rounding fused with the plan's order, then attention, then rows back to tokens."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from math import log2
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from triton.tools.tensor_descriptor import TensorDescriptor

from glocal.kernels.call import Call
from glocal.kernels.quant import LARGEST, WEIGHT
from glocal.kernels.quantised.attend import attend_kernel
from glocal.kernels.quantised.emulate import unsmoothed
from glocal.kernels.quantised.quantise import columns_kernel, ordered_kernel, rounded_kernel, turned_kernel
from glocal.kernels.quantised.work import Work
from glocal.kernels.sides import Side

_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_STEPS = 16  # tiles of a program that looks at channels


@dataclass(frozen=True)
class Tuning:
    """Query rows of a program, its warps, and stages of its loop. hopper: the kernel of warp groups, where it fits;
    emulate: of so many exponentials it leaves one to the multipliers, 0 for none.
    """

    rows: int = 64
    warps: int = 4
    stages: int = 2
    hopper: bool = False
    emulate: int = 0


DEFAULT = Tuning()
HOPPER = Tuning(rows=128, stages=3, hopper=True)


@dataclass(frozen=True, eq=False)
class Rounded:
    """What the attention kernel reads. values: by channel in 8 bits, or in plan order; mean: of the keys, or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor
    mean: Tensor | None


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call, work: Work, tuning: Tuning = DEFAULT) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq].

    tuning: None for the kernel of warp groups where it was measured to be the faster one, else the Triton kernel.
    """
    if tuning is None:
        tuning = HOPPER if q.is_cuda and measured(q, v, call, work) else DEFAULT
    if tuning.hopper and not fits(q, v, call, work):
        raise ValueError(
            f"{tuning} does not take this call; legal: Hopper, blocks of 64 or 128 whose keys share a scale, head "
            "sizes of 64 or 128, weights in fp8 or 16 bits, no pads among the keys."
        )
    where: Any = torch.cuda.device(q.device) if q.is_cuda else nullcontext()
    with where:
        given = quantise(q, k, v, work)
        if tuning.hopper:
            from glocal.kernels.quantised.groups import warp_groups

            out, lse = warp_groups(given, q, call, work, tuning)
        else:
            out, lse = attended(given, q, call, work, tuning)
    out, lse = work.returned(out[..., : v.shape[3]], lse)
    return out, unsmoothed(lse, q, given.mean, call.scale)


def quantise(q: Tensor, k: Tensor, v: Tensor, work: Work) -> Rounded:
    """Everything in plan order, rounded."""
    quant = work.quant
    mean = _columns(k, True) / max(1, k.shape[2]) if quant.smooth_k else None  # [B, Hkv, D]
    q8, q_scale = _rounded(q, work.for_heads(q.shape[1]), work.rows, quant.group[0], quant.qk, None)
    k8, k_scale = _rounded(k, work.k, work.columns, quant.group[1], quant.qk, mean)
    v8, v_scale = _values(v, work)
    return Rounded(q8, k8, v8, q_scale, k_scale, v_scale, None if mean is None else mean[:, :, None])


def attended(given: Rounded, like: Tensor, call: Call, work: Work, tuning: Tuning) -> tuple[Tensor, Tensor]:
    """out [B, Hq, rows, wide Dv] and lse [B, Hq, rows] by slot. like: q, for its type and heads."""
    b, h = like.shape[:2]
    plan, quant = work.plan, work.quant
    size = given.v.shape[2] if quant.pv != "none" else given.v.shape[3]
    out = torch.empty(b, h, work.rows, size, dtype=like.dtype, device=like.device)
    lse = torch.empty(b, h, work.rows, dtype=torch.float32, device=like.device)
    rows = min(tuning.rows, call.q_block)
    tiles = work.rows // rows
    live = None if work.live is None else plan_row(work.live.to(torch.int8), h)
    kernel: Any = attend_kernel
    if lse.numel():
        d = given.q.shape[3]
        keys = TensorDescriptor.from_tensor(given.k.view(-1, d), [call.kv_block, d])
        box = [call.kv_block, size] if quant.pv == "none" else [size, call.kv_block]
        values = TensorDescriptor.from_tensor(given.v.view(-1, given.v.shape[3]), box)
        kernel[(b * h * tiles,)](
            given.q, keys, values, given.q_scale, given.k_scale, given.v_scale, live, out, lse, plan_row(plan.owner, h),
            (plan.full_count, plan.full_index, plan.full_index.shape[-1]),
            (plan.part_count, plan.part_index, plan.part_index.shape[-1], plan.part_mask), plan.masks,
            float(call.scale), h, h // given.k.shape[1], tiles, work.rows, work.columns, call.q_block // rows,
            D=d, DV=size, BQ=rows, BK=call.kv_block, Q_GROUP=quant.group[0], K_GROUP=quant.group[1],
            QK=quant.qk, PV=quant.pv, SHIFT=log2(WEIGHT[quant.pv]), STAGES=tuning.stages,
            num_warps=tuning.warps,
        )  # fmt: skip
    return out, lse


def measured(q: Tensor, v: Tensor, call: Call, work: Work) -> bool:
    """Whether results/quantised.csv has the kernel of warp groups ahead for such a call."""
    whole = (call.q_block, call.kv_block, q.shape[3], v.shape[3]) == (128,) * 4
    return whole and work.quant.pv == "none" and work.quant.qk == "int8" and fits(q, v, call, work)


def fits(q: Tensor, v: Tensor, call: Call, work: Work) -> bool:
    """Whether the kernel of warp groups takes the call."""
    quant, sizes = work.quant, (64, 128)
    return (
        torch.cuda.get_device_capability(q.device) == (9, 0)
        and quant.pv != "int8"
        and (quant.pv == "fp8" or v.dtype != torch.float32)
        and call.q_block in sizes
        and call.kv_block in sizes
        and quant.group[1] == call.kv_block
        and padded(q.shape[3]) in sizes
        and padded(v.shape[3]) in sizes
        and work.live is None
    )


def _rounded(x: Tensor, side: Side, room: int, group: int, kind: str, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    b, h, n, d = x.shape
    wide = padded(d)
    out = torch.empty(b, h, room, wide, dtype=_TYPES[kind], device=x.device)
    scale = torch.empty(b, h, room // group, dtype=torch.float32, device=x.device)
    size = max(group, 64)
    tiles = -(-room // size)
    kernel: Any = rounded_kernel
    if out.numel():
        kernel[(b * h * tiles,)](
            (x, *x.stride()), _order(side), mean, out, scale, h, side.slots, n, room, tiles,
            D=d, WD=wide, BN=size, GROUP=group, LARGEST=LARGEST[kind], INT=kind == "int8",
            num_warps=_warps(size * wide),
        )  # fmt: skip
    return out, scale


def _values(v: Tensor, work: Work) -> tuple[Tensor, Tensor]:
    b, h, n, d = v.shape
    wide, kind, side, room = padded(d), work.quant.pv, work.k, work.columns
    one = torch.ones(1, dtype=torch.float32, device=v.device)
    if kind == "none":
        if side.tokens is None and room == n and wide == d:
            return v.contiguous(), one
        out = torch.empty(b, h, room, wide, dtype=v.dtype, device=v.device)
        tiles = -(-room // 64)
        kernel: Any = ordered_kernel
        if out.numel():
            kernel[(b * h * tiles,)](
                (v, *v.stride()),
                _order(side),
                out,
                h,
                side.slots,
                n,
                room,
                tiles,
                DV=d,
                WDV=wide,
                BN=64,
                num_warps=_warps(64 * wide),
            )
        return out, one
    scale = _columns(v, False).clamp(min=1e-7) / LARGEST[kind]  # [B, H, Dv]
    out = torch.empty(b, h, wide, room, dtype=_TYPES[kind], device=v.device)
    tiles = -(-room // 64)
    kernel = turned_kernel
    if out.numel():
        kernel[(b * h * tiles,)](
            (v, *v.stride()), _order(side), scale, out, h, side.slots, n, room, tiles,
            DV=d, WDV=wide, BN=64, LARGEST=LARGEST[kind], INT=kind == "int8", num_warps=_warps(64 * wide),
        )  # fmt: skip
    return out, pad(scale, (0, wide - d))


def _columns(x: Tensor, total: bool) -> Tensor:
    """Sum or largest magnitude of each channel over all tokens, float32 [B, H, D]."""
    b, h, n, d = x.shape
    tiles = max(1, -(-n // (64 * _STEPS)))
    out = torch.empty(b, h, tiles, d, dtype=torch.float32, device=x.device)
    kernel: Any = columns_kernel
    if out.numel():
        kernel[(b * h * tiles,)](
            (x, *x.stride()),
            out,
            h,
            n,
            tiles,
            _STEPS,
            D=d,
            WD=padded(d),
            BN=64,
            SUM=total,
            num_warps=_warps(64 * padded(d)),
        )
    return out.sum(2) if total else out.amax(2)


def _warps(entries: int) -> int:
    """Warps for a tile of so many float32 entries: 32 for each thread, as far as warps go."""
    return max(1, min(16, entries // 1024))


def padded(size: int) -> int:
    """A head size as 8-bit products take it: a power of two from 32 on."""
    return max(32, 1 << (size - 1).bit_length())


def _order(side: Side) -> tuple[Any, ...]:
    t = side.tokens
    if t is None:
        return (None, 0, 0)
    return (t, t.stride(0) if t.shape[0] > 1 else 0, t.stride(1) if t.shape[1] > 1 else 0)


def plan_row(t: Tensor, heads: int) -> tuple[Any, ...]:
    """A plan tensor [batch|1, heads|1, ...] for `row_of`."""
    samples, own = t.shape[0], t.shape[1]
    return (t.contiguous(), t.stride(0) if samples > 1 else 0, t.stride(1) if own > 1 else 0, heads // own)
