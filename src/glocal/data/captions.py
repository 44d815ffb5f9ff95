"""Says what a picture shows and where, in words and as numbers for a text encoder.

"A striped red disc at the top left, a plain blue ring at the middle centre, on a night background." Only the words
that carry content are tokens, and a comma behind every object. Attributes may be left out.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from glocal.data.objects import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, Layouts

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
WORDS = ("", ",", *TEXTURES, *COLOURS, *SHAPES, *ROWS, *COLUMNS, *BACKGROUNDS)
"""The vocabulary; word 0 pads, word 1 parts objects."""
LENGTH = 20
"""Tokens of a caption: three objects of five words, two commas before them, one before the background, and it."""


def caption_of(layouts: Layouts, index: int) -> str:
    """The whole caption of picture `index`: every object from near to far with its place, and the background."""
    tokens = caption_tokens(layouts)[index].tolist()
    parts: list[list[str]] = [[]]
    for word in (WORDS[t] for t in tokens if t):
        if word == ",":
            parts.append([])
        else:
            parts[-1].append(word)
    *objects, background = parts
    named = [f"{_article(o[0])} {' '.join(o[:3])} at the {o[3]} {o[4]}" for o in objects]
    text = f"{', '.join(named)}, on a {background[0]} background."
    return text[0].upper() + text[1:]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def caption_tokens(layouts: Layouts, drop: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """Tokens [B, LENGTH] long of every picture's caption, near objects first, without going through text.

    drop: probability that a texture, a place (both its words) or the background is not said, drawn from `generator`.
    Raises ValueError for layouts of more than three objects.
    """
    batch, room = layouts.present.shape
    if room > 3:
        raise ValueError(f"layouts have room for {room} objects; a caption of {LENGTH} tokens names at most 3")
    size = torch.tensor([float(layouts.spec.width), float(layouts.spec.height)], device=layouts.middle.device)
    cells = (layouts.middle / size * 3).long().clamp(0, 2)  # [B, K, 2] as (column, row)
    columns = (
        _ids(TEXTURES, layouts.texture),
        _ids(COLOURS, layouts.colour),
        _ids(SHAPES, layouts.shape),
        _ids(ROWS, cells[..., 1]),
        _ids(COLUMNS, cells[..., 0]),
    )
    said = torch.stack([*columns, torch.ones_like(columns[0])], -1).flip(1)  # [B, K, 6], a comma behind each
    if drop:
        lost = torch.rand(batch, room, 2, generator=generator).to(said.device) < drop
        kept = torch.ones_like(said, dtype=torch.bool)
        kept[..., 0], kept[..., 3], kept[..., 4] = ~lost[..., 0], ~lost[..., 1], ~lost[..., 1]
        said = said * kept
    said = said * layouts.present.flip(1)[..., None]
    background = _ids(BACKGROUNDS, layouts.background)[:, None]
    if drop:
        background = background * (torch.rand(batch, 1, generator=generator).to(said.device) >= drop)
    words = torch.cat([said.flatten(1), background], 1)  # [B, 6 K + 1]
    return packed(words)


def packed(words: Tensor) -> Tensor:
    """words [B, n] with 0 for what is left out -> [B, LENGTH]: said words first, in order."""
    order = (words == 0).long().argsort(dim=1, stable=True)
    words = words.gather(1, order)
    missing = LENGTH - words.shape[1]
    return torch.nn.functional.pad(words, (0, max(missing, 0)))[:, :LENGTH]


def _ids(names: Iterable[str], numbers: Tensor) -> Tensor:
    table = torch.tensor([WORDS.index(name) for name in names], device=numbers.device)
    return table[numbers]
