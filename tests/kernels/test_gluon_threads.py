"""Starts the cases of Hopper's backward kernel by threads, in a process in which Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("gluon_threads_cases.py")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_cases_by_threads() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    options = ("-q", "--tb=short", "-p", "no:cacheprovider", "-o", f"pythonpath={CASES.parent}")
    command = [sys.executable, "-m", "pytest", *options, str(CASES)]
    done = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout
