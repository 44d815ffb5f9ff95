"""What the advice page shows, as frozen records of plain values: numbers, strings, tuples, PNG bytes.

The command line turns an advice into these records; `report` knows no models, tensors or recipes. What is not
known is None, and the page says so in words. Times are in seconds unless a field says otherwise; speed-ups are dense
time / sparse time; drift is (error - floor) / (ceiling - floor).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["validated", "candidate", "demonstration", "dense"]
PointKind = Literal["chosen", "allocation", "relative", "single", "published", "dense"]
Cell = str | float | int | bool | None

STATUSES: tuple[Status, ...] = ("validated", "candidate", "demonstration", "dense")
POINT_KINDS: tuple[PointKind, ...] = ("chosen", "allocation", "relative", "single", "published", "dense")


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its interval at `level` (None: no interval known)."""

    value: float
    low: float | None = None
    high: float | None = None
    level: float = 0.90


@dataclass(frozen=True)
class Baseline:
    """The fastest dense kernel present: its name, and its median time in ms of what `of` names."""

    name: str
    ms: float
    of: str = "one attention call"


@dataclass(frozen=True)
class Headline:
    """The block that is read first.

    status: "validated" | "candidate" | "demonstration" | "dense". reason: one sentence, shown first when the status is
    "dense". n: validation pairs. end_to_end, step, operator: speed-ups, never mixed. worst: largest drift of a pair, of
    sample `worst_sample`. limit: drift allowed on average (twice that for the worst). target: speed-up asked for.
    """

    status: Status
    n: int
    reason: str | None = None
    end_to_end: Estimate | None = None
    step: Estimate | None = None
    operator: Estimate | None = None
    drift: Estimate | None = None
    worst: float | None = None
    worst_sample: str | None = None
    limit: float = 0.10
    target: float | None = None
    baseline: Baseline | None = None
    device: str | None = None
    statement: str | None = None

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status is {self.status!r}; legal: {', '.join(STATUSES)}")
        if self.status == "dense" and self.reason is None:
            raise ValueError(
                "status is 'dense' but reason is None; the page puts the reason first, so give one sentence"
            )


@dataclass(frozen=True)
class CurvePoint:
    """One recipe measured end to end: time a sample (s) and error, each with the ends of its bar where known."""

    label: str
    kind: PointKind
    time: Estimate
    error: Estimate
    n: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in POINT_KINDS:
            raise ValueError(f"kind of point {self.label!r} is {self.kind!r}; legal: {', '.join(POINT_KINDS)}")


@dataclass(frozen=True)
class BandPoint:
    """Predicted error at one time (s): middle and the ends of the band."""

    time: float
    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Curve:
    """Error against time.

    floor: error of another exact kernel; ceiling: of what `ceiling_name` says; limit: the largest error allowed.
    error_name: what is on the axis, with its unit in brackets where it has one.
    """

    points: tuple[CurvePoint, ...]
    floor: float | None = None
    ceiling: float | None = None
    limit: float | None = None
    band: tuple[BandPoint, ...] = ()
    error_name: str = "relative error of the output"
    ceiling_name: str = "another seed"

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError(
                "points is empty; a curve needs at least the dense point (leave curve=None where none is known)"
            )


@dataclass(frozen=True)
class Strip:
    """Dense and sparse result of one pair, to be played side by side with their difference.

    role: button text ("worst", "median", "best", "floor pair"). dense, sparse: PNG bytes of `frames` pictures, width x
    height px each, side by side (`pictures.sprite_sheet`). caption: one line beside it (drift, PSNR).
    """

    role: str
    sample: str
    frames: int
    dense: bytes
    sparse: bytes
    width: int
    height: int
    caption: str = ""
    fps: float = 8.0
    labels: tuple[str, str] = ("dense", "sparse")


