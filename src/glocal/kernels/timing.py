"""What a call would take on each backend, from a table of measured calls: a pure function, for choosing among them.

Seconds are visited pairs over the measured rate of their kind: full blocks, partial blocks, or all pairs. Gradients add
the backward pass where it was measured. float16 and bfloat16 stand for one another: matrix units multiply both at one
rate. Where nothing comparable was measured there is no estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

from glocal.kernels.capability import Request
from glocal.plan.devices.table import FLOPS_PER_PAIR, DeviceTable, Direction, Kind

# Names that tables of other sources give to what a backend runs.
_ALIASES: dict[tuple[str, Kind], tuple[str, ...]] = {
    ("dense", "dense"): ("sdpa", "cudnn"),
    ("fa4_dense", "dense"): ("fa4",),
    ("cudnn_sparse", "full"): ("cudnn",),
}
WITH_MASK = "dense, masked"  # the dense backend where it adds the mask of a pattern to the logits
_TWINS = {"float16": "bfloat16", "bfloat16": "float16"}
MASKED_DENSE = 1 << 26  # query-key pairs of a head up to which a mask of all of them may be written out


@dataclass(frozen=True)
class Visits:
    """Shares of all query-key pairs that lie in full and in partial blocks."""

    full: float
    partial: float = 0.0

    @property
    def total(self) -> float:
        """Their sum."""
        return self.full + self.partial


def seconds(
    table: DeviceTable,
    name: str,
    request: Request,
    blocks: tuple[int, int] | None,
    visits: Visits,
    *,
    given: bool = False,
) -> float | None:
    """Estimated seconds of `request` on backend `name`; None where the table does not say.

    blocks: those of the plan; None for a backend that reads no plan. given: no other sizes can be had, so partial
    blocks of a size that was not measured count as so much slower than full ones as they are at 128 x 128.
    """
    dtype, known = str(request.dtype).removeprefix("torch."), {m.dtype for m in table.measurements}
    dtype = dtype if dtype in known else _TWINS.get(dtype, dtype)
    if dtype not in known or 0 in (request.nq, request.nk):
        return None
    pairs = request.batch * request.q_heads * request.nq * request.nk
    directions: tuple[Direction, ...] = ("forward", "backward") if request.grad else ("forward",)
    total = 0.0 if table.launch_seconds is None else table.launch_seconds
    if not request.sparse:
        shares: list[tuple[Kind, float]] = [("dense", 1.0)]
    elif blocks is None:  # all pairs, the hidden ones masked by a bias
        name, shares = WITH_MASK, [("dense", 1.0)]
    else:
        both: tuple[tuple[Kind, float], ...] = (("full", visits.full), ("masked", visits.partial))
        shares = [(kind, share) for kind, share in both if share > 0]
    for direction in directions:
        for kind, share in shares:
            rate = _rate(table, name, kind, direction, request, blocks, dtype)
            if rate is None and given and kind == "masked":
                rate = _masked_alike(table, name, direction, request, blocks, dtype)
            if rate is None:
                return None
            total += FLOPS_PER_PAIR[direction] * request.head_dim * pairs * share / rate
    return total


def _masked_alike(
    table: DeviceTable,
    name: str,
    direction: Direction,
    request: Request,
    blocks: tuple[int, int] | None,
    dtype: str,
) -> float | None:
    """Rate of partial blocks from that of full ones of their size, and what both are at 128 x 128."""
    full = _rate(table, name, "full", direction, request, blocks, dtype)
    common = [_rate(table, name, kind, direction, request, None, dtype) for kind in ("masked", "full")]
    if full is None or common[0] is None or common[1] is None:
        return None
    return full * common[0] / common[1]


def _rate(
    table: DeviceTable,
    name: str,
    kind: Kind,
    direction: Direction,
    request: Request,
    blocks: tuple[int, int] | None,
    dtype: str,
) -> float | None:
    known = (name, *_ALIASES.get((name, kind), ()))
    found = {
        r.kernel: r.flops_per_second
        for r in table.rates(kind, direction, request.head_dim, max(request.nq, request.nk), dtype, blocks)
    }
    for kernel in known:
        if kernel in found:
            return found[kernel]
    return None
