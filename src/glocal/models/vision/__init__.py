"""Vision backbones, one system a file; `glocal.models.create_model` builds them by name."""

from glocal.models.vision.base import VisionBackbone

__all__ = ["VisionBackbone"]
