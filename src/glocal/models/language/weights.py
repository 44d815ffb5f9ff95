"""Reads and writes the weights of the built-in language model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from glocal.models import built_in
from glocal.models.language.decoder import Decoder, DecoderConfig

SHIPPED = built_in.WEIGHTS / "decoder.safetensors"
FORMAT = "glocal.decoder/1"


def save_decoder(model: Decoder, path: Path, notes: dict[str, str] | None = None) -> None:
    """Write all parameters as float16, with the model's sizes and `notes`; a reader never meets half a file."""
    metadata = {"format": FORMAT, "config": json.dumps(asdict(model.config))}
    built_in.write(model, path, metadata | ({} if notes is None else notes))


def load_decoder(
    path: Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Decoder:
    """The trained model that ships with the package, or the one a file describes, in evaluation mode.

    Raises FileNotFoundError for a missing file, ValueError for a file of another format or with foreign sizes.
    """
    file = SHIPPED if path is None else path

    def build(metadata: dict[str, str]) -> Decoder:
        return Decoder(DecoderConfig(**built_in.sizes(metadata, DecoderConfig, file)))

    return built_in.read(file, (FORMAT, "bench/train_language.py"), build, device, dtype)
