"""The kernels of Hopper run by threads on the CPU, for their arithmetic of lists, rings and barriers.

Gluon has no interpreter. Here the text of a kernel runs as Python: tiles are torch tensors, each group of warps is a
thread, barriers count arrivals and bytes, copies and products are done at once. A wait that nothing ends is an error.
What the hardware alone can show (fences, when products read their operands) is not seen here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import log, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glocal.kernels.gluon.backward_tile import share
from glocal.kernels.gluon.boxes import BITS

LOG2E = 1.4426950408889634
SECONDS = 120.0  # after which a wait counts as one for ever


class Number(int):
    """A scalar of a kernel."""

    def to(self, _: object) -> Number:
        return self

    def __eq__(self, other: object) -> Any:
        return Number(int.__eq__(self, other) is True)

    def __ne__(self, other: object) -> Any:
        return Number(int.__eq__(self, other) is not True)

    __hash__ = int.__hash__


def _operator(name: str) -> None:
    usual = getattr(int, name)

    def applied(self: int, other: Any) -> Any:
        return Number(usual(int(self), int(other))) if isinstance(other, int) else NotImplemented

    setattr(Number, name, applied)


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift"):
    _operator(f"__{_name}__")
    _operator(f"__r{_name}__")


class Pointer:
    """Into the memory of a tensor."""

    def __init__(self, t: Tensor, at: int = 0) -> None:
        assert t.is_contiguous()
        self.memory, self.at = t.detach().view(-1), at

    def __add__(self, steps: int) -> Pointer:
        return Pointer(self.memory, self.at + int(steps))


class Tiles:
    """Shared memory; it starts as NaN."""

    def __init__(self, t: Tensor) -> None:
        self.t, self.dtype, self.shape = t, t.dtype, t.shape

    def index(self, i: int) -> Tiles:
        return Tiles(self.t[int(i)])

    def reshape(self, shape: list[int]) -> Tiles:
        return Tiles(self.t.view(*shape))

    def permute(self, axes: tuple[int, ...]) -> Tiles:
        return Tiles(self.t.permute(*axes))

    def slice(self, start: int, size: int, axis: int) -> Tiles:
        return Tiles(self.t.narrow(axis, int(start), size))

    def load(self, _: object) -> Tensor:
        return self.t.clone()

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], _: object) -> Pieces:
        slots, rows, columns = shape
        assert dtype == self.dtype
        return Pieces(self.t.view(slots, -1, rows, min(columns, 64)))

    def store(self, values: Tensor) -> None:
        assert values.shape == self.t.shape
        self.t.copy_(values)


class Pieces(Tiles):
    """Slots of tiles [rows, columns], in memory columns of 64 after one another."""

    def index(self, i: int) -> Tiles:
        return Tiles(self.t[int(i)].transpose(0, 1).flatten(1))


class Barrier:
    """mbarrier: a phase ends when so many have arrived and all bytes that were expected have come."""

    def __init__(self) -> None:
        self.changed, self.count, self.pending, self.bytes, self.phases = threading.Condition(), 0, 0, 0, 0

    def add(self, arrivals: int, size: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += size
            assert self.pending >= 0
            if self.pending == 0 and self.bytes == 0:
                self.phases, self.pending = self.phases + 1, self.count
                self.changed.notify_all()

    def wait(self, phase: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phases % 2 != phase, SECONDS):
                raise RuntimeError(
                    f"a wait for phase {phase} has no end: {self.pending} and {self.bytes} bytes missing"
                )


class Barriers:
    def __init__(self, n: int) -> None:
        self.each = [Barrier() for _ in range(n)]

    def index(self, i: int) -> Barrier:
        return self.each[int(i)]


class Described:
    """A TMA descriptor: boxes of a tensor, of which entries outside read as 0 and are not written."""

    layout = None

    def __init__(self, d: Any) -> None:
        self.t = d.base.detach().as_strided(list(d.shape), list(d.strides))
        self.box, self.dtype = list(d.block_shape), self.t.dtype
        self.block_type = self
        self.shape, self.numel = self.box, prod(self.box)
        self.nbytes = self.numel * self.t.element_size()

    def inside(self, place: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of a box that exists, in the tensor and in the box."""
        spans = [
            (max(a, 0), max(0, min(a + n, size)), a)
            for a, n, size in zip(map(int, place), self.box, self.t.shape, strict=True)
        ]
        spans = [(lo, max(lo, hi), a) if lo < hi else (0, 0, 0) for lo, hi, a in spans]
        return tuple(slice(lo, hi) for lo, hi, _ in spans), tuple(slice(lo - a, hi - a) for lo, hi, a in spans)