@dataclass(frozen=True)
class KeptMap:
    """Kept fraction of layer x step bucket: `values[layer][bucket]`, 0 to 1; None = left dense on purpose."""

    layers: tuple[str, ...]
    buckets: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.layers) or any(len(row) != len(self.buckets) for row in self.values):
            raise ValueError(
                f"values must be {len(self.layers)} layers x {len(self.buckets)} buckets, got "
                f"{len(self.values)} rows of lengths {sorted({len(row) for row in self.values})}"
            )


@dataclass(frozen=True)
class TimeBar:
    """Where one run spent its time: (part, seconds) in the order drawn. Parts of the same name share a colour."""

    name: str
    parts: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        if sum(seconds for _, seconds in self.parts) <= 0 or any(seconds < 0 for _, seconds in self.parts):
            raise ValueError(f"parts of bar {self.name!r} must be times >= 0 with a positive sum, got {self.parts!r}")


@dataclass(frozen=True)
class ForecastPoint:
    """One forecast and what was measured then, in one unit."""

    label: str
    predicted: float
    measured: float

    def __post_init__(self) -> None:
        if self.predicted <= 0 or self.measured <= 0:
            raise ValueError(
                f"forecast {self.label!r} is {self.predicted!r}, measured {self.measured!r}; both must be positive, "
                "because they are drawn on logarithmic axes"
            )


@dataclass(frozen=True)
class Forecast:
    """How good the forecasts were.

    time_spread: worst relative miss of time; error_factor: 90 % band of error, a factor.
    error is empty when the prediction only ranks; `note` then says why.
    """

    time: tuple[ForecastPoint, ...] = ()
    error: tuple[ForecastPoint, ...] = ()
    time_spread: float | None = None
    error_factor: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Pair:
    """One validation pair: same sample and noise, dense and sparse (times in s); measures: further differences."""

    sample: str
    dense_time: float
    sparse_time: float
    error: float
    drift: float
    floor: float | None = None
    ceiling: float | None = None
    measures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A table column. digits: significant digits of numbers; percent: show a share as %; code: set in a fixed font."""

    name: str
    unit: str | None = None
    digits: int = 3
    percent: bool = False
    code: bool = False


@dataclass(frozen=True)
class Table:
    """Columns and rows of plain cells (None = not measured). Every row has one cell a column."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str | None = None

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {index} has {len(row)} cells, the table has {len(self.columns)} columns")


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption and a description for those who cannot see it."""

    caption: str
    png: bytes
    alt: str


@dataclass(frozen=True)
class KernelTime:
    """Timing of one kernel: median and spread in ms over n calls. what: shape, block size, density."""

    name: str
    what: str
    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class AdvicePage:
    """Everything on the advice page. Only model, workload, created and headline are required.

    strips: the worst pair first, so that it is the one shown. rows: every record behind the page, embedded as JSON.
    left_dense, refuted_by: short sentences. valid_for: (what, range) pairs. notice: printed above everything.
    """

    model: str
    workload: str
    created: str
    headline: Headline
    notice: str | None = None
    reproduce: str | None = None
    recipe_json: str | None = None
    curve: Curve | None = None
    strips: tuple[Strip, ...] = ()
    kept: KeptMap | None = None
    times: tuple[TimeBar, ...] = ()
    forecast: Forecast | None = None
    left_dense: tuple[str, ...] = ()
    valid_for: tuple[tuple[str, str], ...] = ()
    refuted_by: tuple[str, ...] = ()
    sites: Table | None = None
    pictures: tuple[Picture, ...] = ()
    pairs: tuple[Pair, ...] = ()
    ladder: Table | None = None
    kernels: tuple[KernelTime, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[Mapping[str, object], ...] = ()

    def __post_init__(self) -> None:
        if self.strips and self.strips[0].role != "worst":
            roles = ", ".join(repr(strip.role) for strip in self.strips)
            raise ValueError(f"strips come as {roles}; the first must be 'worst', because it is the one shown first")
