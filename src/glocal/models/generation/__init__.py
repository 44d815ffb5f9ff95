"""Models that generate: the built-in video model, the built-in image models, and their samplers."""

from glocal.models.generation.conditions import Field, encode_condition
from glocal.models.generation.image_dit import ImageDiT, ImageDiTConfig
from glocal.models.generation.image_unet import ImageUNet, ImageUNetConfig
from glocal.models.generation.painter import Painter, load_painter
from glocal.models.generation.picture_model import PictureModel, draw_picture_noise, to_latents, to_pictures
from glocal.models.generation.picture_sampler import PICTURE_SPEC, sample_pictures
from glocal.models.generation.picture_weights import load_picture_model, save_picture_model
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
    "ImageDiT",
    "ImageDiTConfig",
    "ImageUNet",
    "ImageUNetConfig",
    "PICTURE_SPEC",
    "Painter",
    "PictureModel",
    "SampleSpec",
    "SampleStep",
    "VideoAttention",
    "VideoDiT",
    "VideoDiTConfig",
    "dense_core",
    "draw_noise",
    "draw_picture_noise",
    "encode_condition",
    "from_pixels",
    "load_demo",
    "load_painter",
    "load_picture_model",
    "load_weights",
    "noise_levels",
    "sample",
    "sample_pictures",
    "save_picture_model",
    "save_weights",
    "to_latents",
    "to_pictures",
    "to_pixels",
]
