"""Text to look up in: the seed alone decides, and every question has its fact before it."""

from __future__ import annotations

import re

import pytest

from glocal.data import TextSpec, make_text


def test_a_seed_makes_one_text() -> None:
    assert make_text(500, 3) == make_text(500, 3) != make_text(500, 4)
    assert len(make_text(777, 0)) == 777 and make_text(900, 1).isascii()
    assert make_text(400, 5) == make_text(800, 5)[:400]


def test_every_question_asks_for_a_fact_that_was_said() -> None:
    text = make_text(6000, 2)
    facts = {m.group(1): (m.group(2), m.start()) for m in re.finditer(r"Note (\w+)=(\d{4})\. ", text)}
    questions = list(re.finditer(r"Recall (\w+)=(\d{4})\. ", text))
    assert len(facts) > 20 and len(questions) > 20
    for question in questions:
        code, place = facts[question.group(1)]
        assert question.group(2) == code and place < question.start()


def test_shares_are_checked() -> None:
    with pytest.raises(ValueError, match="facts=0, questions=0.4; legal"):
        TextSpec(0, 0.4)
    with pytest.raises(ValueError, match="length=0; legal: at least 1"):
        make_text(0, 1)
