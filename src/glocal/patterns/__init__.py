"""Who may see whom by position."""

from glocal.patterns.anchors import AxisSlice, Sinks, frame
from glocal.patterns.axis import AxisWindow, Border, Oversize
from glocal.patterns.base import AxisRelation, Dense, Pattern, PerHead, Term, per_head
from glocal.patterns.blocks import BlockPattern, Blocks, coarsen
from glocal.patterns.causal import Causal, CausalWindow
from glocal.patterns.csr import RowLists, kernel_rows, row_lists
from glocal.patterns.grid import Axial, Grid
from glocal.patterns.guided import GuidedWindows
from glocal.patterns.neighborhood import Neighborhood
from glocal.patterns.radial import RadialBlocks, RadialTokens
from glocal.patterns.strided import StridedShards, cache_efficient
from glocal.patterns.tilewindow import TileWindows
from glocal.patterns.windows import Windows

__all__ = [
    "Axial",
    "AxisRelation",
    "AxisSlice",
    "AxisWindow",
    "BlockPattern",
    "Blocks",
    "Border",
    "Causal",
    "CausalWindow",
    "Dense",
    "Grid",
    "GuidedWindows",
    "Neighborhood",
    "Oversize",
    "Pattern",
    "PerHead",
    "RadialBlocks",
    "RadialTokens",
    "RowLists",
    "Sinks",
    "StridedShards",
    "Term",
    "TileWindows",
    "Windows",
    "cache_efficient",
    "coarsen",
    "frame",
    "kernel_rows",
    "per_head",
    "row_lists",
]
