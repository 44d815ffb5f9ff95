"""Flux of diffusers: [text, image] in one sequence, the grid read from position ids."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from glocal.adapt import attach

from .exam import AtCore, Inputs, JointExam, run
from .sizes import FLUX

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")


def positions(rows: int, columns: int, image: int = 0) -> Tensor:
    """Position ids [rows * columns, 3] as the pipeline makes them."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 0] = image
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)
    return ids.reshape(-1, 3)


class TestFlux(JointExam):
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
        return diffusers.FluxTransformer2DModel(**FLUX)

    def inputs(self, generator: torch.Generator, batch: int = 1) -> Inputs:
        return {
            "hidden_states": torch.randn(batch, 24, 16, generator=generator),
            "encoder_hidden_states": torch.randn(batch, 5, 32, generator=generator),
            "pooled_projections": torch.randn(batch, 24, generator=generator),
            "timestep": torch.full((batch,), 0.75),
            "img_ids": positions(4, 6),
            "txt_ids": torch.zeros(5, 3),
            "guidance": torch.full((batch,), 3.5),
        }

    def poke(self, inputs: Inputs, cell: tuple[int, ...]) -> Inputs:
        moved: Tensor = inputs["hidden_states"].clone()
        moved[:, cell[0] * 6 + cell[1], 0] += 1
        return {**inputs, "hidden_states": moved}

    def test_a_reference_image_is_a_grid_of_its_own(
        self, model: nn.Module, given: Inputs, generator: torch.Generator
    ) -> None:
        given["hidden_states"] = torch.randn(1, 24 + 6, 16, generator=generator)
        given["img_ids"] = torch.cat([positions(4, 6), positions(2, 3, image=1)])
        method = AtCore()
        with attach(model, method):
            run(model, given)
        parts = [(p.name, p.shape) for p in method.calls[0].layout.q.parts]
        assert parts == [("text", 5), ("image", (4, 6)), ("reference_1", (2, 3))]

    def test_tokens_in_no_raster_are_a_flat_run(self, model: nn.Module, given: Inputs) -> None:
        given["img_ids"] = given["img_ids"].flip(0)
        method = AtCore()
        with attach(model, method):
            run(model, given)
        assert [(p.name, p.shape) for p in method.calls[0].layout.q.parts] == [("text", 5), ("image", 24)]

    def test_an_image_prompt_keeps_its_own_attention(
        self, model: nn.Module, given: Inputs, generator: torch.Generator
    ) -> None:
        from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

        attention: Any = model.get_submodule("transformer_blocks.0.attn")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            attention.processor = FluxIPAdapterAttnProcessor(32, 8, num_tokens=(3,))
        given["joint_attention_kwargs"] = {"ip_hidden_states": [torch.randn(1, 3, 8, generator=generator)]}
        weights = list(model.state_dict())
        plain, method = run(model, given), AtCore()
        with attach(model, method):
            assert list(model.state_dict()) == weights
            assert torch.equal(run(model, given), plain)
        assert [c.site.name for c in method.calls] == self.joint
        given["joint_attention_kwargs"]["ip_hidden_states"][0] += 1
        assert not torch.equal(run(model, given), plain)
