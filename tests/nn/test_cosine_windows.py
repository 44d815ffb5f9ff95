"""Swin V2's attention beside the definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from glocal.nn.cosine_windows import CosineWindowAttention, spaced


def test_offsets_are_log_spaced() -> None:
    found = spaced(4, 8).reshape(7, 7, 2)
    assert found[0, 0, 0] == pytest.approx(-math.log2(1 + 8 * 3 / 7) / 3) and found[3, 3].abs().sum() == 0
    assert found[3, 6, 1] == -found[3, 0, 1] > 0 and found[3, 6, 0] == 0
    assert spaced(1, 1).tolist() == [[0, 0]]


@pytest.mark.parametrize("backend", [None, "auto"])
def test_cosines_and_a_learned_bias(backend: str | None) -> None:
    """One rolled window beside the sum over pairs; pairs that rolling brought together do not meet."""
    torch.manual_seed(0)
    layer = CosineWindowAttention(8, 2, 3, 1, trained=5, hidden=16).double()
    layer.offsets = layer.offsets.double()
    if backend is not None:
        object.__setattr__(layer.spec, "backend", backend)
    with torch.no_grad():
        layer.logit_scale[1] = 9.0  # above the limit
        for bias in (layer.q_bias, layer.v_bias):
            bias.normal_()
    x = torch.randn(1, 6, 6, 8, dtype=torch.float64)
    qkv = (x @ layer.qkv.weight.T).reshape(6, 6, 3, 2, 4)
    q = F.normalize(qkv[:, :, 0] + layer.q_bias.reshape(2, 4), dim=-1)
    k, v = F.normalize(qkv[:, :, 1], dim=-1), qkv[:, :, 2] + layer.v_bias.reshape(2, 4)
    table = (16 * layer.cpb_mlp(layer.offsets).sigmoid()).reshape(5, 5, 2)

    def group(place: int) -> tuple[int, int]:
        moved = (place - 1) % 6
        return moved // 3, int(place == 0)  # the first row wraps around and stays alone

    out = torch.zeros(6, 6, 2, 4, dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            keys = [(a, b) for a in range(6) for b in range(6) if group(a) == group(i) and group(b) == group(j)]
            for h in range(2):
                factor = min(math.exp(layer.logit_scale[h].item()), 100.0)
                logits = torch.stack(
                    [factor * (q[i, j, h] @ k[a, b, h]) + table[i - a + 2, j - b + 2, h] for a, b in keys]
                )
                out[i, j, h] = sum(w * v[a, b, h] for w, (a, b) in zip(logits.softmax(0), keys, strict=True))
    assert torch.allclose(layer(x), layer.proj(out.flatten(2))[None], atol=1e-9)


def test_whole_maps_under_autocast() -> None:
    layer = CosineWindowAttention(8, 2, 4)
    object.__setattr__(layer.spec, "backend", "auto")
    x = torch.randn(1, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert torch.allclose(found.float(), layer(x), atol=5e-2)
