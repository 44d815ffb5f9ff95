"""Golden cases through our code: every published tensor is compared, or listed as not compared with the reason."""

from __future__ import annotations

import csv
import difflib
import importlib
import io
import pkgutil
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from glocal import systems
from glocal._progress import Progress
from glocal.kernels import registry
from glocal.testing import adapters as _folder
from glocal.testing.adapter import Adapter, Run
from glocal.testing.case import Case, load
from glocal.testing.tolerance import Comparison, compare

COLUMNS = (
    "system", "case", "backend", "device", "max_error", "tolerance", "passed", "skipped", "not_compared", "versions",
)  # fmt: skip


@dataclass(frozen=True)
class CaseResult:
    """One case on one backend and device.

    max_error, tolerance: those of the tensor that is nearest to its limit, or furthest beyond it; NaN if none ran.
    compared: every tensor that was compared. not_compared: name -> reason. skipped: why nothing ran, or "".
    why: what failed, in words; "" if nothing did. backend: "" where a case runs no attention.
    """

    system: str
    case: str
    backend: str
    device: str
    passed: bool
    max_error: float = float("nan")
    tolerance: float = float("nan")
    compared: tuple[Comparison, ...] = ()
    not_compared: dict[str, str] = field(default_factory=dict)
    skipped: str = ""
    why: str = ""

    @property
    def verdict(self) -> str:
        """The result in words."""
        if self.skipped:
            return f"skipped: {self.skipped}"
        return "passed" if self.passed else f"FAILED: {self.why}"


def adapters() -> tuple[str, ...]:
    """The systems that have an adapter."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(_folder.__path__) if not m.name.startswith("_")))


def adapter(slug: str) -> Adapter | None:
    """The adapter of a system, None if it has none yet; ValueError with close names if there is no such system."""
    row = systems.system(slug)
    if row.slug not in adapters():
        return None
    return importlib.import_module(f"{_folder.__name__}.{row.slug}").ADAPTER


def check(path: str | Path, device: str = "cpu", backend: str = "auto") -> CaseResult:
    """Run one golden case and compare.

    path: a file whose folder is named after its system. backend: "auto" or the name of an attention backend.
    Raises FileNotFoundError, or ValueError for a file that is no golden case, an unknown system or backend.
    """
    _usable(device, backend)
    case = load(path)
    try:
        found = adapter(case.system)
    except ValueError as error:
        raise ValueError(f"{path}: a golden case lies in a folder named after its system; {error}") from error
    if found is None:
        reason = f"no adapter: {case.system} is not built yet"
        return CaseResult(case.system, case.name, "", device, passed=False, skipped=reason)
    return check_case(case, found, Run(device, backend))


def check_all(
    paths: Iterable[str | Path], device: str, backends: Sequence[str], progress: Progress
) -> tuple[CaseResult, ...]:
    """`check` for files and backends ("all": every one of the device that runs patterns exactly).

    A case that runs no attention, or has no adapter, runs once.
    """
    _usable(device, "auto")
    paths, names = list(paths), [n for b in backends for n in (backends_of(device) if b == "all" else (b,))]
    results: list[CaseResult] = []
    progress.stage("parity", len(paths))
    for path in paths:
        for name in names:
            results.append(check(path, device, name))
            if not results[-1].backend:
                break
        progress.step()
    return tuple(results)


def backends_of(device: str) -> tuple[str, ...]:
    """The backends of a device that run patterns and lack nothing on this machine."""
    kind = torch.device(device).type
    exact = (b for b in registry.backends() if b.capability.sparse and not b.capability.quant)
    able = (b for b in exact if kind in b.capability.devices)
    return tuple(b.name for b in able if b.missing(kind) is None)


def _usable(device: str, backend: str) -> None:
    legal = ("auto", *registry.names())
    if backend not in legal:
        close = difflib.get_close_matches(backend, legal, n=1)
        hint = f"closest: {close[0]}; " if close else ""
        raise ValueError(f"no attention backend is called {backend!r}; {hint}legal: {', '.join(legal)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"device={device!r} cannot be used here: {first}") from error


def check_case(case: Case, found: Adapter, run: Run) -> CaseResult:
    """The same for a loaded case and an adapter of one's own."""
    backend = run.backend if found.attends(case) else ""
    skipped = found.skip(case)
    if skipped is not None:
        return CaseResult(case.system, case.name, backend, run.device, passed=False, skipped=skipped)
    try:
        expected = dict(found.expected(case))
        left_out = {name: why for name, why in found.left_out(case).items() if name in expected}
        ours = found.run(case.to(run.device), run)
    except Exception as error:  # a case that cannot run is a failed case, and the others still run
        refusal = str(error).split(". For it,")[0]
        if run.backend != "auto" and str(error).startswith(f"backend={run.backend!r} cannot run this call"):
            return CaseResult(case.system, case.name, backend, run.device, passed=False, skipped=refusal)
        why = f"{type(error).__name__}: {error}"
        return CaseResult(case.system, case.name, backend, run.device, passed=False, why=why)
    unknown = sorted(set(ours) - set(expected))
    missing = sorted(set(expected) - set(ours) - set(left_out))
    compared = tuple(
        compare(name, ours[name], expected[name], found.tolerance(case, name))
        for name in expected
        if name in ours and name not in left_out
    )
    problems = [f"{c.name}: {c.why}" for c in compared if not c.passed]
    if unknown:
        problems.append(f"the adapter returns {', '.join(unknown)}, which the case does not have")
    if missing:
        problems.append(f"{', '.join(missing)} neither compared nor listed as left out")
    if not compared:
        problems.append("nothing was compared")
    worst = max(compared, key=_strain, default=None)
    return CaseResult(
        system=case.system,
        case=case.name,
        backend=backend,
        device=run.device,
        passed=not problems,
        max_error=float("nan") if worst is None else worst.error,
        tolerance=float("nan") if worst is None else worst.tolerance,
        compared=compared,
        not_compared=left_out,
        why="; ".join(problems),
    )


def _strain(c: Comparison) -> float:
    """How much of its tolerance a comparison uses; exact ones use none or all."""
    if c.tolerance > 0:
        return c.error / c.tolerance
    return torch.inf if c.error > 0 else -1.0


def table(results: Iterable[CaseResult]) -> str:
    """Results as CSV with the columns `glocal.systems.evidence` reads, and a few more."""
    versions = f"torch {torch.__version__}; python {platform.python_version()}"
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(COLUMNS)
    for r in results:
        numbers = ("", "") if r.skipped else (f"{r.max_error:.3e}", f"{r.tolerance:.0e}")
        left = "; ".join(f"{name}: {why}" for name, why in r.not_compared.items())
        passed = str(r.passed).lower()
        out.writerow((r.system, r.case, r.backend, r.device, *numbers, passed, r.skipped, left, versions))
    return text.getvalue()
