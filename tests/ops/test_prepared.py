"""What layers of small windows ask for at every call is prepared once, and again where anything behind it changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from glocal.canvas import Canvas
from glocal.kernels import windows
from glocal.ops.attention import _facts, _prepare
from glocal.ops.score import Score
from glocal.patterns import Windows


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "CAPABILITY", replace(windows.CAPABILITY, devices=("cpu", "cuda"), by_name_only=None))
    monkeypatch.setattr(windows, "missing", lambda device: None)


def facts(pattern: Any) -> tuple[Any, ...]:
    q = torch.zeros(1, 2, 64, 16)
    return (*_facts(q, q, q, pattern, (), None, Score()), False, None)


def test_once_for_the_same_pattern_and_canvas() -> None:
    pattern, canvas = Windows(4), Canvas((8, 8))
    first = _prepare(pattern, canvas, facts(pattern), "windows")
    assert _prepare(pattern, canvas, facts(pattern), "windows") is first
    other = Windows(8)
    assert _prepare(other, canvas, facts(other), "windows")[1] is not first[1]
    like = _prepare(Windows(4), Canvas((8, 8)), facts(pattern), "windows")  # by content, as before
    assert like is not first and like[1] is first[1]


def test_again_where_the_backend_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, canvas = Windows(4), Canvas((8, 8))
    _prepare(pattern, canvas, facts(pattern), "windows")
    monkeypatch.setattr(windows, "missing", lambda device: "it went away")
    with pytest.raises(ValueError, match="it went away"):
        _prepare(pattern, canvas, facts(pattern), "windows")
