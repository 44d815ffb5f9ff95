"""What a run has finished, on disk: one file a sample or stage, so that a run that was cut goes on where it stopped.

Files appear whole. `job.json` says what the run was asked; a run with other arguments does not go on from it. Files are
read with a list of the classes they may hold, never as arbitrary pickles.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from glocal._files import write_atomic

T = TypeVar("T")

_CLASSES = {
    "glocal.adapt.records": ("Site",),
    "glocal.advise.confirm": ("Confirmed", "ConfirmedCall"),
    "glocal.advise.dropped": ("Dropped",),
    "glocal.advise.inside": ("Timed",),
    "glocal.advise.ladder": ("Anchors",),
    "glocal.advise.methods": ("MethodSpec",),
    "glocal.advise.objective": ("Output",),
    "glocal.advise.preflight": ("Preflight", "Place"),
    "glocal.advise.probe": ("ProbeRecord", "Shrunk"),
    "glocal.advise.recipe": ("Expected", "Fallback", "Phase", "Queries", "Recipe", "Rule"),
    "glocal.advise.search": ("Rung",),
    "glocal.advise.tasks": ("Probed",),
    "glocal.advise.timing": ("Checked", "MethodTime", "Times"),
    "glocal.advise.validation": ("Pair", "PairRun", "Spent"),
    "glocal.advise.weights": ("StepWeight",),
    "glocal.plan.time_model": ("TimeModel",),
}


class State:
    """Finished parts of one run in `folder`; without a folder nothing is kept.

    job: what tells this run from others, in JSON values. resume: go on from what is there. Raises ValueError where
    there is nothing to go on from, where it belongs to another job, and where an unfinished run would be written over.
    """

    def __init__(self, folder: Path | None, job: Mapping[str, Any], *, resume: bool = False) -> None:
        self.folder = folder
        if folder is None:
            if resume:
                raise ValueError("resume=True needs the folder the state lies in.")
            return
        text = json.dumps(dict(job), sort_keys=True, indent=1) + "\n"
        known = folder / "job.json"
        if resume:
            if not known.is_file():
                raise ValueError(f"--resume: {str(folder)!r} holds no state of a run; leave --resume out to begin one.")
            _same(json.loads(known.read_text()), json.loads(text), folder)
            return
        if known.is_file() and not (folder / "finished").is_file():
            raise ValueError(
                f"{str(folder)!r} holds an unfinished run; go on with --resume, or remove that folder to begin again."
            )
        shutil.rmtree(folder, ignore_errors=True)
        write_atomic(known, text)

    def has(self, name: str) -> bool:
        """Whether this part is finished."""
        return self.folder is not None and self._path(name).is_file()

    def once(self, name: str, make: Callable[[], T]) -> T:
        """The finished part `name`, or what `make` returns, which is then finished."""
        if self.has(name):
            return self.load(name)
        value = make()
        self.save(name, value)
        return value

    def save(self, name: str, value: Any) -> None:
        """Finish a part."""
        if self.folder is not None:
            data = io.BytesIO()
            torch.save(value, data)
            write_atomic(self._path(name), data.getvalue())

    def load(self, name: str) -> Any:
        """A finished part."""
        with torch.serialization.safe_globals(_known()):
            return torch.load(self._path(name), weights_only=True)

    def finish(self) -> None:
        """The run is over: the next one need not be asked to go on."""
        if self.folder is not None:
            write_atomic(self.folder / "finished", "")

    def discard(self) -> None:
        """Forget it all: the run stopped for a reason that going on would not mend."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
                self.folder.parent.rmdir()

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / (re.sub(r"[^\w.@=/-]+", "_", name) + ".pt")


def link_into(state: Path, folder: Path) -> None:
    """The files of `state` in `folder` too, without copying where the file system can."""
    for file in sorted(state.rglob("*")):
        target = folder / file.relative_to(state)
        if file.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif not file.name.startswith("."):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, target)
            except OSError:
                shutil.copy2(file, target)


def _known() -> list[Any]:
    found = [getattr(importlib.import_module(module), name) for module, names in _CLASSES.items() for name in names]
    return [*found, Counter]


def _same(was: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    for key in sorted({*was, *now}):
        if was.get(key) != now.get(key):
            raise ValueError(
                f"--resume: {str(folder)!r} belongs to a run with {key}={was.get(key)!r}, this one has "
                f"{now.get(key)!r}; run it with the same arguments, or remove that folder."
            )
