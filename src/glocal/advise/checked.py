"""Names in a job, checked before any work: measures that limits bound, sites that stay dense."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

from glocal._errors import nearest
from glocal.adapt.attach import media_sites, sites_of
from glocal.adapt.records import Site
from glocal.advise.effort import AdviseOptions, Target
from glocal.advise.objective import Objective
from glocal.advise.preflight import Preflight


def check_names(model: Any, objective: Objective, target: Target, options: AdviseOptions) -> None:
    """ValueError for a limit on what the objective does not measure, for a glob of `keep_dense` that fits no site of
    the model, and for globs that leave no site to advise on.
    """
    check_limits(objective, target)
    check_kept(media_sites(sites_of(model)), options.keep_dense)


def check_limits(objective: Objective, target: Target) -> None:
    """ValueError for a limit on an unknown measure, or on one that is better when higher."""
    legal = ["drift", *(name for name in objective.measures if name not in objective.higher)]
    for name in target.limits:
        if name in objective.higher:
            raise ValueError(f"limits: {name!r} is better when higher, and a limit bounds from above.")
        if name not in legal:
            raise ValueError(
                f"limits: {objective.name} has no measure {name!r}; legal: {', '.join(legal)}; nearest: "
                f"{nearest(name, legal)}."
            )


def check_measured(target: Target, before: Preflight, objective: Objective) -> None:
    """ValueError for a limit on a measure that the samples of this workload do not give."""
    for name in target.limits:
        if name != "drift" and name not in before.measures:
            legal = ["drift", *(n for n in before.measures if n not in objective.higher)]
            raise ValueError(f"limits: the samples of this workload give no {name!r}; legal: {', '.join(legal)}.")


def check_kept(sites: Sequence[Site], globs: Sequence[str]) -> None:
    """ValueError for a glob that fits none of `sites`, and for globs that together fit all of them."""
    names = [s.name for s in sites]
    for glob in globs:
        if names and not any(fnmatch(name, glob) for name in names):
            raise ValueError(f"keep_dense: {glob!r} fits no attention site; there are {_some(names)}.")
    if names and all(any(fnmatch(name, glob) for glob in globs) for name in names):
        raise ValueError(f"keep_dense: {', '.join(map(repr, globs))} leaves no site to advise on of {_some(names)}.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ... {names[-1]} ({len(names)})"
