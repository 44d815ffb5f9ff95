"""Device tables: what attention kernels were measured to take on one machine, and the rates that follow from it.

A table keeps seconds of whole calls with their shapes; rates are derived here, so every figure leads back to a
measurement. Floating-point operations: 4 Nq Nk D a head forward, 10 Nq Nk D backward, on the pairs computed.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from glocal._errors import nearest
from glocal.patterns.axis import AxisWindow
from glocal.plan.simulate import simulate

Kind = Literal["dense", "full", "masked"]
Direction = Literal["forward", "backward"]
SCHEMA = "glocal.device/1"
FLOPS_PER_PAIR: dict[str, int] = {"forward": 4, "backward": 10}


@dataclass(frozen=True)
class Measurement:
    """Seconds of one call. kind "dense": all pairs; "full": a window of whole blocks; "masked": stride below the tile.

    canvas: tokens per axis; window, stride, q_tile, kv_tile: per axis, for the kinds that need them. "full" needs the
    window only: its visited pairs are its visible pairs.
    """

    kernel: str
    kind: Kind
    direction: Direction
    dtype: str
    heads: int
    head_dim: int
    canvas: tuple[int, ...]
    milliseconds: float
    window: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    q_tile: tuple[int, ...] = ()
    kv_tile: tuple[int, ...] = ()
    note: str = ""

    @property
    def block(self) -> tuple[int, int]:
        """Tokens of a query and a key block; 128 x 128 where the row does not say."""
        return (math.prod(self.q_tile) if self.q_tile else 128, math.prod(self.kv_tile) if self.kv_tile else 128)

    def distance(self, tokens: int) -> float:
        """How far this shape is from `tokens` tokens, as a ratio on a logarithmic scale."""
        return abs(math.log(math.prod(self.canvas) / tokens))

    def flops(self, pairs: float) -> float:
        """Floating-point operations on `pairs` (query, key) pairs a head."""
        return FLOPS_PER_PAIR[self.direction] * pairs * self.head_dim * self.heads


@dataclass(frozen=True)
class Rate:
    """FLOP/s of a kernel on the pairs it computes, and the head size it was measured at."""

    kernel: str
    flops_per_second: float
    head_dim: int


@dataclass(frozen=True)
class DeviceTable:
    """Measured figures of one machine, with their source and date.

    copy_bytes_per_second counts bytes read and written. launch_seconds is None where it was not measured.
    processors: units that work on query tiles at the same time (streaming multiprocessors, threads).
    """

    name: str
    title: str
    date: str
    source: str
    processors: int
    copy_bytes_per_second: float
    launch_seconds: float | None
    measurements: tuple[Measurement, ...]
    software: dict[str, str] = field(default_factory=dict)
    copy_note: str = ""

    def rates(
        self,
        kind: Kind,
        direction: Direction,
        head_dim: int,
        tokens: int,
        dtype: str = "bfloat16",
        block: tuple[int, int] | None = None,
    ) -> tuple[Rate, ...]:
        """Rates of all kernels measured for this use, fastest first, at the nearest head size and token count.

        block: tokens of a query and a key block; None takes rows of 128 x 128, or any where there are none.

        "masked" is the rate of the partial blocks alone: their time is what a masked call takes beyond its full
        blocks at the kernel's own full-block rate, and at least what as many full blocks would take.
        Raises ValueError when the table has no row of this dtype.
        """
        asked = (kind, direction, head_dim, tokens, dtype, block)
        if asked not in self._answers:
            self._answers[asked] = self._rates(kind, direction, head_dim, tokens, dtype, block)
        return self._answers[asked]

    @cached_property
    def _answers(self) -> dict[tuple[Any, ...], tuple[Rate, ...]]:
        """What was asked before: every call of the attention operator asks again."""
        return {}

    def _rates(
        self, kind: Kind, direction: Direction, head_dim: int, tokens: int, dtype: str, block: tuple[int, int] | None
    ) -> tuple[Rate, ...]:
        dtypes = sorted({m.dtype for m in self.measurements})
        if dtype not in dtypes:
            raise ValueError(
                f"dtype={dtype!r} was not measured on {self.name}; legal: {', '.join(dtypes)}; nearest: {dtypes[0]}"
            )
        rows = [m for m in self.measurements if (m.kind, m.direction, m.dtype) == (kind, direction, dtype)]
        if block is None:
            common = [m for m in rows if m.block == (128, 128)]
            rows = common if common else rows
        elif kind != "dense":
            rows = [m for m in rows if m.block == block]
        if not rows:
            return ()
        nearest = min({m.head_dim for m in rows}, key=lambda d: (abs(d - head_dim), -d))
        found: dict[str, Measurement] = {}
        for row in rows:
            best = found.get(row.kernel)
            if row.head_dim == nearest and (best is None or row.distance(tokens) < best.distance(tokens)):
                found[row.kernel] = row
        rates = [Rate(kernel, self._rate(row, block), nearest) for kernel, row in found.items()]
        return tuple(sorted(rates, key=lambda rate: -rate.flops_per_second))

    def _rate(self, row: Measurement, block_tokens: tuple[int, int] | None) -> float:
        seconds = row.milliseconds / 1e3
        tokens = math.prod(row.canvas)
        if row.kind == "dense":
            return row.flops(tokens**2) / seconds
        if row.kind == "full":
            return row.flops(tokens * math.prod(row.window)) / seconds
        rules = [AxisWindow(k, s) for k, s in zip(row.window, row.stride, strict=True)]
        counts = simulate(row.canvas, rules, row.q_tile, row.kv_tile)
        block = math.prod(row.q_tile) * math.prod(row.kv_tile)
        full = {r.kernel: r for r in self.rates("full", row.direction, row.head_dim, tokens, row.dtype, block_tokens)}
        if row.kernel not in full:
            raise ValueError(
                f"device table {self.name!r}: {row.kernel} has masked rows but no full rows to set them off"
            )
        whole = full[row.kernel].flops_per_second
        rest = seconds - row.flops(counts.full_blocks * block) / whole
        flops = row.flops(counts.partial_blocks * block)
        return flops / max(rest, flops / whole)  # timing noise must not make a mask cheaper than none

    def to_json(self) -> str:
        """The table as a JSON file, readable back by `load_table`."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2, sort_keys=True) + "\n"


