"""What is made once and kept between calls: of ordinary tensors, for as long as what it was made from is unchanged."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def ordinary() -> Iterator[None]:
    """Tensors made here serve any later call, whatever surrounds this one: inference mode (training could not save
    them), torch.func and fake tensors (they would hold no data), a default device (they belong on the CPU where none
    is named).
    """
    with torch.inference_mode(False), torch._C._DisableFuncTorch(), _disable_current_modes():
        with torch._C.DisableTorchFunction():
            yield


@dataclass(frozen=True, eq=False)
class Seen:
    """Whether tensors are still those that were looked at: the same objects, unchanged. Addresses are used again."""

    refs: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Seen:
        """Remember them without keeping them alive."""
        return Seen(tuple(weakref.ref(t) for t in tensors), tuple(_version(t) for t in tensors))

    def still(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are they, not written to since. Tensors of inference mode count no writes."""
        same = all(ref() is t for ref, t in zip(self.refs, tensors, strict=True))
        return same and self.versions == tuple(_version(t) for t in tensors)


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version
