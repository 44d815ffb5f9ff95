"""PixArt of diffusers: image tokens alone in self-attention, padded text in cross attention."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from glocal import attention
from glocal.adapt import attach

from .exam import HostExam, Inputs, Replaced, run
from .sizes import PIXART

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")


class TestPixArt(HostExam):
    attentions: ClassVar = [
        ("transformer_blocks.0.attn1", 0, "self"),
        ("transformer_blocks.0.attn2", 0, "cross"),
        ("transformer_blocks.1.attn1", 1, "self"),
        ("transformer_blocks.1.attn2", 1, "cross"),
    ]
    parts: ClassVar = [("image", (4, 6))]

    def build(self) -> nn.Module:
        return diffusers.PixArtTransformer2DModel(**PIXART)

    def inputs(self, generator: torch.Generator, batch: int = 1) -> Inputs:
        mask = torch.ones(batch, 5)
        mask[:, 3:] = 0
        return {
            "hidden_states": torch.randn(batch, 4, 8, 12, generator=generator),
            "timestep": torch.full((batch,), 900.0),
            "encoder_hidden_states": torch.randn(batch, 5, 32, generator=generator),
            "encoder_attention_mask": mask,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    def poke(self, inputs: Inputs, cell: tuple[int, ...]) -> Inputs:
        moved: Tensor = inputs["hidden_states"].clone()
        moved[:, 0, 2 * cell[0], 2 * cell[1]] += 1
        return {**inputs, "hidden_states": moved}

    def test_masked_words_are_documents_of_the_cross_attention(
        self, model: nn.Module, given: Inputs, generator: torch.Generator
    ) -> None:
        method = Replaced(lambda q, k, v, call: attention(q, k, v, canvas=call.layout))
        method.kinds = ("cross",)
        plain = run(model, given)
        with attach(model, method):
            torch.testing.assert_close(run(model, given), plain, rtol=0, atol=1e-5)
            other = given["encoder_hidden_states"].clone()
            other[:, 3:] = torch.randn(other[:, 3:].shape, generator=generator)
            torch.testing.assert_close(run(model, given, encoder_hidden_states=other), plain, rtol=0, atol=1e-5)
