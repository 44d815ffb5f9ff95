"""Static block masks of a recipe: the axis order of every head and what its blocks read (PAROAttention, arXiv
2506.16054), in a file beside the recipe whose name is made of its content.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any

from glocal.adapt.paro import blocks_of
from glocal.adapt.paro_plan import ParoPlan
from glocal.adapt.records import SiteCall
from glocal.adapt.sparse import media_grid
from glocal.plan.blockplan import BlockPlan
from glocal.plan.facts import declare_lasting
from glocal.plan.selection import plan_selection
from glocal.routing.selection import from_mask

_KEPT = 256
_CURRENT: OrderedDict[tuple[Any, ...], tuple[tuple[Any, ...], BlockPlan]] = (
    OrderedDict()
)  # of each layer, its last plan


def keep_masks(plan: ParoPlan, folder: Path) -> Path:
    """Write masks into `folder`, under a name made of their content."""
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "paro.part"
    plan.save(made)
    return made.replace(folder / f"paro-{_digest(made)}.safetensors").resolve()


def static_plan(file: str, call: SiteCall, device: str) -> BlockPlan:
    """The plan of a call, kept until the run comes to the next mask. FileNotFoundError, ValueError for a file that was
    changed, and for a canvas or a layer that it was not made for.
    """
    plan, layer, axes = read_masks(file), call.site.layer, media_grid(call, "paro")
    every = plan.orders.shape[1]
    heads = tuple(range(every)) if call.heads is None else call.heads
    if layer >= plan.orders.shape[0] or call.site.heads != every:
        raise ValueError(
            f"paro: site {call.site.name!r} is layer {layer} with {call.site.heads} heads, but the masks are of "
            f"{plan.orders.shape[0]} layers of {every} heads."
        )
    time = plan.time(call.state.step, call.state.total, call.state.timestep)
    key, state = (file, call.site.component, layer, heads, device), (time, call.layout.q)
    if key in _CURRENT and _CURRENT[key][0] == state:
        _CURRENT.move_to_end(key)
        return _CURRENT[key][1]
    chosen = list(heads)
    part = blocks_of(call.layout.q, axes, plan.orders[layer][chosen], plan.block)
    if part.groups != plan.blocks:
        raise ValueError(
            f"paro: {call.layout.nk} tokens are {part.groups} blocks of {plan.block}, but the masks have "
            f"{plan.blocks}; they serve the resolution and length they were made for."
        )
    made = plan_selection(from_mask(call.layout, part, part, plan.mask(time, layer)[chosen][None]), device=device)
    declare_lasting(made.full.index)
    _CURRENT[key] = (state, made)
    if len(_CURRENT) > _KEPT:
        _CURRENT.popitem(last=False)
    return made


@lru_cache(maxsize=16)
def read_masks(file: str) -> ParoPlan:
    """The masks of a file; FileNotFoundError, or ValueError where its name does not say its content."""
    plan = ParoPlan.load(file)
    if _digest(Path(file)) not in Path(file).name:
        raise ValueError(f"{file!r} does not hold the masks that its name says; it was changed or renamed.")
    return plan


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
