"""Timers, paired statistics, and error measures of tensors, images, video and logits. Imports torch alone."""

from glocal.measure.errors import (
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
from glocal.measure.memory import PeakMemory, peak_memory
from glocal.measure.stats import (
    Acceptance,
    Interval,
    accept,
    drift,
    exceedance,
    exceedance_statement,
    log_ratio,
    paired,
    t_cdf,
    t_quantile,
)
from glocal.measure.timers import PairedTiming, Ratio, Timing, compare_paired, summarize, time_call

__all__ = [
    "Acceptance",
    "Interval",
    "PairedTiming",
    "PeakMemory",
    "Ratio",
    "Timing",
    "accept",
    "compare_paired",
    "cosine",
    "drift",
    "exceedance",
    "exceedance_statement",
    "flicker",
    "flicker_difference",
    "kl_divergence",
    "log_ratio",
    "max_error",
    "paired",
    "peak_memory",
    "psnr",
    "relative_l2",
    "rms",
    "ssim",
    "summarize",
    "t_cdf",
    "t_quantile",
    "time_call",
    "top1_agreement",
]
