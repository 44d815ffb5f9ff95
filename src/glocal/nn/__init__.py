"""Layers with parameters, one mechanism a file: ``mixer(x, stage=None) -> x``, channels last."""

from glocal.nn.channel_attention import ChannelAttention
from glocal.nn.mixer import begin, list_mixers, mixer, register_mixer
from glocal.nn.neighborhood import (
    NeighborhoodAttention1d,
    NeighborhoodAttention2d,
    NeighborhoodAttention3d,
    NeighborhoodSpec,
)
from glocal.nn.window_attention import WindowAttention, WindowSpec

__all__ = [
    "ChannelAttention",
    "NeighborhoodAttention1d",
    "NeighborhoodAttention2d",
    "NeighborhoodAttention3d",
    "NeighborhoodSpec",
    "WindowAttention",
    "WindowSpec",
    "begin",
    "list_mixers",
    "mixer",
    "register_mixer",
]
