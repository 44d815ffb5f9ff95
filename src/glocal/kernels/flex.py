"""FlexAttention (arXiv 2412.05496) from a block plan: our block lists and mask bits as its BlockMask.

Tokens are gathered into plan order first and rows are scattered back. On CUDA the compiled kernel runs and gives out
and LSE. On the CPU its compiled form gives no LSE, so the eager form runs, which holds every query-key pair. The
backward pass is the block-by-block one in plain tensor code, since autograd is off below an operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from glocal.kernels import _blockwise
from glocal.kernels._jobs import Limits
from glocal.kernels.call import Bias, Call, DenseBias, Grads, PlanTensors
from glocal.kernels.capability import Capability, Sizes, installed
from glocal.plan.blockplan import BlockLists

Mod = Callable[..., Tensor]

CAPABILITY = Capability(
    name="flex",
    needs="plan",
    devices=("cpu", "cuda"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    note="FlexAttention, compiled on CUDA, eager and only for small inputs on the CPU; backward in blocks",
    head_dims=Sizes(1, 256),
    value_dims=Sizes(1, 256),
    block_sizes=Sizes(128, multiple=128),
    blocks=((128, 128),),
    dense=False,
    empty=False,
    most_pairs=1 << 24,
    most_pairs_on=("cpu",),
    most_heads=65_535,  # its second grid axis
    deterministic=False,
)

_BACKWARD = Limits(keys=1 << 18, scores=1 << 26)
# Kinds of calls on CUDA for which the stages that torch chooses want more shared memory than the card has: one stage.
_LEAN: set[Any] = set()


def missing(device: str) -> str | None:
    """What this machine lacks."""
    if device == "cuda" and not installed("triton"):
        return "triton is not installed (pip install triton), which compiles FlexAttention"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq]."""
    assert call.plan is not None
    plan = call.plan
    # A value that is not finite must reach the rows that see it and no others: its key becomes NaN, itself 0.
    ill = ~v.isfinite().all(-1, keepdim=True)
    k, v = k.masked_fill(ill, torch.nan), v.masked_fill(ill, 0)
    q_tokens, k_tokens = plan.q_order.long(), plan.kv_order.long()
    if k_tokens.shape[1] not in (1, k.shape[1]):  # every query head has a key order of its own
        k, v = (_by_query_head(t, q.shape[1]) for t in (k, v))
    if q_tokens.shape[1] != 1:
        q_tokens = _by_query_head(q_tokens, q.shape[1])
    # The compiled kernel wants head sizes from 16 on; zeros change nothing.
    ordered = [
        pad(_gather(t, tokens), (0, -t.shape[3] % 16)) for t, tokens in ((q, q_tokens), (k, k_tokens), (v, k_tokens))
    ]
    tokens = (q_tokens, k_tokens if k_tokens.shape[1] in (1, q.shape[1]) else _by_query_head(k_tokens, q.shape[1]))
    table = _table(call, plan, k_tokens, q.device.type)
    out, lse = _run(
        ordered,
        _score_mod(call, tokens),
        _block_mask(call, plan, table, tokens, q.shape[1]),
        call.scale,
        (call.softcap is None, call.segments is None, *map(type, call.bias)),
    )
    empty = (lse == -torch.inf)[..., None]
    return _return_rows(out[..., : v.shape[3]].masked_fill(empty, 0), lse, q_tokens, q.shape[2])


def backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Grads:
    """Gradients through out and LSE."""
    return _blockwise.backward(grad_out, grad_lse, q, k, v, out, lse, call, _BACKWARD)


