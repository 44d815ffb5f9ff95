"""Measure a device table on this machine: dense attention, whole and masked blocks of each backend, copies."""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from glocal._files import write_atomic
from glocal._progress import NoProgress, Progress
from glocal.canvas import Canvas, Layout, tile
from glocal.kernels import registry
from glocal.measure import time_call
from glocal.ops import attention
from glocal.patterns import AxisWindow, Neighborhood
from glocal.plan.build import PlanSpec, plan
from glocal.plan.cost import DeviceTable, Measurement, user_tables
from glocal.plan.devices.table import Direction, Kind
from glocal.plan.tiles import search_strides

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Shape:
    """One case: a canvas, a window of odd multiples of the tile (so that a perfectly block-sparse stride exists)."""

    canvas: tuple[int, ...]
    window: tuple[int, ...]
    tile: tuple[int, ...]
    heads: int
    head_dim: int


SHAPES = {
    "cpu": (
        Shape((32, 32), (24, 24), (8, 8), heads=4, head_dim=64),
        Shape((64, 64), (24, 48), (8, 16), heads=4, head_dim=64),
    ),
    "cuda": (
        Shape((64, 64), (24, 48), (8, 16), heads=16, head_dim=64),
        Shape((128, 128), (40, 48), (8, 16), heads=16, head_dim=64),
        Shape((128, 128), (40, 48), (8, 16), heads=8, head_dim=128),
        Shape((30, 48, 80), (18, 24, 24), (2, 8, 8), heads=8, head_dim=128),
    ),
}


@dataclass(frozen=True)
class Calibration:
    """What to measure. None stands for the device's own: float32 on the CPU, else bfloat16; every backend of this
    machine that runs plans, guests among them; SHAPES.
    """

    dtype: torch.dtype | None = None
    backends: tuple[str, ...] | None = None
    shapes: tuple[Shape, ...] | None = None
    warmup: int = 2
    repeats: int = 7
    copy_bytes: int = 1 << 26


def measure_device(
    device: torch.device | str = "cpu", spec: Calibration | None = None, progress: Progress | None = None
) -> DeviceTable:
    """Time attention on `device` and return its table; each backend is checked against masked dense attention first.

    Medians of `spec.repeats` calls; forward and backward apart. Raises ValueError for another kind of device, and
    RuntimeError, naming the backend and its error, when a check fails.
    """
    spec = Calibration() if spec is None else spec
    where = torch.device(device)
    if where.type not in SHAPES:
        raise ValueError(f"device={str(device)!r} cannot be calibrated; legal: {', '.join(SHAPES)}; nearest: cpu")
    default = torch.float32 if where.type == "cpu" else torch.bfloat16
    dtype = default if spec.dtype is None else spec.dtype
    if str(dtype).removeprefix("torch.") not in TOLERANCE:
        raise ValueError(f"dtype={dtype} cannot be calibrated; legal: {', '.join(TOLERANCE)}; nearest: float32")
    backends = here(where.type) if spec.backends is None else spec.backends
    shapes = SHAPES[where.type] if spec.shapes is None else spec.shapes
    bar = NoProgress() if progress is None else progress

    bar.stage("check backends", len(backends))
    for backend in backends:
        _check(backend, shapes[0], where, dtype)
        bar.step()
    bar.stage("time attention", len(shapes) * (1 + 2 * len(backends)))
    rows: list[Measurement] = []
    for shape in shapes:
        for name in dense_here(where.type):
            rows += _time(_dense(name), name, "dense", shape, (), where, dtype, spec)
        bar.step()
        for backend in backends:
            kinds: dict[Kind, tuple[int, ...]] = {"full": _aligned(shape), "masked": (1,) * len(shape.canvas)}
            for kind, stride in kinds.items():
                rows += _time(_planned(backend, shape, stride, where), backend, kind, shape, stride, where, dtype, spec)
                bar.step()
    return DeviceTable(
        name=_slug(where),
        title=_title(where),
        date=datetime.date.today().isoformat(),
        source=f"median of {spec.repeats} calls after {spec.warmup} warm-ups, random normal inputs, batch 1",
        processors=_processors(where),
        copy_bytes_per_second=_copy_rate(where, spec),
        launch_seconds=_launch(backends, shapes[0], where, dtype, spec),
        measurements=tuple(rows),
        software={"torch": torch.__version__, "python": platform.python_version()},
        copy_note=f"{spec.copy_bytes} bytes copied, counted read and written",
    )


def save_table(table: DeviceTable, path: str | os.PathLike[str] | None = None) -> Path:
    """Write a table where `device_table(table.name)` finds it, or to `path`; returns the file."""
    target = user_tables() / f"{table.name}.json" if path is None else Path(path)
    return write_atomic(target, table.to_json())


def here(device: str) -> tuple[str, ...]:
    """Exact backends of this machine that run plans, FlexAttention only where it is the only one."""
    able = [b for b in registry.backends() if device in b.capability.devices and b.missing(device) is None]
    plans = [b for b in able if b.capability.needs == "plan" and b.capability.sparse and b.capability.backward]
    return tuple(b.name for b in plans if b.name != "flex" or len(plans) == 1)


