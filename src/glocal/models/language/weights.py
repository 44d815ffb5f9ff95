"""Reads and writes the weights of the built-in language model: float16 safetensors, sizes in the file's metadata."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from glocal._files import write_atomic
from glocal.models.language.decoder import Decoder, DecoderConfig

SHIPPED = Path(__file__).parent.parent / "weights" / "decoder.safetensors"
FORMAT = "glocal.decoder/1"


def save_decoder(model: Decoder, path: Path, notes: dict[str, str] | None = None) -> None:
    """Write all parameters as float16, with the model's sizes and `notes`; a reader never meets half a file."""
    metadata = {"format": FORMAT, "config": json.dumps(asdict(model.config)), **({} if notes is None else notes)}
    tensors = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.state_dict().items()}
    write_atomic(path, save(tensors, metadata=metadata))


def load_decoder(
    path: Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Decoder:
    """The trained model that ships with the package, or the one a file describes, in evaluation mode.

    Raises FileNotFoundError for a missing file, ValueError for a file of another format or with foreign sizes.
    """
    file = SHIPPED if path is None else path
    if not file.is_file():
        raise FileNotFoundError(f"weights {str(file)!r} do not exist; train them with bench/train_language.py")
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        found = None if metadata is None else metadata.get("format")
        if metadata is None or found != FORMAT:
            raise ValueError(f"weights {str(file)!r} have format {found!r}: need {FORMAT!r}")
        state = {name: opened.get_tensor(name).to(dtype) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    sizes = json.loads(metadata["config"])
    known = {f.name for f in fields(DecoderConfig)}
    if set(sizes) != known:
        raise ValueError(f"weights {str(file)!r} have sizes {sorted(sizes)}: need {sorted(known)}")
    model = Decoder(DecoderConfig(**sizes)).to(dtype)
    model.load_state_dict(state, strict=True)
    return model.to(device).eval()
