"""Errors whose message is written for the person at the keyboard, and the words that several of them share."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class GlocalError(Exception):
    """Something the user can mend: the message says what was given, what is legal and the nearest fix."""


class CheckFailed(GlocalError):
    """Everything ran, and the answer is no: a parity case missed its tolerance, a limit was not kept."""


def nearest(word: str, legal: Iterable[str]) -> str:
    """The one of `legal` (at least one) that is spelt most like `word`."""
    return get_close_matches(word, list(legal), n=1, cutoff=0.0)[0]


def check_choice(name: str, value: str, legal: Iterable[str]) -> None:
    """Raise ValueError, with the nearest, unless `value` is one of `legal`."""
    words = list(legal)
    if value not in words:
        raise ValueError(f"{name}={value!r} is unknown; legal: {', '.join(words)}; nearest: {nearest(value, words)}")


def check_file(name: str, path: str | Path) -> None:
    """Raise IsADirectoryError for a folder, FileNotFoundError for a path where nothing is; both say so in words."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"{name} {str(path)!r} is a folder; legal: a file.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name} {str(path)!r} does not exist.")
