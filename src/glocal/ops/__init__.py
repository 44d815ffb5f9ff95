"""The differentiable operators people call."""

from glocal.ops.attention import Attended, attend, attention
from glocal.ops.score import Dense, PerKey, PerPart, Relative, Score

__all__ = ["Attended", "Dense", "PerKey", "PerPart", "Relative", "Score", "attend", "attention"]
