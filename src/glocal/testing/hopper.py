"""Compiles Triton kernels for Hopper (sm_90) on a machine without a GPU, through the launchers of the package.

`compiling()` stands in for the driver: within it, a launch compiles the kernel for its arguments and starts nothing.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any


@dataclass(frozen=True)
class Compiled:
    """One kernel: registers and bytes spilled to local memory a thread, shared memory of a program in bytes."""

    name: str
    registers: int
    spilled: int
    shared: int
    sass: str


@contextmanager
def compiling() -> Iterator[list[Any]]:
    """Launches of Triton kernels append what they compile to the list."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class Hopper:
        """As much of a driver as compiling asks for."""

        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    made: list[Any] = []
    active: Any = driver
    usual, known = jit.JITFunction.run, active._active

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = usual(self, *args, grid=grid, warmup=True, **kwargs)
        made.append(kernel)
        return kernel

    jit.JITFunction.run = run  # type: ignore[method-assign]
    active._active = Hopper()
    try:
        with torch.no_grad():
            yield made
    finally:
        jit.JITFunction.run, active._active = usual, known  # type: ignore[method-assign]


def read(kernel: Any, sass: bool = False) -> Compiled:
    """Resources of a compiled kernel, from its cubin."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        words = [str(tools / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        code = ""
        if sass:
            code = subprocess.run([words[0], "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Compiled(kernel.name, found["REG"], found["STACK"] + found["LOCAL"], kernel.metadata.shared, code)
