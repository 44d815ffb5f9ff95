"""Reads and writes the weights of the built-in image models: float16 safetensors, sizes and words in the metadata."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save

from glocal._files import write_atomic
from glocal.models.generation.image_dit import ImageDiT, ImageDiTConfig
from glocal.models.generation.image_unet import ImageUNet, ImageUNetConfig
from glocal.models.generation.picture_model import PictureModel

Kind = Literal["unet", "dit"]
FORMAT = "glocal.picture/1"
FOLDER = Path(__file__).parent.parent / "weights"


def shipped(kind: Kind) -> Path:
    """Where the trained weights of a kind lie."""
    return FOLDER / f"image_{kind}.safetensors"


def build_picture_model(kind: str, sizes: dict[str, object], vocabulary: tuple[str, ...], length: int) -> PictureModel:
    """An untrained model of a kind; sizes: fields of its configuration, lists for tuples."""
    values: dict[str, object] = {name: tuple(v) if isinstance(v, list) else v for name, v in sizes.items()}
    if kind == "unet":
        return PictureModel(ImageUNet(ImageUNetConfig(**values)), vocabulary, length)  # type: ignore[arg-type]
    if kind == "dit":
        return PictureModel(ImageDiT(ImageDiTConfig(**values)), vocabulary, length)  # type: ignore[arg-type]
    raise ValueError(f"kind={kind!r}; legal: unet, dit")


def save_picture_model(model: PictureModel, path: Path, notes: dict[str, str] | None = None) -> None:
    """Write all parameters as float16 with what a reader needs to build the model, and `notes`."""
    metadata = {
        "format": FORMAT,
        "kind": "dit" if isinstance(model.net, ImageDiT) else "unet",
        "config": json.dumps(asdict(model.net.config)),
        "vocabulary": json.dumps(model.vocabulary),
        "length": str(model.length),
    }
    metadata.update({} if notes is None else notes)
    tensors = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.state_dict().items()}
    write_atomic(path, save(tensors, metadata=metadata))


def load_picture_model(
    path: Path | Kind, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PictureModel:
    """The model a file describes, loaded strictly, in evaluation mode; "unet" or "dit": the shipped one.

    Raises FileNotFoundError for a missing file, ValueError for a file of another format.
    """
    file = shipped(path) if isinstance(path, str) else path
    if not file.is_file():
        raise FileNotFoundError(f"weights {str(file)!r} do not exist; train them with bench/train_image.py")
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        found = None if metadata is None else metadata.get("format")
        if metadata is None or found != FORMAT:
            raise ValueError(f"weights {str(file)!r} have format {found!r}: need {FORMAT!r}")
        state = {name: opened.get_tensor(name).to(dtype) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    words = tuple(json.loads(metadata["vocabulary"]))
    model = build_picture_model(metadata["kind"], json.loads(metadata["config"]), words, int(metadata["length"]))
    model = model.to(dtype)
    model.load_state_dict(state, strict=True)
    return model.to(device).eval()
