"""Captions of still pictures, in words and as tokens, and the layouts behind them."""

from __future__ import annotations

import pytest
import torch

from glocal.data import at_side, caption_of, caption_tokens, draw_layouts, draw_pictures, paint, picture_spec
from glocal.data.captions import COLUMNS, LENGTH, ROWS, WORDS
from glocal.models.generation import picture_words


def read_caption(text: str) -> torch.Tensor:
    return picture_words.read_caption(text, WORDS, LENGTH)


def pictures(count: int = 40, seed: int = 3):
    return draw_pictures(count, torch.Generator().manual_seed(seed))


def test_tokens_are_those_of_the_words():
    layouts = pictures()
    tokens = caption_tokens(layouts)
    for i in range(len(layouts)):
        assert torch.equal(read_caption(caption_of(layouts, i))[0], tokens[i])


def test_captions_say_every_object_and_its_place():
    layouts = pictures(20)
    for i in range(20):
        text = caption_of(layouts, i)
        assert text.count(" at the ") == int(layouts.present[i].sum())
        for k in layouts.present[i].nonzero().flatten().tolist():
            x, y = (layouts.middle[i, k] / 64 * 3).long().tolist()
            assert f"{ROWS[y]} {COLUMNS[x]}" in text


def test_words_left_out_keep_the_order_of_the_others():
    layouts = pictures()
    whole, some = caption_tokens(layouts), caption_tokens(layouts, 0.5, torch.Generator().manual_seed(0))
    fewer = 0
    for a, b in zip(whole.tolist(), some.tolist(), strict=True):
        rest = iter(a)
        assert all(word in rest for word in b if word)  # a subsequence
        fewer += sum(w > 0 for w in b) < sum(w > 0 for w in a)
    assert fewer > 20


def test_attributes_may_be_missing_in_words():
    found = [WORDS[t] for t in read_caption("A red disc and a plain blue ring at the top left")[0].tolist() if t]
    assert found == ["red", "disc", ",", "plain", "blue", "ring", "top", "left", ","]
    assert not read_caption("").any()


def test_unknown_words_and_long_captions_are_refused():
    with pytest.raises(ValueError, match=r"word 'rad' is unknown; legal: plain.*nearest: 'red'"):
        read_caption("a rad disc")
    with pytest.raises(ValueError, match=rf"has 22 words of content; legal: at most {LENGTH}"):
        read_caption(" ".join(["red"] * 21))
    with pytest.raises(ValueError, match="room for 5 objects"):
        caption_tokens(draw_layouts(1, torch.Generator().manual_seed(0)))


def test_objects_keep_apart_and_whole():
    layouts = pictures(200)
    apart = (layouts.middle[:, :, None] - layouts.middle[:, None]).norm(dim=-1)
    gap = apart - layouts.radius[:, :, None] - layouts.radius[:, None]
    both = layouts.present[:, :, None] & layouts.present[:, None] & ~torch.eye(3, dtype=torch.bool)
    assert (gap[both] > -4).float().mean() > 0.97  # px; drawn places alone give about 0.85
    assert bool((layouts.middle >= layouts.radius[..., None]).all())


def test_same_layout_at_another_size_is_the_same_picture():
    layouts = pictures(4)
    small, large = paint(layouts), paint(at_side(layouts, 256))
    assert large.shape == (4, 3, 256, 256)
    reduced = torch.nn.functional.avg_pool2d(large, 4)
    assert (reduced - small).abs().mean() < 0.02
    assert (reduced - small.flip(-1)).abs().mean() > 0.05


def test_pictures_of_a_seed_are_the_same_bits():
    assert torch.equal(paint(pictures(2, 7)), paint(pictures(2, 7)))
    assert picture_spec(32).frames == 1
