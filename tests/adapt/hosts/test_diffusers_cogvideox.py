"""CogVideoX of diffusers: [text, video] in one sequence, guidance batched into one call."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from glocal.adapt import attach, host_of

from .exam import AtCore, Inputs, JointExam, run
from .sizes import COGVIDEOX

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")

ROTARY = {"use_rotary_positional_embeddings": True}  # as the 5B model; the 2B model adds its positions


class TestCogVideoX(JointExam):
    attentions: ClassVar = [("transformer_blocks.0.attn1", 0, "joint"), ("transformer_blocks.1.attn1", 1, "joint")]
    parts: ClassVar = [("text", 5), ("video", (3, 4, 6))]

    def build(self) -> nn.Module:
        return diffusers.CogVideoXTransformer3DModel(**COGVIDEOX, **ROTARY)

    def inputs(self, generator: torch.Generator, batch: int = 1) -> Inputs:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        return {
            "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (4, 6)), (4, 6), 3),
            "hidden_states": torch.randn(batch, 3, 4, 8, 12, generator=generator),
            "timestep": torch.full((batch,), 900),
            "encoder_hidden_states": torch.randn(batch, 5, 8, generator=generator),
        }

    def poke(self, inputs: Inputs, cell: tuple[int, ...]) -> Inputs:
        moved: Tensor = inputs["hidden_states"].clone()
        f, h, w = cell
        moved[:, f, 0, 2 * h, 2 * w] += 1
        return {**inputs, "hidden_states": moved}

    def test_rotary_positions_are_said(self, model: nn.Module) -> None:
        assert {s.rotary for s in host_of(model).sites(model)} == {"3-axis, video"}

    def test_positions_that_are_added(self, given: Inputs) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = diffusers.CogVideoXTransformer3DModel(**COGVIDEOX).eval()
        del given["image_rotary_emb"]
        plain, method = run(model, given), AtCore()
        with attach(model, method):
            assert torch.equal(run(model, given), plain)
        assert [(c.site.name, c.site.rotary) for c in method.calls] == [(name, "none") for name in self.joint]

    def test_fused_projections(self, model: Any, given: Inputs) -> None:
        model.fuse_qkv_projections()
        plain, method = run(model, given), AtCore()
        with attach(model, method):
            assert torch.equal(run(model, given), plain)
        assert len(method.calls) == 2
