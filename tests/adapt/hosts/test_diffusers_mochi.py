"""Mochi of diffusers: [video, valid text] in one sequence, attention called sample by sample."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from glocal.adapt import attach

from .exam import AtCore, HostExam, Inputs, run
from .sizes import MOCHI

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")


class TestMochi(HostExam):
    attentions: ClassVar = [("transformer_blocks.0.attn1", 0, "joint"), ("transformer_blocks.1.attn1", 1, "joint")]
    parts: ClassVar = [("video", (3, 4, 6)), ("text", 3)]
    levels: ClassVar = (100.0, 500.0)
    by_sample: ClassVar = True

    def level(self, timestep: float) -> float:
        return 1 - timestep / 1000  # timesteps rise

    def build(self) -> nn.Module:
        return diffusers.MochiTransformer3DModel(**MOCHI)

    def inputs(self, generator: torch.Generator, batch: int = 1) -> Inputs:
        mask = torch.ones(batch, 5, dtype=torch.bool)
        mask[0, 3:] = False
        return {
            "hidden_states": torch.randn(batch, 4, 3, 8, 12, generator=generator),
            "timestep": torch.full((batch,), 100.0),
            "encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator),
            "encoder_attention_mask": mask,
        }

    def poke(self, inputs: Inputs, cell: tuple[int, ...]) -> Inputs:
        moved: Tensor = inputs["hidden_states"].clone()
        f, h, w = cell
        moved[:, 0, f, 2 * h, 2 * w] += 1
        return {**inputs, "hidden_states": moved}

    def test_a_call_says_which_sample_it_serves(self, model: nn.Module, generator: torch.Generator) -> None:
        method = AtCore()
        with attach(model, method):
            run(model, self.inputs(generator, batch=2))
        assert [(c.site.layer, c.row, c.layout.q.parts[1].tokens) for c in method.calls] == [
            (0, 0, 3),
            (0, 1, 5),
            (1, 0, 3),
            (1, 1, 5),
        ]
        assert all(q.shape[0] == 1 for q in method.queries)

    @pytest.mark.slow
    def test_a_compiled_model_attached_and_not(self, model: nn.Module, given: Inputs) -> None:
        """The functions inside its processor are compiled on their own, since attention is called in a loop."""
        torch.compiler.reset()
        plain = run(model, given)
        model.compile(backend="eager")
        for method in (AtCore(), AtCore()):
            with attach(model, method):
                torch.testing.assert_close(run(model, given), plain)
            torch.testing.assert_close(run(model, given), plain)
