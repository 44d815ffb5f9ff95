"""What a system needs to be compared with its authors' numbers: one adapter file a system, in `adapters/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from glocal.testing.case import Case
from glocal.testing.tolerance import FLOAT32


@dataclass(frozen=True)
class Run:
    """Where a case is to run: a torch device and the name of an attention backend ("auto" picks one)."""

    device: str = "cpu"
    backend: str = "auto"


def _never(case: Case) -> str | None:
    return None


def _float32(case: Case, name: str) -> float:
    return FLOAT32


def _results(case: Case) -> Mapping[str, Tensor]:
    return case.results()


def _nothing(case: Case) -> Mapping[str, str]:
    return {}


def _always(case: Case) -> bool:
    return True


@dataclass(frozen=True)
class Adapter:
    """How the golden cases of one system go through this library.

    slug: the system. run: our results by name, forward and gradients; names are those of `expected`.
    skip: why a case is not run at all, or None.
    tolerance: largest error of a tensor over the reference's largest magnitude.
    expected: the published results by name; the default is every `out.*`, `mid.*` and `grad.*` of the case. An order
        that is not defined (a set of indices) is made canonical here and in `run`.
    left_out: names of `expected` that are not compared, with the reason of each.
    attends: whether a case runs attention, so that the backend matters.
    """

    slug: str
    run: Callable[[Case, Run], Mapping[str, Tensor]]
    skip: Callable[[Case], str | None] = _never
    tolerance: Callable[[Case, str], float] = _float32
    expected: Callable[[Case], Mapping[str, Tensor]] = _results
    left_out: Callable[[Case], Mapping[str, str]] = _nothing
    attends: Callable[[Case], bool] = _always
