"""Importing glocal costs nothing: no heavy package, no output, no time worth naming."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import glocal

HEAVY = {"triton", "diffusers", "transformers", "matplotlib", "rich", "typer", "jinja2"}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_adds_no_heavy_package_to_those_of_torch() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import glocal
import json
print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))
"""
    added = set(json.loads(run(code)))
    assert "glocal" in added
    assert not added & HEAVY


def test_import_takes_under_a_fifth_of_a_second_beyond_torch() -> None:
    code = "import time, torch; t = time.perf_counter(); import glocal; print(time.perf_counter() - t)"
    best = min(float(run(code)) for _ in range(3))  # the fastest of three: the machine may be busy
    assert best < 0.2


def test_import_prints_nothing() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", "import glocal"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_misspelt_name_is_told_the_nearest() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Neighbourhood'; nearest: Neighborhood"):
        glocal.Neighbourhood


def test_help_needs_no_torch() -> None:
    code = """
import sys
from glocal.cli import app
try:
    app(['--help'])
except SystemExit:
    pass
print('torch' in sys.modules or 'rich' in sys.modules)
"""
    assert run(code).splitlines()[-1] == "False"
