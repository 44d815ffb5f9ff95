"""When two results count as equal.

Float32 against published numbers: the largest error is at most 1e-4 of the reference's largest magnitude, unless the
case says otherwise. Booleans and integers: exactly. Low precision: at most twice the error that plain PyTorch makes in
the same precision, plus a small floor, for the largest error and for the root mean square.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32 = 1e-4


@dataclass(frozen=True)
class Comparison:
    """One tensor against its reference.

    error: largest absolute error over the reference's largest finite magnitude (absolute where that is 0); infinite
    where shapes or non-finite entries differ. For booleans and integers the share of entries that differ.
    why: what is wrong in words, "" if nothing is.
    """

    name: str
    error: float
    tolerance: float
    why: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error keeps the tolerance."""
        return self.error <= self.tolerance


def compare(name: str, ours: Tensor, reference: Tensor, tolerance: float = FLOAT32) -> Comparison:
    """Compare two tensors; integers and booleans are compared exactly, whatever `tolerance`."""
    ours, reference = ours.detach().cpu(), reference.detach().cpu()
    exact = not reference.dtype.is_floating_point
    if exact:
        tolerance = 0.0
    if ours.shape != reference.shape:
        return Comparison(name, torch.inf, tolerance, f"shape {tuple(ours.shape)}, not {tuple(reference.shape)}")
    if reference.numel() == 0:
        return Comparison(name, 0.0, tolerance)
    if exact:
        wrong = float((ours.to(torch.int64) != reference.to(torch.int64)).double().mean())
        return Comparison(name, wrong, tolerance, f"{wrong:.3%} of the entries differ" if wrong else "")
    a, b = ours.double(), reference.double()
    finite = b.isfinite()
    strange = ~finite & ~((a == b) | (a.isnan() & b.isnan()))
    if bool(strange.any()) or bool((finite & ~a.isfinite()).any()):
        return Comparison(name, torch.inf, tolerance, "NaN or infinity where the reference has none, or another one")
    if not bool(finite.any()):
        return Comparison(name, 0.0, tolerance)
    top = float(b[finite].abs().max())
    worst = float((a[finite] - b[finite]).abs().max())
    error = worst / top if top > 0 else worst
    return Comparison(name, error, tolerance, "" if error <= tolerance else f"largest error {worst:.3g} of {top:.3g}")


@dataclass(frozen=True)
class LowPrecision:
    """Errors against a high-precision result, ours and those of plain PyTorch in the same precision."""

    largest: float
    plain_largest: float
    rms: float
    plain_rms: float
    factor: float
    floor: float

    @property
    def passed(self) -> bool:
        """Whether both errors keep `factor` times the plain one plus the floor."""
        return (
            self.largest <= self.factor * self.plain_largest + self.floor
            and self.rms <= self.factor * self.plain_rms + self.floor
        )


def low_precision(
    ours: Tensor, plain: Tensor, exact: Tensor, *, factor: float = 2.0, floor: float | None = None
) -> LowPrecision:
    """The rule of low precision for one tensor.

    ours, plain: results in the low precision, of the code under test and of plain PyTorch; exact: float64.
    floor: absolute; default one unit in the last place of `ours` at the largest magnitude of `exact`.
    """
    top = float(exact.abs().max()) if exact.numel() else 0.0
    floor = torch.finfo(ours.dtype).eps * top if floor is None else floor

    def errors(t: Tensor) -> tuple[float, float]:
        if t.numel() == 0:
            return 0.0, 0.0
        gap = (t.double() - exact.double()).abs()
        largest = float(gap.max())
        return (torch.inf, torch.inf) if largest != largest else (largest, float(gap.square().mean().sqrt()))

    return LowPrecision(*_interleave(errors(ours), errors(plain)), factor, floor)


def _interleave(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float, float, float]:
    return a[0], b[0], a[1], b[1]
