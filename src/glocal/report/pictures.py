"""Matrices and frames as PNG bytes, written with zlib alone.

PNG (ISO/IEC 15948): 8 bits a channel, RGB; each row takes the filter (none, sub, up, average) with the smallest sum of
absolute residuals.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

Palette = Literal["ink", "blue", "diverging"]

# Colour stops from low to high, read at even distances.
_PALETTES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "ink": ((255, 255, 255), (17, 22, 28)),
    "blue": ((246, 248, 251), (158, 190, 226), (47, 105, 176), (14, 42, 92)),
    "diverging": ((168, 74, 16), (244, 214, 186), (248, 248, 248), (186, 208, 236), (24, 78, 150)),
}
DIM = (222, 225, 229)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bytes(image: Any) -> bytes:
    """PNG of a uint8 picture [H, W, 3] (an array, or nested lists of integers 0 to 255)."""
    import numpy as np

    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"image must be [H, W, 3] and not empty, got shape {pixels.shape}")
    if not np.issubdtype(pixels.dtype, np.integer) or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"image must hold integers 0 to 255, got {pixels.dtype} in [{pixels.min()}, {pixels.max()}]")
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(_filtered(pixels.astype(np.int16)), 9)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _filtered(pixels: np.ndarray) -> bytes:
    import numpy as np

    height = pixels.shape[0]
    left, up = np.zeros_like(pixels), np.zeros_like(pixels)
    left[:, 1:], up[1:] = pixels[:, :-1], pixels[:-1]
    choices = np.stack([pixels, pixels - left, pixels - up, pixels - (left + up) // 2])  # [4, H, W, 3]
    residuals = (choices & 255).reshape(4, height, -1)
    cost = np.minimum(residuals, 256 - residuals).sum(axis=2)  # [4, H]
    best = cost.argmin(axis=0)
    rows = np.empty((height, residuals.shape[2] + 1), dtype=np.uint8)
    rows[:, 0] = best
    rows[:, 1:] = residuals[best, np.arange(height)]
    return rows.tobytes()


def matrix_png(
    matrix: Any,
    *,
    palette: Palette = "blue",
    low: float | None = None,
    high: float | None = None,
    cell: int = 1,
    dim: Any = None,
    max_side: int | None = None,
) -> bytes:
    """Picture of a boolean or float matrix [H, W]: rows are queries, columns keys.

    low, high: values of the first and last colour (default: 0 and 1 for booleans, else the extremes). cell: pixels a
    side of one entry. dim: boolean [H, W], entries drawn in grey instead (say, left dense on purpose). NaN is grey too.
    max_side: average square groups of entries until neither side exceeds it (for masks of thousands of tokens).
    """
    import numpy as np

    if palette not in _PALETTES:
        raise ValueError(f"palette is {palette!r}; legal: {', '.join(_PALETTES)}")
    if cell < 1:
        raise ValueError(f"cell must be at least 1 pixel, got {cell!r}")
    values = np.asarray(matrix)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"matrix must be [H, W] and not empty, got shape {values.shape}")
    boolean = values.dtype == np.bool_
    values = values.astype(np.float64)
    if dim is not None:
        values = np.where(np.asarray(dim, dtype=np.bool_), np.nan, values)
    if max_side is not None and max(values.shape) > max_side:
        values = _shrunk(values, -(-max(values.shape) // max_side))
    hidden = ~np.isfinite(values)
    seen = values[~hidden]
    first = (0.0 if boolean or seen.size == 0 else float(seen.min())) if low is None else low
    last = (1.0 if boolean or seen.size == 0 else float(seen.max())) if high is None else high
    span = last - first
    place = np.clip((np.where(hidden, first, values) - first) / (1.0 if span == 0 else span), 0.0, 1.0)
    stops = np.asarray(_PALETTES[palette], dtype=np.float64)
    knots = np.linspace(0.0, 1.0, len(stops))
    colours = np.stack([np.interp(place, knots, stops[:, channel]) for channel in range(3)], axis=-1)  # [H, W, 3]
    colours[hidden] = DIM
    return png_bytes(np.rint(colours).astype(np.uint8).repeat(cell, axis=0).repeat(cell, axis=1))


def _shrunk(values: np.ndarray, factor: int) -> np.ndarray:
    """Mean of the finite entries of each factor x factor group; groups at the far edges may be smaller."""
    import numpy as np

    finite = np.isfinite(values)
    rows, columns = (np.arange(0, side, factor) for side in values.shape)

    def grouped(x: np.ndarray) -> np.ndarray:
        return np.add.reduceat(np.add.reduceat(x, rows, axis=0), columns, axis=1)

    counts = grouped(finite.astype(np.float64))
    sums = grouped(np.where(finite, values, 0.0))
    return np.where(counts > 0, sums / np.maximum(counts, 1.0), np.nan)


def sprite_sheet(frames: Sequence[Any]) -> bytes:
    """PNG of equal uint8 frames [H, W, 3], laid side by side in order of time."""
    import numpy as np

    pictures = [np.asarray(frame) for frame in frames]
    if not pictures:
        raise ValueError("frames is empty; a sprite sheet needs at least 1 frame")
    shapes = {picture.shape for picture in pictures}
    if len(shapes) > 1:
        raise ValueError(f"frames must be of one shape, got {sorted(shapes)}")
    return png_bytes(np.concatenate(pictures, axis=1))


def data_uri(png: bytes) -> str:
    """PNG bytes as a data URI, so that a page carries its pictures inside."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
