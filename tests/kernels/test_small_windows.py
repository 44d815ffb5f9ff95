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


def compiled(pattern: Pattern, side: int = 14) -> list[Any]:
    """All kernels of a call with a bias, forward and backward."""
    from glocal.kernels.windows import launch
    from glocal.testing.hopper import compiling, read

    made = window_plan(pattern, Canvas((side, side)))
    table = Relative(torch.zeros(2, 13, 13, dtype=torch.bfloat16)).lower(made.layout)
    given: dict[str, Any] = {"q_block": made.q_block, "kv_block": made.kv_block, "bias": (table,)}
    call = Call("windows", 0.2, plan=PlanTensors(**made.tensors()), **given)
    q, k, v = torch.zeros(3, 1, 2, side**2, 32, dtype=torch.bfloat16)
    with compiling() as kernels:
        out, lse = launch.forward(q, k, v, call)
        launch.backward(launch.Known(out, lse, out, lse), q, k, v, call)
    found = [read(kernel, sass=True) for kernel in kernels]
    assert {one.name for one in found} == {"forward_kernel", "queries_kernel", "keys_kernel"}
    assert all(one.registers <= 255 for one in found)
    return found


@pytest.mark.parametrize(
    ("pattern", "product", "wide", "shared"),
    [(Windows(7, roll=3), "HGMMA", 12, 48 << 10), (Neighborhood(7), "HMMA", 16, 140 << 10)],
    ids=["a window is a tile", "tiles of 16 queries"],
)
def test_compiles_for_hopper(
    pattern: Pattern, product: str, wide: int, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glocal.kernels.windows import launch

    monkeypatch.setattr(launch, "DIRECT_COLUMNS", 0)
    for one in compiled(pattern):
        assert product in one.sass and len(re.findall(r"LDG(?:STS)?\.E\.(?:BYPASS\.)?128", one.sass)) >= wide
        assert one.shared <= shared


@pytest.mark.parametrize("pattern", [Windows(7, roll=3), Neighborhood(7)], ids=["whole windows", "16 queries"])
def test_operands_go_straight_into_registers(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    from glocal.kernels.windows import launch

    monkeypatch.setattr(launch, "DIRECT_COLUMNS", 512)
    for one in compiled(pattern):
        assert "HMMA.16816.F32.BF16" in one.sass and "LDSM" not in one.sass
        assert len(re.findall(r"LDG\.E\.128", one.sass)) >= 8 and one.shared <= 8 << 10
    loop = hottest(next(one.sass for one in compiled(pattern) if one.name == "forward_kernel"))
    assert loop.count("HMMA") >= 32 and "LDL" not in loop and "STL" not in loop  # nothing spills in the loop
    assert loop.count("LDG.E.64") >= 16 and "LDS" not in loop


def hottest(sass: str) -> str:
    """The shortest loop with matrix products."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    back = [
        (int(to, 16), at) for at, text in code for to in re.findall(r"BRA.*0x([0-9a-f]+)", text) if int(to, 16) < at
    ]
    bodies = ["\n".join(text for place, text in code if first <= place <= last) for first, last in back]
    return min((body for body in bodies if "HMMA" in body), key=len)
