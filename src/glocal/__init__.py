"""Attention that is local where it can be and global where it must be.

    from glocal import Canvas, Neighborhood, attention
    out = attention(q, k, v, Neighborhood((18, 24, 24)), canvas=Canvas((30, 48, 80)))

Everything below is imported on first use, so ``import glocal`` costs no more than Python itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glocal import adapt, advise, canvas, kernels, measure, nn, ops, patterns, plan, routing, systems
    from glocal.advise import Recipe, attach
    from glocal.canvas import Canvas, Layout, Part
    from glocal.ops import Attended, Score, attend, attention, explain
    from glocal.patterns import Neighborhood, Pattern, per_head
    from glocal.plan import BlockPlan

__version__ = "0.1.0"

_HOMES = {
    "Attended": "ops",
    "BlockPlan": "plan",
    "Canvas": "canvas",
    "Layout": "canvas",
    "Neighborhood": "patterns",
    "Part": "canvas",
    "Pattern": "patterns",
    "Recipe": "advise",
    "Score": "ops",
    "attach": "advise",
    "attend": "ops",
    "attention": "ops",
    "explain": "ops",
    "per_head": "patterns",
}
_ROOMS = ("adapt", "advise", "canvas", "kernels", "measure", "nn", "ops", "patterns", "plan", "routing", "systems")

__all__ = [
    "Attended",
    "BlockPlan",
    "Canvas",
    "Layout",
    "Neighborhood",
    "Part",
    "Pattern",
    "Recipe",
    "Score",
    "adapt",
    "advise",
    "attach",
    "attend",
    "attention",
    "canvas",
    "explain",
    "kernels",
    "measure",
    "nn",
    "ops",
    "patterns",
    "per_head",
    "plan",
    "routing",
    "systems",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"glocal.{_HOMES[name]}"), name)
    if name in _ROOMS:
        return import_module(f"glocal.{name}")
    from glocal._errors import nearest

    raise AttributeError(f"module 'glocal' has no attribute {name!r}; nearest: {nearest(name, __all__)}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
