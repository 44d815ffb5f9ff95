"""Logits of a neighbourhood in window order: one slot for each key of the window, then the extra keys.

Slots are row-major over the axes from the start of the window, a dilation step apart, as the unfused operators of FNA
lay them out (arXiv 2403.04690). A slot beyond what the query may see (causal axes, clipped windows, short dilation
groups) is -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glocal._exact import exact
from glocal.kernels.call import DenseBias
from glocal.ops._rows import Rows, looked_up
from glocal.patterns.neighborhood import Neighborhood


def slot_keys(rows: Rows, pattern: Neighborhood, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Key index (int64) and visibility (bool) of every slot, both [n, slots], for query indices [n]."""
    layout = rows.layout
    grid = layout.q.grid
    if grid not in layout.kv.parts or layout.q_start or layout.kv_start or layout.nk != layout.kv.size:
        raise ValueError(f"window: queries and keys must lie on one whole grid, got {layout.q!r} and {layout.kv!r}.")
    at = layout.q_coords(queries)
    if bool((at.part != layout.q.number(grid.name)).any()):
        raise ValueError(f"window: only queries of the grid {grid.name!r} have a window; name them with rows=.")
    place = torch.zeros(queries.numel(), 1, dtype=torch.long, device=queries.device)
    seen = torch.ones_like(place, dtype=torch.bool)
    for axis, (rule, length) in enumerate(zip(pattern.axes(grid.axes), grid.axes, strict=True)):
        group = at.axes[axis] % rule.dilation
        places = -((group - length) // rule.dilation)
        start, end = rule.span(at.axes[axis] // rule.dilation, places)
        slot = start[:, None] + torch.arange(rule.window, device=queries.device)  # [n, window]
        inside = slot < end[:, None]
        where = (torch.where(inside, slot, 0) * rule.dilation + group[:, None]).clamp(max=length - 1)
        place = (place[:, :, None] * length + where[:, None]).flatten(1)
        seen = (seen[:, :, None] & inside[:, None]).flatten(1)
    own = layout.kv.indices(grid.name).to(queries.device)
    extra = layout.kv_coords(device=queries.device)
    others = (extra.part != layout.kv.number(grid.name)).nonzero().flatten()
    keys = torch.cat([own[place], others.expand(queries.numel(), -1)], 1)
    allowed = layout.outside(at.unsqueeze(1), layout.kv_coords(others).unsqueeze(0))  # [n, extra]
    return keys, torch.cat([seen, allowed], 1)


def slot_logits(rows: Rows, pattern: Neighborhood, queries: Tensor) -> Tensor:
    """Logits [B, H, n, slots], -inf in hidden slots."""
    keys, seen = slot_keys(rows, pattern, queries)
    near = rows.k[:, :, keys]  # [B, Hkv, n, slots, D]
    q = rows.q[:, :, queries].unflatten(1, (near.shape[1], -1))  # [B, Hkv, groups, n, D]
    high = near.dtype
    with exact(q):
        s = (near[:, :, None] @ q[..., None]).squeeze(-1).flatten(1, 2)  # [B, H, n, slots]
    s = rows.shaped(s)
    for bias in rows.bias:
        if isinstance(bias, DenseBias):
            values = bias.values if bias.values.shape[2] == 1 else bias.values[:, :, queries]
            index = keys.expand(*values.shape[:2], -1, -1)
            values = values.expand(-1, -1, queries.numel(), rows.k.shape[2])
            s = s + values.gather(3, index).to(high)
        else:
            s = s + looked_up(bias.table, bias.k_code[keys] - bias.q_code[queries][:, None]).to(high)
    if rows.segments is not None:
        mine, theirs = rows.segments
        mine = mine[:, queries][:, :, None]  # [B, n, 1]
        hidden = (mine != theirs[:, keys]) | (mine < 0)
        s = s.masked_fill(hidden[:, None], -torch.inf)
    return s.masked_fill(~seen, -torch.inf)
