"""Wan of diffusers: video tokens alone in self-attention, text and image in cross attention."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from glocal.adapt import Method, SiteCall, attach, host_of
from glocal.adapt.records import Core

from .exam import AtCore, HostExam, Inputs, run
from .sizes import WAN

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")


class TestWan(HostExam):
    attentions: ClassVar = [
        ("blocks.0.attn1", 0, "self"),
        ("blocks.0.attn2", 0, "cross"),
        ("blocks.1.attn1", 1, "self"),
        ("blocks.1.attn2", 1, "cross"),
    ]
    parts: ClassVar = [("video", (3, 4, 6))]

    def build(self) -> nn.Module:
        return diffusers.WanTransformer3DModel(**WAN)

    def inputs(self, generator: torch.Generator, batch: int = 1) -> Inputs:
        return {
            "hidden_states": torch.randn(batch, 4, 3, 8, 12, generator=generator),
            "timestep": torch.full((batch,), 900.0),
            "encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator),
        }

    def poke(self, inputs: Inputs, cell: tuple[int, ...]) -> Inputs:
        moved: Tensor = inputs["hidden_states"].clone()
        f, h, w = cell
        moved[:, 0, f, 2 * h, 2 * w] += 1
        return {**inputs, "hidden_states": moved}

    def test_cross_attention_is_left_alone_unless_asked_for(self, model: nn.Module, given: Inputs) -> None:
        cross = [m.processor for name, m in model.named_modules() if name.endswith("attn2")]
        with attach(model, AtCore(0.5)):
            assert [m.processor for name, m in model.named_modules() if name.endswith("attn2")] == cross
        plain, method = run(model, given), AtCore(kinds=("cross",))
        with attach(model, method):
            assert torch.equal(run(model, given), plain)
        assert [c.site.name for c in method.calls] == ["blocks.0.attn2", "blocks.1.attn2"]
        layout = method.calls[0].layout
        assert [(p.name, p.shape) for p in (*layout.q.parts, *layout.kv.parts)] == [("video", (3, 4, 6)), ("text", 5)]
        assert method.keys[0].shape == (1, 2, 5, 12)

    def test_an_image_condition_is_a_second_cross_attention(self, generator: torch.Generator) -> None:
        model = diffusers.WanTransformer3DModel(**WAN, image_dim=8, added_kv_proj_dim=24).eval()
        given = {
            **self.inputs(generator),
            "encoder_hidden_states": torch.randn(1, 512, 16, generator=generator),  # the length diffusers assumes
            "encoder_hidden_states_image": torch.randn(1, 3, 8, generator=generator),
        }
        plain, method = run(model, given), AtCore(kinds=("self", "cross"))
        with attach(model, method):
            assert torch.equal(run(model, given), plain)
        seen = [(c.site.name, c.layout.kv.parts[0].name, c.layout.nk) for c in method.calls[:3]]
        assert seen == [
            ("blocks.0.attn1", "video", 72),
            ("blocks.0.attn2", "image", 3),
            ("blocks.0.attn2", "text", 512),
        ]

    def test_a_call_shows_the_stream_and_what_heads_add_to_it(self, model: nn.Module, given: Inputs) -> None:
        class Kept(AtCore):
            def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
                out = super().core(q, k, v, call, inner)
                if call.site.layer == 0 and self.factor:
                    assert call.residual is not None and call.contribution is not None
                    streams.append(call.residual)
                    added.append(call.contribution(out))
                return out

        streams: list[Tensor] = []
        added: list[Tensor] = []
        entered: list[Tensor] = []  # the stream before the block
        after: list[Tensor] = []  # the stream between the two attentions
        model.get_submodule("blocks.0.norm2").register_forward_pre_hook(lambda _, args: after.append(args[0]))
        model.get_submodule("blocks.0").register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        given = {**given, "hidden_states": torch.cat([given["hidden_states"], given["hidden_states"] + 1])}
        given["encoder_hidden_states"] = given["encoder_hidden_states"].expand(2, -1, -1)
        given["timestep"] = torch.tensor([900.0, 400.0])  # gates of their own
        with attach(model, Kept()):
            run(model, given)
        with attach(model, Kept(0.0)):
            run(model, given)
        assert added[0].shape == (2, 2, 72, 24)
        torch.testing.assert_close(added[0].sum(1), after[0] - after[1], rtol=0, atol=1e-5)
        assert torch.equal(streams[0], entered[0])

    def test_levels_of_single_tokens_count_by_the_highest(self, model: nn.Module, given: Inputs) -> None:
        each = torch.full((1, 72), 700.0)
        each[:, :24] = 0  # the first frame is given
        method = AtCore()
        with attach(model, method) as handle:
            run(model, given, timestep=each)
        assert method.calls[0].contribution is None  # the gate differs by token
        assert handle.state.timestep == pytest.approx(0.7)

    def test_a_backend_set_while_attached_holds(self, model: nn.Module, given: Inputs) -> None:
        attention: Any = model.get_submodule("blocks.0.attn1")
        original = attention.processor
        with attach(model, AtCore()):
            assert isinstance(attention.processor, type(original))
            attention.processor._attention_backend = "no such backend"
            with pytest.raises(ValueError, match="no such backend"):
                run(model, given)
        assert attention.processor is original
        assert original._attention_backend == "no such backend"

    def test_fused_projections(self, model: nn.Module, given: Inputs) -> None:
        model.get_submodule("blocks.0.attn1").fuse_projections()  # type: ignore[operator]
        plain = run(model, given)
        with attach(model, AtCore()):
            assert torch.equal(run(model, given), plain)

    def test_a_processor_that_hides_its_attention_is_named(self, model: nn.Module) -> None:
        class Closed:
            def __call__(self, attn: Any, hidden_states: Tensor, *args: Any) -> Tensor:
                return hidden_states

        attention: Any = model.get_submodule("blocks.1.attn1")
        attention.processor = Closed()
        parts = [m.processor for m in model.modules() if hasattr(m, "processor")]
        with pytest.raises(ValueError, match=r"Closed hides its attention; legal: one whose __call__ calls"):
            attach(model, AtCore())
        assert [m.processor for m in model.modules() if hasattr(m, "processor")] == parts

    def test_a_mask_no_layout_says_is_refused(self, model: nn.Module, given: Inputs) -> None:
        class Masked(Method):
            def module(self, original: Any, site: Any, state: Any) -> Any:
                mask = torch.ones(1, 1, 1, 72, dtype=torch.bool)
                return lambda hidden, text, _, rotary: original(hidden, text, mask, rotary)

        with attach(model, Masked()), attach(model, AtCore()):
            with pytest.raises(
                ValueError, match=r"mask of shape \(1, 1, 1, 72\) arrives, which no layout of this host"
            ):
                run(model, given)

    def test_other_models_are_refused_by_name(self) -> None:
        model = diffusers.WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=4)
        with pytest.raises(ValueError, match=r"No host adapter for .*WanVACETransformer3DModel\..* Nearest: .*Wan"):
            host_of(model)

    @pytest.mark.slow
    def test_a_compiled_model(self, model: nn.Module, given: Inputs) -> None:
        plain = run(model, given)
        with attach(model, AtCore(0.5)):
            wanted = run(model, given)
        model.compile(backend="eager")
        torch.testing.assert_close(run(model, given), plain)
        method = AtCore(0.5)
        with attach(model, method):
            for _ in range(2):
                torch.testing.assert_close(run(model, given), wanted)
        assert [c.site.name for c in method.calls] == self.joint * 2
        torch.testing.assert_close(run(model, given), plain)

    @pytest.mark.slow
    def test_all_layers_run_what_was_compiled_once(self, given: Inputs) -> None:
        """Ten layers are more than torch.compile takes versions of one function."""
        counts = []
        for layers in (3, 10):
            torch.compiler.reset()
            made, ran = [0], [0]

            def backend(graph: Any, _: Any, made: list[int] = made, ran: list[int] = ran) -> Any:
                made[0] += 1

                def counted(*args: Any) -> Any:
                    ran[0] += 1
                    return graph.forward(*args)

                return counted

            model = diffusers.WanTransformer3DModel(**{**WAN, "num_layers": layers}).eval()
            with attach(model, AtCore()):
                model.compile(backend=backend)
                run(model, given)
                ran[0] = 0
                with torch._dynamo.config.patch(error_on_recompile=True):
                    run(model, {**given, "timestep": given["timestep"] - 1})
            counts.append((made[0], ran[0] / layers))
        assert counts[0][0] == counts[1][0]
        assert counts[1][1] > 3  # around each self-attention, and the rest of the block
