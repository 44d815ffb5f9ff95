"""Golden cases through our code, on every backend of this machine, into results/parity.csv.

python bench/parity.py                     # the cases of tests/golden
python bench/parity.py ../shared/golden    # those of another folder of folders
python bench/parity.py --device cuda --merge --system gna    # some of them; rows of other calls stay in the file
Exit code 1 if a case fails; the file is written all the same. `glocal list` and the documentation read it.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path

import torch

from glocal._files import write_atomic
from glocal._progress import TextProgress
from glocal.testing.parity import adapters, check_all, table

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "parity.csv"


def merged(old: str, new: str) -> str:
    """Both tables, with the rows of `new` where both have a case on one backend and device."""
    names, *rows = csv.reader(io.StringIO(old))
    found = {tuple(row[:4]): row for row in rows} | {
        tuple(row[:4]): row for row in list(csv.reader(io.StringIO(new)))[1:]
    }
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([names, *(found[key] for key in sorted(found))])
    return text.getvalue()


def main() -> int:
    """Run, write, and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", nargs="?", type=Path, default=ROOT / "tests" / "golden")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", action="append", help="repeat for several; default: all for the device")
    parser.add_argument("--system", action="append", help="repeat for several; default: all")
    parser.add_argument("--merge", action="store_true", help="keep rows of the file that were not made again")
    parser.add_argument("-o", "--out", type=Path, default=OUT)
    given = parser.parse_args()
    wanted = [slug for slug in adapters() if given.system is None or slug in given.system]
    files = sorted(file for slug in wanted for file in (given.golden / slug).glob("*") if file.is_file())
    if not files:
        print(f"error: {given.golden} holds no folder of {', '.join(wanted or given.system)}", file=sys.stderr)
        return 2
    progress = TextProgress()
    results = check_all(files, given.device, ("all",) if given.backend is None else given.backend, progress)
    progress.close()
    made = table(results)
    write_atomic(given.out, merged(given.out.read_text(), made) if given.merge and given.out.exists() else made)
    failed = [r for r in results if not r.passed and not r.skipped]
    for r in failed:
        print(f"{r.system}/{r.case} on {r.backend}: {r.verdict}")
    skipped = sum(bool(r.skipped) for r in results)
    print(f"{len(results) - len(failed) - skipped} passed, {len(failed)} failed, {skipped} skipped: {given.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
