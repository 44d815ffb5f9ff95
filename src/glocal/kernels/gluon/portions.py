"""Long lists of the backward kernel cut into portions, each a program of its own: keys of a stride are seen from
everywhere after them, and one program a key block would leave most of the card waiting for a few.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.kernels._jobs import Units
from glocal.kernels.triton.lists import Turned
from glocal.kernels.triton.work import Work, may_look

_SHARE = 6  # portions of the fair share of one processor
_LEAST = 48  # steps of a portion
_HOPPER = 132  # processors where there is no card
_ALL = 1 << 30


@dataclass(frozen=True, eq=False)
class Portions:
    """Programs in the order in which they start, long ones first.

    programs: int32 [n, 4], each the number of a sample, unit and key block, the steps to leave out at the end of each
    of its lists, the steps from there after which it stops, and the place of its sums, -1 for a list that is not cut.
    cut: int32 [lists that are cut, 3], number, first place, portions. places: of sums, in all.
    """

    programs: Tensor
    cut: Tensor
    places: int


def processors(device: torch.device) -> int:
    """Of a card."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _HOPPER


def portions(w: Work, units: Units, full: Turned, part: Turned, tiles: int) -> Portions | None:
    """None where no list is long enough, or the plan is not known to stay. tiles: steps of a full entry.

    This waits for the device.
    """
    if not may_look(w.plan.full_index):
        return None
    owner = w.plan.owner.long().repeat_interleave(w.heads // w.plan.owner.shape[1], 1).expand(w.batch, w.heads)
    steps = (full.count * tiles + part.count).view(-1, w.kv_blocks)[owner]  # [B, heads, key blocks]
    return _cut(steps.view(w.batch * units.count, units.rows, w.kv_blocks))


def _cut(steps: Tensor) -> Portions | None:
    """steps: int64 [members, heads, key blocks]; what is counted from the end falls on the same queries in lists that
    end at the same one, as those of causal patterns do, and programs that start together then share what they read.
    """
    device, heads, blocks = steps.device, *steps.shape[1:]
    most = max(_LEAST, int(steps.sum()) // (_SHARE * processors(device))) // heads
    parts = ((2 * steps.amax(1) + most) // (2 * most)).clamp(min=1).flatten()
    if int(parts.max()) == 1:
        return None
    number = torch.arange(parts.numel(), device=device).repeat_interleave(parts)
    ends = parts.cumsum(0)
    part = torch.arange(number.numel(), device=device) - (ends - parts)[number]
    cut = parts[number] > 1
    place = torch.where(cut, cut.cumsum(0) - 1, -1)
    skip = part * most
    stop = torch.where(part + 1 == parts[number], _ALL, skip + most)
    mine = steps.transpose(1, 2).flatten(0, 1)[number]  # [programs, heads]
    work = (mine.clamp(max=stop[:, None]) - skip[:, None]).clamp(min=0).sum(1)
    order = (number // blocks * (1 << 20) + part).argsort(stable=True)
    order = order[work[order].clamp(min=1).log2().round().argsort(stable=True, descending=True)]
    listed = (parts > 1).nonzero()[:, 0]
    return Portions(
        torch.stack([number, skip, stop, place], 1)[order].int().contiguous(),
        torch.stack([listed, place[(ends - parts)[listed]], parts[listed]], 1).int().contiguous(),
        int(cut.sum()),
    )
