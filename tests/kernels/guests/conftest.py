"""Stand-ins for the packages of guests: their signatures and conventions, computed in plain torch on the CPU.

Rows without a listed block hold rubbish, as a guest may leave them; keys past the end of the sequence are not seen.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

RUBBISH = 77.0


class BlockSparseTensorsTorch(NamedTuple):
    """The lists of FlashAttention-4."""

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    block_size: tuple[int, int] | None = None


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins where the guests import from."""
    modules: dict[str, dict[str, Any]] = {
        "flash_attn": {},
        "flash_attn.cute": {},
        "flash_attn.cute.interface": {"_flash_attn_fwd": _flash_attn_fwd, "_flash_attn_bwd": _flash_attn_bwd},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": BlockSparseTensorsTorch},
        "cudnn": {},
        "cudnn.block_sparse_attention": {
            "block_sparse_attention_forward": _cudnn_forward,
            "block_sparse_attention_backward": _cudnn_backward,
        },
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)


def _counts(count: Tensor, index: Tensor, blocks: tuple[int, int], sizes: tuple[int, int]) -> Tensor:
    """How often each row sees each column, [b, h, n, m]; rows own the lists."""
    b, h, rows, most = index.shape
    columns = -(-sizes[1] // blocks[1])
    live = torch.arange(most) < count[..., None]
    assert bool((index[live] < columns).all()) and bool((index[live] >= 0).all())
    seen = torch.zeros(b, h, rows, columns)
    seen.scatter_add_(3, torch.where(live, index.long(), 0), live.float())
    return seen.repeat_interleave(blocks[0], 2).repeat_interleave(blocks[1], 3)[:, :, : sizes[0], : sizes[1]]


def _attend(q: Tensor, k: Tensor, v: Tensor, counts: Tensor | float, scale: float) -> tuple[Tensor, Tensor]:
    """All [B, H, N, D]."""
    group = q.shape[1] // k.shape[1]
    s = q.float() @ k.float().repeat_interleave(group, 1).mT * scale + torch.as_tensor(counts).log()
    lse = s.logsumexp(-1)
    empty = lse == -torch.inf
    p = (s - lse.masked_fill(empty, 0)[..., None]).exp()
    out = (p @ v.float().repeat_interleave(group, 1)).masked_fill(empty[..., None], RUBBISH)
    return out.to(q.dtype), lse.masked_fill(empty, RUBBISH)


def _differentiate(
    q: Tensor, k: Tensor, v: Tensor, given: tuple[Tensor, Tensor, Tensor, Tensor], counts: Tensor | float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """given: out, gradient of out, LSE and gradient of LSE of whole rows."""
    out, grad, lse, grad_lse = (t.float() for t in given)
    group, rows = q.shape[1] // k.shape[1], k.shape[1]
    wide_k, wide_v = (t.float().repeat_interleave(group, 1) for t in (k, v))
    s = q.float() @ wide_k.mT * scale + torch.as_tensor(counts).log()
    p = (s - lse[..., None]).exp()
    ds = p * (grad @ wide_v.mT - (out * grad).sum(-1, keepdim=True) + grad_lse[..., None]) * scale
    to_k, to_v = (t.unflatten(1, (rows, group)).sum(2) for t in (ds.mT @ q.float(), p.mT @ grad))
    return (ds @ wide_k).to(q.dtype), to_k.to(k.dtype), to_v.to(v.dtype)


def _turned(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def _flash_attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    block_sparse_tensors: BlockSparseTensorsTorch | None = None,
    return_lse: bool = False,
    pack_gqa: bool | None = None,
) -> tuple[Tensor, Tensor, None, None, None]:
    assert return_lse
    counts: Tensor | float = 1.0
    if block_sparse_tensors is not None:
        t = block_sparse_tensors
        assert pack_gqa is False and t.full_block_cnt is not None and t.full_block_idx is not None and t.block_size
        assert t.full_block_cnt.shape[1] in (1, q.shape[2]) and not t.mask_block_cnt.any()
        assert t.full_block_cnt.shape[2] == -(-q.shape[1] // t.block_size[0])
        counts = _counts(t.full_block_cnt, t.full_block_idx, t.block_size, (q.shape[1], k.shape[1]))
    qt, kt, vt = _turned(q, k, v)
    out, lse = _attend(qt, kt, vt, counts, softmax_scale)
    return out.transpose(1, 2), lse, None, None, None


def _flash_attn_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    block_sparse_tensors: BlockSparseTensorsTorch | None = None,
    dlse: Tensor,
) -> tuple[Tensor, ...]:
    counts: Tensor | float = 1.0
    if block_sparse_tensors is not None:
        t = block_sparse_tensors
        assert t.full_block_cnt is not None and t.full_block_idx is not None and t.block_size
        size = (k.shape[1], q.shape[1])
        counts = _counts(t.full_block_cnt, t.full_block_idx, (t.block_size[1], t.block_size[0]), size).mT
    qt, kt, vt, *given = _turned(q, k, v, out, dout)
    whole = (given[0], given[1], lse, dlse)
    return tuple(_turned(*_differentiate(qt, kt, vt, whole, counts, softmax_scale)))


def _cudnn_counts(q: Tensor, k: Tensor, given: dict[str, Any]) -> Tensor:
    block = given["sparse_block_size"]
    index, nums, sizes = given["q2k_block_index"], given["q2k_block_nums"], given["block_sizes"]
    if nums is None:
        nums = torch.full(index.shape[:3], given["block_sparse_num"], dtype=torch.int32)
    assert index.shape[:3] == nums.shape == (*q.shape[:2], q.shape[2] // block)
    assert q.shape[2] % block == 0 and index.dtype == nums.dtype == torch.int32
    if sizes is None:
        assert k.shape[2] % block == 0
    else:
        assert int(sizes.sum()) == k.shape[2]
    return _counts(nums, index, (block, block), (q.shape[2], k.shape[2]))


def _cudnn_forward(
    q_tensor: Tensor,
    k_tensor: Tensor,
    v_tensor: Tensor,
    *,
    allow_empty_block_nums: bool,
    softmax_scale: float,
    **lists: Any,
) -> dict[str, Tensor]:
    assert allow_empty_block_nums or lists["q2k_block_nums"] is None or bool((lists["q2k_block_nums"] > 0).all())
    out, lse = _attend(q_tensor, k_tensor, v_tensor, _cudnn_counts(q_tensor, k_tensor, lists), softmax_scale)
    return {"o_tensor": out, "lse_tensor": lse}


def _cudnn_backward(
    do_tensor: Tensor,
    q_tensor: Tensor,
    k_tensor: Tensor,
    v_tensor: Tensor,
    o_tensor: Tensor,
    lse_tensor: Tensor,
    *,
    softmax_scale: float,
    **lists: Any,
) -> dict[str, Tensor]:
    counts = _cudnn_counts(q_tensor, k_tensor, lists)
    given = (o_tensor, do_tensor, lse_tensor, torch.zeros_like(lse_tensor))
    found = _differentiate(q_tensor, k_tensor, v_tensor, given, counts, softmax_scale)
    return dict(zip(("dq_tensor", "dk_tensor", "dv_tensor"), found, strict=True))
