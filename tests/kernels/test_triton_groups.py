"""Starts the cases of the kernels around routers under Triton's interpreter, in a process that has not imported it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("triton_group_cases.py")
COMMAND = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(CASES)]


def run(**more: str) -> subprocess.CompletedProcess[str]:
    left_out = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | more
    return subprocess.run(COMMAND, env=environment, cwd=CASES.parents[2], capture_output=True, text=True)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_cases_under_the_interpreter() -> None:
    done = run(TRITON_INTERPRET="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.gpu
def test_cases_compiled_on_a_gpu() -> None:
    done = run()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
