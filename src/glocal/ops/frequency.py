"""Low frequencies of maps, by a filter in Fourier space with a cutoff of its own for each axis.

What a small picture can carry of a large one is a band of low frequencies; C-Upscale (arXiv 2505.16976) lets that band
guide the large picture. Frequencies are shares of the Nyquist frequency of their axis: 1 is the fastest a map can hold.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Filter = Literal["gaussian", "ideal"]


def low_pass(x: Tensor, cutoff: tuple[float, float], kind: Filter = "gaussian") -> Tensor:
    """The low frequencies of x [..., H, W], of its shape and dtype.

    cutoff: of rows and of columns, above 0. kind: "gaussian" weighs a frequency f by exp(-(f / cutoff)^2 / 2), "ideal"
    keeps those up to the cutoff and is idempotent. The map counts as periodic. Raises ValueError for other values.
    """
    if len(cutoff) != 2 or min(cutoff) <= 0:
        raise ValueError(f"low_pass: cutoff={cutoff!r}; legal: (rows, columns), shares of Nyquist above 0.")
    if kind not in ("gaussian", "ideal"):
        raise ValueError(f"low_pass: kind={kind!r}; legal: 'gaussian', 'ideal'.")
    exact = torch.promote_types(x.dtype, torch.float32)
    found = torch.fft.rfft2(x.to(exact))
    rows = _weights(torch.fft.fftfreq(x.shape[-2], 0.5, device=x.device, dtype=exact), cutoff[0], kind)
    columns = _weights(torch.fft.rfftfreq(x.shape[-1], 0.5, device=x.device, dtype=exact), cutoff[1], kind)
    return torch.fft.irfft2(found * (rows[:, None] * columns), s=x.shape[-2:]).to(x.dtype)


def _weights(frequency: Tensor, cutoff: float, kind: Filter) -> Tensor:
    if kind == "ideal":
        return (frequency.abs() <= cutoff).to(frequency.dtype)
    return torch.exp(-0.5 * (frequency / cutoff) ** 2)
