"""HunyuanVideo of diffusers: [video, text] in one sequence, padded text, a text refiner that is nobody's site."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from glocal import attention
from glocal.adapt import attach

from .exam import AtCore, Inputs, JointExam, Replaced, run
from .sizes import HUNYUAN_VIDEO

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")


class TestHunyuanVideo(JointExam):
    attentions: ClassVar = [
        ("transformer_blocks.0.attn", 0, "joint"),
        ("single_transformer_blocks.0.attn", 1, "joint"),
        ("single_transformer_blocks.1.attn", 2, "joint"),
    ]
    parts: ClassVar = [("video", (3, 4, 6)), ("text", 5)]
    text_lengths: ClassVar = [3]

    def build(self) -> nn.Module:
        return diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN_VIDEO)

    def inputs(self, generator: torch.Generator, batch: int = 1) -> Inputs:
        mask = torch.ones(batch, 5, dtype=torch.long)
        mask[0, 3:] = 0
        return {
            "hidden_states": torch.randn(batch, 4, 3, 4, 6, generator=generator),
            "timestep": torch.full((batch,), 900.0),
            "encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator),
            "encoder_attention_mask": mask,
            "pooled_projections": torch.randn(batch, 8, generator=generator),
            "guidance": torch.full((batch,), 6000.0),
        }

    def poke(self, inputs: Inputs, cell: tuple[int, ...]) -> Inputs:
        moved: Tensor = inputs["hidden_states"].clone()
        moved[(slice(None), 0, *cell)] += 1
        return {**inputs, "hidden_states": moved}

    def test_the_text_refiner_is_never_touched(self, model: nn.Module) -> None:
        refiner = {n: m.processor for n, m in model.named_modules() if "refiner" in n and hasattr(m, "processor")}
        assert refiner
        with attach(model, AtCore(0.5)):
            assert {n: model.get_submodule(n).processor for n in refiner} == refiner

    def test_padded_text_counts_for_nothing(self, model: nn.Module, given: Inputs, generator: torch.Generator) -> None:
        method = Replaced(lambda q, k, v, call: attention(q, k, v, canvas=call.layout))
        with attach(model, method):
            padded = run(model, given)
            other = given["encoder_hidden_states"].clone()
            other[:, 3:] = torch.randn(1, 2, 16, generator=generator)
            moved = run(model, given, encoder_hidden_states=other)
        # The refiner in front averages over valid text only, so nothing of the padding may arrive.
        torch.testing.assert_close(moved, padded, rtol=0, atol=1e-6)
        with attach(model, Replaced(lambda q, k, v, call: attention(q, k, v, canvas=call.layout.q))):
            assert not torch.allclose(run(model, given), padded, rtol=0, atol=1e-5)  # the lengths do count