class mbarrier:
    MBarrierLayout = staticmethod(lambda: Barrier)

    @staticmethod
    def init(bar: Barrier, count: int) -> None:
        bar.count = bar.pending = count

    @staticmethod
    def wait(bar: Barrier, phase: int) -> None:
        bar.wait(int(phase))

    @staticmethod
    def arrive(bar: Barrier, count: int = 1) -> None:
        bar.add(count, 0)

    @staticmethod
    def expect(bar: Barrier, size: int) -> None:
        bar.add(1, size)


class tma:
    store_wait = staticmethod(lambda _: None)

    @staticmethod
    def async_copy_global_to_shared(d: Described, place: list[int], bar: Barrier, to: Tiles) -> None:
        found = torch.zeros(d.box, dtype=d.dtype)
        there, here = d.inside(place)
        found[here] = d.t[there]
        to.t.copy_(found.view(to.t.shape))
        bar.add(0, -found.numel() * found.element_size())


class gl:
    float32, int32, int64 = torch.float32, torch.int32, torch.int64
    program = programs = Number(0)
    static_range = range
    DotOperandLayout = SliceLayout = BlockedLayout = staticmethod(lambda *_: None)
    thread_barrier = static_assert = staticmethod(lambda *_: None)
    exp2, abs = staticmethod(torch.exp2), staticmethod(torch.abs)
    max = staticmethod(torch.amax)
    expand_dims = staticmethod(torch.unsqueeze)
    convert_layout = staticmethod(lambda t, _: t)
    zeros = staticmethod(lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype))
    full = staticmethod(lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype))
    to_tensor = staticmethod(Number)

    class NVMMASharedLayout:
        get_default_for = staticmethod(lambda *_: None)

    @staticmethod
    def program_id(_: int) -> Number:
        return gl.program

    @staticmethod
    def num_programs(_: int) -> Number:
        return gl.programs

    @staticmethod
    def load(at: Pointer, mask: Any = True, other: int = 0) -> Number:
        return Number(at.memory[at.at]) if mask else Number(other)

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        return torch.where(condition, a, b) if isinstance(condition, Tensor) else (a if condition else b)

    @staticmethod
    def maximum(a: Any, b: Any) -> Any:
        return torch.maximum(a, b) if isinstance(a, Tensor) else Number(max(a, b))

    @staticmethod
    def minimum(a: int, b: int) -> Number:
        return Number(min(a, b))

    @staticmethod
    def allocate_shared_memory(dtype: torch.dtype, shape: list[int], layout: object) -> Any:
        if layout is Barrier:
            return Barrier() if len(shape) == 1 else Barriers(shape[0])
        return Tiles(torch.full(shape, torch.nan, dtype=dtype))

    @staticmethod
    def warp_specialize(parts: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: object) -> None:
        failed: list[BaseException] = []

        def work(part: Callable[..., None], given: tuple[Any, ...]) -> None:
            try:
                part(*given)
            except BaseException as problem:
                failed.append(problem)

        threads = [threading.Thread(target=work, args=part, daemon=True) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]


_ADDING = threading.Lock()


