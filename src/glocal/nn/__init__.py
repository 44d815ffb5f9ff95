"""Layers with parameters, one mechanism a file: ``mixer(x, stage=None) -> x``, channels last."""

from glocal.nn.neighborhood import (
    NeighborhoodAttention1d,
    NeighborhoodAttention2d,
    NeighborhoodAttention3d,
    NeighborhoodSpec,
)

__all__ = ["NeighborhoodAttention1d", "NeighborhoodAttention2d", "NeighborhoodAttention3d", "NeighborhoodSpec"]
