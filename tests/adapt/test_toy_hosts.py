"""The records fit other kinds of methods and hosts: token pruning between layers, a second stream with a cache of its
own, capture at a site where text and image are one sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from glocal.adapt import Method, RunState, Site, SiteCall, attach, host, register_host
from glocal.adapt.host import CoreFactory, Point, Undo, Wrapper, replace_forward
from glocal.adapt.records import Core, Kind
from glocal.canvas import Canvas, Layout, Part

HEADS, DIM = 2, 8


class ToyAttention(nn.Module):
    """Attention over whatever tokens come in; `positions` are added, `core` can be replaced."""

    def __init__(self, text: int) -> None:
        super().__init__()
        self.text = text
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.core: Callable[..., Tensor] = lambda q, k, v, positions: scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:  # [B, N, DIM], [N]
        angles = (positions[:, None] * torch.arange(1, DIM + 1)).sin()
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x + angles).chunk(3, -1))
        return self.core(q, k, v, positions).transpose(1, 2).flatten(2)


class ToyLayer(nn.Module):
    def __init__(self, text: int) -> None:
        super().__init__()
        self.attn = ToyAttention(text)

    def forward(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return hidden + self.attn(hidden, positions), positions


class Toy(nn.Module):
    """Layers hand (hidden states, positions) on, so that a layer may shorten both. The first `text` tokens are text."""

    def __init__(self, text: int = 0) -> None:
        super().__init__()
        self.text = text
        self.layers = nn.ModuleList(ToyLayer(text) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1])
        for layer in self.layers:
            hidden, positions = layer(hidden, positions)
        return hidden


class ToyHost:
    points: frozenset[Point] = frozenset({"core", "layer", "forward"})

    def sites(self, model: Toy) -> Sequence[Site]:
        kind: Kind = "joint" if model.text else "self"
        return [Site(f"layers.{i}.attn", i, HEADS, DIM // HEADS, kind=kind) for i in range(len(model.layers))]

    def watch(self, model: Toy, state: RunState) -> Undo:
        def before(*_: Any) -> None:
            state.begin()
            state.step = 0

        return model.register_forward_pre_hook(before).remove

    def wrap_core(self, model: Toy, site: Site, state: RunState, core: CoreFactory) -> Undo:
        module = cast(ToyAttention, model.get_submodule(site.name))
        original = module.core
        made = core(lambda q, k, v, call: original(q, k, v, call.native))

        def replaced(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
            parts = [Part("text", module.text)] if module.text else []
            canvas = Canvas([*parts, Part("image", (q.shape[2] - module.text,))])
            return made(q, k, v, SiteCall(site, Layout.of(canvas), state, native=positions))

        module.core = replaced

        def undo() -> None:
            module.core = original

        return undo

    def wrap(self, model: Toy, point: Point, name: str, wrapper: Callable[[Wrapper], Wrapper]) -> Undo:
        return replace_forward(model if point == "forward" else model.get_submodule(name.rpartition(".")[0]), wrapper)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    name = f"{Toy.__module__}.{Toy.__qualname__}"
    register_host(name, ToyHost())
    yield
    del host._REGISTERED[name]


@pytest.fixture
def x(generator: torch.Generator) -> Tensor:
    return torch.randn(1, 12, DIM, generator=generator)


class Prune(Method):
    """After layer 0, keeps the tokens that its last query looks at most; later layers run on those alone."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.tokens: list[tuple[int, list[int]]] = []

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        self.tokens.append((call.layout.nk, call.native.tolist()))
        if call.site.layer == 0:
            share = (q[:, :, -1:] @ k.mT).softmax(-1).mean((0, 1, 2))  # [N]
            call.state.store[call.site.name, "kept"] = share.topk(self.keep).indices.sort().values
        return inner(q, k, v, call)

    def layer(self, original: Callable[..., Any], site: Site, state: RunState) -> Callable[..., Any]:
        def run(hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            hidden, positions = original(hidden, positions)
            kept = state.store.get((site.name, "kept"))
            return (hidden, positions) if kept is None else (hidden[:, kept], positions[kept])

        return run

    def forward(self, original: Callable[..., Any], state: RunState) -> Callable[..., Any]:
        def run(hidden: Tensor) -> Tensor:
            short = original(hidden)
            kept = state.store["layers.0.attn", "kept"]
            return hidden.index_copy(1, kept, short)  # tokens left out come out as they came in

        return run


def test_pruning_between_layers(x: Tensor) -> None:
    model, method = Toy(), Prune(5)
    plain = model(x)
    with attach(model, method):
        out = model(x)
    assert out.shape == plain.shape
    assert [n for n, _ in method.tokens] == [12, 5, 5]
    kept = method.tokens[1][1]
    assert len(kept) == 5
    assert method.tokens[2][1] == kept  # positions are those of before, not renumbered
    want, positions = model.layers[0](x, torch.arange(12))
    want, positions = want[:, kept], positions[kept]
    for layer in list(model.layers)[1:]:
        want, positions = layer(want, positions)
    torch.testing.assert_close(out, x.index_copy(1, torch.tensor(kept), want))
    assert torch.equal(model(x), plain)


class Guided(Method):
    """Runs the model a second time on a shorter sequence; each stream keeps keys and values of its own, and the second
    stream's are added to what the first one sees."""

    def __init__(self) -> None:
        self.lengths: list[tuple[str, int]] = []

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        store = call.state.store
        stream = store["", "stream"]
        store[call.site.name, stream] = (k, v)
        if stream == "main":
            k, v = (torch.cat([a, b], 2) for a, b in zip((k, v), store[call.site.name, "guide"], strict=True))
        self.lengths.append((stream, k.shape[2]))
        return scaled_dot_product_attention(q, k, v)

    def forward(self, original: Callable[..., Any], state: RunState) -> Callable[..., Any]:
        def run(hidden: Tensor) -> Tensor:
            state.store["", "stream"] = "guide"
            original(hidden[:, ::3])
            state.store["", "stream"] = "main"
            return original(hidden)

        return run


def test_a_second_stream_with_its_own_cache(x: Tensor) -> None:
    model, method = Toy(), Guided()
    plain = model(x)
    with attach(model, method) as handle:
        out = model(x)
        store = handle.state.store
        assert store["layers.2.attn", "guide"][0].shape[2] == 4
        assert store["layers.2.attn", "main"][0].shape[2] == 12
        model(x)
        assert len(store) == 1 + 2 * 3  # cleared when the second run began
    assert method.lengths == ([("guide", 4)] * 3 + [("main", 16)] * 3) * 2
    assert not torch.allclose(out, plain)
    assert torch.equal(model(x), plain)


class LookAtText(Method):
    """Keeps, for every joint site, how much each text token looks at the image; the model runs as before."""

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(s for s in sites if s.kind == "joint")

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        text, image = (call.layout.q.indices(name) for name in ("text", "image"))
        rows = (q[:, :, text] @ k.mT * q.shape[-1] ** -0.5).softmax(-1)  # [B, H, text, N]
        call.state.store[call.site.name, "text to image"] = rows[..., image].sum(-1)
        return inner(q, k, v, call)


def test_capture_where_text_and_image_are_one_sequence(x: Tensor) -> None:
    model = Toy(text=4)
    plain = model(x)
    with attach(model, LookAtText()) as handle:
        assert torch.equal(model(x), plain)
        found = [handle.state.store[f"layers.{i}.attn", "text to image"] for i in range(3)]
    for shares in found:
        assert shares.shape == (1, HEADS, 4)
        assert bool(((shares > 0) & (shares < 1)).all())


def test_methods_for_self_attention_find_no_joint_site() -> None:
    with pytest.raises(ValueError, match="Prune found no attention site it wants in Toy"):
        attach(Toy(text=4), Prune(2))
