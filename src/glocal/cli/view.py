"""glocal view: pictures of a recipe's patterns, of masks and plans in a file, or of a pattern on a canvas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glocal._errors import check_file
from glocal.cli._common import Json, check_folder, extents, print_json, print_table

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 1024  # longest side of a block map in pixels


@dataclass(frozen=True)
class Drawn:
    """One picture. kept: share of ones or of visible pairs, None where that says nothing."""

    file: str
    what: str
    kept: float | None
    png: bytes


def command(
    what: Annotated[str, typer.Argument(help="recipe.json, a .safetensors of masks, or a pattern's name.")],
    canvas: Annotated[
        str | None, typer.Option(help="Tokens per axis; for patterns, and for recipes without one.")
    ] = None,
    query: Annotated[
        str | None, typer.Option(help="The query of a pattern, such as 8x8x8 (default: the middle).")
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of pairs that a pattern's windows are made for.")] = 0.25,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the pictures.")] = Path("out/view"),
    json: Json = False,
) -> None:
    """Draw patterns, recipes, masks and plans as PNG files."""
    check_folder(out)
    path = Path(what)
    shape = None if canvas is None else extents(canvas, "--canvas")
    if path.suffix == ".json":
        pictures = list(_recipe(path, shape))
    elif path.suffix == ".safetensors":
        pictures = list(_tensors(path))
    elif path.exists() or path.suffix:
        raise ValueError(f"{what!r}: legal: a recipe.json, a .safetensors file, or a pattern's name with --canvas")
    else:
        pictures = list(_pattern(what, shape, query, keep))
    _write(pictures, out)
    rows = [{"file": str(out / p.file), "what": p.what, "kept": p.kept} for p in pictures]
    if json:
        print_json(rows)
        return
    print_table(
        ("file", "what", "kept %"),
        [(r["file"], r["what"], None if r["kept"] is None else round(100 * r["kept"], 2)) for r in rows],
    )


def _write(pictures: list[Drawn], out: Path) -> None:
    from glocal._files import write_atomic

    for picture in pictures:  # all are drawn by now; each appears whole
        write_atomic(out / picture.file, picture.png)


def _pattern(name: str, shape: tuple[int, ...] | None, query: str | None, keep: float) -> Iterator[Drawn]:
    """What a query sees, and the block map of the plan."""
    from glocal.bench.contenders import contenders
    from glocal.canvas import Canvas
    from glocal.cli._seen import seen_png
    from glocal.patterns import Pattern
    from glocal.plan import plan

    if shape is None:
        raise ValueError(f"pattern {name!r} needs --canvas, such as --canvas 16x16x16")
    one = contenders(shape, 2, keep, [name])[0]
    if not isinstance(one.method, Pattern):
        raise ValueError(f"{name!r} looks at q and k, so a canvas alone has no picture of it; nearest: tile windows")
    place = tuple(n // 2 for n in shape) if query is None else _place(query, shape)
    drawn = seen_png(one.method, shape, place)
    made = plan(one.method, Canvas(shape))
    title = f"{one.name}, {one.what}"
    asked = "x".join(map(str, place))
    yield Drawn(f"{_slug(name)}.png", f"{title}: keys that query {asked} sees", None, drawn)
    yield Drawn(f"{_slug(name)}-blocks.png", f"{title}: {_blocks(made)}", made.kept, _map(made.block_shares()))


def _place(text: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Read a place of the canvas such as 0x8x8."""
    parts = text.lower().split("x")
    legal = "x".join(f"0..{n - 1}" for n in shape)
    if not all(part.isdecimal() for part in parts) or len(parts) != len(shape):
        raise ValueError(f"--query {text!r} is no place of the canvas; legal: {legal}")
    place = tuple(int(part) for part in parts)
    if any(x >= n for x, n in zip(place, shape, strict=True)):
        nearest = "x".join(str(min(x, n - 1)) for x, n in zip(place, shape, strict=True))
        raise ValueError(f"--query {text!r} lies outside the canvas; legal: {legal}; nearest: {nearest}")
    return place


def _recipe(path: Path, shape: tuple[int, ...] | None) -> Iterator[Drawn]:
    """The block map of every method, and which method runs where."""
    from glocal.advise.recipe import Recipe
    from glocal.canvas import Canvas, Layout

    recipe = Recipe.load(path)
    if not recipe.methods:
        raise ValueError(f"{str(path)!r} has status {recipe.status!r} and no method: nothing to draw")
    canvases = recipe.workload.get("canvases")
    if shape is None:
        if not canvases:
            raise ValueError(f"{str(path)!r} names no canvas; give one with --canvas, such as --canvas 16x16x16")
        shape = tuple(canvases[0]["shape"])
    layout = Layout.of(Canvas(shape))
    for name, method in recipe.methods.items():
        if method.kind != "pattern":
            continue  # a router has no picture without q and k
        made = method.plan(layout)
        words = f"{name}: {method.words()}, {_blocks(made)}"
        yield Drawn(f"{_slug(name)}.png", words, made.kept, _map(made.block_shares()))
    if recipe.rules:
        yield _rules(recipe)


