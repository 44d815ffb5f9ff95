"""Masks of a large grid under the guidance of a small one, and their blocks without a mask of tokens."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout
from glocal.canvas.orders import raster
from glocal.patterns import coarsen
from glocal.patterns.guided import GuidedWindows
from glocal.patterns.guided_blocks import guided_blocks, guided_canvas, guided_order

CANVAS = guided_canvas(5, (16, 24), (4, 6))


def kept(blocks: object) -> Tensor:
    found = blocks.kept  # type: ignore[attr-defined]
    assert isinstance(found, Tensor)
    return found


def sees(pattern: GuidedWindows, q: str, k: str, canvas: Canvas = CANVAS) -> Tensor:
    mask = pattern.mask(Layout.of(canvas))[0]
    return mask[canvas.indices(q)][:, canvas.indices(k)]


def test_inference_as_published() -> None:
    pattern = GuidedWindows((8, 8))
    for q, k, share in (("text", "text", 1), ("text", "image", 1), ("image", "text", 1), ("text", "low", 0)):
        assert bool((sees(pattern, q, k) == bool(share)).all())
    assert not sees(pattern, "low", "text").any()
    assert not sees(pattern, "low", "image").any()
    image = sees(pattern, "image", "image").reshape(16, 24, 16, 24)
    assert image[8, 10].nonzero().amin(0).tolist() == [4, 6]
    assert image[8, 10].nonzero().amax(0).tolist() == [12, 14]
    assert int(image[0, 0].sum()) == 25  # cut at the border, not shifted
    guide = sees(pattern, "image", "low").reshape(16, 24, 4, 6)
    assert guide[0, 0].tolist() == [[True] * 4 + [False] * 2] * 2 + [[False] * 6] * 2  # windows 0 and 1 of 2 x 3
    assert guide[0, 23][2:, :2].all()  # window 2 sees window 3: numbers run on over the end of a row
    assert int(sees(pattern, "low", "low").reshape(4, 6, 4, 6)[2, 3].sum()) == 9


def test_four_neighbours_wrap_inside_a_window_but_not_around_the_image() -> None:
    image = sees(GuidedWindows((8, 8), "four"), "image", "image").reshape(16, 24, 16, 24)
    assert image[0, 0, 15, 23]  # the window that sticks out
    assert image[0, 0, 7, 0]
    assert image[0, 0, 0, 7]
    assert not image[0, 0, 7, 7]  # diagonal
    assert not image[0, 0, 0, 15]


def test_training_lets_low_tokens_read_and_groups_many_of_them() -> None:
    few = GuidedWindows((8, 8), phase="training", text_sees_low=True)
    assert sees(few, "low", "text").all()
    assert sees(few, "text", "low").all()
    assert sees(few, "image", "low").all()
    assert sees(few, "low", "low").all()
    assert not sees(GuidedWindows((8, 8), phase="training", guided=False), "image", "low").any()
    large = guided_canvas(3, (40, 40), (20, 20))  # 400 low tokens
    low = sees(GuidedWindows((8, 8), phase="training"), "low", "low", large)
    assert torch.equal(low, torch.arange(400)[:, None] // 256 == torch.arange(400) // 256)
    runs = sees(GuidedWindows((8, 8), phase="training"), "image", "low", large)
    assert torch.equal(runs[:, :384].sum(1), torch.where(torch.arange(1600) < 6 * 266, 64, 0))
    windows = sees(GuidedWindows((8, 8), phase="training", window_first=True), "image", "low", large)
    assert windows.reshape(40, 40, 400)[0, 0].nonzero().flatten().tolist() == list(range(64))
    assert torch.equal(windows.reshape(40, 40, 400)[0, 0], windows.reshape(40, 40, 400)[7, 31])  # windows 0 to 3
    assert not torch.equal(windows.reshape(40, 40, 400)[0, 0], windows.reshape(40, 40, 400)[0, 32])


@pytest.mark.parametrize("text", [0, 5, 37])
@pytest.mark.parametrize("local", ["sliding", "four"])
@pytest.mark.parametrize("windows", [True, False])
def test_blocks_from_runs_are_those_of_all_pairs(text: int, local: Literal["sliding", "four"], windows: bool) -> None:
    pattern, canvas = GuidedWindows((8, 8), local), guided_canvas(text, (24, 32), (6, 8))
    order = guided_order(pattern, canvas) if windows else raster(canvas)
    ours = guided_blocks(pattern, canvas, 32, 16, order=order)
    assert torch.equal(kept(ours), kept(coarsen(pattern, canvas, 32, 16, "any", order)))


def test_the_published_table_leaves_out_what_fills_no_block() -> None:
    pattern, canvas = GuidedWindows(), guided_canvas(512, (32, 32), (8, 8))  # 1600 tokens: 12.5 blocks of queries
    table, whole = kept(guided_blocks(pattern, canvas, full_only=True)), kept(guided_blocks(pattern, canvas))
    assert table.shape == (1, 12, 25)
    assert not table[..., 24].any()
    assert torch.equal(table[..., :24], whole[:, :12, :24])
    assert whole[0, 4:12, 24].all()


def test_low_tokens_of_the_published_table_see_half_a_block_more() -> None:
    canvas = guided_canvas(512, (48, 64), (12, 16))  # 3776 tokens: 29.5 blocks of queries, 59 of keys
    table, whole = (
        kept(guided_blocks(GuidedWindows(), canvas, full_only=True)),
        kept(guided_blocks(GuidedWindows(), canvas)),
    )
    assert table.shape == (1, 29, 59)
    assert not table[0, :28, 58].any()
    assert table[0, 28, 58]
    assert torch.equal(table[0, 28], whole[0, 28])


def test_windows_of_low_tokens_may_be_given() -> None:
    canvas = guided_canvas(0, (16, 16), (8, 8))
    wide = sees(GuidedWindows((8, 8)), "low", "low", canvas).reshape(8, 8, 8, 8)
    narrow = sees(GuidedWindows((8, 8), low_window=(2, 2)), "low", "low", canvas).reshape(8, 8, 8, 8)
    assert (int(wide[4, 4].sum()), int(narrow[4, 4].sum())) == (25, 9)
    ours = guided_blocks(GuidedWindows((8, 8), low_window=(2, 2)), canvas, 16, 16)
    pattern = GuidedWindows((8, 8), low_window=(2, 2))
    assert torch.equal(kept(ours), kept(coarsen(pattern, canvas, 16, 16, "any", guided_order(pattern, canvas))))


@pytest.mark.parametrize(
    ("image", "published"), [((128, 128), 0.1106), ((256, 256), 0.0298), ((512, 1024), 0.00387)], ids=["2K", "4K", "8K"]
)
def test_densities_are_those_of_the_authors_builder(image: tuple[int, int], published: float) -> None:
    canvas = guided_canvas(512, image, (image[0] // 4, image[1] // 4))
    mask = kept(guided_blocks(GuidedWindows(), canvas, full_only=True))
    assert float(mask.float().mean()) == pytest.approx(published, rel=2e-3)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="phase='training'; legal: 'inference'"):
        guided_blocks(GuidedWindows(phase="training"), CANVAS)
    with pytest.raises(ValueError, match=r"image of \(16, 24\) tokens over \(4, 5\) low tokens.*whole ratios"):
        guided_blocks(GuidedWindows((8, 8)), guided_canvas(0, (16, 24), (4, 5)))
    with pytest.raises(ValueError, match=r"window=\(16, 16\) does not divide shape=\(16, 24\)"):
        guided_blocks(GuidedWindows(), CANVAS)
    with pytest.raises(ValueError, match="local='round'; legal: 'sliding', 'four'"):
        GuidedWindows(local="round")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="legal: parts 'text', 'image' and 'low'"):
        GuidedWindows().check(Layout.of(Canvas((4, 4))))
    with pytest.raises(ValueError, match=r"window=\(0, 4\) must be rows and columns"):
        GuidedWindows((0, 4))
