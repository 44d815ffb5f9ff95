"""Learning-rate shape: warm up, stay, cool down (arXiv 2405.18392). The plateau lets a run be cut or prolonged."""

from __future__ import annotations


def trapezoid(step: int, steps: int, warmup: int, cooldown: int) -> float:
    """Factor in (0, 1] for the update after `step` finished updates of `steps` in all.

    Rises linearly over `warmup` updates, falls linearly to 1 / (cooldown + 1) over the last `cooldown`.
    Raises ValueError if the two ends overlap.
    """
    if warmup < 0 or cooldown < 0 or warmup + cooldown > steps:
        raise ValueError(f"warmup={warmup} and cooldown={cooldown}: must be >= 0 and together at most steps={steps}")
    rise = (step + 1) / (warmup + 1)
    fall = (steps - step) / (cooldown + 1)
    return min(1.0, rise, fall)
