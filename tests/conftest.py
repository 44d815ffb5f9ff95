"""What every test may use: the golden cases, a generator of its own, and the markers' rules."""

from __future__ import annotations

import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


def golden_roots() -> list[Path]:
    """Folders that may hold golden cases, first match wins case by case."""
    roots = [HERE.parent.parent / "shared" / "golden", HERE / "golden"]
    named = os.environ.get("GLOCAL_GOLDEN")
    if named is not None:
        roots.insert(0, Path(named))
    return roots


def pytest_configure() -> None:
    """Share the cores: one torch thread for each worker of pytest-xdist."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests without CUDA and `browser` tests without chromium."""
    skips = {}
    if not torch.cuda.is_available():
        skips["gpu"] = pytest.mark.skip(reason="no CUDA device")
    if shutil.which("chromium") is None:
        skips["browser"] = pytest.mark.skip(reason="no chromium: apt-get install chromium")
    for item in items:
        for name, skip in skips.items():
            if item.get_closest_marker(name) is not None:
                item.add_marker(skip)


@pytest.fixture
def golden() -> Callable[[str], Path]:
    """`golden("gna")` is a folder of golden cases, `golden("gna/simulator.json")` a file; skips where it is absent."""

    def find(name: str) -> Path:
        roots = golden_roots()
        for root in roots:
            if (root / name).exists():
                return root / name
        pytest.skip(f"golden case {name!r} is in none of {', '.join(map(str, roots))} (set GLOCAL_GOLDEN)")

    return find


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A CPU generator seeded by the test's own name: the same on every run, another for every test."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.nodeid.encode()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly what was not tested: a skip is a hole, not a pass."""
    reasons = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))
    if reasons:
        terminalreporter.section("not tested here")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:5d} x {reason}")


def _reason(report: pytest.TestReport) -> str:
    """The words of a skip without file and line."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
