"""Quantised attention as a record: what is rounded to how many bits, and which rows share a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

QK = Literal["int8", "fp8", "int4"]
PV = Literal["int8", "fp8", "none"]


@dataclass(frozen=True)
class Quant:
    """Rounding of attention, forward only (SageAttention, arXiv 2410.02367; PAROAttention, arXiv 2506.16054).

    qk: q and k as int8, fp8 (e4m3) or int4, symmetric, scale = largest magnitude of a group / largest value.
    pv: weights and values as int8 or fp8, "none" for the type of the inputs. A weight lies in (0, 1] against the
        running maximum of its row and is rounded with a constant factor, 127 or 256; values have a scale for every
        channel of a head.
    group: tokens in plan order that share a scale, of queries and of keys; divisors of the block sizes.
    smooth_k: subtract the mean key of a head first, which changes no weight.
    """

    qk: QK = "int8"
    pv: PV = "none"
    group: tuple[int, int] = (32, 64)
    smooth_k: bool = False

    def __post_init__(self) -> None:
        for name, legal in (("qk", get_args(QK)), ("pv", get_args(PV))):
            if getattr(self, name) not in legal:
                raise ValueError(f"Quant: {name}={getattr(self, name)!r}; legal: {', '.join(map(repr, legal))}.")
        group = tuple(self.group) if isinstance(self.group, (tuple, list)) else (self.group,)
        if len(group) != 2 or any(not isinstance(n, int) or n < 1 for n in group):
            raise ValueError(
                f"Quant: group={self.group!r} must be two positive numbers: queries and keys that share a scale."
            )
        object.__setattr__(self, "group", group)

    @property
    def word(self) -> str:
        """As a word that `of_word` reads back."""
        return f"{self.qk},{self.pv},{self.group[0]},{self.group[1]},{int(self.smooth_k)}"

    @staticmethod
    def of_word(word: str) -> Quant:
        """The inverse of `word`."""
        qk, pv, a, b, smooth = word.split(",")
        return Quant(qk, pv, (int(a), int(b)), bool(int(smooth)))  # type: ignore[arg-type]

    def __str__(self) -> str:
        pv = "" if self.pv == "none" else f", weights and values in {self.pv}"
        smooth = ", keys less their mean" if self.smooth_k else ""
        return f"q and k in {self.qk} by groups of {self.group[0]} and {self.group[1]} tokens{pv}{smooth}"


LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
WEIGHT = {"int8": 127.0, "fp8": 256.0, "none": 1.0}  # what a weight of 1 becomes
