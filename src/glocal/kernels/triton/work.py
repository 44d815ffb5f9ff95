"""A call as the kernels take it: strides and sizes as tuples, biases and documents in slot order, rows in boxes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from triton.tools.tensor_descriptor import TensorDescriptor

from glocal.kernels import _launch
from glocal.kernels._launch import on_device as on_device
from glocal.kernels._seen import Seen
from glocal.kernels.call import Call, DenseBias, PlanTensors, TableBias
from glocal.kernels.triton import defaults
from glocal.kernels.triton.lists import check
from glocal.kernels.triton.ordered import ordered_keys_kernel
from glocal.plan.facts import OrderFacts, order_facts, worth_a_look

_SMALL = 1 << 24  # codes of tables and canvases below this fit into 32 bits with room to spare
_MOST_ROWS = 1 << 31
_MOST_KINDS = 16
# A plan's tensors, and the rest of its Work for each kind of call without tensors beside the plan.
_PREPARED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def may_look(lists: Tensor) -> bool:
    """Whether what lists hold may be read on the host: they belong to more than one call, and no graph is captured."""
    return worth_a_look(lists) and not (lists.is_cuda and torch.cuda.is_current_stream_capturing())


@dataclass(frozen=True, eq=False)
class Work:
    """plan: contiguous int32. score: the tuple of `tile.py`. sizes: constants of every kernel.

    key_heads: heads of k and v in slot order: as many as k has or, where each query head has its own key order, as q.
    q_facts, kv_facts: what is known of the orders. masked: whether the plan has partial blocks. notes: what is kept for
    calls of the same kind with the same plan.
    """

    call: Call
    plan: PlanTensors
    batch: int
    heads: int
    key_heads: int
    score: tuple[Any, ...]
    sizes: dict[str, Any]
    q_facts: OrderFacts
    kv_facts: OrderFacts
    notes: dict[Any, Any] = field(default_factory=dict)

    def tile(self, part: defaults.Part, itemsize: int) -> dict[str, int]:
        """Tile, warps and stages of a kernel."""
        width = max(self.sizes["WD"], self.sizes["WDV"])
        blocks, memory = (self.call.q_block, self.call.kv_block), _shared_memory(self.plan.owner.device)
        found = defaults.tuning(part, width, itemsize, blocks, masked=self.masked, memory=memory)
        return {"BM": found.queries, "BN": found.keys, "num_warps": found.warps, "num_stages": found.stages}

    def row(self, t: Tensor) -> tuple[Any, ...]:
        """A plan tensor [batch|1, heads|1, ...] for `row_of`."""
        return plan_row(t, self.heads)

    def noted(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned at the first call of this kind; nothing is kept while a CUDA graph is captured.

        It must not hold the lists of full blocks, by which all this is kept.
        """
        if name in self.notes:
            return self.notes[name]
        found = make()
        if not (self.plan.owner.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.notes[name] = found
        return found

    @property
    def masked(self) -> bool:
        return self.plan.part_index.shape[-1] > 0

    @property
    def plain(self) -> bool:
        """Every pair of a listed block counts, so a bad row may be multiplied with anything."""
        return not (self.masked or self.kv_facts.holes or any(t is not None for t in self.score[2:5]))

    @property
    def q_room(self) -> int:
        return self.plan.q_order.shape[-1]

    @property
    def room(self) -> int:
        return self.plan.kv_order.shape[-1]

    @property
    def q_blocks(self) -> int:
        return self.q_room // self.call.q_block

    @property
    def kv_blocks(self) -> int:
        return self.room // self.call.kv_block

    def keys(self, k: Tensor, v: Tensor, fill: float) -> tuple[Tensor, Tensor]:
        """k and v in slot order, [B, key heads, room, padded D], as they are where they lie so already."""
        if self.kv_facts.identity and self.room == k.shape[2] and self.plain and boxed(k) and boxed(v):
            return k, v
        return self.copied(k, v, self.plan.kv_order, fill)

    def copied(
        self, k: Tensor, v: Tensor, order: Tensor, fill: float, when: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """k and v in the order of `order`, bad rows cleaned: keys become `fill`, values 0.

        when: int32 [1] on the device; where it holds 0 the copies are left as they come.
        """
        b, _, _, d = k.shape
        room, dv = order.shape[-1], v.shape[3]
        to_k, to_v = (t.new_empty(b, self.key_heads, room, box_width(t)) for t in (k, v))
        tiles = -(-room // defaults.ROWS)
        step = self.key_heads // k.shape[1]
        start(
            ordered_keys_kernel, b * self.key_heads * tiles,
            strided(k), strided(v), to_k, to_v, self.row(order), self.key_heads, step, self.heads // self.key_heads,
            room, tiles, fill, when,
            D=d, DV=dv, PD=to_k.shape[3], PDV=to_v.shape[3], WD=self.sizes["WD"], WDV=self.sizes["WDV"],
            BM=defaults.ROWS,
        )  # fmt: skip
        return to_k, to_v


def prepare(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Work:
    """Check the plan and put a call into the form of the kernels; what it finds is kept for calls of the same kind."""
    assert call.plan is not None
    tensors = tuple(getattr(call.plan, name) for name in call.plan.__dataclass_fields__)
    kind = None
    if not call.bias and call.segments is None:
        kind = (q.shape, k.shape, v.shape, q.dtype, call.scale, call.softcap, call.q_block, call.kv_block)
        known = _PREPARED.get(call.plan.full_index)
        if known is not None and kind in known[1] and known[0].still(tensors):
            return Work(call, call.plan, *known[1][kind])
    check(call.plan, (call.q_block, call.kv_block))
    converted = [_int(t) for t in tensors]
    plan = PlanTensors(*converted)
    heads, own = q.shape[1], plan.kv_order.shape[1]
    for name, rows in (("queries", q.shape[0] * heads * plan.q_order.shape[-1]),
                       ("keys", q.shape[0] * heads * plan.kv_order.shape[-1])):  # fmt: skip
        if rows >= _MOST_ROWS:
            raise ValueError(
                f"backend={call.backend!r}: {rows:,} rows of {name} in plan order; legal: below {_MOST_ROWS:,}."
            )
    sizes = {
        "D": q.shape[3],
        "DV": v.shape[3],
        "WD": defaults.padded(q.shape[3]),
        "WDV": defaults.padded(v.shape[3]),
        "QB": call.q_block,
        "KB": call.kv_block,
        "PRECISION": defaults.FLOAT32_PRECISION if q.dtype == torch.float32 else "tf32",
    }
    found = (
        q.shape[0],
        heads,
        k.shape[1] if own in (1, k.shape[1]) else heads,
        _score(q, k, call, plan),
        sizes,
        order_facts(plan.q_order, q.shape[2]),
        order_facts(plan.kv_order, k.shape[2]),
        {},
    )
    looked = not (q.is_cuda and torch.cuda.is_current_stream_capturing())  # then all that can be known of orders is
    if looked and kind is not None and all(a is b for a, b in zip(tensors, converted, strict=True)):
        known = _PREPARED.get(call.plan.full_index)
        if known is None or len(known[1]) >= _MOST_KINDS or not known[0].still(tensors):
            known = _PREPARED[call.plan.full_index] = (Seen.of(tensors), {})
        known[1][kind] = found
    return Work(call, plan, *found)


def _int(t: Tensor) -> Tensor:
    return t if t.dtype == torch.int32 and t.is_contiguous() else t.int().contiguous()


def _score(q: Tensor, k: Tensor, call: Call, plan: PlanTensors) -> tuple[Any, ...]:
    """The kernels read one dense and one table bias: several dense ones are added up, further tables written out."""
    heads, shape = q.shape[1], (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    tables = [b for b in call.bias if isinstance(b, TableBias)]
    dense = [b.values for b in call.bias if isinstance(b, DenseBias)] + [_written_out(t) for t in tables[1:]]
    values = dense[0] if dense else None
    for more in dense[1:]:
        values = more.float() if values is None else values.float() + more.float()
    tokens = plan_row(plan.q_order, heads), plan_row(plan.kv_order, heads)
    table = None
    if tables:
        t = tables[0]
        stride = t.table.shape[1] if t.table.shape[0] > 1 else 0
        small = max(t.table.shape[1], q.shape[2], k.shape[2]) < _SMALL
        codes = (
            plan_row(_code(code, order, rest, small), heads)
            for code, order, rest in ((t.q_code, plan.q_order, 0), (t.k_code, plan.kv_order, -1))
        )
        table = (t.table.contiguous(), stride, t.table.shape[1], *codes)
    segments = None
    if call.segments is not None:
        sides = zip(call.segments, (plan.q_order, plan.kv_order), (-1, -2), strict=True)
        segments = tuple(plan_row(_document(s, order, rest), heads) for s, order, rest in sides)
    plain = call.softcap is None and values is None and table is None
    return (
        float(call.scale),
        None if call.softcap is None else float(call.softcap),
        None if values is None else (values, *values.expand(shape).stride(), *tokens),
        table,
        segments,
        1 if plain and call.scale <= 0 else None,
    )


def _code(code: Tensor, order: Tensor, rest: int, small: bool) -> Tensor:
    """Codes by slot, like `order`; of 32 bits where all that count are small."""
    if small:
        code = code.clamp(-(1 << 29), 1 << 29).int()
    return torch.where(order < 0, rest, code[order.clamp(min=0).long()])


def _document(numbers: Tensor, order: Tensor, rest: int) -> Tensor:
    """Document numbers [B, N] by slot, [B, order heads, room]; pads have a number that nobody has."""
    samples = max(numbers.shape[0], order.shape[0])
    table = numbers[:, None].expand(samples, order.shape[1], -1)
    order = order.expand(samples, -1, -1)
    return torch.where(order < 0, rest, table.gather(2, order.clamp(min=0).long())).int().contiguous()


def _written_out(bias: TableBias) -> Tensor:
    """A table as a dense bias, [1, H|1, Nq, Nk]."""
    place = bias.k_code[None, :] - bias.q_code[:, None]
    inside = (place >= 0) & (place < bias.table.shape[1])
    return torch.where(inside, bias.table[:, torch.where(inside, place, 0)], 0)[None]


def boxed(t: Tensor) -> bool:
    """Whether [B, H, N, D] is one matrix that a descriptor can read: contiguous, rows and start on 16 bytes."""
    return t.is_contiguous() and t.shape[3] == box_width(t) and t.data_ptr() % 16 == 0


def box_width(t: Tensor) -> int:
    """The head size rounded up to 16 bytes."""
    step = 16 // t.element_size()
    return -(-t.shape[3] // step) * step


def box(t: Tensor, rows: int, width: int) -> Any:
    """Descriptor of boxes [rows, width] over all rows of [B, H, N, D]."""
    flat = t.reshape(-1, t.shape[3])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, width])


@lru_cache(maxsize=64)
def _shared_memory(device: torch.device) -> int | None:
    """Bytes of shared memory that a program can have on the card; None where there is no card."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def strided(t: Tensor) -> tuple[Any, ...]:
    """A tensor for `head_of` and `rows`."""
    return (t, *t.stride())


def plan_row(t: Tensor, heads: int) -> tuple[Any, ...]:
    """A tensor [batch|1, heads|1, ...] for `row_of`."""
    samples, own = t.shape[0], t.shape[1]
    return (t, t.stride(0) if samples > 1 else 0, t.stride(1) if own > 1 else 0, heads // own)


def start(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """All programs lie on the first axis of the grid, which counts to 2^31."""
    _launch.start(kernel, (programs,), *args, **constants)
