"""Who may see whom by position."""

from glocal.patterns.axis import AxisWindow
from glocal.patterns.base import AxisRelation, Dense, Pattern, per_head
from glocal.patterns.neighborhood import Neighborhood

__all__ = ["AxisRelation", "AxisWindow", "Dense", "Neighborhood", "Pattern", "per_head"]
