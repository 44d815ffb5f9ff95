from __future__ import annotations

import math

import pytest
import torch

from glocal.testing import compare, low_precision


def test_error_counts_against_the_largest_reference() -> None:
    reference = torch.tensor([100.0, 0.0])
    assert compare("a", reference + torch.tensor([0.0, 0.005]), reference).passed
    found = compare("a", reference + torch.tensor([0.0, 0.02]), reference)
    assert (
        not found.passed and found.error == pytest.approx(2e-4, rel=1e-3) and found.why == "largest error 0.02 of 100"
    )
    assert compare("a", torch.tensor([1e-5]), torch.zeros(1)).passed  # a reference of zeros: absolute


def test_integers_and_booleans_are_exact() -> None:
    mask = torch.tensor([1, 0, 1, 1], dtype=torch.uint8)
    assert compare("m", mask.bool(), mask, tolerance=1.0).passed
    found = compare("m", ~mask.bool(), mask, tolerance=1.0)
    assert not found.passed and found.error == 1.0 and found.tolerance == 0.0


def test_what_is_not_finite_must_agree() -> None:
    reference = torch.tensor([1.0, -torch.inf, torch.nan])
    assert compare("l", reference.clone(), reference).passed
    for wrong in ([1.0, torch.inf, torch.nan], [1.0, -1e30, torch.nan], [torch.nan, -torch.inf, torch.nan]):
        found = compare("l", torch.tensor(wrong), reference)
        assert math.isinf(found.error) and "NaN or infinity" in found.why
    assert compare("l", torch.full((2,), -torch.inf), torch.full((2,), -torch.inf)).passed


def test_shapes_must_agree() -> None:
    assert compare("s", torch.zeros(2, 1), torch.zeros(2)).why == "shape (2, 1), not (2,)"
    assert compare("s", torch.zeros(0, 3), torch.zeros(0, 3)).passed


def test_low_precision_is_measured_against_plain_torch(generator: torch.Generator) -> None:
    exact = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    plain = exact.bfloat16()
    assert low_precision(plain, plain, exact).passed
    assert not low_precision((exact * 1.05).bfloat16(), plain, exact).passed
    assert not low_precision(torch.full_like(plain, torch.nan), plain, exact).passed
    one_off = plain.clone()
    one_off[0, 0] += 0.5
    found = low_precision(one_off, plain, exact)
    assert not found.passed and found.rms <= 2 * found.plain_rms + found.floor  # the largest error alone shows it
