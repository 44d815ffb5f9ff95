"""Run the conformance suite of the CUDA backends on this card and record the outcome.

python bench/gpu_conformance.py [-o results/gpu_conformance.csv] [--jobs N]

One row a test and backend: passed, failed, or refused with the backend's own words. Exit code 1 if one failed. The
suite is dealt over several processes, since compiling takes longer than running.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
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


def run(names: list[str], folder: Path, number: int, limit: int) -> list[tuple[str, str, str]]:
    """(test, outcome, words) of some tests, in a process of their own."""
    report = folder / f"{number}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", f"--junitxml={report}"]
    try:
        subprocess.run([*command, *names], cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return [(n.split("::")[1], "failed", f"no end within {limit} s") for n in names]
    if not report.is_file():
        return [(n.split("::")[1], "failed", "the process ended without a report") for n in names]
    rows = []
    for case in ET.parse(report).iter("testcase"):
        name = str(case.get("name"))
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        skipped = case.find("skipped")
        if bad is not None:
            rows.append((name, "failed", " ".join(str(bad.get("message")).split())[:200]))
        elif skipped is not None:
            rows.append((name, "refused", " ".join(str(skipped.get("message")).split())[:200]))
        else:
            rows.append((name, "passed", ""))
    return rows


def main() -> int:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "results" / "gpu_conformance.csv")
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--limit", type=int, default=400, help="seconds for each process")
    parser.add_argument("-k", dest="select", help="as pytest takes it")
    given = parser.parse_args()
    names = collected(given.select)
    parts = [names[i :: given.jobs] for i in range(given.jobs) if names[i :: given.jobs]]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        found = pool.map(lambda p: run(p[1], Path(folder), p[0], given.limit), enumerate(parts))
        rows = sorted(row for part in found for row in part)
    text = io.StringIO()
    writer = csv.writer(text)
    device = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}"
    writer.writerow(("test", "backend", "case", "outcome", "words", "device", "versions"))
    for name, outcome, words in rows:
        test, _, inside = name.partition("[")
        inside = inside.rstrip("]")
        backend = max((b for b in registry.names() if re.search(rf"(^|-){b}($|-)", inside)), key=len, default="")
        case = re.sub(rf"(^|-){backend}($|-)", "", inside) if backend else inside
        writer.writerow((test.removeprefix("test_"), backend, case, outcome, words, device, versions))
    write_atomic(given.out, text.getvalue())
    for name, outcome, words in rows:
        if outcome == "failed":
            print("FAILED", name, words)
    print(dict(Counter(outcome for _, outcome, _ in rows)), given.out)
    return 1 if any(outcome == "failed" for _, outcome, _ in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
