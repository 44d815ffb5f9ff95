"""The kernel of warp groups is compiled for sm_90 here: no spills, and products of the kinds that were asked for."""

from __future__ import annotations

import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def compiled(qk: str, pv: str, blocks: tuple[int, int], *, masked: bool) -> Any:
    """The kernel for head size 128 and bfloat16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from glocal.kernels.quantised.hopper import hopper_kernel

    kinds = {"int8": ("i8", gl.int8), "fp8": ("fp8e4nv", gl.float8e4nv), "none": ("bf16", gl.bfloat16)}

    def tiles(kind: str, rows: int, columns: int) -> str:
        word, dtype = kinds[kind]
        layout: Any = gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)  # type: ignore[arg-type]
        return f"tensordesc<{word}{[rows, columns]},{layout!r}>"

    bq, bk = blocks
    constants = {
        "BQ": bq,
        "BK": bk,
        "STAGES": 3,
        "EXTRA": (64, bk, qk == "int8", pv == "fp8", 8.0 if pv == "fp8" else 0.0, masked, 4),
        "REGISTERS": 240,
    }
    signature: dict[str, Any] = {
        "q": tiles(qk, 64, 128),
        "k": tiles(qk, bk, 128),
        "v": tiles(pv, 128, bk) if pv == "fp8" else tiles(pv, bk, 128),
        "out": ("*bf16", "*fp32"),
        "lists": (("*i32", "i32", "i32", "i32"), ("*i32", "*i32", "i32"), ("*i32", "*i32", "i32", "*i32"), "i32"),
        "table": "*i32",
        "scales": ("*fp32", "*fp32", "*fp32", "fp32"),
        "sizes": ("i32",) * 5,
        **dict.fromkeys(constants, "constexpr"),
    }
    names = hopper_kernel.arg_names
    source = GluonASTSource(hopper_kernel, signature, {(names.index(k),): v for k, v in constants.items()}, {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def tool(name: str, *arguments: str) -> str:
    """Output of a binary of Triton's."""
    import triton

    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(binary), *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "qk, pv, blocks, masked, products",
    [
        ("fp8", "fp8", (128, 128), True, {"QGMMA"}),
        ("int8", "none", (64, 64), False, {"IGMMA", "HGMMA"}),
        ("int8", "fp8", (128, 64), False, {"IGMMA", "QGMMA"}),
    ],
)
def test_compiled_for_hopper(
    qk: str, pv: str, blocks: tuple[int, int], masked: bool, products: set[str], tmp_path: Path
) -> None:
    made = compiled(qk, pv, blocks, masked=masked)
    file = tmp_path / "kernel.cubin"
    file.write_bytes(made.asm["cubin"])
    used = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage", os.fspath(file)))
    assert used is not None and int(used[2]) == 0 and made.metadata.shared < 228 << 10
    assert set(re.findall(r"[HIQ]GMMA", tool("cuobjdump", "-sass", os.fspath(file)))) == products
