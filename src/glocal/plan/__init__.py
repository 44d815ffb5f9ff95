"""Compile patterns and selections into block plans; forecast what they cost."""

from glocal.plan.blockplan import BlockLists, BlockPlan
from glocal.plan.build import PlanSpec, plan
from glocal.plan.selection import plan_selection

__all__ = ["BlockLists", "BlockPlan", "PlanSpec", "plan", "plan_selection"]
