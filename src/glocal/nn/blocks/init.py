"""Weights as most vision transformers start: Linear layers truncated normal, biases zero, norms one."""

from __future__ import annotations

from torch import nn


def init_linears(module: nn.Module, std: float = 0.02) -> None:
    """Set every Linear below `module` to truncated normal weights and zero biases; convolutions keep torch's start."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