def _rules(recipe: Any) -> Drawn:
    """Layers down, heads across: how much of the noise levels runs sparse."""
    import numpy as np

    from glocal.report import matrix_png

    layers = 1 + max(last for rule in recipe.rules for _, last in rule.layers)
    heads = 1 + max((max(rule.heads) for rule in recipe.rules if rule.heads != "all" and rule.heads), default=0)
    share = np.zeros((layers, heads))
    for rule in recipe.rules:
        if rule.use == "dense":
            continue
        part = rule.phase.high - rule.phase.low if rule.phase.coordinate in ("sigma", "progress") else 1.0
        part *= 0.5 if rule.branch != "both" else 1.0
        columns = range(heads) if rule.heads == "all" else rule.heads
        for first, last in rule.layers:
            for head in columns:
                share[first : last + 1, head] += part
    png = matrix_png(np.minimum(share, 1.0), low=0.0, high=1.0, cell=24)
    return Drawn("rules.png", f"rules: share of the run that is sparse, {layers} layers x {heads} heads", None, png)


def _tensors(path: Path) -> Iterator[Drawn]:
    """Every two-dimensional slice of the matrices in a file; a plan's tensors are drawn as one block map."""
    from safetensors import SafetensorError, safe_open

    check_file("FILE", path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata()
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is no safetensors file: {error}") from error
    if {"full_count", "full_index", "part_count", "part_index"} <= set(tensors):
        yield _plan(tensors)
        return
    drawn = 0
    for name, tensor in tensors.items():
        if tensor.dim() < 2 or 0 in tensor.shape or tensor.is_complex():
            continue
        flat = tensor.reshape(-1, *tensor.shape[-2:])
        for number, matrix in enumerate(flat[:_SLICES]):
            suffix = "" if len(flat) == 1 else f"-{number}"
            kept = float((matrix != 0).double().mean()) if not matrix.dtype.is_floating_point else None
            words = f"{name} {'x'.join(map(str, tensor.shape))}" + ("" if len(flat) == 1 else f", slice {number}")
            yield Drawn(f"{_slug(name)}{suffix}.png", words, kept, _map(matrix))
            drawn += 1
    if not drawn:
        found = ", ".join(f"{n} {tuple(t.shape)}" for n, t in tensors.items())
        note = "" if metadata is None else f" (metadata: {', '.join(metadata)})"
        raise ValueError(
            f"{str(path)!r} holds no matrix: {found if found else 'nothing'}{note}; legal: masks [..., q, k]"
        )


_SLICES = 16  # heads or samples of one tensor that are drawn


def _plan(tensors: Mapping[str, Tensor]) -> Drawn:
    """Full blocks dark, partial ones light, hidden ones white."""
    import torch

    from glocal.plan.blockplan import BlockLists

    count, index = tensors["full_count"], tensors["full_index"]
    order = tensors.get("kv_order")
    used = [int(tensors[f"{kind}_index"].max()) + 1 for kind in ("full", "part") if tensors[f"{kind}_index"].numel()]
    columns = max(used, default=1)
    picture = torch.zeros(count.shape[1], columns)
    for kind, value in (("part", 0.5), ("full", 1.0)):
        count, index = tensors[f"{kind}_count"], tensors[f"{kind}_index"]
        _, row, column, _ = BlockLists(count, index).entries()
        picture[row, column] = value
    note = "" if order is None else f", {order.shape[-1]} key slots"
    words = f"plan: {picture.shape[0]} query blocks x {columns} key blocks, full dark, partial light{note}"
    return Drawn("plan.png", words, float((picture > 0).float().mean()), _map(picture))


def _map(matrix: Tensor) -> bytes:
    from glocal.report import matrix_png

    values = matrix.detach().cpu()
    values = values.float() if values.dtype.is_floating_point else values
    cell = max(1, min(16, SIDE // 2 // max(values.shape)))
    return matrix_png(values.numpy(), low=None if values.dtype.is_floating_point else 0.0, cell=cell, max_side=SIDE)


def _blocks(made: Any) -> str:
    return f"{made.q_blocks} x {made.kv_blocks} blocks of {made.q_block} x {made.kv_block}, visited {made.visited:.1%}"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-").replace("--", "-")
