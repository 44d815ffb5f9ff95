"""Cosmos of diffusers: video tokens alone in self-attention, text in cross attention."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from glocal.adapt import attach

from .exam import AtCore, HostExam, Inputs, run
from .sizes import COSMOS

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")


class TestCosmos(HostExam):
    attentions: ClassVar = [
        ("transformer_blocks.0.attn1", 0, "self"),
        ("transformer_blocks.0.attn2", 0, "cross"),
        ("transformer_blocks.1.attn1", 1, "self"),
        ("transformer_blocks.1.attn2", 1, "cross"),
    ]
    parts: ClassVar = [("video", (3, 4, 6))]
    levels: ClassVar = (0.75, 0.5)
    scale: ClassVar = 1.0

    def build(self) -> nn.Module:
        return diffusers.CosmosTransformer3DModel(**COSMOS)

    def inputs(self, generator: torch.Generator, batch: int = 1) -> Inputs:
        return {
            "hidden_states": torch.randn(batch, 4, 3, 8, 12, generator=generator),
            "timestep": torch.full((batch,), 0.75),
            "encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator),
            "fps": 30,
        }

    def poke(self, inputs: Inputs, cell: tuple[int, ...]) -> Inputs:
        moved: Tensor = inputs["hidden_states"].clone()
        f, h, w = cell
        moved[:, 0, f, 2 * h, 2 * w] += 1
        return {**inputs, "hidden_states": moved}

    def test_the_first_generation_is_told_the_logarithm_of_sigma(self, given: Inputs) -> None:
        model = diffusers.CosmosTransformer3DModel(**{**COSMOS, "extra_pos_embed_type": "learnable"}).eval()
        method = AtCore()
        with attach(model, method) as handle:
            run(model, given, timestep=torch.tensor([0.0]))  # sigma 1
        assert handle.state.timestep == 0.5
