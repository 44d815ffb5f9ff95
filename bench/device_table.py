"""Make a device table from what `glocal bench kernels` measured: rows for choosing backends and for forecasts.

python bench/device_table.py results/kernels-DEVICE.csv --name h100 --title "NVIDIA H100" --copy BYTES_PER_SECOND

Rows of whole calls (permutation included); `glocal env --measure` measures a table of its own kind on any machine.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import sys
from pathlib import Path

from glocal._files import write_atomic
from glocal.bench.kernel_cases import CASES
from glocal.plan.devices.table import DeviceTable, Direction, Kind, Measurement

ROOT = Path(__file__).resolve().parent.parent
DENSE = {"cuDNN dense": "dense", "FA4 dense": "fa4_dense"}


def rows(path: Path) -> tuple[list[Measurement], str]:
    """Measurements of one results file, and its versions."""
    cases = {(case.name, case.passes): case for case in CASES}
    found, versions, met = [], "", set()
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            case = cases.get((row["case"], row["pass"]))
            if case is None or not row["ms"] or case.ordered or case.shards or row["contender"] == "NATTEN":
                continue
            dense = row["contender"] in DENSE
            if row["contender"] in ("glocal auto", "FlashAttention-2 dense"):
                continue
            place = (row["contender"], case.canvas, case.passes)
            if dense and place in met:  # the same dense call stands beside several windows
                continue
            met.add(place)
            kind: Kind = "dense" if dense else "masked" if 1 in case.stride else "full"
            direction: Direction = "forward" if case.passes == "forward" else "backward"
            versions = row["versions"]
            found.append(
                Measurement(
                    kernel=DENSE.get(row["contender"], row["contender"]),
                    kind=kind,
                    direction=direction,
                    dtype="bfloat16",
                    heads=case.heads,
                    head_dim=case.head_dim,
                    canvas=case.canvas,
                    milliseconds=float(row["ms"]),
                    window=() if dense else case.window,
                    stride=case.stride if kind == "masked" else (),
                    q_tile=() if dense else case.tile,
                    kv_tile=() if dense else case.tile,
                )
            )
    return found, versions


def main() -> int:
    """Read, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--title", required=True, help="part of what the card calls itself")
    parser.add_argument("--copy", type=float, required=True, help="bytes a second of a copy, read and written")
    parser.add_argument("--processors", type=int, default=132)
    given = parser.parse_args()
    found, versions = rows(given.results)
    masked = {(m.kernel, m.direction, m.head_dim) for m in found if m.kind == "full" and m.block == (128, 128)}
    found = [m for m in found if m.kind != "masked" or (m.kernel, m.direction, m.head_dim) in masked]
    table = DeviceTable(
        name=given.name,
        title=given.title,
        date=datetime.date.today().isoformat(),
        source="glocal bench kernels: medians of interleaved rounds, random inputs, batch 1, permutation included",
        processors=given.processors,
        copy_bytes_per_second=given.copy,
        launch_seconds=None,
        measurements=tuple(found),
        software={"torch": versions.removeprefix("torch ")},
        copy_note="reordering of q, k and v together, bytes read and written (bench/permute.py)",
    )
    target = ROOT / "src" / "glocal" / "plan" / "devices" / f"{given.name}.json"
    write_atomic(target, table.to_json())
    print(f"{len(found)} rows: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
