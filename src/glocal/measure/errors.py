"""Distances between a reference and another result: tensors, images, video, logits.

All functions keep leading dimensions: measures of tensors reduce the last `dims` dimensions, images the last three
[C, H, W], video the last four [T, C, H, W], logits the last one. float64 is computed in float64, all else in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _pair(reference: Tensor, other: Tensor, dims: int, what: str) -> tuple[Tensor, Tensor]:
    if reference.shape != other.shape:
        raise ValueError(
            f"reference has shape {tuple(reference.shape)} and other {tuple(other.shape)}; they must be equal"
        )
    if reference.ndim < dims or dims < 1:
        raise ValueError(
            f"{what} needs at least {max(dims, 1)} dimensions, got shape {tuple(reference.shape)}, dims={dims}"
        )
    if reference.numel() == 0:
        raise ValueError(f"{what} of an empty tensor is undefined, got shape {tuple(reference.shape)}")
    dtype = torch.float64 if torch.float64 in (reference.dtype, other.dtype) else torch.float32
    return reference.to(dtype), other.to(dtype)


def _flat(x: Tensor, dims: int) -> Tensor:
    return x.flatten(-dims)  # [..., d1, ..., dn] -> [..., d1 * ... * dn]


def _both(reference: Tensor, other: Tensor, dims: int | None, what: str) -> tuple[Tensor, Tensor]:
    count = max(reference.ndim, 1) if dims is None else dims
    a, b = _pair(reference, other, count, what)
    return _flat(a, count), _flat(b, count)


def relative_l2(reference: Tensor, other: Tensor, dims: int | None = None) -> Tensor:
    """||other - reference|| / ||reference|| over the last `dims` dimensions (all if None). Range [0, inf); 0 = equal.

    A reference of zeros gives 0 where the other is zero too, and inf where it is not.
    """
    a, b = _both(reference, other, dims, "relative_l2")
    gap, size = (b - a).norm(dim=-1), a.norm(dim=-1)
    return torch.where(gap == 0, torch.zeros_like(gap), gap / size)


def max_error(reference: Tensor, other: Tensor, dims: int | None = None) -> Tensor:
    """Largest absolute difference over the last `dims` dimensions (all if None). Range [0, inf), unit of the input."""
    a, b = _both(reference, other, dims, "max_error")
    return (b - a).abs().amax(dim=-1)


def rms(reference: Tensor, other: Tensor, dims: int | None = None) -> Tensor:
    """Root mean square of the difference over the last `dims` dimensions (all if None). Range [0, inf)."""
    a, b = _both(reference, other, dims, "rms")
    return (b - a).square().mean(dim=-1).sqrt()


def cosine(reference: Tensor, other: Tensor, dims: int | None = None) -> Tensor:
    """Cosine similarity over the last `dims` dimensions (all if None). Range [-1, 1]; NaN where one is zero."""
    a, b = _both(reference, other, dims, "cosine")
    return ((a * b).sum(dim=-1) / (a.norm(dim=-1) * b.norm(dim=-1))).clamp(-1.0, 1.0)


def psnr(reference: Tensor, other: Tensor, data_range: float, dims: int = 3) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(data_range^2 / MSE), over the last `dims` dimensions.

    data_range: largest minus smallest legal value (1 for [0, 1], 2 for [-1, 1], 255 for bytes). Equal inputs give inf.
    """
    _check_range(data_range)
    a, b = _both(reference, other, dims, "psnr")
    mse = (b - a).square().mean(dim=-1)
    return 10.0 * torch.log10(data_range**2 / mse)


def _check_range(data_range: float) -> None:
    if not data_range > 0 or math.isinf(data_range):
        raise ValueError(f"data_range must be a positive finite number, got {data_range!r}")


def ssim(reference: Tensor, other: Tensor, data_range: float) -> Tensor:
    """Structural similarity (Wang et al., 2004) of images [..., C, H, W] -> [...]. Range [-1, 1]; 1 = equal.

    Gaussian window 11 x 11 with sigma 1.5 without padding, K1 = 0.01, K2 = 0.03, per channel, then the mean over
    positions and channels. H and W must be at least 11. data_range as in `psnr`.
    """
    _check_range(data_range)
    a, b = _pair(reference, other, 3, "ssim of [..., C, H, W]")
    height, width = a.shape[-2:]
    if min(height, width) < 11:
        raise ValueError(f"ssim needs images of at least 11 x 11, got {height} x {width}; resize them first")
    lead = a.shape[:-2]
    planes = torch.stack([a, b, a * a, b * b, a * b]).reshape(-1, 1, height, width)  # [5 * B, 1, H, W]
    offsets = torch.arange(11, dtype=a.dtype, device=a.device) - 5
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()
    planes = torch.nn.functional.conv2d(planes, window.view(1, 1, 11, 1))
    planes = torch.nn.functional.conv2d(planes, window.view(1, 1, 1, 11))  # [5 * B, 1, H - 10, W - 10]
    mean_a, mean_b, aa, bb, ab = planes.reshape(5, *lead, height - 10, width - 10)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    var_a, var_b, covariance = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    denominator = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return (numerator / denominator).mean(dim=(-3, -2, -1))


def flicker(video: Tensor) -> Tensor:
    """Mean absolute difference of consecutive frames, [..., T, C, H, W] -> [...]. Range [0, inf), unit of the input."""
    if video.ndim < 4 or video.shape[-4] < 2:
        raise ValueError(f"flicker needs [..., T, C, H, W] with T >= 2, got shape {tuple(video.shape)}")
    frames = video if video.dtype == torch.float64 else video.float()
    return frames.diff(dim=-4).abs().mean(dim=(-4, -3, -2, -1))


def flicker_difference(reference: Tensor, other: Tensor) -> Tensor:
    """flicker(other) - flicker(reference): above 0 the other video flickers more. [..., T, C, H, W] -> [...]."""
    a, b = _pair(reference, other, 4, "flicker_difference of [..., T, C, H, W]")
    return flicker(b) - flicker(a)


def kl_divergence(reference_logits: Tensor, other_logits: Tensor) -> Tensor:
    """KL(reference || other) in nats of the softmax of logits [..., V] -> [...]. Range [0, inf)."""
    a, b = _pair(reference_logits, other_logits, 1, "kl_divergence of [..., V]")
    log_a, log_b = a.log_softmax(dim=-1), b.log_softmax(dim=-1)
    # A class the reference rules out (-inf) adds nothing, whatever the other says.
    terms = torch.where(log_a == -math.inf, torch.zeros_like(log_a), log_a.exp() * (log_a - log_b))
    return terms.sum(dim=-1).clamp_min(0.0)  # rounding alone can go below zero


def top1_agreement(reference_logits: Tensor, other_logits: Tensor) -> Tensor:
    """Share of positions of [..., N, V] whose largest logit is the same class, -> [...]. Range [0, 1]."""
    a, b = _pair(reference_logits, other_logits, 2, "top1_agreement of [..., N, V]")
    return (a.argmax(dim=-1) == b.argmax(dim=-1)).to(a.dtype).mean(dim=-1)
