"""Candidates that were dropped, and why. One that does not fit a canvas is nothing special; three that fail stop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from glocal.advise.preflight import AdviceError
from glocal.advise.probe import ProbeRecord

MOST_FAILURES = 3


@dataclass
class Dropped:
    """why: reason by name of the candidate. failed: those whose kernel raised an error or gave NaN."""

    why: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def unfit(self, name: str, why: str) -> None:
        """The candidate cannot run here, and says so itself."""
        self.why[name] = why

    def take(self, other: Dropped) -> None:
        """What another part of the run dropped."""
        for name, why in other.why.items():
            if name in other.failed:
                self.fail(name, why)
            else:
                self.unfit(name, why)

    def fail(self, name: str, why: str) -> None:
        """The candidate broke. AdviceError at the third: then the kernels are at fault, not a candidate."""
        self.why[name] = why
        self.failed.append(name)
        if len(self.failed) >= MOST_FAILURES:
            lines = "; ".join(f"{n}: {self.why[n]}" for n in self.failed)
            raise AdviceError(
                f"{len(self.failed)} candidates failed, so the kernels here are not to be trusted: {lines}. Mend the "
                "kernel, or name the sound ones with `methods`."
            )


def broken(out: Tensor) -> str | None:
    """What is wrong with an output, or None."""
    return None if bool(out.isfinite().all()) else "its output holds NaN or infinity"


def broken_records(records: list[ProbeRecord]) -> set[str]:
    """Methods with a record that is not finite."""
    return {r.method for r in records if not all(map(math.isfinite, (r.mass, r.output, r.residual, r.high)))}
