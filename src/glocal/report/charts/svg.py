"""Small SVG kit: elements as text, scales, ticks, and labels that do not overlap. The style sheet colours them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

FONT = 12.0
GLYPH = 0.55  # mean width of a letter over the font size, for system sans faces


def tag(name: str, /, *children: str, **attributes: object) -> str:
    """One element. `klass` becomes class, underscores hyphens; floats are cut to two decimals, None is left out."""
    parts = [name]
    for key, value in attributes.items():
        if value is None:
            continue
        text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
        parts.append(f'{"class" if key == "klass" else key.replace("_", "-")}="{escape(text)}"')
    return f"<{' '.join(parts)}>{''.join(children)}</{name}>"


def text(x: float, y: float, words: str, klass: str = "tick", anchor: str = "start", **attributes: object) -> str:
    """Text with its baseline at y."""
    return tag("text", escape(words), x=float(x), y=float(y), klass=klass, text_anchor=anchor, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, klass: str) -> str:
    """A straight line."""
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), klass=klass)


def rect(x: float, y: float, width: float, height: float, klass: str, *children: str, **attributes: object) -> str:
    """A rectangle; children hold its <title>."""
    return tag(
        "rect", *children, x=float(x), y=float(y), width=float(width), height=float(height), klass=klass, **attributes
    )


def title(words: str) -> str:
    """What a pointer or a screen reader is told about a mark."""
    return tag("title", escape(words))


def document(width: float, height: float, parts: Sequence[str], label: str, klass: str) -> str:
    """The whole picture, scaling with its column."""
    return tag("svg", *parts, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label, klass=klass)


def text_width(words: str, size: float = FONT) -> float:
    """Estimated width of a line of text in px."""
    return GLYPH * size * len(words)


def shorten(words: str, room: float, size: float = FONT) -> str:
    """`words`, cut with an ellipsis where they need more than `room` px."""
    fits = max(int(room / (GLYPH * size)), 1)
    return words if len(words) <= fits else words[: fits - 1] + "…"


@dataclass(frozen=True)
class Scale:
    """Maps values in [low, high] to pixels [start, stop], linearly or by logarithm."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def clip(self, value: float) -> float:
        """Pixel of the value, held inside the axis."""
        return self(min(max(value, self.low), self.high))

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the axis."""
        return log_ticks(self.low, self.high, count) if self.log else linear_ticks(self.low, self.high, count)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 x a power of ten inside [low, high], as near to `count` of them as this gives."""
    power = 10.0 ** math.floor(math.log10((high - low) / max(count, 1)))
    best: list[float] = []
    for factor in (1, 2, 2.5, 5, 10):
        step = factor * power
        indices = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        if not best or abs(len(indices) - count) < abs(len(best) - count):
            best = [index * step for index in indices]
    return best


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """1, 2, 5 (or 1 alone, where that gives enough) x powers of ten inside [low, high]."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [
            f * 10.0**p for p in range(first, last + 1) for f in factors if low <= f * 10.0**p * 1.0001 <= high * 1.0002
        ]
        if len(found) >= min(count, 4):
            return found
    return found


@dataclass
class Labeller:
    """Puts labels beside marks without overlap; what does not fit is left out (the mark keeps its <title>)."""

    left: float
    top: float
    right: float
    bottom: float
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def block(self, x: float, y: float, half: float) -> None:
        """Keep labels off a mark of half-width `half`."""
        self.taken.append((x - half, y - half, x + half, y + half))

    def block_box(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """Keep labels off a box."""
        self.taken.append((x1, y1, x2, y2))

    def _free(self, box: tuple[float, float, float, float]) -> bool:
        x1, y1, x2, y2 = box
        if x1 < self.left or y1 < self.top or x2 > self.right or y2 > self.bottom:
            return False
        return all(x2 <= a1 or x1 >= a2 or y2 <= b1 or y1 >= b2 for a1, b1, a2, b2 in self.taken)

    def place(self, x: float, y: float, words: str, klass: str, reach: float) -> str:
        """Text element at the first free place around (x, y), `reach` px off sideways; empty where there is none."""
        size, gap = FONT, 9.0
        for dx, dy, anchor in (
            (reach, size * 0.35, "start"),
            (-reach, size * 0.35, "end"),
            (0.0, -gap, "middle"),
            (0.0, gap + size * 0.75, "middle"),
            (gap * 0.7, -gap * 0.8, "start"),
            (gap * 0.7, gap + size * 0.6, "start"),
            (-gap * 0.7, -gap * 0.8, "end"),
            (-gap * 0.7, gap + size * 0.6, "end"),
        ):
            box = self._box(x + dx, y + dy, words, anchor)
            if self._free(box):
                self.taken.append(box)
                return text(x + dx, y + dy, words, klass, anchor)
        return ""

    def place_far(self, x: float, y: float, words: str, klass: str) -> str:
        """Like `place`, farther off, with a thin line that leads to the mark."""
        for off, drop in ((16.0, 20.0), (24.0, 34.0), (36.0, 50.0), (60.0, 30.0), (80.0, 70.0)):
            for dx, dy in ((off, -drop), (-off, -drop), (off, drop + 8), (-off, drop + 8)):
                anchor = "start" if dx > 0 else "end"
                box = self._box(x + dx, y + dy, words, anchor)
                near = box[3] if dy < 0 else box[1]
                if self._free(box) and self._clear(x, y, x + dx, near):
                    self.taken.append(box)
                    start = 9.0 / math.hypot(dx, near - y)
                    leader = line(x + dx * start, y + (near - y) * start, x + dx, near, "leader")
                    return leader + text(x + dx, y + dy, words, klass, anchor)
        return ""

    def _clear(self, x: float, y: float, x2: float, y2: float) -> bool:
        """Whether a leader from the mark at (x, y) meets no other mark or label (thin boxes are lines and bars)."""
        own = [box for box in self.taken if box[0] <= x <= box[2] and box[1] <= y <= box[3]]
        others = [box for box in self.taken if box not in own and box[3] - box[1] > 4]
        path = [(x + (x2 - x) * step / 12, y + (y2 - y) * step / 12) for step in range(1, 13)]
        return not any(a1 < px < a2 and b1 < py < b2 for px, py in path for a1, b1, a2, b2 in others)

    @staticmethod
    def _box(x: float, y: float, words: str, anchor: str) -> tuple[float, float, float, float]:
        width = text_width(words)
        start = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        return start, y - FONT * 0.82, start + width, y + FONT * 0.28


def both_sizes(draw: Callable[[float, float], str], wide: tuple[float, float], narrow: tuple[float, float]) -> str:
    """The chart drawn twice, for a desktop column and for a phone; the style sheet shows one of them."""
    return tag("div", draw(*wide), klass="only-wide") + tag("div", draw(*narrow), klass="only-narrow")