def _add(sums: Pointer, row: int, column: int, values: Tensor, width: int) -> None:
    r, c = (torch.arange(n) for n in values.shape)
    down = r // 16 * (16 * width) + r % 8 * 16 + r // 8 % 2 * 2
    place = down[:, None] + (c // 8 * 128 + c % 8 // 2 * 4 + c % 2)
    with _ADDING:
        sums.memory[sums.at + int(row) * width + column * 16 + place] += values


def _product(a: Any, b: Any, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Tensor:
    a, b = (x.t if isinstance(x, Tiles) else x for x in (a, b))
    found = a.float() @ b.float()
    assert found.shape == acc.shape
    return acc + found if use_acc else found


def _load_words(table: Pointer, mask: int, first: int, block: int, rows: int) -> Tensor:
    start = table.at + (int(mask) * block + first) * 4
    return table.memory[start : start + rows * 4].view(rows, 4).clone()


def _hide(p: Tensor, word: Tensor, rows: int, columns: int, other: float = 0.0) -> Tensor:
    column = torch.arange(columns)
    return torch.where(word[:, column % 8 // 2] >> (column // 8 * 2 + column % 2) & 1 != 0, p, other)


def _store(
    to: tuple[Any, ...], order: tuple[Any, ...], values: Tensor, first: int, b: int, h: int, rows: int, d: int,
    direct: bool,
) -> None:  # fmt: skip
    out, most, columns = to
    row = first + torch.arange(rows)
    if direct:
        row = order[0].memory[order[0].at + b * order[1] + h // order[3] * order[2] + row].long()
    live = row >= 0
    assert int(row.max()) < most
    place = out.at + row[live][:, None] * columns + torch.arange(columns)
    out.memory[place] = values[live][:, :columns].to(out.memory.dtype)


def _weigh(s: Tensor, top: Tensor, total: Tensor, scale: float, keys: int) -> tuple[Tensor, ...]:
    new = torch.maximum(top, s.amax(1) * scale)
    shift = torch.where(new == -torch.inf, 0.0, new)
    p, old = torch.exp2(s * scale - shift[:, None]), torch.exp2(top - shift)
    return p, new, total * old[:, None] + p.view(-1, keys // 8, 4, 2).sum((1, 3)), old


def _opening(
    s: Tensor, word: Tensor | None, score: tuple[float, None], dtype: torch.dtype, C: Any, hides: bool
) -> tuple[Tensor, ...]:
    s = _hide(s, word, 64, C.keys, -torch.inf) if hides else s  # type: ignore[arg-type]
    p, top, total, _ = _weigh(s, torch.full((64,), -torch.inf), torch.zeros(64, 4), score[0] * LOG2E, C.keys)
    return p.to(dtype), top, total


def _put(
    acc: Tensor, top: Tensor, total: Tensor, out: tuple[Any, ...], at: tuple[int, ...], first: int, heads: int,
    ill: Pointer | None, C: Any,
) -> None:  # fmt: skip
    values, lse, order, n = out
    token = first + torch.arange(64)
    if order is not None:
        start = order[0].at + at[0] * order[1] + at[1] // order[3] * order[2]
        token = order[0].memory[start + token].long()
    live, total = (token >= 0) & (token < n), total.sum(1)
    acc = acc / torch.where(total == 0, 1.0, total)[:, None]
    if ill is not None and not bool(acc[live].isfinite().all()):
        ill.memory[ill.at] = 1
    to = ((at[0] * heads + at[1]) * n + token)[live]
    lse.memory[lse.at + to] = (top * log(2) + total.log())[live]
    values.memory[values.at + to[:, None] * C.real + torch.arange(C.real)] = acc[live, : C.real].to(values.memory.dtype)


class _Anything:
    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_: None


_TILES: dict[str, dict[str, Any]] = {
    "backward_kv_kernel": {
        "add": _add, "hide": _hide, "rounded": lambda t, dtype: t.to(dtype), "widened": lambda t: t.float(),
        "load_words": lambda table, mask, first, block, rows, _: _load_words(table, mask, first, block, rows),
        "store": _store, "products": lambda *_: None, "share": share, "fence_async_shared": lambda: None,
    },
    "forward_kernel": {
        "capped": lambda s, _: s, "factor": lambda score: score[0] * LOG2E, "weigh": _weigh, "opening": _opening,
        "packed": lambda p, dtype, _: p.to(dtype), "opened": lambda p, *_: p,
        "scores": lambda q, ring, slot, _: (q.t if isinstance(q, Tiles) else q).float() @ ring.index(slot).t.float().T,
        "hidden": lambda s, word, columns: _hide(s, word, 64, columns, -torch.inf),
        "load_words": lambda table, mask, first, block, _: _load_words(table, mask, first, block, 64),
        "pad_words": lambda at, _: at.memory[at.at : at.at + 4][None], "put": _put, "layouts": _Anything(),
        "SHIFT": BITS,
    },
}  # fmt: skip
_BESIDE = {"forward_kernel": ("forward_lists.py", "forward_fetch.py")}  # files whose functions it calls as they are


def run(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """A call of a kernel as `start` gets it."""
    file = Path(kernel.fn.__code__.co_filename)
    texts = [path.read_text() for path in (*(file.with_name(n) for n in _BESIDE.get(kernel.__name__, ())), file)]
    text = "\n".join(text[text.index("@gluon.jit\n") :] for text in texts).replace("@gluon.jit\n", "")
    for name in ("stage", "phase"):  # literals that methods of scalars are called on
        text = text.replace(f"{name} = 0\n", f"{name} = Number(0)\n")
    space: dict[str, Any] = {
        "gl": gl, "mbarrier": mbarrier, "tma": tma, "Number": Number,
        "range": lambda *ends: map(Number, range(*ends)), "warpgroup_mma": _product,
        "warpgroup_mma_wait": lambda _, deps: deps[0] if len(deps) == 1 else tuple(deps),
    }  # fmt: skip
    exec(compile("from __future__ import annotations\n" + text, kernel.__name__, "exec"), space)
    space |= _TILES[kernel.__name__]
    given = [_given(a) for a in args]
    constants = {name: value for name, value in constants.items() if name.isupper()}
    gl.programs = Number(programs)
    for i in range(programs):
        gl.program = Number(i)
        space[kernel.__name__](*given, **constants)


def _given(a: Any) -> Any:
    if isinstance(a, tuple):
        return tuple(_given(x) for x in a)
    if isinstance(a, Tensor):
        return Pointer(a)
    if type(a) is int:
        return Number(a)
    return Described(a) if hasattr(a, "block_shape") else a
