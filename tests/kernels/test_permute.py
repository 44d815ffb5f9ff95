"""The permutation compiled for Hopper, without a GPU: whole 16-byte accesses, next to nothing spilled."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest
import torch

from glocal.kernels.permute import Finish

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("kind", ["move", "side by side", "apart", "across"])
def test_compiles_for_hopper(kind: str) -> None:
    from glocal.kernels.triton import permute
    from glocal.testing.hopper import compiling, read

    qkv = torch.zeros(1, 64, 3, 8, 128, dtype=torch.bfloat16)
    tensors = [qkv[:, :, i].transpose(1, 2) for i in range(3)]
    order = torch.zeros(1, 1, 64, dtype=torch.int32)
    angles = torch.zeros(64, 64)
    step = Finish(torch.ones(1024 if kind == "across" else 128), 1e-6, angles, angles, interleaved=kind != "apart")
    with compiling() as made:
        permute.gather_rows(tensors, order, () if kind == "move" else (step, step, None))
    found = read(made[0], sass=True)
    assert found.spilled <= 16
    assert len(re.findall(r"STG\.E\.128", found.sass)) == len(re.findall(r"STG\.", found.sass)) > 0


@pytest.mark.parametrize("across", [False, True])
def test_finishing_in_place_compiles_for_hopper(across: bool) -> None:
    """Rows by token, all heads of a token side by side, as in Wan (a norm over all heads) and HunyuanVideo."""
    from glocal.kernels.triton import permute
    from glocal.testing.hopper import compiling, read

    q = torch.zeros(1, 64, 8, 128, dtype=torch.bfloat16).transpose(1, 2)
    angles = torch.zeros(1, 1, 64, 64)
    step = Finish(torch.ones(1024 if across else 128), 1e-6, angles, angles)
    with compiling() as made:
        permute.finish_rows([q], [step])
    found = read(made[0], sass=True)
    assert found.spilled <= 16
    assert len(re.findall(r"STG\.E\.128", found.sass)) == len(re.findall(r"STG\.", found.sass)) > 0
