"""Reads and writes the weights of the built-in image models; their sizes and words are in the metadata."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch

from glocal._errors import check_choice
from glocal.models import built_in
from glocal.models.generation.image_dit import ImageDiT, ImageDiTConfig
from glocal.models.generation.image_unet import ImageUNet, ImageUNetConfig
from glocal.models.generation.picture_model import PictureModel

Kind = Literal["unet", "dit"]
FORMAT = "glocal.picture/1"


def shipped(kind: Kind) -> Path:
    """Where the trained weights of a kind lie; ValueError for no kind."""
    check_choice("kind", kind, ("unet", "dit"))
    return built_in.WEIGHTS / f"image_{kind}.safetensors"


def build_picture_model(kind: str, sizes: dict[str, object], vocabulary: tuple[str, ...], length: int) -> PictureModel:
    """An untrained model of a kind; sizes: fields of its configuration, lists for tuples."""
    values: dict[str, object] = {name: tuple(v) if isinstance(v, list) else v for name, v in sizes.items()}
    if kind == "unet":
        return PictureModel(ImageUNet(ImageUNetConfig(**values)), vocabulary, length)  # type: ignore[arg-type]
    check_choice("kind", kind, ("unet", "dit"))
    return PictureModel(ImageDiT(ImageDiTConfig(**values)), vocabulary, length)  # type: ignore[arg-type]


def save_picture_model(model: PictureModel, path: Path, notes: dict[str, str] | None = None) -> None:
    """Write all parameters as float16 with what a reader needs to build the model, and `notes`."""
    metadata = {
        "format": FORMAT,
        "kind": "dit" if isinstance(model.net, ImageDiT) else "unet",
        "config": json.dumps(asdict(model.net.config)),
        "vocabulary": json.dumps(model.vocabulary),
        "length": str(model.length),
    }
    built_in.write(model, path, metadata | ({} if notes is None else notes))


def load_picture_model(
    path: Path | Kind, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PictureModel:
    """The model a file describes, loaded strictly, in evaluation mode; "unet" or "dit": the shipped one.

    Raises FileNotFoundError for a missing file, ValueError for a file of another format.
    """
    file = shipped(path) if isinstance(path, str) else path

    def build(metadata: dict[str, str]) -> PictureModel:
        words = tuple(json.loads(metadata["vocabulary"]))
        return build_picture_model(metadata["kind"], json.loads(metadata["config"]), words, int(metadata["length"]))

    return built_in.read(file, (FORMAT, "bench/train_image.py"), build, device, dtype)
