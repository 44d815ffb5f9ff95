"""Samples on a smaller canvas, where step weights cost less: the same aspect, and not so small that content changes.

What an error at a noise level is worth at the end is much the same on a canvas of the same aspect. That is checked: the
first and the last step range are measured at full size too, and all of them are where the two disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from glocal.advise.weights import StepWeight, fit_weights, make_buckets
from glocal.advise.workload import Sample

FRAMES, SIDE = 8, 24  # tokens: an axis is not cut below
AGREE = 1.5  # weights of the two sizes may differ by so much
_FRAME_NAMES = ("frames", "num_frames")


def reduced_shape(shape: Sequence[int], limit: int) -> tuple[int, ...] | None:
    """The largest grid (height, width) or (frames, height, width) of the same aspect with at most `limit` tokens and
    axes not below `FRAMES` and `SIDE`; None where the grid is small enough already, or cannot be made much smaller.
    """
    if len(shape) not in (2, 3) or _product(shape) <= limit:
        return None
    height, width = shape[-2:]
    side, least = min(height, width), min(SIDE, height, width)
    best: tuple[int, ...] | None = None
    for small in range(side, least - 1, -1):
        across = (round(height * small / side), round(width * small / side))
        times: list[tuple[int, ...]] = [()]
        if len(shape) == 3:
            times = [(max(min(FRAMES, shape[0]), round(shape[0] * small / side)),)]
        best = (*times[0], *across)
        if _product(best) <= limit:
            break
    return best if best is not None and _product(best) <= 0.75 * _product(shape) else None


def reduced_sample(sample: Sample, sizes: Mapping[str, int], shape: Sequence[int], limit: int) -> Sample | None:
    """The sample on the reduced grid. sizes: its arguments that say a size, in pixels and frames; shape: its grid.

    None where there is none, or where pixels are no whole multiple of tokens.
    """
    small = reduced_shape(shape, limit)
    if small is None or not {"height", "width"} <= set(sizes):
        return None
    made: dict[str, int] = {}
    for name, length, cut in zip(("height", "width"), shape[-2:], small[-2:], strict=True):
        if sizes[name] % length:
            return None
        made[name] = sizes[name] // length * cut
    if len(shape) == 3:
        name = next((n for n in _FRAME_NAMES if n in sizes), None)
        if name is None:
            return None
        frames = sizes[name]
        if frames % shape[0] == 0:
            made[name] = frames // shape[0] * small[0]
        elif shape[0] > 1 and (frames - 1) % (shape[0] - 1) == 0:  # the first frame is a token of its own
            made[name] = (frames - 1) // (shape[0] - 1) * (small[0] - 1) + 1
        else:
            return None
    return Sample(f"{sample.id}-reduced", sample.seed, {**sample.args, **made})


def agree(full: Sequence[StepWeight], small: Sequence[StepWeight]) -> bool:
    """Whether the weights of every bucket that was measured at both sizes lie within a factor of `AGREE`."""
    for bucket in sorted({r.bucket for r in full}):
        one = make_buckets((1.0, 0.0), 1)
        both = [
            fit_weights(one, [replace(r, bucket=0) for r in runs if r.bucket == bucket]).weight[0]
            for runs in (full, small)
        ]
        if not 1 / AGREE <= both[0] / both[1] <= AGREE:
            return False
    return True


def _product(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
