"""The block masks of Scale-DiT (arXiv 2510.16325) for any image, without a mask of its tokens.

A block of the window-first sequence is a few runs of tokens in a row of the grid. Two blocks see each other if two of
their runs do, so the mask is made of comparisons of runs, and only for blocks whose bounding boxes are near.
`glocal.patterns.coarsen` of `GuidedWindows` with the rule "any" is the same mask from all pairs of tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout, Order, Part
from glocal.canvas.window_first import window_first
from glocal.patterns.blocks import Blocks
from glocal.patterns.guided import IMAGE, LOW, TEXT, GuidedWindows, half

Near = Callable[[Tensor, Tensor], Tensor]


def guided_order(pattern: GuidedWindows, canvas: Canvas) -> Order:
    """Image and low tokens window by window, other tokens as they lie."""
    pieces = []
    for number, _, index in canvas.runs():
        part = canvas.parts[number]
        if part.name == IMAGE:
            window = pattern.window
        elif part.name == LOW:
            window = pattern.low_tile(Layout.of(canvas))
        else:
            pieces.append(index)
            continue
        rows, columns = part.axes
        pieces.append(index[window_first((rows, columns), window)])
    tall, wide = pattern.window
    return Order(f"window-first{tall}x{wide}", torch.cat(pieces))


def guided_canvas(text: int, image: tuple[int, int], low: tuple[int, int]) -> Canvas:
    """[text, image, low], in tokens; no text leaves that part out."""
    scale = (image[0] / low[0], image[1] / low[1])
    parts = [Part(TEXT, text), Part(IMAGE, image), Part(LOW, low, scale=scale)]
    return Canvas([p for p in parts if p.tokens])


def guided_blocks(
    pattern: GuidedWindows,
    canvas: Canvas,
    q_block: int = 128,
    kv_block: int = 64,
    *,
    order: Order | None = None,
    full_only: bool = False,
) -> Blocks:
    """The mask that keeps a block of the sequence if any pair of its tokens is visible.

    pattern: of phase "inference". order: of the tokens, without pads; None: window-first. full_only: the published
    table, which ends with the last full block, and in which image tokens see nothing behind the last full block of
    queries; it fits sequences of whole blocks only.
    Raises ValueError for a pattern of training, and for windows that do not divide the image.
    """
    if pattern.phase != "inference":
        raise ValueError(f"guided_blocks: phase={pattern.phase!r}; legal: 'inference' (coarsen() takes any pattern).")
    layout = Layout.of(canvas)
    pattern.check(layout)
    order = guided_order(pattern, canvas) if order is None else order
    sides = (q_block, kv_block)
    counts = [canvas.size // b if full_only else -(-canvas.size // b) for b in sides]
    cut = min(counts[0] * q_block, canvas.size)  # tokens in blocks of queries
    last = min(counts[1] * kv_block, canvas.size)
    mask = torch.zeros(counts[0], counts[1], dtype=torch.bool)
    numbers = {p.name: n for n, p in enumerate(canvas.parts)}
    here = canvas.coords(order.gather)
    place = torch.arange(canvas.size)

    def atoms(part: str, block: int, end: int, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks of one part and their runs (row, first column, last column), [runs] and [runs, 3], in order."""
        of = (here.part == numbers.get(part, -1)) & (place < end)
        blocks, r, c = place[of] // block, rows[of], columns[of]
        if not blocks.numel():
            return blocks, blocks.new_zeros(0, 3)
        new = torch.ones_like(blocks, dtype=torch.bool)
        new[1:] = (blocks[1:] != blocks[:-1]) | (r[1:] != r[:-1]) | ((c[1:] - c[:-1]).abs() > 1) | (c[1:] < c[:-1])
        starts = new.nonzero().flatten()
        ends = torch.cat((starts[1:], starts.new_tensor([blocks.numel()]))) - 1
        return blocks[starts], torch.stack((r[starts], c[starts], c[ends]), 1)

    def put(q: str, k: str, near: Near, q_at: tuple[Tensor, Tensor], k_at: tuple[Tensor, Tensor]) -> None:
        end = cut if q == IMAGE else last
        (a, mine), (b, theirs) = atoms(q, q_block, cut, *q_at), atoms(k, kv_block, end, *k_at)
        if a.numel() and b.numel():
            _touch(mask, (a, mine), (b, theirs), near)

    flat = torch.zeros_like(place)
    at = here.axes[0], here.axes[1]
    image_shape = canvas.parts[numbers[IMAGE]].axes
    for q, k in ((TEXT, TEXT), (TEXT, IMAGE), (IMAGE, TEXT), *([(TEXT, LOW)] if pattern.text_sees_low else [])):
        put(q, k, _every, (flat, flat), (flat, flat))
    if pattern.local == "sliding":
        put(IMAGE, IMAGE, _reach(*half(pattern.window)), at, at)
    else:
        cells = pattern.cells(*at, image_shape)
        put(IMAGE, IMAGE, _cross, cells, cells)
    if LOW in numbers:
        ratio = pattern.ratio(layout)
        put(LOW, LOW, _reach(*half(pattern.low_tile(layout))), at, at)
        if pattern.guided:
            mine = pattern.number(*at, image_shape[1])
            theirs = pattern.number(*at, canvas.parts[numbers[LOW]].axes[1], ratio)
            put(IMAGE, LOW, _reach(1, 0), (mine, flat), (theirs, flat))
    return Blocks(mask, q_block, kv_block, order)


def _touch(mask: Tensor, q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], near: Near) -> None:
    """Set the blocks of which two runs are near; runs of one block of queries at a time meet all runs of keys."""
    blocks, runs = q
    columns, theirs = k
    cuts = blocks.unique_consecutive(return_counts=True)
    for block, mine in zip(cuts[0].tolist(), runs.split(cuts[1].tolist()), strict=True):
        seen = near(mine[:, None], theirs[None]).any(0)
        mask[block, columns[seen]] = True


def _every(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[0], k.shape[1], dtype=torch.bool)


def _reach(rows: int, columns: int) -> Near:
    def near(q: Tensor, k: Tensor) -> Tensor:
        apart = (q[..., 0] - k[..., 0]).abs() <= rows
        return apart & (k[..., 1] <= q[..., 2] + columns) & (k[..., 2] >= q[..., 1] - columns)

    return near


def _cross(q: Tensor, k: Tensor) -> Tensor:
    """Cells of windows: the same one or a neighbour of four."""
    rows = (q[..., 0] - k[..., 0]).abs()
    touch = (k[..., 1] <= q[..., 2]) & (k[..., 2] >= q[..., 1])
    beside = (k[..., 1] <= q[..., 2] + 1) & (k[..., 2] >= q[..., 1] - 1)
    return ((rows == 0) & beside) | ((rows == 1) & touch)
