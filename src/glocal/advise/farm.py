"""Independent parts of a run, one after the other or in several processes, each finished part kept at once.

A process loads the model itself: on its own GPU where there are some, else with its share of the CPU's threads.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any

import torch

from glocal._progress import NoProgress, Progress
from glocal.advise.state import State

Loader = Callable[[], tuple[Any, Any]]


@dataclass(frozen=True)
class Task:
    """``function(model, objective, *args)``, a function of a module; name: of the finished part."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]


class Farm:
    """Runs tasks on `model` with `objective`. jobs: processes; more than one needs `loader`, a function of a module
    (with arguments bound by functools.partial, say) that returns both anew.
    """

    def __init__(
        self,
        model: Any,
        objective: Any,
        state: State,
        *,
        jobs: int = 1,
        loader: Loader | None = None,
        progress: Progress | None = None,
    ) -> None:
        if jobs < 1:
            raise ValueError(f"jobs={jobs}; legal: at least 1.")
        if jobs > 1 and loader is None:
            raise ValueError(
                f"jobs={jobs}: every process loads the model itself; give options.loader, a function that returns "
                "(model, objective), or jobs=1."
            )
        self.model, self.objective, self.state = model, objective, state
        self.jobs, self.loader = jobs, loader
        self.progress = NoProgress() if progress is None else progress
        self._pool: ProcessPoolExecutor | None = None

    def map(self, tasks: Sequence[Task], fail: Callable[[Task, Exception], None] | None = None) -> list[Any]:
        """Results in the order of the tasks; None where one failed and `fail` took note of it."""
        if self.jobs == 1 or len(tasks) == 1:
            return [self._here(task, fail) for task in tasks]
        open_tasks = [task for task in tasks if not self.state.has(task.name)]
        results = {task.name: self.state.load(task.name) for task in tasks if task not in open_tasks}
        futures: dict[Future[Any], Task] = {}
        for task in open_tasks:
            futures[self._workers().submit(_work, task.function, _packed(task.args))] = task
        for future in as_completed(futures):
            task = futures[future]
            try:
                results[task.name] = _unpacked(future.result())
            except Exception as error:
                if fail is None:
                    raise
                fail(task, error)
                results[task.name] = None
                continue
            self.state.save(task.name, results[task.name])
            self.progress.step()
        return [results[task.name] for task in tasks]

    def _here(self, task: Task, fail: Callable[[Task, Exception], None] | None) -> Any:
        def make() -> Any:
            with torch.no_grad():
                return task.function(self.model, self.objective, *task.args)

        try:
            found = self.state.once(task.name, make)
        except Exception as error:  # whatever a kernel raises; the caller decides
            if fail is None:
                raise
            fail(task, error)
            return None
        self.progress.step()
        return found

    def _workers(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = get_context("spawn")
            places = context.Queue()
            for number in range(self.jobs):
                places.put(number)
            assert self.loader is not None
            begin: tuple[Loader, Any, int] = (self.loader, places, self.jobs)
            self._pool = ProcessPoolExecutor(self.jobs, mp_context=context, initializer=_begin, initargs=begin)
        return self._pool

    def __enter__(self) -> Farm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


_LOADED: list[tuple[Any, Any]] = []  # of a worker process


def _begin(loader: Loader, places: Any, jobs: int) -> None:
    """A worker begins: its GPU or its threads, then its model."""
    number = places.get()
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(devices.split(",")) if devices else torch.cuda.device_count()
    if count:
        own = devices.split(",")[number % count] if devices else str(number % count)
        os.environ["CUDA_VISIBLE_DEVICES"] = own  # before the first call to the driver in this process
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    _LOADED.append(loader())


def _outlive_nobody() -> None:
    """A worker whose parent was killed would wait for work for ever, and hold its GPU."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work(function: Callable[..., Any], args: bytes) -> bytes:
    with torch.no_grad():
        return _packed(function(*_LOADED[0], *_unpacked(args)))


def _packed(value: Any) -> bytes:
    """As bytes: torch would else hand tensors over in shared memory, which outlives a process that is killed."""
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)  # from a process of our own
