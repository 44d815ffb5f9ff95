"""LTX of diffusers: packed video tokens in self-attention, padded text in cross attention."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from glocal import attention
from glocal.adapt import attach

from .exam import AtCore, HostExam, Inputs, Replaced, run
from .sizes import LTX

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")


class TestLTX(HostExam):
    attentions: ClassVar = [
        ("transformer_blocks.0.attn1", 0, "self"),
        ("transformer_blocks.0.attn2", 0, "cross"),
        ("transformer_blocks.1.attn1", 1, "self"),
        ("transformer_blocks.1.attn2", 1, "cross"),
    ]
    parts: ClassVar = [("video", (3, 4, 6))]

    def build(self) -> nn.Module:
        return diffusers.LTXVideoTransformer3DModel(**LTX)

    def inputs(self, generator: torch.Generator, batch: int = 1) -> Inputs:
        mask = torch.ones(batch, 5)
        mask[:, 3:] = 0
        return {
            "hidden_states": torch.randn(batch, 72, 8, generator=generator),
            "timestep": torch.full((batch,), 900.0),
            "encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator),
            "encoder_attention_mask": mask,
            "num_frames": 3,
            "height": 4,
            "width": 6,
        }

    def poke(self, inputs: Inputs, cell: tuple[int, ...]) -> Inputs:
        moved: Tensor = inputs["hidden_states"].clone()
        f, h, w = cell
        moved[:, (f * 4 + h) * 6 + w, 0] += 1
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

    def test_tokens_of_a_condition_make_a_flat_run(
        self, model: nn.Module, given: Inputs, generator: torch.Generator
    ) -> None:
        given["hidden_states"] = torch.randn(1, 80, 8, generator=generator)
        given["video_coords"] = torch.rand(1, 3, 80, generator=generator)
        method = AtCore()
        with attach(model, method):
            run(model, given)
        assert [(p.name, p.shape) for p in method.calls[0].layout.q.parts] == [("video", 80)]
