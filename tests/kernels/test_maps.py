"""Starts the cases of the kernels over maps under the interpreter, in a process that has not imported Triton yet."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from glocal.kernels import maps

CASES = Path(__file__).with_name("maps_cases.py")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_cases_under_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "no CUDA device" not in done.stdout


@pytest.mark.gpu
def test_cases_compiled_on_a_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_not_on_the_cpu_and_not_for_mixed_types() -> None:
    assert not maps.usable(torch.zeros(2, 3))
    assert not maps.usable(torch.zeros(2, 3), None, torch.zeros(3, dtype=torch.bfloat16))


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_stream_compiles_for_hopper() -> None:
    """Rows of Wan 14B: nothing spilled, whole accesses."""
    from glocal.kernels.maps.stream import stream
    from glocal.testing.hopper import compiling, read

    x = torch.zeros(1, 4, 5120, dtype=torch.bfloat16)
    gate, scale, shift = torch.zeros(1, 6, 5120).chunk(6, 1)[:3]
    weight, bias = torch.zeros(2, 5120)
    for norm, change, eps in (((weight, bias), None, 1e-6), (None, (scale, shift), 1e-6), (None, None, None)):
        with compiling() as made:
            stream(x, x, gate, norm, change, eps)
        found = read(made[0], sass=True)
        assert found.spilled == 0 and found.registers <= 128
        assert all(word.startswith("STG.E.128") for word in re.findall(r"STG\.\S+", found.sass))
