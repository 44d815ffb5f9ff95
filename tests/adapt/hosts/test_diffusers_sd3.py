"""SD3 of diffusers: [image, text] in one sequence; SD3.5 has a second attention over the image."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from glocal.adapt import attach, host_of

from .exam import AtCore, Inputs, JointExam, run
from .sizes import SD3

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")


class TestSD3(JointExam):
    attentions: ClassVar = [("transformer_blocks.0.attn", 0, "joint"), ("transformer_blocks.1.attn", 1, "joint")]
    parts: ClassVar = [("image", (4, 6)), ("text", 5)]

    def build(self) -> nn.Module:
        return diffusers.SD3Transformer2DModel(**SD3)

    def inputs(self, generator: torch.Generator, batch: int = 1) -> Inputs:
        return {
            "hidden_states": torch.randn(batch, 4, 8, 12, generator=generator),
            "timestep": torch.full((batch,), 900.0),
            "encoder_hidden_states": torch.randn(batch, 5, 32, generator=generator),
            "pooled_projections": torch.randn(batch, 24, generator=generator),
        }

    def poke(self, inputs: Inputs, cell: tuple[int, ...]) -> Inputs:
        moved: Tensor = inputs["hidden_states"].clone()
        moved[:, 0, 2 * cell[0], 2 * cell[1]] += 1
        return {**inputs, "hidden_states": moved}

    def test_a_second_attention_sees_the_image_alone(self, given: Inputs) -> None:
        model = diffusers.SD3Transformer2DModel(**SD3, qk_norm="rms_norm", dual_attention_layers=(0,)).eval()
        kinds = [(s.name, s.kind) for s in host_of(model).sites(model)]
        assert kinds == [
            ("transformer_blocks.0.attn", "joint"),
            ("transformer_blocks.0.attn2", "self"),
            ("transformer_blocks.1.attn", "joint"),
        ]
        plain, method = run(model, given), AtCore()
        with attach(model, method):
            assert torch.equal(run(model, given), plain)
        assert [c.layout.nk for c in method.calls] == [29, 24, 29]
