"""Reads a caption as numbers of a model's vocabulary: small words are skipped, "and" and commas part the objects."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

import torch
from torch import Tensor

SKIPPED = ("a", "an", "the", "at", "on", "in", "background")
PAD, COMMA = 0, 1


def read_caption(text: str, vocabulary: Sequence[str], length: int) -> Tensor:
    """Tokens [1, length] long; "" gives no token at all.

    vocabulary: its first word pads, its second one is the comma, which ends every object, as in the model's training;
    what stands before the word "background" is no object. Raises ValueError for a word that is not known (naming the
    nearest), and for more words than fit.
    """
    known = vocabulary[COMMA + 1 :]
    words = re.findall(r"[a-z]+|,", text.lower())
    tokens: list[int] = []
    for word in words:
        if word in (",", "and"):
            if tokens and tokens[-1] != COMMA:
                tokens.append(COMMA)
        elif word in known:
            tokens.append(vocabulary.index(word))
        elif word not in SKIPPED:
            near = get_close_matches(word, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"caption {text!r}: word {word!r} is unknown; legal: {', '.join(known)}; nearest: {near!r}"
            )
    if tokens and tokens[-1] != COMMA and words[-1] != "background":
        tokens.append(COMMA)
    if len(tokens) > length:
        raise ValueError(f"caption {text!r} has {len(tokens)} words of content; legal: at most {length}")
    return torch.tensor([tokens + [PAD] * (length - len(tokens))])
