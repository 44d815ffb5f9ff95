"""Norms over channels-last maps on the CPU; `tests/kernels/maps_cases.py` has the kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from glocal.ops import depthwise_conv, stored_norm


def test_stored_norm_is_batch_norm_in_evaluation() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, eps=1e-3).eval()
    for value, low in ((norm.running_mean, -1.0), (norm.running_var, 0.5), (norm.weight, -1.0), (norm.bias, -1.0)):
        nn.init.uniform_(value, low, 2.0)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 4, 6)
    stats = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    wanted = nn.functional.gelu(norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    assert torch.allclose(stored_norm(x, stats, 1e-3, "gelu"), wanted, atol=1e-6)  # type: ignore[arg-type]
    kernel = torch.zeros(6, 1, 3, 3)
    kernel[:, :, 1, 1] = 1
    same = depthwise_conv(x, kernel, padding=(1, 1, 1, 1), norm=(stats, 1e-3), act="gelu")  # type: ignore[arg-type]
    assert torch.allclose(same, wanted, atol=1e-6)


def test_unknown_activations_are_refused_in_words() -> None:
    x, stats = torch.zeros(1, 4), (torch.zeros(4), torch.ones(4), torch.ones(4), torch.zeros(4))
    with pytest.raises(ValueError, match="stored_norm: act='relu'; legal: 'none', 'gelu', 'gelu_tanh'"):
        stored_norm(x, stats, act="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depthwise_conv: act='relu'"):
        depthwise_conv(torch.zeros(1, 3, 3, 4), torch.zeros(4, 1, 3, 3), act="relu")  # type: ignore[arg-type]
