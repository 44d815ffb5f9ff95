"""The differentiable operators people call."""

from glocal.kernels import planning as _planning
from glocal.kernels.quant import Quant
from glocal.ops import _routed, cells, merge
from glocal.ops._approximation import Approximation
from glocal.ops.attention import Attended, attend, attention
from glocal.ops.capture import BlockStats, Capture
from glocal.ops.depthwise import depthwise_conv
from glocal.ops.dynamic_conv import dynamic_conv
from glocal.ops.epilogue import Epilogue
from glocal.ops.explain import explain
from glocal.ops.heads import HeadGroup, heads
from glocal.ops.linear import Ratio, Subtract, Unnormalised, linear_attention, linear_weights, told_apart
from glocal.ops.norm import layer_norm, stored_norm
from glocal.ops.pool import ConvPool, GroupPool, MeanPool, Pooled, ResizePool, SoftmaxPool, pool
from glocal.ops.reorder import Finish, finish_rows, reorder, restore
from glocal.ops.score import Dense, PerKey, PerPart, Relative, Score

__all__ = [
    "Approximation",
    "Attended",
    "BlockStats",
    "Capture",
    "ConvPool",
    "Dense",
    "Epilogue",
    "Finish",
    "GroupPool",
    "HeadGroup",
    "MeanPool",
    "PerKey",
    "PerPart",
    "Pooled",
    "Quant",
    "Ratio",
    "Relative",
    "ResizePool",
    "Score",
    "SoftmaxPool",
    "Subtract",
    "Unnormalised",
    "attend",
    "attention",
    "cells",
    "depthwise_conv",
    "dynamic_conv",
    "explain",
    "finish_rows",
    "heads",
    "layer_norm",
    "linear_attention",
    "linear_weights",
    "merge",
    "pool",
    "reorder",
    "restore",
    "stored_norm",
    "told_apart",
]

_planning.register()
_routed.register()
