"""Text that is full of things to look up: facts that are said once and asked for much later, between plain sentences.

A fact gives a made-up name a code of four digits ("Note kadubo=4172."); a question repeats the name and then the code
("Recall kadubo=4172."), so predicting its digits needs the fact, however far back it stands. The other sentences follow
a small grammar and need a few words of context only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_SUBJECTS = ("the miller", "a traveller", "the old clerk", "my sister", "the captain", "a painter", "the gardener")
_VERBS = ("looked at", "walked past", "wrote about", "asked for", "carried", "forgot", "painted")
_OBJECTS = ("the red gate", "a silver spoon", "the long river", "an empty house", "the market", "a green boat")
_TIMES = ("in the morning", "after the rain", "before noon", "last winter", "every week", "at dusk")
FACT, QUESTION = "Note {name}={code}. ", "Recall {name}="
SENTENCES = (_SUBJECTS, _VERBS, _OBJECTS, _TIMES)  # a plain sentence takes one of each
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class TextSpec:
    """facts, questions: share of the sentences that say a fact, and that ask for one said before (by chance any of
    them, near or far).
    """

    facts: float = 0.3
    questions: float = 0.4

    def __post_init__(self) -> None:
        if self.facts <= 0 or self.questions < 0 or self.facts + self.questions > 1:
            raise ValueError(f"facts={self.facts}, questions={self.questions}; legal: shares with a sum up to 1.")


def make_text(length: int, seed: int, spec: TextSpec | None = None) -> str:
    """`length` characters of ASCII that depend on `seed` alone; the last sentence may be cut."""
    if length < 1:
        raise ValueError(f"length={length}; legal: at least 1 character.")
    spec = TextSpec() if spec is None else spec
    draw = random.Random(seed)
    known: list[tuple[str, str]] = []
    said: list[str] = []
    have = 0
    while have < length:
        kind = draw.random()
        if kind < spec.facts:
            known.append((name_of(draw), code_of(draw)))
            said.append(fact(*known[-1]))
        elif kind < spec.facts + spec.questions and known:
            said.append(question(*draw.choice(known)))
        else:
            sentence = " ".join(draw.choice(group) for group in SENTENCES)
            said.append(sentence[0].upper() + sentence[1:] + ". ")
        have += len(said[-1])
    return "".join(said)[:length]


def fact(name: str, code: str) -> str:
    """The sentence that says a code."""
    return FACT.format(name=name, code=code)


def question(name: str, code: str) -> str:
    """The sentence that asks for a code, and the answer."""
    return QUESTION.format(name=name) + f"{code}. "


def name_of(draw: random.Random) -> str:
    """A made-up name of three syllables."""
    return "".join(draw.choice(CONSONANTS) + draw.choice(VOWELS) for _ in range(3))


def code_of(draw: random.Random) -> str:
    """Four digits."""
    return f"{draw.randrange(10_000):04d}"
