"""What layers of small windows ask for at every call is prepared once, and again where anything behind it changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.canvas import Canvas
from glocal.kernels import windows
from glocal.kernels.call import Call, TableBias
from glocal.ops import Relative, attention
from glocal.ops import _operator as operator_module
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


def test_a_call_that_was_made_before_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        calls.append(call)
        return q, q[..., 0]

    monkeypatch.setattr(operator_module, "run", run)
    pattern, canvas, q = Windows(4), Canvas((8, 8)), torch.randn(2, 2, 64, 16)
    tables = torch.randn(2, 2, 7, 7)

    def ask(q: Tensor, table: Tensor, scale: float | None = None, pattern: Windows = pattern) -> Call:
        score = Score(scale, bias=(Relative(table, sign=-1, within=True),))
        assert attention(q, q, q, pattern, canvas=canvas, score=score, backend="windows").shape == q.shape
        return calls[-1]

    first, again = ask(q, tables[0]), ask(q, tables[1], 0.3)
    assert again.plan is first.plan and again.scale == 0.3 and first.scale == 0.25
    one, two = first.bias[0], again.bias[0]
    assert isinstance(one, TableBias) and isinstance(two, TableBias) and two.q_code is one.q_code
    assert torch.equal(two.table, tables[1].flatten(1)) and (again.q_block, again.kv_block) == (16, 32)
    other = ask(q, tables[0], pattern=Windows(8))
    assert other.plan is not first.plan
    with pytest.raises(ValueError, match="q has 48 tokens"):
        ask(q[:, :, :48], tables[0])
    monkeypatch.setattr(windows, "missing", lambda device: "it went away")
    with pytest.raises(ValueError, match="it went away"):
        ask(q, tables[0])
