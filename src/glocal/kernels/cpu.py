"""Block-sparse attention on the CPU: gathered key blocks through torch's own fused CPU attention, batch by batch.

The forward pass hands each batch of query blocks and its gathered keys to the flash kernel of torch, which also gives
the LSE; a soft-cap takes the explicit softmax. The backward pass makes the weights again from the LSE with plain matrix
products, which is faster here than the fused backward. Low precision is computed in float32.
"""

from __future__ import annotations

from torch import Tensor

from glocal.kernels import _blockwise
from glocal.kernels._jobs import Limits
from glocal.kernels.call import Call, Grads
from glocal.kernels.capability import ALL_DTYPES, Capability

CAPABILITY = Capability(
    name="cpu",
    needs="plan",
    devices=("cpu",),
    dtypes=ALL_DTYPES,
    note="gathered key blocks through torch's fused CPU attention, batch by batch; low precision in float32",
    blocks=((128, 128), (64, 64)),
    dense=False,
)

# What one thread holds at a time. Where scores or masks of every head are held, they should stay in cache.
_FORWARD = Limits(keys=1 << 15, scores=1 << 24)
_HELD = Limits(keys=1 << 14, scores=1 << 22)
_BACKWARD = Limits(keys=1 << 14, scores=1 << 20)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] -> out [B, Hq, Nq, Dv], lse [B, Hq, Nq]."""
    held = call.softcap is not None or call.bias or call.segments is not None
    return _blockwise.forward(q, k, v, call, _HELD if held else _FORWARD)


def backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Grads:
    """Gradients through out and LSE."""
    return _blockwise.backward(grad_out, grad_lse, q, k, v, out, lse, call, _BACKWARD)
