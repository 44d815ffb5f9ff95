"""Student's t distribution in plain floats: CDF by the regularized incomplete beta function, quantile by bisection.

The incomplete beta uses its continued fraction (Abramowitz and Stegun 26.5.8), evaluated by the modified Lentz method,
on the side of x where the fraction converges fast.
"""

from __future__ import annotations

import math

_TINY = 1e-300
_EPSILON = 1e-15
_MAX_TERMS = 10_000


def _beta_fraction(x: float, a: float, b: float) -> float:
    """Continued fraction of I_x(a, b); converges fast for x < (a + 1) / (a + b + 2)."""
    c = 1.0
    d = 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > _TINY else _TINY)
    value = d
    for m in range(1, _MAX_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for numerator in (even, odd):
            d = 1.0 + numerator * d
            d = 1.0 / (d if abs(d) > _TINY else _TINY)
            c = 1.0 + numerator / c
            c = c if abs(c) > _TINY else _TINY
            value *= c * d
        if abs(c * d - 1.0) < _EPSILON:
            return value
    raise ArithmeticError(f"the incomplete beta fraction did not converge at x={x!r}, a={a!r}, b={b!r}")


def incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularized incomplete beta function I_x(a, b), 0 <= x <= 1, a and b > 0."""
    if not 0.0 <= x <= 1.0:
        raise ValueError(f"x must lie in [0, 1], got {x!r}")
    if a <= 0 or b <= 0:
        raise ValueError(f"a and b must be positive, got a={a!r}, b={b!r}")
    if x in (0.0, 1.0):
        return x
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    front = math.exp(log_front)
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _beta_fraction(x, a, b) / a
    return 1.0 - front * _beta_fraction(1.0 - x, b, a) / b


def t_cdf(t: float, degrees: float) -> float:
    """Probability that Student's t with `degrees` (> 0) degrees of freedom is at most `t`."""
    if degrees <= 0:
        raise ValueError(f"degrees must be positive, got {degrees!r}")
    if math.isinf(t):
        return 1.0 if t > 0 else 0.0
    tail = 0.5 * incomplete_beta(degrees / (degrees + t * t), 0.5 * degrees, 0.5)
    return 1.0 - tail if t > 0 else tail


def t_quantile(probability: float, degrees: float) -> float:
    """The t below which Student's distribution with `degrees` degrees of freedom holds `probability` (in (0, 1))."""
    if not 0.0 < probability < 1.0:
        raise ValueError(f"probability must lie strictly between 0 and 1, got {probability!r}")
    if degrees <= 0:
        raise ValueError(f"degrees must be positive, got {degrees!r}")
    if probability == 0.5:
        return 0.0
    # Work on the lower tail, where the CDF keeps its relative precision, and mirror the answer.
    tail = min(probability, 1.0 - probability)
    low, high = -1.0, 0.0
    while t_cdf(low, degrees) > tail:
        low, high = 2.0 * low, low
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        if t_cdf(middle, degrees) > tail:
            high = middle
        else:
            low = middle
    quantile = 0.5 * (low + high)
    return quantile if probability < 0.5 else -quantile
