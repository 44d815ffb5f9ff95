"""Run the conformance suite of the CUDA backends on this card and record the outcome.

python bench/gpu_conformance.py [-o results/gpu_conformance.csv] [--jobs N] [--resume] [-k WORDS]

One row a test and backend, written as soon as it is known: passed, failed, or refused with words of the backend.
Exit code 1 if one failed. The suite is dealt over several processes, since compiling takes longer than running.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from glocal._files import write_atomic
from glocal.kernels import registry

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "tests" / "kernels" / "test_gpu_conformance.py"
COLUMNS = ("test", "backend", "case", "outcome", "words", "device", "versions")


class Collected:
    """Names of all tests."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Called by pytest."""
        self.names = [item.nodeid for item in session.items]


class Recorder:
    """Writes a row for each test that ends, beside those of an earlier run."""

    def __init__(self, target: Path, known: list[list[str]]) -> None:
        self.target, self.rows = target, {tuple(row[:3]): row for row in known}
        self.new: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest."""
        if report.when != "call" and report.passed:
            return
        place = cells(report.nodeid)
        outcome = "passed" if report.passed else "refused" if report.skipped else "failed"
        self.new[outcome] += 1
        end = (torch.cuda.get_device_name(), f"torch {torch.__version__}")
        self.rows[place] = [*place, outcome, words(report), *end]
        text = io.StringIO()
        csv.writer(text).writerows([COLUMNS, *(self.rows[key] for key in sorted(self.rows))])
        write_atomic(self.target, text.getvalue())


def words(report: pytest.TestReport) -> str:
    """Why a test did not run, or failed."""
    told = report.longrepr
    if isinstance(told, tuple):
        return told[2].removeprefix("Skipped: ")[:200]
    crash = getattr(told, "reprcrash", None)
    return "" if report.passed else str(told if crash is None else crash.message).partition("\n")[0][:200]


def backend_of(name: str) -> str:
    """The backend in the brackets of a test's name."""
    inside = name.partition("[")[2].rstrip("]")
    return max((b for b in registry.names() if re.search(rf"(^|-){b}($|-)", inside)), key=len, default="")


def cells(name: str) -> tuple[str, str, str]:
    """The first columns of a test's row: test, backend, case."""
    test, _, inside = name.rpartition("::")[2].partition("[")
    inside, backend = inside.rstrip("]"), backend_of(name)
    case = re.sub(rf"(^|-){backend}($|-)", "", inside) if backend else inside
    return test.removeprefix("test_"), backend, case


def finished(path: Path) -> list[list[str]]:
    """Rows of an earlier run that need no other."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.reader(file) if row[3] in ("passed", "refused")]


def main() -> int:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "results" / "gpu_conformance.csv")
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("-k", dest="select", default="", help="as pytest takes it")
    parser.add_argument("--resume", action="store_true", help="run what the file does not know as passed or refused")
    given = parser.parse_args()
    known = finished(given.out) if given.resume else []
    told, found = {tuple(row[:3]) for row in known}, Collected()
    usual = ["-p", "no:cacheprovider", "--rootdir", str(ROOT), "-k", given.select]
    pytest.main(["--collect-only", "-qq", *usual, str(SUITE)], plugins=[found])
    names = [name for name in found.names if cells(name) not in told]
    recorder = Recorder(given.out, known)
    if names:
        dealt = ["-n", str(given.jobs), "--dist", "worksteal"]
        pytest.main(["-q", "--tb=short", "-rfE", *dealt, *usual, *names], plugins=[recorder])
    print(dict(recorder.new), given.out)
    return 1 if recorder.new["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
