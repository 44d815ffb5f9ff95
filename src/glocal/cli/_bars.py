"""Progress drawn with rich, on stderr."""

from __future__ import annotations

import atexit

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class RichProgress:
    """One bar a stage; a finished stage stays on the screen with its time."""

    def __init__(self, console: Console | None = None) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True) if console is None else console,
        )
        self._task: TaskID | None = None
        self._steps: int | None = None

    def stage(self, name: str, steps: int | None = None) -> None:
        """Fill the bar before, start one for `name`."""
        self._fill()
        if self._task is None:
            self._bars.start()
            atexit.register(self._bars.stop)  # an error in the work must not leave the cursor hidden
        self._task, self._steps = self._bars.add_task(name, total=steps), steps

    def step(self, count: int = 1) -> None:
        """Move the bar."""
        if self._task is not None:
            self._bars.advance(self._task, count)

    def note(self, text: str) -> None:
        """Print the line above the bars."""
        self._bars.console.print(f"  {text}", markup=False, highlight=False)

    def close(self) -> None:
        """Leave the bars as they stand."""
        self._fill()
        if self._task is not None:
            self._bars.stop()
        self._task = None

    def _fill(self) -> None:
        """A stage without a known number of steps spins until it ends; then its bar is full and its clock stops."""
        if self._task is not None and self._steps is None:
            self._bars.update(self._task, total=1, completed=1)
        if self._task is not None:
            self._bars.stop_task(self._task)
