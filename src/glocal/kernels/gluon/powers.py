"""Powers of two with part of the work on the multipliers, for kernels that the special units of the card hold back."""

# pyright: reportArgumentType=false, reportCallIssue=false
# Inside kernels, annotations and operators mean what the compiler of Gluon makes of them.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

POLYNOMIAL = ("0f3F7FFB49", "0f3F31798D", "0f3E786F0D", "0f3D61FBB0")  # of 2^f, the constant first


@constexpr_function
def recipe(every):
    """Assembly for 2^x of `every` numbers: the special units take all but the last, which the multipliers compute.

    x = n + f with n whole and |f| <= 1/2; 2^f by a polynomial of degree 3, relative error 1e-4; n goes to the exponent.
    """
    lines = [f"ex2.approx.ftz.f32 ${i}, ${every + i};" for i in range(every - 1)]
    lines += [
        "{ .reg .f32 x, t, f; .reg .b32 n, y;",
        f"max.f32 x, ${2 * every - 1}, 0fC2FC0000;",  # -126
        "add.rn.f32 t, x, 0f4B400000;",  # 1.5 * 2^23: the whole part comes to lie in the low bits
        "sub.rn.f32 f, t, 0f4B400000;",
        "sub.rn.f32 f, x, f;",
        f"fma.rn.f32 x, f, {POLYNOMIAL[3]}, {POLYNOMIAL[2]};",
        f"fma.rn.f32 x, x, f, {POLYNOMIAL[1]};",
        f"fma.rn.f32 x, x, f, {POLYNOMIAL[0]};",
        "mov.b32 y, x; mov.b32 n, t; shl.b32 n, n, 23; add.s32 y, y, n;",
        f"mov.b32 ${every - 1}, y; }}",
    ]
    return "\n".join(lines)


@constexpr_function
def registers(every):
    """Constraints of `recipe`."""
    return ",".join(["=f"] * every + ["f"] * every)


@gluon.jit
def powers(x, EMULATE: gl.constexpr):
    """2^x. EMULATE: so many numbers share the special units with one that does without; 0 for none."""
    if EMULATE == 0:
        return gl.exp2(x)
    else:
        return gl.inline_asm_elementwise(recipe(EMULATE), registers(EMULATE), [x], gl.float32, True, EMULATE)
