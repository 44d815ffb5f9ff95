"""The window kernels compiled for Hopper, without a GPU: products on tensor cores, whole 16-byte loads."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from glocal.canvas import Canvas
from glocal.kernels.call import Call, PlanTensors
from glocal.ops import Relative
from glocal.patterns import Neighborhood, Pattern, Windows
from glocal.plan.windows import window_plan

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def compiled(pattern: Pattern, side: int = 14, *, bias: bool = True) -> list[Any]:
    """All kernels of a call with products, forward and backward."""
    from glocal.kernels.windows import launch
    from glocal.testing.hopper import compiling, read

    made = window_plan(pattern, Canvas((side, side)))
    table = Relative(torch.zeros(2, 13, 13, dtype=torch.bfloat16)).lower(made.layout)
    given: dict[str, Any] = {"q_block": made.q_block, "kv_block": made.kv_block, "bias": (table,) * bias}
    call = Call("windows", 0.2, plan=PlanTensors(**made.tensors()), **given)
    q, k, v = torch.zeros(3, 1, 2, side**2, 32, dtype=torch.bfloat16)
    with compiling() as kernels:
        out, lse = launch.forward(q, k, v, call)
        launch.backward(launch.Known(out, lse, out, lse), q, k, v, call)
    found = [read(kernel, sass=True) for kernel in kernels]
    assert all(one.registers <= 255 for one in found)
    assert ("entries_kernel" in {one.name for one in found}) == bias
    return [one for one in found if one.name != "entries_kernel"]


@pytest.mark.parametrize(
    ("pattern", "product", "backward", "wide", "shared"),
    [
        (Windows(7, roll=3), "HGMMA", {"whole_kernel"}, 12, 64 << 10),
        (Neighborhood(7), "HMMA", {"queries_kernel", "keys_kernel"}, 16, 140 << 10),
    ],
    ids=["a window is a tile", "tiles of 16 queries"],
)
def test_compiles_for_hopper(
    pattern: Pattern, product: str, backward: set[str], wide: int, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glocal.kernels.windows import launch

    monkeypatch.setattr(launch, "DIRECT_COLUMNS", 0)
    found = compiled(pattern)
    assert {one.name for one in found} == backward | {"forward_kernel"}
    for one in found:
        assert product in one.sass and len(re.findall(r"LDG(?:STS)?\.E\.(?:BYPASS\.)?128", one.sass)) >= wide
        assert one.shared <= shared


@pytest.mark.parametrize(
    ("pattern", "bias", "straight"),
    [
        (Neighborhood(7), True, {"forward_kernel", "queries_kernel", "keys_kernel"}),
        (Neighborhood(7), False, {"forward_kernel", "queries_kernel", "keys_kernel"}),
    ],
    ids=["table", "no table"],
)
def test_operands_go_straight_into_registers(pattern: Pattern, bias: bool, straight: set[str]) -> None:
    found = [one for one in compiled(pattern, bias=bias) if "LDSM" not in one.sass and one.shared <= 8 << 10]
    assert {one.name for one in found} == straight
    for one in found:
        assert "MOVM" in one.sass  # one load serves the products over the head size and over tokens
        assert one.spilled <= 128  # beside the loop over images


def test_images_of_a_program_fill_whole_rounds() -> None:
    from glocal.kernels.windows.launch import images_a_program

    assert images_a_program(1, 10, 264) == 1
    assert images_a_program(128, 78, 264) == 13  # 780 programs: three rounds of 264, nearly full
    assert images_a_program(5, 1000, 2) == 5  # tables are made as seldom as can be where rounds abound
