"""How long work says where it is. The library speaks to this protocol only; who draws it is the caller's affair."""

from __future__ import annotations

import sys
import time
from typing import Protocol, TextIO


class Progress(Protocol):
    """Stages one after the other, each with a number of equal steps (None: not known beforehand)."""

    def stage(self, name: str, steps: int | None = None) -> None:
        """Begin the stage `name`; the one before it has ended."""
        ...

    def step(self, count: int = 1) -> None:
        """`count` more steps of this stage are done."""
        ...

    def note(self, text: str) -> None:
        """One line worth reading, now."""
        ...

    def close(self) -> None:
        """The last stage has ended."""
        ...


class NoProgress:
    """Says nothing."""

    def stage(self, name: str, steps: int | None = None) -> None:
        """Ignore the stage."""

    def step(self, count: int = 1) -> None:
        """Ignore the step."""

    def note(self, text: str) -> None:
        """Ignore the line."""

    def close(self) -> None:
        """Nothing to end."""


class TextProgress:
    """A line when a stage begins and one when it ends, with its seconds: for logs and pipes."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = sys.stderr if out is None else out
        self._name: str | None = None
        self._steps: int | None = None
        self._done = 0
        self._began = 0.0

    def stage(self, name: str, steps: int | None = None) -> None:
        """End the stage before, if any, and print the name of this one."""
        self.close()
        self._name, self._steps, self._done, self._began = name, steps, 0, time.monotonic()
        print(f"{name} ..." if steps is None else f"{name} ({steps}) ...", file=self.out, flush=True)

    def step(self, count: int = 1) -> None:
        """Count; a log needs no line for each."""
        self._done += count

    def note(self, text: str) -> None:
        """Print the line, indented under its stage."""
        print(f"  {text}", file=self.out, flush=True)

    def close(self) -> None:
        """Print the seconds of the running stage."""
        if self._name is not None:
            part = "" if self._steps is None or self._done == self._steps else f", {self._done} of {self._steps}"
            print(f"{self._name}: {time.monotonic() - self._began:.1f} s{part}", file=self.out, flush=True)
        self._name = None
