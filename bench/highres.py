"""Pictures of one, two and four times the trained side by every high-resolution method, into results/highres.csv.

    python bench/highres.py --device cuda                      # 48 seeds, minutes
    python bench/highres.py --sides 256 --seeds 24 --carry A.csv B.csv    # rows of A and B stay where these are not new
    python bench/highres.py --seeds 2 --sides 128 --models unet --out /tmp/highres.csv --pictures /tmp/highres

The captions say count, colour and place of objects that training never saw together; objects are found in the pictures
by their hue (`glocal.measure.find_objects`) and compared with them:

right: share of the named objects that stand exactly once in the picture, in the named ninth (0.08 of the side beyond it
counts); whole: share of pictures where all do and nothing else is there; extra: objects too many, a picture; missing:
share of the named objects; detail: what a picture loses when it is reduced to the trained side, over what the painted
scene of the caption loses (1 is as sharp as painted; above 1 there is more texture than there should be).

Every method has the same captions and noises, but for C-Upscale, which draws a noise of its own. gain is the mean of
paired differences to "naive" at the same side, with a t interval of 90 % over seeds; better says whether the whole
interval lies on the good side. First the measure is checked: in the painted scenes every object must be found, once,
in its place, and nothing else.

The folder of pictures has one strip a model, side and method: the first captions, reduced to 128 px where larger, in
steps of 16 of 256 levels, so that they stay small.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from highres_methods import Way, detail, drawn, ways
from torch import Tensor

from glocal._files import write_atomic
from glocal.data.captions import caption_of, caption_tokens
from glocal.data.objects import COLOURS, Layouts
from glocal.data.pictures import at_side, draw_pictures, paint
from glocal.measure import WantedObject, agreement, find_objects
from glocal.measure.stats import paired
from glocal.models.built_in import WEIGHTS
from glocal.models.generation import PictureModel, draw_picture_noise, load_picture_model, to_pictures
from glocal.models.generation.picture_model import SIDE
from glocal.report.pictures import png_bytes

ROOT = Path(__file__).resolve().parent.parent
HEADER = ["model", "method", "side", "measure", "seeds", "mean", "low", "high"]
HEADER += ["gain", "gain_low", "gain_high", "better", "device", "torch"]
Row = list[Any]
GOOD = {"right": 1, "whole": 1, "extra": -1, "missing": -1, "detail": 0}
SCENES, POOL = 51_000, 48  # seed of the captions, and how many are drawn at least: runs of fewer share the first
SHOWN = 4
CELL = 128  # side of a shown picture


def wanted(layouts: Layouts, index: int) -> list[WantedObject]:
    """What the caption of a scene asks for: colours, and ninths of the picture a little widened."""
    found = []
    for k in layouts.present[index].nonzero().flatten().tolist():
        column, row = (layouts.middle[index, k] / layouts.spec.side * 3).long().clamp(0, 2).tolist()
        box = (column / 3 - 0.08, row / 3 - 0.08, (column + 1) / 3 + 0.08, (row + 1) / 3 + 0.08)
        found.append(WantedObject(int(layouts.colour[index, k]), box))
    return found


def judged(pictures: Tensor, layouts: Layouts) -> dict[str, list[float]]:
    """Measures of each picture [B, 3, H, W] against its scene."""
    palette = torch.tensor(list(COLOURS.values()), device=pictures.device)
    truth = paint(at_side(layouts, pictures.shape[-1]).to(pictures.device))
    measures: dict[str, list[float]] = {name: [] for name in GOOD}
    for index, found in enumerate(find_objects(pictures, palette)):
        a = agreement(found, wanted(layouts, index))
        measures["right"].append(a.right / a.wanted)
        measures["whole"].append(float(a.right == a.wanted == a.found))
        measures["extra"].append(float(a.repeated + a.strange))
        measures["missing"].append(a.missing / a.wanted)
    if pictures.shape[-1] > SIDE:
        measures["detail"] = (detail(pictures, SIDE) / detail(truth, SIDE)).tolist()
    else:
        del measures["detail"]
    return measures


def check(painted: Tensor, layouts: Layouts) -> None:
    """AssertionError unless painted scenes are judged to be perfect."""
    got = judged(painted, layouts)
    assert min(got["whole"]) == 1.0 and max(got["extra"]) == 0.0, f"painted scenes are judged as {got}"


def draw(way: Way, model: PictureModel, layouts: Layouts, side: int, small: Tensor, batch: int) -> Tensor:
    """Pictures [B, 3, side, side] of all scenes, some at a time."""
    from highres_methods import Job

    device = small.device
    tokens = caption_tokens(layouts).to(device)
    made = []
    for start in range(0, len(layouts), batch):
        rows = slice(start, min(start + batch, len(layouts)))
        noise = draw_picture_noise(range(start, rows.stop), side, side).to(device)
        made.append(to_pictures(way(Job(model, tokens[rows], noise, small[rows]))))
    return torch.cat(made)


def rows_of(kind: str, method: str, side: int, got: dict[str, list[float]], base: dict[str, list[float]]) -> list[Row]:
    """Rows of one method at one side."""
    rows = []
    for measure, values in got.items():
        mine = paired(values)
        if method == "naive":
            gain = ["", "", "", ""]
        else:
            change = paired([a - b for a, b in zip(values, base[measure], strict=True)])
            low, high = change.low, change.high
            sign = GOOD[measure]
            better = "" if not sign else ("yes" if sign * low > 0 and sign * high > 0 else "unclear")
            if sign and sign * low < 0 and sign * high < 0:
                better = "no"
            gain = [f"{change.mean:.4f}", f"{low:.4f}", f"{high:.4f}", better]
        numbers = [f"{n:.4f}" for n in (mine.mean, mine.low, mine.high)]
        rows.append([kind, method, side, measure, len(values), *numbers, *gain])
    return rows


def strip(pictures: Tensor) -> bytes:
    """PNG of the first pictures [n, 3, H, W] side by side."""
    shown = pictures[:SHOWN].cpu()
    if shown.shape[-1] > CELL:
        shown = torch.nn.functional.interpolate(shown, (CELL, CELL), mode="bilinear", antialias=True)
    elif shown.shape[-1] < CELL:
        shown = torch.nn.functional.interpolate(shown, (CELL, CELL), mode="nearest-exact")
    levels = torch.cat(list(shown), 2).mul(255 / 16).round().mul(16).clamp(max=255)
    return png_bytes(levels.byte().permute(1, 2, 0).numpy())


def strip_name(kind: str, side: int, method: str) -> str:
    """File of a strip."""
    return f"{kind}_{side}_{re.sub(r'[^a-z0-9_]+', '-', method.lower())}.png"


def write_rows(rows: list[Row], path: Path) -> None:
    """The table, whole or not at all."""
    ordered = sorted(rows, key=lambda row: (row[0], int(row[2]), row[1] != "naive"))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(ordered)
    write_atomic(path, table.getvalue())


def carried(paths: list[Path]) -> list[Row]:
    """Rows of tables."""
    found = []
    for path in paths:
        with path.open(newline="") as file:
            found += list(csv.reader(file))[1:]
    return found


def most_seeds(rows: list[Row]) -> list[Row]:
    """Of the rows of each model, side and method those with most seeds, of equals the last."""

    def key(row: Row) -> tuple[str, ...]:
        return row[0], str(row[2]), row[1]

    most: dict[tuple[str, ...], int] = {}
    for row in rows:
        most[key(row)] = max(most.get(key(row), 0), int(row[4]))
    found = {(*key(row), row[3]): row for row in rows if int(row[4]) == most[key(row)]}
    return list(found.values())


def _first(layouts: Layouts, count: int) -> Layouts:
    """The first scenes of a batch."""
    return replace(layouts, **{f.name: getattr(layouts, f.name)[:count] for f in fields(layouts) if f.name != "spec"})


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[48], help="one number, or one a side")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--models", nargs="*", default=["unet", "dit"])
    parser.add_argument("--ways", nargs="+", help="these methods alone, beside naive")
    parser.add_argument("--backend", default="auto", help="of sparse attention; reference needs no compiler")
    parser.add_argument("--wait", action="store_true", help="for the files of the models to be written")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of image_unet and image_dit")
    parser.add_argument("--parts", type=Path, default=WEIGHTS, help="folder of trained parts")
    parser.add_argument("--carry", type=Path, nargs="*", default=[], help="tables whose rows stay where none is new")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "highres.csv")
    parser.add_argument("--pictures", type=Path, default=ROOT / "results" / "highres")
    options = parser.parse_args()
    seeds = options.seeds if len(options.seeds) > 1 else options.seeds * len(options.sides)
    if not options.models:  # tables alone
        write_rows(most_seeds(carried(options.carry)), options.out)
        return
    layouts = draw_pictures(max(POOL, *seeds), torch.Generator().manual_seed(SCENES))
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    kept = carried(options.carry)
    rows: list[Row] = []
    for kind in options.models:
        file = options.weights / f"image_{kind}.safetensors"
        while options.wait and not file.is_file():
            time.sleep(0.2)
        model = load_picture_model(file, options.device)
        tokens = caption_tokens(layouts).to(options.device)
        small = drawn(model, tokens, draw_picture_noise(range(len(layouts))).to(options.device))
        for side, count in zip(options.sides, seeds, strict=True):
            base: dict[str, list[float]] = {}
            scenes = _first(layouts, count)
            painted = paint(at_side(scenes, side))
            check(painted, scenes)
            write_atomic(options.pictures / strip_name(kind, side, "painted"), strip(painted))
            for method, way in ways(kind, options.parts, options.backend).items():
                wanted_here = options.ways is None or method in (*options.ways, "naive")
                if not wanted_here or (side == SIDE and method != "naive"):
                    continue
                pictures = draw(way, model, scenes, side, small, options.batch)
                got = judged(pictures, scenes)
                base = got if method == "naive" else base
                found = rows_of(kind, method, side, got, base)
                rows += [[*row, name, torch.__version__] for row in found]
                print(kind, side, method, {r[3]: r[5] for r in found}, flush=True)
                # After every method, so that a run that is cut short leaves what it has.
                write_rows(most_seeds([*kept, *rows]), options.out)
                write_atomic(options.pictures / strip_name(kind, side, method), strip(pictures))
    words = [caption_of(layouts, i) for i in range(min(SHOWN, len(layouts)))]
    write_atomic(options.pictures / "captions.txt", "\n".join(words) + "\n")


if __name__ == "__main__":
    main()
