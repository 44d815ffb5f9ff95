"""The differentiable operators people call."""

from glocal.ops import merge
from glocal.ops.attention import Attended, attend, attention
from glocal.ops.capture import BlockStats, Capture
from glocal.ops.epilogue import Epilogue
from glocal.ops.explain import explain
from glocal.ops.heads import HeadGroup, heads
from glocal.ops.pool import ConvPool, GroupPool, MeanPool, Pooled, ResizePool, SoftmaxPool, pool
from glocal.ops.score import Dense, PerKey, PerPart, Relative, Score

__all__ = [
    "Attended",
    "BlockStats",
    "Capture",
    "ConvPool",
    "Dense",
    "Epilogue",
    "GroupPool",
    "HeadGroup",
    "MeanPool",
    "PerKey",
    "PerPart",
    "Pooled",
    "Relative",
    "ResizePool",
    "Score",
    "SoftmaxPool",
    "attend",
    "attention",
    "explain",
    "heads",
    "merge",
    "pool",
]
