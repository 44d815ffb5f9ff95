"""One step of 64 query rows in the forward kernel: logits, their online softmax, and weights as the next operand."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# Inside kernels, annotations and operators mean what the compiler of Gluon makes of them.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from glocal.kernels.gluon import layouts

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def capped(s, score):
    """Logits with soft-cap, in powers of two; without one they keep their scale for `weigh`."""
    if score[1] is not None:
        e = gl.exp2(s * (2.0 * LOG2E * score[0] / score[1])) + 1.0
        inverse = gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [e], gl.float32, True, 1)
        s = (1.0 - 2.0 * inverse) * (score[1] * LOG2E)  # soft-cap * tanh
    return s


@gluon.jit
def factor(score):
    """What is left for `weigh` to multiply by."""
    if score[1] is None:
        return score[0] * LOG2E
    else:
        return 1.0


@gluon.jit
def weigh(s, top, total, scale, KEYS: gl.constexpr):
    """Fold logits s [64, KEYS] into the largest logit of each row and the sums of weights, in powers of two.

    Sums [64, 4] are those of each lane of four; they are added up when all is done. Returns weights, largest logit,
    sums, and the factor for what was summed before.
    """
    lanes: gl.constexpr = gl.SliceLayout(1, layouts.words(KEYS))
    new = gl.maximum(top, gl.max(s, 1) * scale)
    shift = gl.where(new == float("-inf"), 0.0, new)
    p = gl.exp2(s * scale - gl.expand_dims(shift, 1))
    old = gl.exp2(top - shift)
    mine = gl.sum(gl.sum(gl.reshape(p, [64, KEYS // 8, 4, 2]), 3), 1)  # [64, 4]
    mine = gl.convert_layout(mine, layouts.words(KEYS), assert_trivial=True)
    total = total * gl.expand_dims(gl.convert_layout(old, lanes, assert_trivial=True), 1) + mine
    return p, new, total, old


@gluon.jit
def packed(p, dtype: gl.constexpr, KEYS: gl.constexpr):
    """Weights [64, KEYS] as the left operand keeps them, two to a word: int32 [64, KEYS / 8, 4].

    Carried through a loop as single numbers of 16 bits they would be taken apart and put together in every round.
    """
    low, high = gl.split(gl.reshape(p, [64, KEYS // 8, 4, 2]))
    kind: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    return gl.inline_asm_elementwise(
        "cvt.rn." + kind + ".f32 $0, $2, $1;", "=r,f,f", [low, high], gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def opened(word, dtype: gl.constexpr, KEYS: gl.constexpr, DV: gl.constexpr):
    """The left operand that `packed` packed."""
    low, high = word.to(gl.int16), (word >> 16).to(gl.int16)
    p = gl.reshape(gl.join(low, high), [64, KEYS]).to(dtype, bitcast=True)
    return gl.convert_layout(p, layouts.operand(DV), assert_trivial=True)


@gluon.jit
def scores(q, ks, slot, BK: gl.constexpr):
    """Start q k^T, [64, BK]."""
    blank = gl.zeros([64, BK], gl.float32, layout=layouts.products(BK))
    return warpgroup_mma(q, ks.index(slot).permute((1, 0)), blank, use_acc=False, is_async=True)
