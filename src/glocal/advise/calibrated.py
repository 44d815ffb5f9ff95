"""PAROAttention (arXiv 2506.16054) as candidates of `advise`: axis orders and static masks, calibrated on the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glocal.adapt.paro_calibration import ParoSpec, calibrate_each
from glocal.advise.masks import keep_masks, read_masks
from glocal.advise.methods import MethodSpec

DENSITIES = (0.1, 0.2, 0.35, 0.5, 0.7)


def paro_candidates(
    model: Any, run: Callable[[], Any], folder: Path, densities: Sequence[float] = DENSITIES, *, block: int = 64
) -> list[MethodSpec]:
    """One candidate a density (share of blocks kept), from two dense runs: `run()` generates a sample. Their masks lie
    in files in `folder` and serve the resolution they were made for. ValueError where heads or resolution change on the
    way, or the media tokens are no grid of two or three axes.
    """
    specs = [ParoSpec(density=density, block=block) for density in densities]
    return [masked(keep_masks(plan, folder)) for plan in calibrate_each(model, run, specs)]


def masked(file: Path) -> MethodSpec:
    """The candidate of masks that are there already."""
    plan = read_masks(str(file))
    params = {"density": round(plan.density, 3)}
    blocks = (plan.block, plan.block)
    return MethodSpec("paro", params, "heads", blocks, kind="masks", resolution="exact", masks=str(file.resolve()))


def calibrated(model: Any, objective: Any, sample: Any, folder: Path) -> list[MethodSpec]:
    """`paro_candidates` of a sample of an objective."""
    return paro_candidates(model, lambda: objective.run(model, sample), folder)
