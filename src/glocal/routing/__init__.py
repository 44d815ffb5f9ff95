"""Who may see whom by content: partitions, scorers, budgets and the selections they make."""

from glocal.routing.keep import Keep, Kept
from glocal.routing.partition import Partition
from glocal.routing.route import PooledTopK, RouteSpec, pooled_topk, route
from glocal.routing.scorers import BlockMean, MeanToToken, Scorer
from glocal.routing.selection import Selection, from_mask
from glocal.routing.skip_softmax import SkipSoftmax
from glocal.routing.visible import visible_groups

__all__ = [
    "BlockMean",
    "Keep",
    "Kept",
    "MeanToToken",
    "Partition",
    "PooledTopK",
    "RouteSpec",
    "Scorer",
    "Selection",
    "SkipSoftmax",
    "from_mask",
    "pooled_topk",
    "route",
    "visible_groups",
]
