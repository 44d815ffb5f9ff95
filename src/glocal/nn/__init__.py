"""Layers with parameters, one mechanism a file: ``mixer(x, stage=None) -> x``, channels last."""

from glocal.nn.bilevel_routing import BiLevelRoutingAttention, GridRoutingAttention, RoutingSpec
from glocal.nn.channel_attention import ChannelAttention
from glocal.nn.inline import InLineAttention, InLineSpec
from glocal.nn.linear_attention import EnhancedLinearAttention
from glocal.nn.mixer import begin, list_mixers, mixer, register_mixer
from glocal.nn.neighborhood import (
    NeighborhoodAttention1d,
    NeighborhoodAttention2d,
    NeighborhoodAttention3d,
    NeighborhoodSpec,
)
from glocal.nn.super_tokens import SuperTokenAttention
from glocal.nn.window_attention import WindowAttention, WindowSpec

__all__ = [
    "BiLevelRoutingAttention",
    "EnhancedLinearAttention",
    "GridRoutingAttention",
    "InLineAttention",
    "InLineSpec",
    "RoutingSpec",
    "SuperTokenAttention",
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
