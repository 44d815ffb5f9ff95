"""Orders by name, so that a recipe or a command line can say in which sequence tokens lie."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from glocal.canvas import curves
from glocal.canvas.orders import Order, raster, tile
from glocal.canvas.parts import Canvas

_LETTERS = {1: "w", 2: "hw", 3: "thw"}


def named(canvas: Canvas, name: str, *, block: int = 1, part: str | None = None) -> Order:
    """The order called `name` on the grid of the canvas (or on `part`); other parts stay as they lie.

    name: "raster", "gilbert", "hilbert", "snake", an axis permutation such as "wht" (slowest axis first, letters of
        t, h, w), or "tile4x8x8" (then `block` must stay 1: the tile is the block).
    block: pads the end of every part to whole blocks of so many tokens, so that no block holds two parts.
    Raises ValueError for unknown names and for canvases an order cannot fill.
    """
    if name == "raster":
        return raster(canvas, block)
    boxes = re.fullmatch(r"tile(\d+(?:x\d+)*)", name)
    if boxes:
        if block != 1:
            raise ValueError(f"named: order {name!r} has blocks of its own; block={block} must stay 1.")
        return tile(canvas, [int(n) for n in boxes[1].split("x")], part=part)
    grid = canvas.grid if part is None else canvas.parts[canvas.number(part)]
    return _arranged(canvas, canvas.number(grid.name), _path(grid.axes, name), name, block)


def _path(shape: tuple[int, ...], name: str) -> Tensor:
    if name == "gilbert":
        return curves.gilbert(shape)
    if name == "hilbert":
        return curves.hilbert(shape)
    if name == "snake":
        return curves.snake(shape)
    letters = _LETTERS.get(len(shape), "")
    if letters and sorted(name) == sorted(letters):
        return curves.axes(shape, [letters.index(letter) for letter in name])
    raise ValueError(
        f"order {name!r} is unknown on a grid {shape}; legal: 'raster', 'gilbert', 'hilbert', 'snake', a permutation "
        f"of the letters {letters!r}, or a tile such as {'tile' + 'x'.join(['4'] * len(shape))!r}."
    )


def _arranged(canvas: Canvas, number: int, path: Tensor, name: str, block: int) -> Order:
    label = f"{name}/{block}@{canvas.parts[number].name}"
    if any(p.times > 1 for p in canvas.parts):
        gather = torch.arange(canvas.size, device="cpu")
        index = canvas.indices(canvas.parts[number].name)
        gather[index] = index[path]  # interleaved parts keep their places
        return Order(label, pad(gather, (0, -canvas.size % block), value=-1), block)
    pieces = []
    for run, tokens, index in canvas.runs():
        pieces.append(pad(index[path] if run == number else index, (0, -tokens % block), value=-1))
    return Order(label, torch.cat(pieces), block)


def per_head_orders(orders: Sequence[Order]) -> Order:
    """One order a head, as a single gather list [heads, N'] (shorter ones are padded at their end)."""
    if not orders:
        raise ValueError("per_head_orders: orders=[] holds no order; give one for each head.")
    sizes = {order.block for order in orders}
    if len(sizes) > 1:
        raise ValueError(f"per_head_orders: orders have different block sizes {sorted(sizes)}; use one for all heads.")
    longest = max(order.gather.shape[-1] for order in orders)
    rows = []
    for order in orders:
        if order.gather.dim() != 1:
            raise ValueError(f"per_head_orders: order {order.name!r} is not one list but {tuple(order.gather.shape)}.")
        rows.append(pad(order.gather, (0, longest - order.gather.numel()), value=-1))
    return Order("+".join(order.name for order in orders), torch.stack(rows), orders[0].block)
