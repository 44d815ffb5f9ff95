"""Models that generate: the built-in video diffusion transformer and its sampler."""

from glocal.models.generation.conditions import Field, encode_condition
from glocal.models.generation.sampler import (
    SampleSpec,
    SampleStep,
    draw_noise,
    from_pixels,
    noise_levels,
    sample,
    to_pixels,
)
from glocal.models.generation.video_dit import (
    AttentionCore,
    AttentionSite,
    VideoAttention,
    VideoDiT,
    VideoDiTConfig,
    dense_core,
)
from glocal.models.generation.weights import load_demo, load_weights, save_weights

__all__ = [
    "AttentionCore",
    "AttentionSite",
    "Field",
    "SampleSpec",
    "SampleStep",
    "VideoAttention",
    "VideoDiT",
    "VideoDiTConfig",
    "dense_core",
    "draw_noise",
    "encode_condition",
    "from_pixels",
    "load_demo",
    "load_weights",
    "noise_levels",
    "sample",
    "save_weights",
    "to_pixels",
]
