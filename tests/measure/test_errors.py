"""Error measures against direct formulas, hand values and their limits."""

import math

import pytest
import torch

from glocal.measure import (
    cosine,
    flicker,
    flicker_difference,
    kl_divergence,
    max_error,
    psnr,
    relative_l2,
    rms,
    ssim,
    top1_agreement,
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


def test_tensor_measures_and_batching(generator):
    a = torch.randn(4, 3, 5, 7, generator=generator, dtype=torch.float64)
    b = a + 0.1 * torch.randn(4, 3, 5, 7, generator=generator, dtype=torch.float64)
    for measure in (relative_l2, max_error, rms, cosine):
        batched = measure(a, b, dims=2)
        assert batched.shape == (4, 3) and batched.dtype == torch.float64
        assert batched[1, 2].item() == pytest.approx(measure(a[1, 2], b[1, 2]).item())
    assert relative_l2(a, b).item() == pytest.approx(((b - a).norm() / a.norm()).item())
    assert rms(a, b).item() == pytest.approx((b - a).square().mean().sqrt().item())
    assert max_error(a, b).item() == (b - a).abs().max().item()


def test_relative_l2_of_zero_reference():
    zero, one = torch.zeros(3), torch.ones(3)
    assert relative_l2(zero, zero).item() == 0.0
    assert relative_l2(zero, one).item() == math.inf
    assert cosine(one, -one).item() == pytest.approx(-1.0)


def test_half_precision_is_measured_in_float32():
    a = torch.full((10,), 300.0, dtype=torch.float16)
    assert rms(a, -a).item() == 600.0  # the square would overflow float16
    assert rms(a, -a).dtype == torch.float32


def test_psnr_known_value_and_limit():
    a = torch.zeros(2, 3, 8, 8)
    b = torch.full_like(a, 0.1)
    assert psnr(a, b, 1.0).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)
    assert psnr(a, b, 2.0)[0].item() == pytest.approx(20.0 + 20 * math.log10(2), abs=1e-4)
    assert psnr(a, a, 1.0)[0].item() == math.inf
    with pytest.raises(ValueError, match="data_range must be a positive finite number, got 0"):
        psnr(a, b, 0)


def direct_ssim(a, b, data_range):
    """One pixel at a time, from the definition."""
    offsets = [i - 5 for i in range(11)]
    weights = torch.tensor([[math.exp(-(y * y + x * x) / 4.5) for x in offsets] for y in offsets], dtype=torch.float64)
    weights /= weights.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for c in range(a.shape[0]):
        for y in range(a.shape[1] - 10):
            for x in range(a.shape[2] - 10):
                p, q = a[c, y : y + 11, x : x + 11], b[c, y : y + 11, x : x + 11]
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                cov = (weights * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return torch.stack(values).mean()


def test_ssim_equals_its_definition(generator):
    a = torch.rand(2, 2, 13, 15, generator=generator, dtype=torch.float64)
    b = (a + 0.2 * torch.randn(2, 2, 13, 15, generator=generator, dtype=torch.float64)).clamp(0, 1)
    got = ssim(a, b, 1.0)
    assert got.shape == (2,)
    for i in range(2):
        assert got[i].item() == pytest.approx(direct_ssim(a[i], b[i], 1.0).item(), abs=1e-10)
    assert ssim(a, a, 1.0).tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match="at least 11 x 11, got 10 x 15"):
        ssim(a[..., :10, :], a[..., :10, :], 1.0)


def test_flicker():
    video = torch.zeros(2, 4, 3, 5, 5)
    video[1, 1::2] = 1.0  # the second video blinks
    assert flicker(video).tolist() == [0.0, 1.0]
    assert flicker_difference(video[0], video[1]).item() == 1.0
    with pytest.raises(ValueError, match=r"T >= 2, got shape \(1, 3, 5, 5\)"):
        flicker(video[0, :1])


def test_kl_and_agreement(generator):
    a = torch.randn(2, 6, 11, generator=generator)
    b = torch.randn(2, 6, 11, generator=generator)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b)
    )
    torch.testing.assert_close(kl_divergence(a, b), expected, rtol=1e-4, atol=1e-6)
    assert kl_divergence(a, a + 3.0).abs().max() < 1e-6
    masked = torch.tensor([0.0, 0.0, -math.inf])
    assert kl_divergence(masked, masked).item() == 0.0
    assert top1_agreement(a, a).tolist() == [1.0, 1.0]
    assert top1_agreement(torch.eye(4), torch.eye(4).roll(1, 0)[[0, 1, 2, 3]]).item() == 0.0


def test_shapes_must_be_equal():
    with pytest.raises(ValueError, match=r"reference has shape \(3,\) and other \(4,\); they must be equal"):
        rms(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="rms needs at least 3 dimensions"):
        rms(torch.zeros(3), torch.zeros(3), dims=3)
    with pytest.raises(ValueError, match="of an empty tensor is undefined"):
        rms(torch.zeros(0), torch.zeros(0))
