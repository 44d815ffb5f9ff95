"""Low frequencies."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import interpolate

from glocal.ops.frequency import low_pass


@pytest.mark.parametrize("kind", ["gaussian", "ideal"])
@pytest.mark.parametrize("size", [(12, 16), (9, 7), (1, 5)])
def test_the_ideal_filter_is_idempotent(kind: str, size: tuple[int, int], generator: torch.Generator) -> None:
    x = torch.randn(2, 3, *size, generator=generator)
    low = low_pass(x, (0.3, 0.5), kind)  # type: ignore[arg-type]
    again = low_pass(low, (0.3, 0.5), kind)  # type: ignore[arg-type]
    assert torch.allclose(again, low, atol=1e-6) == (kind == "ideal")
    torch.testing.assert_close(low.mean((-2, -1)), x.mean((-2, -1)), rtol=0, atol=1e-6)


def test_a_wave_is_weighed_by_its_frequency_on_its_own_axis() -> None:
    place = torch.arange(32.0)
    wave = torch.cos(2 * math.pi * 4 * place / 32)  # 4 of 16 frequencies: a quarter of Nyquist
    rows, columns = wave[:, None].expand(32, 32), wave[None].expand(32, 32)
    weight = math.exp(-0.5 * (0.25 / 0.2) ** 2)
    torch.testing.assert_close(low_pass(rows, (0.2, 0.9)), rows * weight, rtol=0, atol=1e-5)
    weight = math.exp(-0.5 * (0.25 / 0.9) ** 2)
    torch.testing.assert_close(low_pass(columns, (0.2, 0.9)), columns * weight, rtol=0, atol=1e-5)
    assert float(low_pass(rows, (0.2, 0.9), "ideal").abs().max()) < 1e-5
    torch.testing.assert_close(low_pass(rows, (0.25, 0.9), "ideal"), rows.contiguous(), rtol=0, atol=1e-5)


def test_what_a_small_map_holds_passes(generator: torch.Generator) -> None:
    small = torch.randn(1, 1, 8, 8, generator=generator)
    large = interpolate(small, scale_factor=4, mode="bicubic")
    kept = low_pass(large, (0.25, 0.25), "ideal")
    assert float((large - kept).square().mean()) < 0.2 * float(large.var())


def test_bfloat16_stays() -> None:
    assert low_pass(torch.ones(4, 4, dtype=torch.bfloat16), (0.5, 0.5)).dtype == torch.bfloat16


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"cutoff=\(0, 1\); legal: \(rows, columns\), shares of Nyquist above 0"):
        low_pass(torch.ones(2, 2), (0, 1))
    with pytest.raises(ValueError, match="kind='box'; legal: 'gaussian', 'ideal'"):
        low_pass(torch.ones(2, 2), (1, 1), "box")  # type: ignore[arg-type]
