"""FLUX.2 of diffusers: [text, image] in one sequence, position ids of four numbers."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from .exam import Inputs, JointExam
from .sizes import FLUX2

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")


def positions(rows: int, columns: int) -> Tensor:
    """Position ids [rows * columns, 4] as the pipeline makes them."""
    ids = torch.zeros(rows, columns, 4)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)
    return ids.reshape(-1, 4)


class TestFlux2(JointExam):
    attentions: ClassVar = [
        ("transformer_blocks.0.attn", 0, "joint"),
        ("transformer_blocks.1.attn", 1, "joint"),
        ("single_transformer_blocks.0.attn", 2, "joint"),
        ("single_transformer_blocks.1.attn", 3, "joint"),
    ]
    parts: ClassVar = [("text", 5), ("image", (4, 6))]
    levels: ClassVar = (0.75, 0.5)
    scale: ClassVar = 1.0

    def build(self) -> nn.Module:
        return diffusers.Flux2Transformer2DModel(**FLUX2)

    def inputs(self, generator: torch.Generator, batch: int = 1) -> Inputs:
        words = torch.zeros(5, 4)
        words[:, 3] = torch.arange(5)
        return {
            "hidden_states": torch.randn(batch, 24, 16, generator=generator),
            "encoder_hidden_states": torch.randn(batch, 5, 32, generator=generator),
            "timestep": torch.full((batch,), 0.75),
            "img_ids": positions(4, 6),
            "txt_ids": words,
            "guidance": torch.full((batch,), 3.5),
        }

    def poke(self, inputs: Inputs, cell: tuple[int, ...]) -> Inputs:
        moved: Tensor = inputs["hidden_states"].clone()
        moved[:, cell[0] * 6 + cell[1], 0] += 1
        return {**inputs, "hidden_states": moved}
