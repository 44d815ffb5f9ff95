"""UNets of diffusers (Stable Diffusion 1.5, XL): a grid for each level, stages and residual blocks as places to act."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from glocal import attention
from glocal.adapt import Block, Method, RunState, Site, attach, host_of

from .exam import AtCore, HostExam, Inputs, Replaced, run, scaled
from .sizes import SD15, SDXL

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")


class TestSD15(HostExam):
    attentions: ClassVar = [
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1", 0, "self"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn2", 0, "cross"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1", 1, "self"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2", 1, "cross"),
        ("up_blocks.1.attentions.0.transformer_blocks.0.attn1", 2, "self"),
        ("up_blocks.1.attentions.0.transformer_blocks.0.attn2", 2, "cross"),
        ("up_blocks.1.attentions.1.transformer_blocks.0.attn1", 3, "self"),
        ("up_blocks.1.attentions.1.transformer_blocks.0.attn2", 3, "cross"),
    ]
    parts: ClassVar = [("image", (8, 6))]
    grids: ClassVar = [(8, 6), (4, 3), (8, 6), (8, 6)]

    def build(self) -> nn.Module:
        return diffusers.UNet2DConditionModel(**SD15)

    def inputs(self, generator: torch.Generator, batch: int = 1) -> Inputs:
        return {
            "sample": torch.randn(batch, 4, 8, 6, generator=generator),
            "timestep": torch.full((batch,), 900),
            "encoder_hidden_states": torch.randn(batch, 7, 32, generator=generator),
        }

    def test_a_call_says_where_the_tokens_lie(self, model: nn.Module, given: Inputs) -> None:
        method = AtCore(kinds=("self", "cross"))
        with attach(model, method):
            run(model, given)
        selfs = [c for c in method.calls if c.site.kind == "self"]
        assert [c.layout.q.grid.axes for c in selfs] == self.grids
        cross = method.calls[1].layout
        assert [(p.name, p.shape) for p in (*cross.q.parts, *cross.kv.parts)] == [("image", self.grids[0]), ("text", 7)]

    def test_moving_one_cell_moves_one_query_row(self) -> None:  # type: ignore[override]
        pytest.skip("convolutions in front of the attention spread what one cell holds")

    def test_odd_sizes(self, model: nn.Module, given: Inputs, generator: torch.Generator) -> None:
        given["sample"] = torch.randn(1, 4, 7, 5, generator=generator)
        method = AtCore()
        with attach(model, method):
            run(model, given)
        assert [c.layout.q.grid.axes for c in method.calls[:2]] == [(7, 5), (4, 3)]

    def test_windows_folded_into_the_batch_are_a_flat_run(self, model: nn.Module, given: Inputs) -> None:
        class Halves(Method):
            def module(self, original: Callable[..., Any], site: Site | Block, state: RunState) -> Callable[..., Any]:
                def halves(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                    return torch.cat([original(part, *args, **kwargs) for part in x.chunk(2, 1)], 1)

                return halves

        method = AtCore()
        with attach(model, method), attach(model, Halves()):
            run(model, given)
        assert [(p.name, p.shape) for p in method.calls[0].layout.q.parts] == [("image", 24)]

    def test_methods_reach_stages_and_residual_blocks(self, model: nn.Module, given: Inputs) -> None:
        class AtBlocks(Method):
            def __init__(self, *roles: str) -> None:
                self.roles, self.found = roles, []

            def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
                return ()

            def blocks(self, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
                self.found = [b for b in blocks if b.role in self.roles]
                return tuple(self.found)

            def module(self, original: Callable[..., Any], site: Site | Block, state: RunState) -> Callable[..., Any]:
                return lambda *args, **kwargs: scaled(original(*args, **kwargs), 0.5)

        plain = run(model, given)
        names = {
            "down": ["down_blocks.0", "down_blocks.1"],
            "mid": ["mid_block"],
            "downsampler": ["down_blocks.0.downsamplers.0"],
            "upsampler": ["up_blocks.0.upsamplers.0"],
        }
        for role, wanted in names.items():
            method = AtBlocks(role)
            with attach(model, method):
                assert [b.name for b in method.found] == wanted
                assert all(b.module is model.get_submodule(b.name) for b in method.found)
                if role != "down":  # what a stage gives holds its skips as well
                    assert not torch.equal(run(model, given), plain)
            assert torch.equal(run(model, given), plain)


class TestSDXL:
    """What differs from Stable Diffusion 1.5: several transformer blocks a level, more conditions."""

    attentions: ClassVar = [
        (f"{where}.transformer_blocks.{n}.{kind}", layer + n, "self" if kind == "attn1" else "cross")
        for where, layer in (
            ("down_blocks.1.attentions.0", 0),
            ("mid_block.attentions.0", 2),
            ("up_blocks.0.attentions.0", 4),
            ("up_blocks.0.attentions.1", 6),
        )
        for n in (0, 1)
        for kind in ("attn1", "attn2")
    ]

    @pytest.fixture
    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return diffusers.UNet2DConditionModel(**SDXL).eval()

    @pytest.fixture
    def given(self, generator: torch.Generator) -> Inputs:
        more = {"text_embeds": torch.randn(1, 24, generator=generator), "time_ids": torch.ones(1, 6)}
        return {
            "sample": torch.randn(1, 4, 8, 6, generator=generator),
            "timestep": torch.full((1,), 900),
            "encoder_hidden_states": torch.randn(1, 7, 32, generator=generator),
            "added_cond_kwargs": more,
        }

    def test_sites(self, model: nn.Module) -> None:
        assert [(s.name, s.layer, s.kind) for s in host_of(model).sites(model)] == self.attentions

    def test_cross_attention_of_ours(self, model: nn.Module, given: Inputs) -> None:
        method = Replaced(lambda q, k, v, call: attention(q, k, v, canvas=call.layout))
        method.kinds = ("cross",)
        plain = run(model, given)
        with attach(model, method):
            torch.testing.assert_close(run(model, given), plain, rtol=0, atol=1e-5)

    def test_heads_are_read_from_the_modules(self, model: nn.Module) -> None:
        assert {(s.heads, s.head_dim, s.component) for s in host_of(model).sites(model)} == {(4, 16, "unet")}
