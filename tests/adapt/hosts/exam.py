"""The examination every host of diffusers takes, on a tiny model of random weights."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from glocal import attention
from glocal.adapt import Method, RunState, Site, SiteCall, attach, host_of
from glocal.adapt.records import Core
from glocal.advise.apply import attach as attach_recipe
from glocal.advise.methods import MethodSpec
from glocal.advise.recipe import Fallback, Recipe, Rule
from glocal.patterns import TileWindows

Inputs = dict[str, Any]


class AtCore(Method):
    """Multiplies what an attention gives, at sites of the kinds asked for, and keeps the calls."""

    def __init__(self, factor: float = 1.0, kinds: tuple[str, ...] = ("self", "joint")) -> None:
        self.factor, self.kinds = factor, kinds
        self.calls: list[SiteCall] = []
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(s for s in sites if s.kind in self.kinds)

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        self.calls.append(call)
        self.queries.append(q)
        self.keys.append(k)
        return inner(q, k, v, call) * self.factor


class Replaced(AtCore):
    """Another function in place of attention."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor, SiteCall], Tensor]) -> None:
        super().__init__()
        self.function = function

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        return self.function(q, k, v, call)


def scaled(value: Any, factor: float) -> Any:
    """Every tensor of an output times `factor`."""
    if isinstance(value, tuple):
        return tuple(scaled(v, factor) for v in value)
    return None if value is None else value * factor


class AtModule(AtCore):
    """Halves what an attention module gives."""

    core = Method.core

    def module(self, original: Callable[..., Any], site: Site, state: RunState) -> Callable[..., Any]:
        return lambda *args, **kwargs: scaled(original(*args, **kwargs), self.factor)


class AtLayer(AtCore):
    """Halves what a layer gives."""

    core = Method.core

    def layer(self, original: Callable[..., Any], site: Site, state: RunState) -> Callable[..., Any]:
        return lambda *args, **kwargs: scaled(original(*args, **kwargs), self.factor)


class AtForward(AtCore):
    """Halves what the model gives."""

    core = Method.core

    def forward(self, original: Callable[..., Any], state: RunState) -> Callable[..., Any]:
        return lambda *args, **kwargs: scaled(original(*args, **kwargs), self.factor)


class AtStep(Method):
    """Acts where no host here lets it."""

    def step(self, original: Callable[..., Any], state: RunState) -> Callable[..., Any]:
        return original


def run(model: nn.Module, inputs: Inputs, **changed: Any) -> Tensor:
    """The model's output."""
    with torch.no_grad():
        return model(**{**inputs, **changed, "return_dict": False})[0]


def kept(model: nn.Module) -> dict[str, Any]:
    """What the instances hold that attaching touches."""
    return {
        f"{name}.{key}": dict(value) if key.endswith("_hooks") else value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key in ("forward", "processor") or key.endswith("_hooks")
    }


def loop(model: nn.Module, inputs: Inputs, levels: tuple[float, ...], other_text: Tensor | None = None) -> None:
    """A fake sampling loop; with `other_text`, guidance is a second call of every step."""
    latents = "sample" if "sample" in inputs else "hidden_states"
    for level in levels:
        inputs = {**inputs, "timestep": torch.full_like(inputs["timestep"], level)}
        noise = run(model, inputs)
        if other_text is not None:
            noise = run(model, inputs, encoder_hidden_states=other_text)
        inputs[latents] = inputs[latents] - noise[:, : inputs[latents].shape[1]] * 0.1


