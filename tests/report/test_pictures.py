"""PNG bytes decode to the very pixels; palettes, grey cells and averaging."""

import struct
import zlib

import numpy as np
import pytest

from glocal.report import data_uri, matrix_png, png_bytes, sprite_sheet
from glocal.report.pictures import DIM


def decode(png: bytes) -> np.ndarray:
    """RGB pixels by the PNG rules, one byte at a time."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, body, width, height = 8, b"", 0, 0
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at : at + 8])
        data = png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + data)
        if kind == b"IHDR":
            width, height = struct.unpack(">II", data[:8])
            assert data[8:] == bytes([8, 2, 0, 0, 0])
        if kind == b"IDAT":
            body += data
        at += 12 + size
    raw, stride = zlib.decompress(body), 3 * width
    rows = [[0] * stride]
    for y in range(height):
        kind, line = raw[y * (stride + 1)], raw[y * (stride + 1) + 1 : (y + 1) * (stride + 1)]
        row: list[int] = []
        for i, byte in enumerate(line):
            left, up = (row[i - 3] if i >= 3 else 0), rows[-1][i]
            row.append((byte + (0, left, up, (left + up) // 2)[kind]) % 256)
        rows.append(row)
    return np.asarray(rows[1:], dtype=np.uint8).reshape(height, width, 3)


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (17, 40)])
def test_png_holds_the_pixels(shape):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    smooth = np.broadcast_to(np.linspace(0, 255, shape[1]).astype(np.uint8)[None, :, None], (*shape, 3))
    for image in (noise, smooth):
        assert np.array_equal(decode(png_bytes(image)), image)


def test_nested_lists_are_pictures_too():
    assert decode(png_bytes([[[1, 2, 3], [255, 0, 9]]])).tolist() == [[[1, 2, 3], [255, 0, 9]]]


def test_bad_pictures_are_refused():
    with pytest.raises(ValueError, match=r"image must be \[H, W, 3\] and not empty, got shape \(2, 2\)"):
        png_bytes(np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match="image must hold integers 0 to 255, got float64"):
        png_bytes(np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match="palette is 'rainbow'; legal: ink, blue, diverging"):
        matrix_png(np.eye(2), palette="rainbow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="frames is empty"):
        sprite_sheet([])


def test_boolean_matrix_takes_the_ends_of_the_palette():
    pixels = decode(matrix_png(np.eye(3, dtype=bool), palette="ink", cell=2))
    assert pixels.shape == (6, 6, 3)
    assert pixels[0, 0].tolist() == [17, 22, 28] and pixels[0, 5].tolist() == [255, 255, 255]


def test_all_false_is_white_and_hidden_cells_are_grey():
    assert decode(matrix_png(np.zeros((2, 2), bool), palette="ink"))[0, 0].tolist() == [255, 255, 255]
    matrix = np.array([[0.0, np.nan], [1.0, 0.5]])
    pixels = decode(matrix_png(matrix, dim=np.array([[False, False], [True, False]])))
    assert pixels[0, 1].tolist() == list(DIM) and pixels[1, 0].tolist() == list(DIM)


def test_large_matrix_is_averaged():
    matrix = np.zeros((10, 6), bool)
    matrix[:4, :4] = True
    pixels = decode(matrix_png(matrix, palette="ink", max_side=3))
    assert pixels.shape == (3, 2, 3)
    assert pixels[0, 0].tolist() == [17, 22, 28] and pixels[2, 1].tolist() == [255, 255, 255]


def test_sprite_sheet_lays_frames_side_by_side():
    frames = [np.full((2, 3, 3), value, np.uint8) for value in (10, 20)]
    sheet = decode(sprite_sheet(frames))
    assert sheet.shape == (2, 6, 3) and sheet[0, 2, 0] == 10 and sheet[0, 3, 0] == 20
    assert data_uri(b"x") == "data:image/png;base64,eA=="
