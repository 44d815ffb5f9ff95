"""Weights by rule: golden cases of whole models store a rule and a seed in place of megabytes.

Sorted rule: the i-th name of the sorted manifest (integer tensors count) draws from a generator of its own, seeded
``seed * 100003 + i``. Hash rule: every entry is a hash of its name and flat index.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod, sqrt
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Manifest = Mapping[str, Sequence[int]]
Extra = Literal["tables", "gammas", "embeddings"]
_GAMMAS = ("gamma", "gamma1", "gamma2", "gamma_1", "gamma_2")
_EMBEDDINGS = ("pos_embed", "pos_embed_for_scale", "cls_token", "cls_token1", "channel_token")


def fill_sorted(
    manifest: Manifest,
    seed: int,
    *,
    extras: Collection[Extra] = (),
    integers: Collection[str] = (),
    keep: Callable[[str], bool] | None = None,
) -> dict[str, Tensor]:
    """Float32 weights by the sorted rule.

    manifest: shape of every tensor of the state, integer ones included.
    extras: what a system's rule says beyond the common part: "tables" (relative_position_bias_table 0.5 z), "gammas"
        (0.6 + 0.2 z), "embeddings" (position embeddings and class tokens 0.5 z).
    integers: names that hold integers; they count but are not filled, and neither is num_batches_tracked.
    keep: names that keep the values they have; they count but are not filled.
    """
    filled = {}
    for i, name in enumerate(sorted(manifest)):
        if name in integers or name.endswith("num_batches_tracked") or (keep is not None and keep(name)):
            continue
        generator = torch.Generator().manual_seed(seed * 100003 + i)
        filled[name] = _drawn(name, tuple(manifest[name]), extras, generator)
    return filled


def _drawn(name: str, shape: tuple[int, ...], extras: Collection[Extra], generator: torch.Generator) -> Tensor:
    last = name.rsplit(".", 1)[-1]
    if last == "running_var":
        return 0.5 + torch.rand(shape, generator=generator)
    z = torch.randn(shape, generator=generator)
    if last == "running_mean":
        return 0.3 * z
    if "tables" in extras and "relative_position_bias_table" in name:
        return 0.5 * z
    if "gammas" in extras and last in _GAMMAS:
        return 0.6 + 0.2 * z
    if "embeddings" in extras and last in _EMBEDDINGS:
        return 0.5 * z
    if last == "bias":
        return 0.2 * z
    if last == "weight" and len(shape) == 1:
        return 1 + 0.25 * z
    return z * 1.3 / sqrt(prod(shape[1:])) if len(shape) >= 2 else 0.3 * z


def fill_crc32(manifest: Manifest, gain: float = 1.0) -> dict[str, Tensor]:
    """Float32 weights by the hash rule; `num_batches_tracked` is int64 zero. gain: from the metadata of the case."""
    return {name: _hashed_weight(name, tuple(shape), gain) for name, shape in manifest.items()}


def _hashed_weight(name: str, shape: tuple[int, ...], gain: float) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    u = hashed(name, shape)
    if name.endswith("running_var"):
        out = 0.5 + u
    elif name.endswith("running_mean"):
        out = 0.2 * (2 * u - 1)
    elif len(shape) >= 2:
        out = (2 * u - 1) * sqrt(3 / prod(shape[1:])) * gain
    elif len(shape) == 1 and name.endswith("bias"):
        out = 0.2 * (2 * u - 1)
    else:
        out = 0.5 + u
    return out.float()


def hashed(name: str, shape: Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1) from a name, float64 of `shape`: the raw numbers of the hash rule, for inputs too."""
    start = np.uint32((zlib.crc32(name.encode()) * 0x9E3779B9) & 0xFFFFFFFF)
    with np.errstate(over="ignore"):
        z = np.arange(prod(shape), dtype=np.uint32) + start
        z ^= z >> np.uint32(16)
        z *= np.uint32(0x85EBCA6B)
        z ^= z >> np.uint32(13)
        z *= np.uint32(0xC2B2AE35)
        z ^= z >> np.uint32(16)
    return torch.from_numpy(z.astype(np.float64) / 2.0**32).reshape(tuple(shape))
