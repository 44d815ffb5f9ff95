"""What says float32 is float32 under autocast too: outputs, and gradients through what forward kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from glocal import Canvas, Neighborhood, attend
from glocal.ops import Capture, Unnormalised, cells, channel, linear_attention
from glocal.ops.rectify import rectification
from glocal.routing import Partition
from glocal.routing.shares import helpful, pooled, shares
from glocal.routing.skip_softmax import best_margin

CANVAS, PATTERN = Canvas((4, 6)), Neighborhood((3, 3))
GROUPS = Partition.blocks(CANVAS, 8)


def attended(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pattern = None if backend == "dense" else PATTERN
        done = attend(q, k, v, pattern, canvas=CANVAS, backend=backend)
        return done.out + done.lse[..., None]

    return run


def rectified(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mine, theirs = pooled(q, GROUPS), pooled(k, GROUPS)
    share, good = shares(mine, theirs, k[:, :, :2]), helpful(mine, theirs)
    factor, addend = rectification(share, torch.zeros_like(good), torch.ones_like(good), pooled(v, GROUPS).mean)
    return factor[..., None] + addend + share.blocks.sum(-1, keepdim=True)


def around(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    centres, pixels = k[0].unflatten(1, (4, 6)), q[0].unflatten(1, (4, 6))[..., None, :].expand(-1, -1, -1, 3, -1)
    weights = cells.affinity(pixels, centres, 1)
    return cells.scatter(pixels, weights)


def looked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Capture(q, k, PATTERN, CANVAS, differentiable=True).rows()


OPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "reference": attended("reference"),
    "cpu": attended("cpu"),
    "dense": attended("dense"),
    "flex": attended("flex"),
    "rectified": rectified,
    "cells": around,
    "capture": looked,
    "weighted": lambda q, k, v: Capture(q, k, differentiable=True).column_mean(),
    "channel": lambda q, k, v: channel.gram(q[:, 0], k[:, 0], v[:, 0]),
    "linear": lambda q, k, v: linear_attention(q, k, v, Unnormalised(0.1)),
    "margin": lambda q, k, v: best_margin(q, k, GROUPS, GROUPS, 0.3),
}


@pytest.mark.parametrize("name", list(OPS))
def test_nothing_is_rounded_under_autocast(name: str, generator: torch.Generator) -> None:
    inputs = [torch.randn(1, 2, 24, 8, generator=generator).requires_grad_() for _ in range(3)]

    want = OPS[name](*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = OPS[name](*inputs)
    grads = [torch.autograd.grad(out.square().sum(), inputs, allow_unused=True) for out in (found, want)]
    for a, b in zip((found, *grads[0]), (want, *grads[1]), strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