def dense_here(device: str) -> tuple[str, ...]:
    """Dense backends of this machine."""
    able = [b for b in registry.backends() if device in b.capability.devices and b.missing(device) is None]
    return tuple(b.name for b in able if b.capability.needs == "nothing" and b.capability.dense)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _dense(backend: str) -> Attend:
    return lambda q, k, v: attention(q, k, v, backend=backend)


def _aligned(shape: Shape) -> tuple[int, ...]:
    axes = [AxisWindow(window) for window in shape.window]
    found = search_strides(shape.canvas, axes, shape.tile, shape.tile).perfect
    if found is None:
        raise ValueError(f"{shape} has no perfectly block-sparse stride; nearest: windows of odd multiples of the tile")
    return tuple(axis.window.stride for axis in found.axes)


def _planned(backend: str, shape: Shape, stride: Sequence[int], where: torch.device) -> Attend:
    """Attention through `backend` with blocks that are the tiles of the shape."""
    canvas, block = Canvas(shape.canvas), math.prod(shape.tile)
    order = tile(canvas, shape.tile)
    spec = PlanSpec(q_block=block, kv_block=block, q_order=order, kv_order=order)
    built = plan(Neighborhood(shape.window, tuple(stride)), canvas, spec, device=where)
    return lambda q, k, v: attention(q, k, v, built, backend=backend)


def _inputs(shape: Shape, where: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and an output gradient, [1, heads, tokens, head_dim]."""
    generator = torch.Generator().manual_seed(0)
    size = (1, shape.heads, math.prod(shape.canvas), shape.head_dim)
    return [torch.randn(size, generator=generator).to(where, dtype) for _ in range(4)]


def _check(backend: str, shape: Shape, where: torch.device, dtype: torch.dtype) -> None:
    q, k, v, _ = _inputs(shape, where, dtype)
    stride = (1,) * len(shape.canvas)
    mask = Neighborhood(shape.window).mask(Layout.of(Canvas(shape.canvas)), device=where)  # [1, N, N]
    exact = scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    found = _planned(backend, shape, stride, where)(q, k, v).float()
    error = float((found - exact).abs().max() / exact.abs().max())
    limit = TOLERANCE[str(dtype).removeprefix("torch.")]
    if not error <= limit:
        raise RuntimeError(f"backend {backend!r} is off by {error:.2e} of the largest value ({dtype}); limit {limit:g}")


def _time(
    fn: Attend,
    kernel: str,
    kind: Kind,
    shape: Shape,
    stride: Sequence[int],
    where: torch.device,
    dtype: torch.dtype,
    spec: Calibration,
) -> list[Measurement]:
    """A forward and a backward row."""
    q, k, v, grad = _inputs(shape, where, dtype)
    with torch.no_grad():
        forward = time_call(lambda: fn(q, k, v), device=where, warmup=spec.warmup, repeats=spec.repeats)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = fn(*leaves)

    def run_backward() -> None:
        torch.autograd.grad(out, leaves, grad, retain_graph=True)

    backward = time_call(run_backward, device=where, warmup=spec.warmup, repeats=spec.repeats)
    timed: dict[Direction, float] = {"forward": forward.median, "backward": backward.median}
    tiled = kind == "masked"
    return [
        Measurement(
            kernel=kernel,
            kind=kind,
            direction=direction,
            dtype=str(dtype).removeprefix("torch."),
            heads=shape.heads,
            head_dim=shape.head_dim,
            canvas=shape.canvas,
            milliseconds=seconds * 1e3,
            window=() if kind == "dense" else shape.window,
            stride=tuple(stride) if tiled else (),
            q_tile=() if kind == "dense" else shape.tile,
            kv_tile=() if kind == "dense" else shape.tile,
        )
        for direction, seconds in timed.items()
    ]


def _launch(backends: Sequence[str], shape: Shape, where: torch.device, dtype: torch.dtype, spec: Calibration) -> float:
    """Seconds of the smallest possible call: one tile, one head; the slowest backend counts."""
    one = Shape(shape.tile, shape.tile, shape.tile, heads=1, head_dim=shape.head_dim)
    q, k, v, _ = _inputs(one, where, dtype)
    seconds = []
    for backend in backends:
        fn = _planned(backend, one, (1,) * len(one.canvas), where)
        timing = time_call(lambda fn=fn: fn(q, k, v), device=where, warmup=3, repeats=4 * spec.repeats)
        seconds.append(timing.median if timing.host is None else max(timing.median, timing.host))
    return max(seconds)


def _copy_rate(where: torch.device, spec: Calibration) -> float:
    source = torch.zeros(spec.copy_bytes, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    timing = time_call(lambda: target.copy_(source), device=where, warmup=spec.warmup, repeats=spec.repeats)
    return 2 * spec.copy_bytes / timing.median


def _processors(where: torch.device) -> int:
    if where.type == "cuda":
        return torch.cuda.get_device_properties(where).multi_processor_count
    return torch.get_num_threads()


def _title(where: torch.device) -> str:
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def _slug(where: torch.device) -> str:
    """File name of the table: "cpu", or the device's own name in small letters."""
    if where.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(where).lower()).strip("-")
