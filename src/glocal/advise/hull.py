"""Lower hulls of many small clouds of (time, error) points at once.

Under one price of time, the best point of a cloud always lies on its lower hull, and falling prices walk along the
hull from the fastest point to the most accurate one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 17  # clouds handled at once: bounds the temporary memory


@dataclass(frozen=True, eq=False)
class Hulls:
    """Of each cloud [items, corners], padded at the end.

    point: index of each corner in its cloud, fastest first, -1 pads. rise: time from this corner to the next. fall:
    error saved by it. Both are positive, fall / rise sinks along a hull; 0 where there is no next corner.
    """

    point: Tensor
    rise: Tensor
    fall: Tensor

    @property
    def slope(self) -> Tensor:
        """fall / rise [items, corners], 0 where there is no next corner."""
        return torch.where(self.rise > 0, self.fall / self.rise.clamp(min=torch.finfo(self.rise.dtype).tiny), 0)


def lower_hulls(time: Tensor, error: Tensor) -> Hulls:
    """time, error [items, points], finite times, errors >= 0 (inf: not allowed) -> the hulls.

    Of equal points the first counts; corners on a straight line are left out. float64 inside.
    """
    found = [_wrap(t.double(), e.double()) for t, e in zip(time.split(_CHUNK), error.split(_CHUNK), strict=True)]
    most = max(point.shape[1] for point, _, _ in found)

    def padded(part: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(part, (0, most - part.shape[1]), value=value)

    return Hulls(
        torch.cat([padded(point, -1) for point, _, _ in found]),
        torch.cat([padded(rise, 0) for _, rise, _ in found]),
        torch.cat([padded(fall, 0) for _, _, fall in found]),
    )


def _wrap(time: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gift wrapping from the fastest point; every turn moves all clouds that are not done by one corner."""
    items = len(time)
    time = torch.where(error.isinf(), torch.inf, time)
    fastest = time.amin(1, keepdim=True)  # [items, 1]
    here = torch.where(time == fastest, error, torch.inf).argmin(1)  # [items]
    corners = [here]
    rises, falls = [], []
    active = torch.arange(items, device=time.device)
    while active.numel():
        t, e = time[active], error[active]  # [active, points]
        at = here[active][:, None]
        rise, fall = t - t.gather(1, at), e.gather(1, at) - e
        better = (rise > 0) & (fall > 0) & rise.isfinite()
        slope = torch.where(better, fall / rise, -1.0)
        best = slope.amax(1, keepdim=True)
        far = torch.where(slope == best, rise, -1.0)  # of several on one line the farthest
        step = far.argmax(1)
        goes = best[:, 0] > 0
        active, step = active[goes], step[goes]
        if not active.numel():
            break
        next_point = torch.full((items,), -1, dtype=torch.long, device=time.device)
        next_rise, next_fall = time.new_zeros(items), time.new_zeros(items)
        next_point[active] = step
        next_rise[active] = rise[goes].gather(1, step[:, None])[:, 0]
        next_fall[active] = fall[goes].gather(1, step[:, None])[:, 0]
        here = torch.where(next_point >= 0, next_point, here)
        corners.append(next_point)
        rises.append(next_rise)
        falls.append(next_fall)
    nothing = time.new_zeros(items)
    return torch.stack(corners, 1), torch.stack([*rises, nothing], 1), torch.stack([*falls, nothing], 1)
