"""Reads and writes the weights of the built-in video model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from glocal.models import built_in
from glocal.models.generation.video_dit import VideoDiT, VideoDiTConfig

SHIPPED = built_in.WEIGHTS / "video_dit.safetensors"
FORMAT = "glocal.video_dit/1"


def save_weights(model: VideoDiT, path: Path, notes: dict[str, str] | None = None) -> None:
    """Write all parameters as float16, with the model's sizes and `notes`; a reader never meets half a file."""
    metadata = {"format": FORMAT, "config": json.dumps(asdict(model.config))}
    built_in.write(model, path, metadata | ({} if notes is None else notes))


def load_weights(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> VideoDiT:
    """Build the model a file describes and load it strictly, in evaluation mode.

    Raises FileNotFoundError for a missing file, ValueError for a file of another format or with foreign sizes.
    """

    def build(metadata: dict[str, str]) -> VideoDiT:
        sizes = built_in.sizes(metadata, VideoDiTConfig, path)
        sizes["fields"] = tuple((name, tuple(values)) for name, values in sizes["fields"])
        return VideoDiT(VideoDiTConfig(**sizes))

    return built_in.read(path, (FORMAT, "bench/train_demo.py"), build, device, dtype)


def load_demo(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> VideoDiT:
    """The trained model that ships with the package (16 frames of 64 x 64 px are 4,096 tokens)."""
    return load_weights(SHIPPED, device, dtype)
