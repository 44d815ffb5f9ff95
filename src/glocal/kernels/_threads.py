"""Run independent pieces of work on as many threads as torch may use, each piece serial inside.

Many small tensor operations, each dealt over all cores, wait for each other at every step; whole pieces wait only once.
Pieces must write to different places.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier, current_thread
from typing import TypeVar

import torch

T = TypeVar("T")
_PREFIX = "glocal"


def width() -> int:
    """Threads worth dealing work to: torch's own number, 1 inside a piece."""
    return 1 if current_thread().name.startswith(_PREFIX) else torch.get_num_threads()


def each(work: Callable[[T], None], pieces: Sequence[T], threads: int) -> None:
    """`work(piece)` for all pieces; the first error is raised. Gradients are not recorded."""
    if threads == 1 or len(pieces) < 2:
        for piece in pieces:
            work(piece)
        return
    for _ in _pool(threads, os.getpid()).map(work, pieces):
        pass


@lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """A pool whose threads use one core each. process: threads do not survive a fork, so a child gets its own."""
    ready = Barrier(threads + 1)

    def start() -> None:
        torch.set_grad_enabled(False)
        torch.get_num_threads()  # a thread reads the shared setting on first use; the next line must come after that
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix=_PREFIX, initializer=start)
    for _ in range(threads):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # the number is each thread's own, but later threads start from the last one set
    return pool