class HostExam:
    """Subclass it, say how the model and its inputs are made and what is expected."""

    attentions: ClassVar[list[tuple[str, int, str]]]  # name, layer, kind of every site
    parts: ClassVar[list[tuple[str, Any]]]  # of the layout of `inputs`
    levels: ClassVar[tuple[float, ...]] = (900.0, 500.0)
    scale: ClassVar[float] = 1000.0  # of timesteps
    text_lengths: ClassVar[list[int] | None] = None
    by_sample: ClassVar[bool] = False  # one attention call a sample

    def build(self) -> nn.Module:
        """A tiny model."""
        raise AssertionError("no model")

    def inputs(self, generator: torch.Generator, batch: int = 1) -> Inputs:
        """Keyword arguments of a forward."""
        raise AssertionError("no inputs")

    def poke(self, inputs: Inputs, cell: tuple[int, ...]) -> Inputs:
        """`inputs` with the latents of one token of the grid moved."""
        raise AssertionError("no cell")

    def level(self, timestep: float) -> float:
        """The noise level of a timestep."""
        return timestep / self.scale

    @pytest.fixture
    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build().eval()

    @pytest.fixture
    def given(self, generator: torch.Generator) -> Inputs:
        return self.inputs(generator)

    @property
    def joint(self) -> list[str]:
        return [name for name, _, kind in self.attentions if kind != "cross"]

    def test_sites(self, model: nn.Module) -> None:
        assert [(s.name, s.layer, s.kind) for s in host_of(model).sites(model)] == self.attentions

    def test_the_stock_core_changes_no_bit(self, model: nn.Module, given: Inputs) -> None:
        plain, method = run(model, given), AtCore()
        with attach(model, method):
            assert torch.equal(run(model, given), plain)
        assert [c.site.name for c in method.calls] == self.joint

    @pytest.mark.parametrize("method", [AtCore, AtModule, AtLayer, AtForward])
    def test_undo_restores_bit_for_bit(self, method: type[AtCore], model: nn.Module, given: Inputs) -> None:
        before, parts = run(model, given), kept(model)
        handle = attach(model, method(0.5))
        assert not torch.equal(run(model, given), before)
        handle.undo()
        assert torch.equal(run(model, given), before)
        after = kept(model)
        assert after.keys() == parts.keys()
        assert all(after[name] is parts[name] or after[name] == parts[name] for name in parts)

    def test_handles_nest(self, model: nn.Module, given: Inputs) -> None:
        plain = run(model, given)
        with attach(model, AtCore(4.0)):
            once = run(model, given)
            with attach(model, AtCore(0.25)):
                assert torch.equal(run(model, given), plain)  # powers of two
            assert torch.equal(run(model, given), once)
        assert torch.equal(run(model, given), plain)

    def test_two_models_do_not_leak(self, model: nn.Module, given: Inputs) -> None:
        other = deepcopy(model)
        plain, method = run(other, given), AtCore(0.5)
        with attach(model, method):
            run(model, given)
            calls = len(method.calls)
            assert torch.equal(run(other, given), plain)
            assert len(method.calls) == calls == len(self.joint)

    def test_dense_attention_of_ours_equals_the_host(self, generator: torch.Generator, model: nn.Module) -> None:
        given = self.inputs(generator, batch=2)
        plain = run(model, given)
        with attach(model, Replaced(lambda q, k, v, call: attention(q, k, v, canvas=call.layout))):
            torch.testing.assert_close(run(model, given), plain, rtol=0, atol=1e-5)  # another kernel: rounding

    def test_a_call_says_where_the_tokens_lie(self, model: nn.Module, given: Inputs) -> None:
        method = AtCore()
        with attach(model, method):
            run(model, given)
        for call, q in zip(method.calls, method.queries, strict=True):
            assert [(p.name, p.shape) for p in call.layout.q.parts] == self.parts
            assert call.layout.nq == call.layout.nk == q.shape[2]
            assert q.shape[1] == call.site.heads and q.shape[3] == call.site.head_dim
            lengths = call.layout.lengths
            assert (lengths["text"].tolist() if lengths else None) == self.text_lengths

    @pytest.mark.parametrize("where", ["first", "inner"])
    def test_moving_one_cell_moves_one_query_row(self, where: str, model: nn.Module, given: Inputs) -> None:
        method = AtCore()
        with attach(model, method):
            run(model, given)
            canvas = method.calls[0].layout.q
            axes = canvas.grid.axes
            cell = tuple(0 if where == "first" else n // 2 for n in axes)
            run(model, self.poke(given, cell))
        before, after = method.queries[0], method.queries[len(self.joint)]
        moved = (before != after).any(-1).any(1)[0].nonzero().flatten().tolist()
        inside = 0
        for place, length in zip(cell, axes, strict=True):
            inside = inside * length + place
        assert moved == [int(canvas.indices(canvas.grid.name)[inside])]

    def test_steps_are_distinct_noise_levels(self, model: nn.Module, given: Inputs) -> None:
        method = Notes()
        with attach(model, method):
            loop(model, given, self.levels)
            loop(model, given, self.levels)  # a second run begins at the higher level
        assert [(s[0], s[2], s[3]) for s in method.seen] == [(0, "cond", 0), (1, "cond", 0)] * 2

    def test_guidance_in_two_calls_is_one_step(
        self, model: nn.Module, given: Inputs, generator: torch.Generator
    ) -> None:
        method = Notes()
        text = given["encoder_hidden_states"]
        with attach(model, method):
            loop(model, given, self.levels, torch.randn(text.shape, generator=generator))
        high, low = (pytest.approx(self.level(t)) for t in self.levels)
        assert method.seen == [
            (0, high, "cond", 0),
            (0, high, "uncond", 1),
            (1, low, "cond", 0),
            (1, low, "uncond", 1),
        ]

    def test_runs_of_one_step_are_not_guidance(self, model: nn.Module, given: Inputs) -> None:
        method = Notes()
        with attach(model, method):
            loop(model, given, self.levels[:1])
            loop(model, given, self.levels[:1])
        assert [(s[0], s[2], s[3]) for s in method.seen] == [(0, "cond", 0)] * 2

    def test_guidance_in_one_call_is_read_from_the_rows(self, model: nn.Module, generator: torch.Generator) -> None:
        one, method = self.inputs(generator, batch=2), Notes()
        doubled = {k: torch.cat([v, v]) if torch.is_tensor(v) and v.shape[:1] == (2,) else v for k, v in one.items()}
        doubled["encoder_hidden_states"] = torch.randn(doubled["encoder_hidden_states"].shape, generator=generator)
        with attach(model, method) as handle:
            run(model, doubled)
            assert handle.state.rows == ((0, "uncond"), (1, "uncond"), (0, "cond"), (1, "cond"))
            run(model, one)
            assert handle.state.rows == ((0, "cond"), (1, "cond"))
        calls = (4, 2) if self.by_sample else (1, 1)
        assert [s[2] for s in method.seen] == ["both"] * calls[0] + ["cond"] * calls[1]

    def test_a_sparse_recipe_equals_the_masked_reference(self, model: nn.Module, generator: torch.Generator) -> None:
        given = self.inputs(generator, batch=2)
        axes = next(shape for _, shape in self.parts if isinstance(shape, tuple))
        tiles, windows = [2] * len(axes), [1] + [2] * (len(axes) - 1)
        extents = [{"tokens": 2 * w} for w in windows]
        spec = MethodSpec(
            "tile_windows", {"tile": tiles, "window": extents}, {"tile": tiles}, block=(2 ** len(axes),) * 2
        )
        kind = "joint" if len(self.parts) > 1 else "self"
        recipe = Recipe(
            "candidate",
            {"tiles": spec},
            (Rule("tiles", ((0, 99),), site=kind, component=host_of(model).sites(model)[0].component),),
            fallback=Fallback(min_tokens=1),
        )
        pattern = TileWindows(tuple(tiles), tuple(windows))

        def masked(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> Tensor:
            seen = pattern.mask(call.layout)[0].to(q.device).expand(q.shape[0], 1, -1, -1)
            if call.native.mask is not None:
                seen = seen & call.native.mask
            assert not bool(seen.all())
            return scaled_dot_product_attention(q, k, v, seen)

        dense = run(model, given)
        with attach(model, Replaced(masked)):
            wanted = run(model, given)
        assert not torch.allclose(wanted, dense, rtol=0, atol=1e-4)
        with torch.no_grad(), attach_recipe(model, recipe) as handle:
            torch.testing.assert_close(run(model, given), wanted, rtol=0, atol=1e-5)
            stats = handle.method.stats  # type: ignore[attr-defined]
        assert list(stats) == self.joint
        head_calls = host_of(model).sites(model)[0].heads * (2 if self.by_sample else 1)
        assert all(s.sparse == head_calls and 0 < s.kept < 1 for s in stats.values())

    def test_a_missing_point_is_named(self, model: nn.Module) -> None:
        with pytest.raises(ValueError, match=r"point 'step', which the host of \w+ does not offer; it offers core, "):
            attach(model, AtStep())


class Notes(AtCore):
    """Writes down the state at the first site of every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, Any, str, int]] = []

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        if call.site.layer == 0:
            self.seen.append((call.state.step, call.state.timestep, call.state.branch, call.state.call))
        return super().core(q, k, v, call, inner)


class JointExam(HostExam):
    """Of hosts with text in the sequence."""

    def test_tokens_that_are_added_on_the_way_are_refused(self, model: nn.Module, given: Inputs) -> None:
        class Longer(AtCore):
            """Doubles the text on the way in."""

            core = Method.core

            def forward(self, original: Callable[..., Any], state: RunState) -> Callable[..., Any]:
                def doubled(**kwargs: Any) -> Any:
                    text = kwargs["encoder_hidden_states"]
                    kwargs["encoder_hidden_states"] = torch.cat([text, text], 1)
                    for name, dim in (("encoder_attention_mask", 1), ("txt_ids", 0)):  # where the model has them
                        if name in kwargs:
                            kwargs[name] = torch.cat([kwargs[name], kwargs[name]], dim)
                    return original(**kwargs)

                return doubled

        words = (
            r"queries and \d+ keys arrive, but the arguments of the model say \d+ and \d+; legal: the whole sequence"
        )
        with attach(model, AtCore()), attach(model, Longer()), pytest.raises(ValueError, match=words):
            run(model, given)