def load_table(path: str | os.PathLike[str]) -> DeviceTable:
    """Read one table file. Raises ValueError naming the file and the field that does not fit."""
    return _parse(Path(path).read_text(encoding="utf-8"), str(path))


def _parse(text: str, origin: str) -> DeviceTable:
    try:
        record: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"device table {origin}: not JSON ({error})") from error
    schema = record.pop("schema", None) if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"device table {origin}: schema={schema!r}; legal: {SCHEMA!r}")
    lists = ("canvas", "window", "stride", "q_tile", "kv_tile")
    try:
        rows: list[dict[str, Any]] = record.pop("measurements")
        for row in rows:
            row.update({key: tuple(row[key]) for key in lists if key in row})
        return DeviceTable(measurements=tuple(Measurement(**row) for row in rows), **record)
    except (TypeError, KeyError) as error:
        raise ValueError(f"device table {origin}: {error}") from error


def user_tables() -> Path:
    """Folder of the tables measured on this machine: $XDG_CACHE_HOME/glocal/devices, else ~/.cache/glocal/devices."""
    cache = os.environ.get("XDG_CACHE_HOME")
    base = Path(cache) if cache else Path.home() / ".cache"
    return base / "glocal" / "devices"


def device_names() -> tuple[str, ...]:
    """Names `device_table` knows: shipped tables and those measured on this machine."""
    shipped = [Path(f.name).stem for f in resources.files("glocal.plan.devices").iterdir() if f.name.endswith(".json")]
    folder = user_tables()
    measured = [f.stem for f in folder.glob("*.json")] if folder.is_dir() else []
    return tuple(sorted({*shipped, *measured}))


def device_table(name: str) -> DeviceTable:
    """Table by name ("h200") or by path to a .json file; one measured here comes before a shipped one.

    Raises ValueError with the closest name.
    """
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise ValueError(f"device={name!r}: no such file; write one with `glocal env --measure`")
        return load_table(name)
    measured = user_tables() / f"{name}.json"
    if measured.is_file():
        return load_table(measured)
    known = device_names()
    if name.lower() not in known:
        raise ValueError(
            f"device={name!r} has no table; legal: {', '.join(known)}, or a .json file from `glocal env --measure`; "
            f"nearest: {nearest(name.lower(), known)}"
        )
    return _shipped(name.lower())


_KIN = {"NVIDIA H200": "h100"}


def table_for(title: str) -> DeviceTable | None:
    """The table to choose backends by on the device that calls itself `title`: one measured on this machine, else a
    shipped one whose title is part of it ("NVIDIA H100" of "NVIDIA H100 80GB HBM3"); None if there is none. An H200
    has the processors of an H100, whose table knows our own kernels.
    """
    measured = user_tables() / f"{slug(title)}.json"
    if measured.is_file():
        return load_table(measured)
    for part, name in _KIN.items():
        if part in title:
            return _shipped(name)
    for name in device_names():
        found = _shipped(name) if resources.files("glocal.plan.devices").joinpath(f"{name}.json").is_file() else None
        if found is not None and found.title in title:
            return found
    return None


def slug(title: str) -> str:
    """The name of a device as a file name: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


@lru_cache
def _shipped(name: str) -> DeviceTable:
    file = resources.files("glocal.plan.devices").joinpath(f"{name}.json")
    return _parse(file.read_text(encoding="utf-8"), f"{name}.json")
