"""Whether tensors are still those that were looked at: the same objects, unchanged. Addresses alone are used again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Seen:
    """Tensors as they were."""

    refs: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Seen:
        """Remember them without keeping them alive."""
        return Seen(tuple(weakref.ref(t) for t in tensors), tuple(_version(t) for t in tensors))

    def still(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are they, not written to since. Tensors of inference mode count no writes."""
        for ref, version, t in zip(self.refs, self.versions, tensors, strict=True):
            if ref() is not t or version != _version(t):
                return False
        return True


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version
