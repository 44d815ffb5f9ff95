"""Compile patterns and selections into block plans; forecast what they cost."""

from glocal.plan.blockplan import BlockLists, BlockPlan
from glocal.plan.build import PlanSpec, plan
from glocal.plan.dynamic import plan_blocks
from glocal.plan.selection import plan_selection
from glocal.plan.slots import PlanSlots

__all__ = ["BlockLists", "BlockPlan", "PlanSlots", "PlanSpec", "plan", "plan_blocks", "plan_selection"]
