"""Starts the cases of the permutation and window kernels, interpreted on the CPU, compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CASES = [Path(__file__).with_name(name) for name in ("permute_cases.py", "windows_cases.py")]


def start(environment: dict[str, str], case: Path) -> str:
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(case)]
    done = subprocess.run(command, env=environment, cwd=case.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_cases_under_the_interpreter(case: Path) -> None:
    said = start({**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, case)
    assert " passed" in said and "no CUDA device" not in said


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_cases_compiled_on_a_gpu(case: Path) -> None:
    start({name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}, case)
