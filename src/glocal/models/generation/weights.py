"""Reads and writes the weights of the built-in video model: float16 safetensors, sizes in the file's metadata."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from glocal._files import write_atomic
from glocal.models.generation.video_dit import VideoDiT, VideoDiTConfig

SHIPPED = Path(__file__).parent.parent / "weights" / "video_dit.safetensors"
FORMAT = "glocal.video_dit/1"


def save_weights(model: VideoDiT, path: Path, notes: dict[str, str] | None = None) -> None:
    """Write all parameters as float16, with the model's sizes and `notes`; a reader never meets half a file."""
    metadata = {"format": FORMAT, "config": json.dumps(asdict(model.config))}
    metadata.update({} if notes is None else notes)
    tensors = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.state_dict().items()}
    write_atomic(path, save(tensors, metadata=metadata))


def load_weights(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> VideoDiT:
    """Build the model a file describes and load it strictly, in evaluation mode.

    Raises FileNotFoundError for a missing file, ValueError for a file of another format or with foreign sizes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights {str(path)!r} do not exist; train them with bench/train_demo.py")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        found = None if metadata is None else metadata.get("format")
        if metadata is None or found != FORMAT:
            raise ValueError(f"weights {str(path)!r} have format {found!r}: need {FORMAT!r}")
        state = {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118 (not a dict)
    sizes = json.loads(metadata["config"])
    known = {f.name for f in fields(VideoDiTConfig)}
    if set(sizes) != known:
        raise ValueError(f"weights {str(path)!r} have sizes {sorted(sizes)}: need {sorted(known)}")
    sizes["fields"] = tuple((name, tuple(values)) for name, values in sizes["fields"])
    model = VideoDiT(VideoDiTConfig(**sizes)).to(dtype)
    model.load_state_dict(state, strict=True)
    return model.to(device).eval()


def load_demo(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> VideoDiT:
    """The trained model that ships with the package (16 frames of 64 x 64 px are 4,096 tokens)."""
    return load_weights(SHIPPED, device, dtype)
