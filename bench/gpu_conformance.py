"""Run the conformance suite of the CUDA backends on this card and record the outcome.

python bench/gpu_conformance.py [-o results/gpu_conformance.csv] [--jobs N] [--resume]

One row a test and backend: passed, failed, refused with the backend's own words, or not run for lack of time. Exit code
1 if one failed. The suite is dealt over several processes, since compiling takes longer than running.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from glocal._files import write_atomic
from glocal.kernels import registry

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "tests" / "kernels" / "test_gpu_conformance.py"


def collected(select: str | None) -> list[str]:
    """Names of all tests."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(SUITE)]
    command += [] if select is None else ["-k", select]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


def run(names: list[str], limit: int) -> list[tuple[str, str, str]]:
    """(test, outcome, words) of some tests, in a process of their own, for at most `limit` seconds."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-rfEs", "-p", "no:cacheprovider", *names]
    try:
        text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit).stdout
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else str(late.stdout)
    outcome = dict(re.findall(r"::(test_\S+(?:\[.*?\])?) (PASSED|FAILED|ERROR|SKIPPED)", text))
    words = dict(re.findall(r"^(?:FAILED|ERROR) \S*?::(test_[^ ]+(?: [^-]*?\])?) - (.*)$", text, re.M))
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", text, re.M)
    told = {"PASSED": "passed", "SKIPPED": "refused"}
    rows = []
    for name in (n.split("::")[1] for n in names):
        state = told.get(outcome[name], "failed") if name in outcome else "not run"
        said = words.get(name, "" if name in outcome else f"not reached within {limit} s")
        if state == "refused":
            backend = backend_of(name)
            said = next((r for r in reasons if backend and r.startswith(backend)), "")
        rows.append((name, state, said[:200]))
    return rows


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
    parser.add_argument("--limit", type=int, default=400, help="seconds for each process")
    parser.add_argument("-k", dest="select", help="as pytest takes it")
    parser.add_argument("--resume", action="store_true", help="run what the file does not know as passed or refused")
    given = parser.parse_args()
    known = finished(given.out) if given.resume else []
    told = {tuple(row[:3]) for row in known}
    names = [name for name in collected(given.select) if cells(name) not in told]
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:  # cases of one test and backend share compiled kernels, so they go to one process
        groups.setdefault((name.partition("[")[0], backend_of(name)), []).append(name)
    parts: list[list[str]] = [[] for _ in range(given.jobs)]
    for group in sorted(groups.values(), key=len, reverse=True):
        min(parts, key=len).extend(group)
    parts = [p for p in parts if p]
    with ThreadPoolExecutor(given.jobs) as pool:
        rows = sorted(row for part in pool.map(lambda p: run(p, given.limit), parts) for row in part)
    text = io.StringIO()
    writer = csv.writer(text)
    device = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}"
    writer.writerow(("test", "backend", "case", "outcome", "words", "device", "versions"))
    new = [[*cells(name), outcome, words, device, versions] for name, outcome, words in rows]
    writer.writerows(sorted(known + new))
    write_atomic(given.out, text.getvalue())
    for name, outcome, words in rows:
        if outcome == "failed":
            print("FAILED", name, words)
    print(dict(Counter(outcome for _, outcome, _ in rows)), given.out)
    return 1 if any(outcome == "failed" for _, outcome, _ in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