def _run(
    ordered: list[Tensor], score_mod: Mod, block_mask: Any, scale: float, kinds: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """out and LSE in plan order. kinds: what the functions depend on beside shapes."""
    q, k, v = ordered
    grouped = q.shape[1] != k.shape[1]
    if q.device.type == "cuda":
        kind = (q.dtype, q.shape, k.shape, v.shape, kinds)
        given = (q, k, v, score_mod, block_mask, scale, grouped)
        if kind not in _LEAN:
            try:
                return _compiled(kind)(*given, return_lse=True)
            except RuntimeError as error:
                if "No valid triton configs" not in str(error):
                    raise
                _LEAN.add(kind)
        return _compiled((kind, "lean"))(*given, return_lse=True, kernel_options={"num_stages": 1})
    from torch.nn.attention.flex_attention import flex_attention_hop

    if grouped:
        k, v = (_by_query_head(t, q.shape[1]) for t in (k, v))
    # The public function compiles each new pair of functions even for eager use; the operator below it does not.
    out, lse, _ = flex_attention_hop(q, k, v, score_mod, block_mask.as_tuple(), scale, {"OUTPUT_LOGSUMEXP": True})
    return out, lse * math.log(2)


@lru_cache(maxsize=64)
def _compiled(kind: tuple[Any, ...]) -> Callable[..., Any]:
    """A compiled function of its own for every kind of call: the compiler keeps few variants of one function."""
    from torch.nn.attention.flex_attention import flex_attention

    code = flex_attention.__code__.replace()
    own = FunctionType(code, flex_attention.__globals__, "flex_attention", flex_attention.__defaults__)
    own.__kwdefaults__ = flex_attention.__kwdefaults__
    return torch.compile(own, fullgraph=True)


def _by_query_head(t: Tensor, heads: int) -> Tensor:
    """[B, Hkv, ...] or [B, Hq, ...] -> [B, Hq, ...]."""
    return t.repeat_interleave(heads // t.shape[1], 1)


def _gather(t: Tensor, tokens: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, H, slots, D] in plan order; pads are 0."""
    tokens = tokens.expand(t.shape[0], t.shape[1], -1)[..., None]
    found = t.gather(2, tokens.clamp(min=0).expand(-1, -1, -1, t.shape[3]))
    return found.masked_fill(tokens < 0, 0)


def _return_rows(out: Tensor, lse: Tensor, tokens: Tensor, nq: int) -> tuple[Tensor, Tensor]:
    """Rows from plan order to tokens; queries outside the order get 0 and -inf."""
    tokens = tokens.expand(*lse.shape[:2], -1)
    place = torch.where(tokens < 0, nq, tokens)  # pads go to a row that is cut off
    rows = out.new_zeros(*out.shape[:2], nq + 1, out.shape[3])
    ends = lse.new_full((*lse.shape[:2], nq + 1), -torch.inf)
    rows.scatter_(2, place[..., None].expand(out.shape), out)
    ends.scatter_(2, place, lse)
    return rows[:, :, :nq], ends[:, :, :nq]


def _table(call: Call, plan: PlanTensors, k_tokens: Tensor, device: str) -> Tensor:
    """Mask row of every listed block pair, int32 [U, query blocks, key blocks]; M is a row of ones for full blocks.

    Raises ValueError where a list repeats a key block in a way that this table, or the eager form, cannot count.
    """
    lists, q_blocks, _ = plan.full_index.shape
    full, part = plan.masks.shape[0], -1
    table = torch.full((lists, q_blocks, k_tokens.shape[-1] // call.kv_block), part, device=k_tokens.device).int()
    times = torch.zeros_like(table)
    again = torch.zeros((), dtype=torch.bool, device=table.device)
    for lists in (
        BlockLists(plan.full_count, plan.full_index),
        BlockLists(plan.part_count, plan.part_index, plan.part_mask),
    ):
        u, row, column, rows = lists.entries()
        at = (u, row, column)
        value = torch.full_like(at[0], full).int() if rows is None else rows.int()
        times.index_put_(at, torch.ones_like(value), accumulate=True)
        table.index_put_(at, value)
        again = again | (table[at] != value).any()
    repeated = again | (times > 1).any() if device == "cpu" else again
    if bool(repeated):
        raise ValueError(
            "backend='flex': a list of this plan repeats a key block, which FlexAttention visits once; "
            "legal: lists without repeats, or another backend."
        )
    return table


def _block_mask(call: Call, plan: PlanTensors, table: Tensor, tokens: tuple[Tensor, Tensor], heads: int) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    q_tokens, k_tokens = tokens
    # What hides pairs at run time hides them in full blocks too, so all blocks go through the mask then.
    holes = (k_tokens < 0).reshape(*k_tokens.shape[:2], -1, call.kv_block).any(-1)
    whole = table == plan.masks.shape[0]
    check_all = call.segments is not None or bool((whole.any(0).any(0) & holes.any(0).any(0)).any())
    part = (table >= 0) if check_all else (table >= 0) & ~whole
    owner = plan.owner.long() if plan.owner.shape[1] == 1 else _by_query_head(plan.owner.long(), heads)
    counts_part, index_part = (t[owner] for t in _listed(part))
    counts_full, index_full = (t[owner] for t in _listed(whole & ~part))
    masks = torch.cat([plan.masks, plan.masks.new_full((1, *plan.masks.shape[1:]), -1)])
    return BlockMask.from_kv_blocks(
        counts_part, index_part, counts_full, index_full,
        BLOCK_SIZE=(call.q_block, call.kv_block),
        mask_mod=_mask_mod(call, masks, table, owner, tokens),
        seq_lengths=(q_tokens.shape[-1], k_tokens.shape[-1]),
        compute_q_blocks=False,
    )  # fmt: skip


def _listed(picked: Tensor) -> tuple[Tensor, Tensor]:
    """Bool [U, query blocks, key blocks] as counts and lists as wide as there are key blocks."""
    order = (~picked).int().argsort(dim=-1, stable=True).int()
    return picked.sum(-1, dtype=torch.int32), order


def _at(t: Tensor, b: Tensor, h: Tensor) -> Any:
    """Index of sample and head into a tensor whose leading axes may be 1."""
    return (b if t.shape[0] > 1 else 0, h if t.shape[1] > 1 else 0)


def _mask_mod(call: Call, masks: Tensor, table: Tensor, owner: Tensor, tokens: tuple[Tensor, Tensor]) -> Mod:
    q_tokens, k_tokens = tokens
    q_block, kv_block, segments = call.q_block, call.kv_block, call.segments

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = table[owner[_at(owner, b, h)], i // q_block, j // kv_block]
        place = j % kv_block
        # Pairs in blocks that no list holds are looked up by the eager form alone; they count as hidden.
        word = masks[row.clamp(min=0), i % q_block, place // 32]
        key = k_tokens[(*_at(k_tokens, b, h), j)]
        found = (((word >> (place % 32)) & 1) == 1) & (row >= 0) & (key >= 0)
        if segments is not None:
            query = q_tokens[(*_at(q_tokens, b, h), i)]
            mine, theirs = segments[0][b, query.clamp(min=0)], segments[1][b, key.clamp(min=0)]
            found = found & (mine == theirs) & (mine >= 0)
        return found

    return seen


def _score_mod(call: Call, tokens: tuple[Tensor, Tensor]) -> Mod:
    softcap, terms = call.softcap, [_term(bias) for bias in call.bias]
    q_tokens, k_tokens = tokens

    def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        query = q_tokens[(*_at(q_tokens, b, h), i)].clamp(min=0)
        key = k_tokens[(*_at(k_tokens, b, h), j)].clamp(min=0)
        for term in terms:
            score = score + term(b, h, query, key)
        return score

    return change


def _term(bias: Bias) -> Mod:
    """A bias as a function of sample, head, query token and key token."""
    if isinstance(bias, DenseBias):
        values = bias.values

        def dense(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            query_at, key_at = (t if n > 1 else 0 for t, n in zip((query, key), values.shape[2:], strict=True))
            return values[(*_at(values, b, h), query_at, key_at)]

        return dense
    table, q_code, k_code = bias.parts()

    def looked_up(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = k_code[key] - q_code[query]
        inside = (place >= 0) & (place < table.shape[1])
        return torch.where(inside, table[h if table.shape[0] > 1 else 0, torch.where(inside, place, 0)], 0.0)

    return looked_up
