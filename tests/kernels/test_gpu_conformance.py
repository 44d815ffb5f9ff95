"""Faults that attention kernels have had elsewhere, on a real card, for every CUDA backend that claims the case.

`bench/gpu_conformance.py` runs this file and records the outcome. A backend that refuses a case says so and is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout, Part
from glocal.kernels import registry
from glocal.ops import Dense, PerKey, Relative, Score, attend, merge
from glocal.patterns import CausalWindow, Neighborhood, PerHead
from glocal.patterns.base import Pattern
from glocal.plan.blockplan import BlockLists, BlockPlan
from glocal.plan.build import PlanSpec, plan

pytestmark = pytest.mark.gpu

BACKENDS = [b.name for b in registry.backends() if "cuda" in b.capability.devices and b.capability.needs != "counts"]
SPARSE = [n for n in BACKENDS if n != "dense" and not n.endswith("_dense")]
LIMIT = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 5e-5}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Three = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    """Batch, query heads, key heads, query tokens, key tokens, head size."""

    heads: tuple[int, int] = (2, 2)
    tokens: tuple[int, int] = (300, 300)
    dim: int = 64
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16


def qkv(shape: Shape, seed: int = 0) -> Three:
    """Random q, k, v on the card, leaves."""
    g = torch.Generator("cuda").manual_seed(seed)
    (h, hk), (n, m) = shape.heads, shape.tokens
    sizes = ((shape.batch, h, n, shape.dim), (shape.batch, hk, m, shape.dim), (shape.batch, hk, m, shape.dim))
    q, k, v = (torch.randn(s, generator=g, device="cuda").to(shape.dtype).requires_grad_() for s in sizes)
    return q, k, v


def attempt(name: str, *args: Any, **options: Any) -> Any:
    """`attend` on a backend by name; skips, with its words, what it refuses."""
    lacking = next(b for b in registry.backends() if b.name == name).missing("cuda")
    if lacking is not None:
        pytest.skip(f"{name}: {lacking}")
    try:
        return attend(*args, backend=name, **options)
    except ValueError as error:
        if "cannot run this call" in str(error) or "repeats a key block" in str(error):
            pytest.skip(f"{name} refuses: {str(error).split('. For it,')[0][:160]}")
        raise


def compared(
    name: str,
    inputs: Three,
    pattern: Pattern | BlockPlan | None,
    canvas: Canvas | Layout | None = None,
    *,
    score: Score | None = None,
    grads: bool = True,
    through_lse: bool = True,
    extra: Iterable[Tensor] = (),
) -> Any:
    """Out, LSE and gradients against the definition in float64."""
    done = attempt(name, *inputs, pattern, canvas=canvas, score=score)
    q, k, v = (t.double() for t in inputs)
    want = attend(q, k, v, pattern, canvas=canvas, score=score, backend="reference")
    limit = LIMIT[inputs[0].dtype]
    close(done.out, want.out, limit, "out")
    close(done.lse, want.lse, max(limit / 4, 1e-4), "lse")
    if grads:
        g = torch.Generator("cuda").manual_seed(9)
        weight = torch.randn(done.out.shape, generator=g, device="cuda")
        wanted = (*inputs, *extra)

        def loss(a: Any) -> Tensor:
            total = (a.out.double() * weight).sum()
            return total + a.lse.double().masked_fill(a.lse == -torch.inf, 0).sum() if through_lse else total

        mine = torch.autograd.grad(loss(done), wanted)
        theirs = torch.autograd.grad(loss(want), wanted)
        for label, a, b in zip(("q", "k", "v", *("bias" for _ in extra)), mine, theirs, strict=True):
            close(a, b, 2 * limit, f"gradient of {label}")
    return done


def close(a: Tensor, b: Tensor, limit: float, what: str) -> None:
    """Equal infinities; otherwise within `limit` of the largest entry."""
    a, b = a.detach().double(), b.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    top = float(b[b.isfinite()].abs().max()) if bool(b.isfinite().any()) else 0.0
    error = float(torch.where(same, 0, (a - b).abs()).max()) if a.numel() else 0.0
    assert error <= limit * max(top, 1e-3), f"{what}: error {error:.3g} where the largest entry is {top:.3g}"


def everyone(n: int, m: int | None = None) -> tuple[None, Layout]:
    """Dense, and its layout."""
    return None, Layout(Canvas([Part("q", (n,))]), Canvas([Part("k", (n if m is None else m,))]))


@pytest.fixture(params=SPARSE)
def sparse(request: pytest.FixtureRequest) -> str:
    """Every backend that runs patterns."""
    return request.param


@pytest.fixture(params=BACKENDS)
def any_backend(request: pytest.FixtureRequest) -> str:
    """Every backend."""
    return request.param


def relation(name: str, n: int, window: int = 41) -> tuple[Pattern | None, Canvas | Layout]:
    """A neighbourhood for backends of patterns, everything for dense ones."""
    return (Neighborhood(min(window, n)), Canvas((n,))) if name in SPARSE else everyone(n)


@pytest.mark.parametrize("axis", ["head", "token"])
def test_fault_01_offsets_beyond_32_bits(any_backend: str, axis: str) -> None:
    n, d = 300, 64
    strides = ((1 << 30) + 64, 64, 1) if axis == "head" else (64, (1 << 23) + 64, 1)
    room = sum(s * (k - 1) for s, k in zip(strides, (3, n, d), strict=True)) + 64
    assert room > 1 << 31
    storage = torch.zeros(room, dtype=torch.bfloat16, device="cuda")
    small = qkv(Shape((3, 3), (n, n), d))
    wide = []
    for t in small:  # one after the other in the same storage would overlap: heads are 64 apart in the second case
        view = storage.as_strided((1, 3, n, d), (0, *strides))
        wide.append(view)
        view.copy_(t.detach())
        done = attempt(any_backend, *(view if u is t else u.detach() for u in small), *relation(any_backend, n)[:1],
                       canvas=relation(any_backend, n)[1])  # fmt: skip
        want = attempt(any_backend, *(u.detach() for u in small), *relation(any_backend, n)[:1],
                       canvas=relation(any_backend, n)[1])  # fmt: skip
        assert torch.equal(done.out, want.out) or any_backend == "flex"
        close(done.out, want.out, 1e-2, "out")


def test_fault_02_seventy_thousand_heads(any_backend: str) -> None:
    inputs = qkv(Shape((70_000, 70_000), (16, 16), 16))
    pattern, canvas = relation(any_backend, 16, 5)
    done = attempt(any_backend, *inputs, pattern, canvas=canvas)
    assert bool(done.out.isfinite().all())
    for part in (slice(0, 3), slice(69_990, 70_000)):
        few = tuple(t[:, part] for t in inputs)
        q, k, v = (t.double() for t in few)
        want = attend(q, k, v, pattern, canvas=canvas, backend="reference")
        close(done.out[:, part], want.out, 2e-2, "out")
    for g in torch.autograd.grad(done.out.float().sum(), inputs):
        assert bool(g.isfinite().all())


@pytest.mark.parametrize("empty", ["start", "middle", "end", "all"])
def test_fault_03_rows_that_see_nothing(sparse: str, empty: str) -> None:
    n, block = 512, 128
    made = plan(Neighborhood(201), Canvas((n,)), PlanSpec(block, block), device="cuda")
    gone = {"start": [0], "middle": [1, 2], "end": [3], "all": [0, 1, 2, 3]}[empty]
    full, part = made.full.count.clone(), made.partial.count.clone()
    full[:, gone], part[:, gone] = 0, 0
    made = replace(made, full=replace(made.full, count=full), partial=replace(made.partial, count=part))
    done = compared(sparse, qkv(Shape(tokens=(n, n))), made)
    rows = torch.cat([made.q_order[0, 0].view(-1, block)[i] for i in gone]).long()
    assert bool((done.out[:, :, rows] == 0).all()) and bool((done.lse[:, :, rows] == -torch.inf).all())


@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257])
def test_fault_04_every_tail_in_poisoned_memory(any_backend: str, n: int) -> None:
    inputs = tuple(poisoned(t) for t in qkv(Shape(tokens=(n, n))))
    pattern, canvas = relation(any_backend, n)
    compared(any_backend, inputs, pattern, canvas)  # type: ignore[arg-type]


def poisoned(t: Tensor) -> Tensor:
    """The same values inside a larger tensor full of NaN."""
    room = torch.full((*t.shape[:-2], t.shape[-2] + 16, t.shape[-1] + 8), torch.nan, dtype=t.dtype, device="cuda")
    room[..., 8:-8, :-8] = t.detach()
    return room[..., 8:-8, :-8].requires_grad_()


@pytest.mark.parametrize("axis", ["batch", "queries", "keys"])
@pytest.mark.parametrize("size", [0, 1])
def test_fault_05_zero_and_one_on_every_axis(any_backend: str, axis: str, size: int) -> None:
    b, n, m = (size if axis == name else full for name, full in (("batch", 2), ("queries", 130), ("keys", 130)))
    _, layout = everyone(n, m)
    pattern = None if any_backend not in SPARSE else Neighborhood(1)
    if pattern is not None and (n != m or n == 0):
        from glocal.patterns.base import Dense as Everything

        pattern = Everything()
    elif pattern is not None:
        layout = Canvas((n,))
    done = compared(any_backend, qkv(Shape((2, 2), (n, m), batch=b)), pattern, layout)
    if m == 0:
        assert bool((done.out == 0).all()) and bool((done.lse == -torch.inf).all())


def test_fault_06_rectangular(any_backend: str) -> None:
    layout = Layout(Canvas((12, 17)), Canvas((12, 17), after=90))
    compared(
        any_backend, qkv(Shape((2, 2), (204, 294))), Neighborhood((5, 7)) if any_backend in SPARSE else None, layout
    )


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (7, 1), (8, 4), (14, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fault_08_grouped_heads(any_backend: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    pattern, canvas = relation(any_backend, 300)
    compared(any_backend, qkv(Shape(heads, dtype=dtype)), pattern, canvas)


@pytest.mark.parametrize("dim", [16, 32, 40, 64, 72, 80, 96, 128, 160, 256])
def test_head_sizes(any_backend: str, dim: int) -> None:
    pattern, canvas = relation(any_backend, 300)
    compared(any_backend, qkv(Shape(dim=dim)), pattern, canvas)


@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (64, 128), (16, 16), (48, 96), (256, 128)], ids=str)
def test_block_sizes(sparse: str, blocks: tuple[int, int]) -> None:
    made = plan(Neighborhood((13, 11)), Canvas((23, 29)), PlanSpec(*blocks), device="cuda")
    compared(sparse, qkv(Shape(tokens=(667, 667))), made)


@pytest.mark.parametrize("layout", ["tokens first", "sliced", "expanded gradient", "transposed gradient"])
def test_fault_09_strides(any_backend: str, layout: str) -> None:
    inputs = qkv(Shape())
    pattern, canvas = relation(any_backend, 300)
    if layout == "tokens first":
        inputs = tuple(t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in inputs)
    elif layout == "sliced":
        inputs = tuple(torch.cat([t, t], -1).detach()[..., :64].requires_grad_() for t in inputs)
    usual = qkv(Shape())
    results = []
    for given in (inputs, usual):
        done = attempt(any_backend, *given, pattern, canvas=canvas)
        grad = torch.ones_like(done.out)
        if given is inputs and layout == "expanded gradient":
            grad = torch.ones((), dtype=done.out.dtype, device="cuda").expand(done.out.shape)
        elif given is inputs and layout == "transposed gradient":
            grad = torch.ones_like(done.out.transpose(1, 2).contiguous()).transpose(1, 2)
        results.append((done.out, *torch.autograd.grad(done.out, given, grad)))
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-2, layout)


def test_fault_10_a_thousand_repeats(any_backend: str) -> None:
    capability = next(b for b in registry.backends() if b.name == any_backend).capability
    if not capability.deterministic:
        pytest.skip(f"{any_backend} claims no equal bits")
    inputs = qkv(Shape((4, 2), (700, 700)))
    pattern, canvas = relation(any_backend, 700, 201)
    first, wrong = None, torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        done = attempt(any_backend, *inputs, pattern, canvas=canvas)
        bits = [done.out, *torch.autograd.grad(done.out, inputs, torch.ones_like(done.out))]
        if first is None:
            first = bits
        wrong += sum((a != b).any() for a, b in zip(bits, first, strict=True))
    assert int(wrong) == 0


def test_fault_12_halves_merge_into_the_whole(any_backend: str) -> None:
    q, k, v = qkv(Shape(tokens=(256, 512)))
    if any_backend in SPARSE:
        from glocal.patterns.base import Dense as Everything

        pattern: Pattern | None = Everything()
    else:
        pattern = None
    whole = attempt(any_backend, q, k, v, pattern, canvas=everyone(256, 512)[1])
    halves = [attempt(any_backend, q, k[:, :, s], v[:, :, s], pattern, canvas=everyone(256, 256)[1])
              for s in (slice(0, 256), slice(256, 512))]  # fmt: skip
    merged = merge.lse([(h.out.float(), h.lse) for h in halves])
    close(merged.out, whole.out, 1e-2, "out")
    close(merged.lse, whole.lse, 1e-3, "lse")


def test_fault_13_scale_zero_and_negative(any_backend: str) -> None:
    pattern, canvas = relation(any_backend, 200)
    for scale in (0.0, -0.2):
        compared(any_backend, qkv(Shape(tokens=(200, 200))), pattern, canvas, score=Score(scale=scale))


def test_fault_15_capture_and_replay(any_backend: str) -> None:
    found = next(b for b in registry.backends() if b.name == any_backend)
    if not found.capability.graphs:
        pytest.skip(f"{any_backend} claims no CUDA graphs")
    inputs = qkv(Shape((4, 2), (400, 400)))
    pattern, canvas = relation(any_backend, 400)
    if isinstance(pattern, Pattern):
        pattern = plan(pattern, canvas, PlanSpec(128, 128), device="cuda")
        canvas = None  # type: ignore[assignment]

    def step() -> list[Tensor]:
        done = attempt(any_backend, *inputs, pattern, canvas=canvas)
        return [done.out.detach(), *torch.autograd.grad(done.out, inputs, torch.ones_like(done.out))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    with torch.no_grad():
        for t in inputs:
            t.copy_(torch.randn_like(t))
    graph.replay()
    for a, b in zip(held, step(), strict=True):
        close(a, b, 1e-2, "replay")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second card")
def test_fault_16_a_device_that_is_not_the_current_one(any_backend: str) -> None:
    pattern, canvas = relation(any_backend, 300)
    inputs = qkv(Shape())
    there = tuple(t.detach().to("cuda:1") for t in inputs)
    close(attempt(any_backend, *there, pattern, canvas=canvas).out.cpu(),
          attempt(any_backend, *inputs, pattern, canvas=canvas).out.cpu(), 1e-2, "out")  # fmt: skip


@pytest.mark.parametrize("ill", [torch.nan, torch.inf])
def test_fault_26_keys_that_nobody_sees_do_not_leak(sparse: str, ill: float) -> None:
    n = 400
    made = plan(Neighborhood(21), Canvas((n,)), PlanSpec(128, 128), device="cuda")
    q, k, v = qkv(Shape(tokens=(n, n)))
    usual = attempt(sparse, q, k, v, made)
    bad_k, bad_v = k.detach().clone(), v.detach().clone()
    bad_k[:, :, 200], bad_v[:, :, 250] = ill, ill
    done = attempt(sparse, q, bad_k.requires_grad_(), bad_v.requires_grad_(), made)
    token = torch.arange(n, device="cuda")
    blind = ((token - 200).abs() > 10) & ((token - 250).abs() > 10)
    assert bool(done.out[:, :, blind].isfinite().all())
    close(done.out[:, :, blind], usual.out[:, :, blind], 1e-2, "out")
    assert bool((~done.out[:, :, 250].isfinite()).any(-1).all())
    grads = [torch.autograd.grad(x.out[:, :, blind].float().sum(), q)[0][:, :, blind] for x in (done, usual)]
    close(grads[0], grads[1], 2e-2, "gradient of q")


@pytest.mark.parametrize("kind", ["dense", "by key", "relative"])
def test_biases(any_backend: str, kind: str) -> None:
    canvas = Canvas((13, 17))
    n = canvas.size
    g = torch.Generator("cuda").manual_seed(3)
    shape = {"dense": (1, 2, n, n), "by key": (1, 2, n), "relative": (2, 9, 9)}[kind]
    values = torch.randn(shape, generator=g, device="cuda", requires_grad=True)
    term = {"dense": Dense, "by key": PerKey, "relative": Relative}[kind](values)
    pattern = Neighborhood((5, 7)) if any_backend in SPARSE else None
    compared(any_backend, qkv(Shape(tokens=(n, n))), pattern, canvas, score=Score(bias=(term,)), extra=(values,))
    compared(any_backend, qkv(Shape(tokens=(n, n))), pattern, canvas, score=Score(bias=(term,), softcap=1.5))


def test_soft_cap(any_backend: str) -> None:
    pattern, canvas = relation(any_backend, 300)
    compared(any_backend, qkv(Shape()), pattern, canvas, score=Score(softcap=2.0))


def test_lengths_and_documents(any_backend: str) -> None:
    n = 300
    layout = Layout(Canvas((n,)), Canvas((n,)), lengths={"grid": torch.tensor([300, 170], device="cuda")})
    pattern = CausalWindow(90) if any_backend in SPARSE else None
    compared(any_backend, qkv(Shape(tokens=(n, n), batch=2)), pattern, layout)


def test_lists_by_head(sparse: str) -> None:
    for heads, patterns in (((4, 2), 2), ((4, 2), 4)):
        windows = PerHead(tuple(Neighborhood(31 + 40 * i) for i in range(patterns)))
        compared(sparse, qkv(Shape(heads, (400, 400))), windows, Canvas((400,)))


def test_fault_29_hostile_lists_are_refused(sparse: str) -> None:
    made = plan(Neighborhood(201), Canvas((512,)), PlanSpec(128, 128), device="cuda")
    far = BlockLists(made.partial.count, made.partial.index + 9, made.partial.mask)
    inputs = qkv(Shape(tokens=(512, 512)))
    attempt(sparse, *inputs, made)
    with pytest.raises((ValueError, RuntimeError), match=r"\d"):
        attempt(sparse, *inputs, replace(made, full=replace(made.full, index=made.full.index.clone()), partial=far))


def test_fault_30_lists_changed_in_place(sparse: str) -> None:
    made = plan(Neighborhood(101), Canvas((512,)), PlanSpec(128, 128), device="cuda")
    full, partial = made.full, made.partial
    assert partial.mask is not None
    made = replace(
        made,
        full=BlockLists(full.count.clone(), full.index.clone()),
        partial=BlockLists(partial.count.clone(), partial.index.clone(), partial.mask.clone()),
        masks=made.masks.clone(),
    )
    inputs = qkv(Shape(tokens=(512, 512)))
    compared(sparse, inputs, made)
    made.partial.count[:, 0] = 1
    made.masks[0] = -1
    compared(sparse, inputs, made)


@pytest.mark.parametrize("change", [lambda q: q * 60, lambda q: q * 1e-4], ids=["large logits", "small logits"])
def test_extreme_logits(any_backend: str, change: Callable[[Tensor], Tensor]) -> None:
    pattern, canvas = relation(any_backend, 300)
    q, k, v = qkv(Shape())
    compared(any_backend, (change(q.detach()).requires_grad_(), k, v), pattern, canvas, grads=False)
