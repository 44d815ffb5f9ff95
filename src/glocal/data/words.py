"""Says in words what a scene shows: a caption, and questions whose answers follow from the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectAttributes:
    """One object of a scene. number: place in the far-to-near order; distance in (0, 1]; radius in px."""

    number: int
    shape: str
    colour: str
    texture: str
    direction: str
    radius: float
    distance: float

    @property
    def name(self) -> str:
        """Texture, colour and shape, as captions write them."""
        return f"{self.texture} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Question:
    """A question about a scene. kind: count, colour, texture, direction, front, pan or exists."""

    kind: str
    text: str
    answer: str


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def caption(objects: Sequence[ObjectAttributes], background: str, pan: str) -> str:
    """One or two sentences that name every object from near to far, the background and the camera."""
    parts = [f"{_article(o.name)} moving {o.direction}" for o in reversed(objects)]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    camera = "The camera stands still." if pan == "still" else f"The camera pans {pan}."
    return f"{listed[0].upper()}{listed[1:]} on a {background} background. {camera}"


def questions(objects: Sequence[ObjectAttributes], pan: str, absent: str) -> tuple[Question, ...]:
    """Questions with answers. absent: a colour that no object has. A fact is asked only where its subject is unique."""
    asked = [Question("count", "How many objects are there?", str(len(objects)))]
    shapes = [o.shape for o in objects]
    for o in objects:
        if shapes.count(o.shape) == 1:
            asked.append(Question("colour", f"What colour is the {o.shape}?", o.colour))
            asked.append(Question("texture", f"How is the {o.shape} textured?", o.texture))
            asked.append(Question("direction", f"Which way does the {o.shape} move?", o.direction))
    asked.append(Question("front", "Which colour is the nearest object?", objects[-1].colour))
    asked.append(Question("pan", "How does the camera move?", pan))
    asked.append(Question("exists", f"Is there a {objects[0].colour} object?", "yes"))
    asked.append(Question("exists", f"Is there a {absent} object?", "no"))
    return tuple(asked)
