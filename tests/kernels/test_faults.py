"""Faults that attention kernels have had elsewhere, each as a test of the CPU and dense backends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout, Part
from glocal.kernels import cpu, reference, registry
from glocal.kernels.call import Call, PlanTensors
from glocal.measure import peak_memory
from glocal.ops import Attended, PerKey, Score, attend, attention
from glocal.patterns import Dense as Everything
from glocal.patterns import Neighborhood
from glocal.patterns.base import Pattern
from glocal.plan.blockplan import BlockLists, BlockPlan, pack
from glocal.plan.build import PlanSpec, plan

Three = tuple[Tensor, Tensor, Tensor]


def qkv(g: torch.Generator, heads: tuple[int, int], n: int, m: int | None = None, d: int = 8, b: int = 1) -> Three:
    """Random float64 q [b, heads, n, d], k and v [b, kv heads, m, d]."""
    m = n if m is None else m
    shapes = ((b, heads[0], n, d), (b, heads[1], m, d), (b, heads[1], m, d))
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    return q, k, v


def leaves(tensors: Iterable[Tensor]) -> Three:
    """q, k, v as leaves that want gradients."""
    q, k, v = (t.requires_grad_() for t in tensors)
    return q, k, v


def equal(a: Attended, b: Attended, tolerance: float = 1e-12) -> None:
    """Out and LSE agree."""
    torch.testing.assert_close(a.out, b.out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.lse, b.lse, rtol=tolerance, atol=tolerance)


def pair(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | BlockPlan | None, canvas: Canvas | Layout | None, **kw
) -> Attended:
    """The fast backend, compared with the reference."""
    fast = attend(q, k, v, pattern, canvas=canvas, backend="dense" if pattern is None else "cpu", **kw)
    equal(fast, attend(q, k, v, pattern, canvas=canvas, backend="reference", **kw))
    return fast


def test_fault_2_seventy_thousand_heads(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(7, 10_000, 4, 2, generator=generator) for _ in range(3))
    for pattern, canvas in ((Neighborhood(3), Canvas((4,))), (None, None)):
        backend = "dense" if pattern is None else "cpu"
        fast = attend(q, k, v, pattern, canvas=canvas, backend=backend)
        slow = attend(q[-1:, -5:], k[-1:, -5:], v[-1:, -5:], pattern, canvas=canvas, backend="reference")
        assert bool(fast.out.isfinite().all())
        torch.testing.assert_close(fast.out[-1:, -5:], slow.out)


def some_rows_empty(nq: int, nk: int, empty: list[int]) -> BlockPlan:
    """A plan in which some queries see nothing and the others every second key."""
    seen = torch.zeros(nq, nk, dtype=torch.bool)
    seen[:, ::2] = True
    seen[empty] = False
    block = 4
    rows, columns = -(-nq // block), -(-nk // block)
    wide = torch.zeros(rows * block, columns * block, dtype=torch.bool)
    wide[:nq, :nk] = seen
    tiles = wide.view(rows, block, columns, block).transpose(1, 2)  # [rows, columns, block, block]
    order = [
        torch.where(torch.arange(n * block) < m, torch.arange(n * block), -1) for n, m in ((rows, nq), (columns, nk))
    ]
    picked = tiles.flatten(2).any(-1)[None]
    return BlockPlan(
        layout=Layout(Canvas([Part("q", (nq,))]), Canvas([Part("k", (nk,))])),
        q_block=block,
        kv_block=block,
        q_order=order[0].int()[None, None],
        kv_order=order[1].int()[None, None],
        full=BlockLists.from_dense(torch.zeros_like(picked)),
        partial=BlockLists.from_dense(picked, torch.arange(rows * columns).view(1, rows, columns)),
        masks=pack(tiles.flatten(0, 1)),
        owner=torch.zeros(1, 1, dtype=torch.int32),
    )


@pytest.mark.parametrize("empty", [[0], [5], [12], [0, 1, 2, 3], list(range(13))], ids=str)
def test_fault_3_rows_that_see_nothing(empty: list[int], generator: torch.Generator) -> None:
    inputs = leaves(qkv(generator, (2, 1), 13, 10))
    made = some_rows_empty(13, 10, empty)
    done = pair(*inputs, made, None)
    assert bool((done.out[:, :, empty] == 0).all()) and bool((done.lse[:, :, empty] == -torch.inf).all())
    weights = torch.randn(done.out.shape, generator=generator, dtype=torch.float64)
    # The LSE of an empty row is -inf: its own gradient must not become NaN either.
    grads = torch.autograd.grad((done.out * weights).sum() + done.lse.exp().sum(), inputs)
    assert all(bool(g.isfinite().all()) for g in grads)
    assert bool((grads[0][:, :, empty] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fault_4_every_length_in_poisoned_memory(dtype: torch.dtype, generator: torch.Generator) -> None:
    block = 8
    for n in range(1, 2 * block + 2):
        q, k, v = (t.to(dtype) for t in qkv(generator, (2, 1), n))
        canvas, pattern = Canvas((n,)), Neighborhood(min(n, 5))
        made = plan(pattern, canvas, PlanSpec(block, block))
        inputs = leaves(_in_poison(t) for t in (q, k, v))
        found = attend(*inputs, made, backend="cpu")
        want = attend(q, k, v, pattern, canvas=canvas, backend="reference")
        torch.testing.assert_close(found.out, want.out, rtol=2e-2, atol=2e-2)
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(found.out.sum() + found.lse.sum(), inputs)), n


def _in_poison(t: Tensor) -> Tensor:
    """The same values inside a larger tensor full of NaN."""
    room = torch.full((*t.shape[:-2], t.shape[-2] + 16, t.shape[-1] + 8), torch.nan, dtype=t.dtype)
    room[..., 8:-8, :-8] = t
    return room[..., 8:-8, :-8]


@pytest.mark.parametrize("axis", ["batch", "queries", "keys", "none"])
@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("sparse", [False, True])
def test_fault_5_zero_and_one_on_every_axis(axis: str, size: int, sparse: bool, generator: torch.Generator) -> None:
    sizes = {"batch": 2, "queries": 5, "keys": 6, **({} if axis == "none" else {axis: size})}
    inputs = qkv(generator, (2, 2), sizes["queries"], sizes["keys"], b=sizes["batch"])
    inputs = leaves(inputs)
    layout = Layout(Canvas([Part("a", (sizes["queries"],))]), Canvas([Part("b", (sizes["keys"],))]))
    done = pair(*inputs, Everything() if sparse else None, layout)
    if sizes["keys"] == 0:
        assert bool((done.out == 0).all()) and bool((done.lse == -torch.inf).all())
    grads = torch.autograd.grad(done.out.sum(), inputs)
    assert [g.shape for g in grads] == [t.shape for t in inputs]


def test_fault_5_a_single_token_and_no_head_size(generator: torch.Generator) -> None:
    q, k, v = qkv(generator, (1, 1), 1)
    pair(q, k, v, Neighborhood(1), Canvas((1,)))
    with pytest.raises(ValueError, match=r"head size 0 \(legal: sizes from 1\)"):
        attention(q[..., :0], k[..., :0], v)


def test_fault_6_rectangular_attention(generator: torch.Generator) -> None:
    layout = Layout(Canvas((5, 7)), Canvas((5, 7), after=9))
    pair(*qkv(generator, (2, 2), 35, 44), Neighborhood((3, 3)), layout)
    pair(*qkv(generator, (2, 2), 3, 44), None, None)


@pytest.mark.parametrize("shape", [(2, 3, 7), (7, 2, 3), (3, 7, 2), (5, 13), (13, 5), (31,)], ids=str)
def test_fault_7_axes_that_differ(shape: tuple[int, ...], generator: torch.Generator) -> None:
    canvas, window = Canvas(shape), tuple(min(3, n) for n in shape)
    done = pair(*qkv(generator, (1, 1), canvas.size), Neighborhood(window), canvas)
    assert bool((done.lse > -torch.inf).all())


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (7, 1), (14, 2)], ids=str)
def test_fault_8_gradients_of_grouped_heads(heads: tuple[int, int], generator: torch.Generator) -> None:
    canvas = Canvas((5, 7))
    inputs = leaves(qkv(generator, heads, 35))
    along = torch.randn(1, heads[0], 35, 8, generator=generator, dtype=torch.float64)
    for pattern in (Neighborhood((3, 5)), None):
        grads = [
            torch.autograd.grad(attention(*inputs, pattern, canvas=canvas, backend=name), inputs, along)
            for name in ("dense" if pattern is None else "cpu", "reference")
        ]
        for found, want in zip(*grads, strict=True):
            for head in range(found.shape[1]):
                torch.testing.assert_close(found[:, head], want[:, head], rtol=1e-10, atol=1e-10)


def _strided(t: Tensor, kind: str) -> Tensor:
    if kind == "transposed":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "last axis strided":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "sliced":
        return torch.cat([t, t], -1)[..., : t.shape[-1]]
    if kind == "expanded":
        return t[:, :1].expand_as(t)
    return t


@pytest.mark.parametrize("pattern", [Neighborhood((3, 5)), None], ids=["sparse", "dense"])
@pytest.mark.parametrize("kind", ["contiguous", "transposed", "last axis strided", "sliced", "expanded"])
def test_fault_9_strides_of_inputs_and_of_incoming_gradients(
    kind: str, pattern: Pattern | None, generator: torch.Generator
) -> None:
    canvas = Canvas((5, 7))
    inputs = leaves(_strided(t, kind) for t in qkv(generator, (2, 2), 35, b=2))
    along = _strided(torch.randn(2, 2, 35, 8, generator=generator, dtype=torch.float64), kind)
    fast = "dense" if pattern is None else "cpu"
    found, want = (
        torch.autograd.grad(attention(*inputs, pattern, canvas=canvas, backend=name), inputs, along)
        for name in (fast, "reference")
    )
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    one = torch.ones((), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(attention(*inputs, pattern, canvas=canvas, backend=fast), inputs, one.expand(2, 2, 35, 8)),
        torch.autograd.grad(attention(*inputs, pattern, canvas=canvas, backend="reference").sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_fault_11_two_calls_give_equal_bits(backend: str, generator: torch.Generator) -> None:
    inputs = leaves(t.float() for t in qkv(generator, (4, 2), 77))
    pattern = Neighborhood((3, 5)) if backend == "cpu" else None
    runs = []
    for _ in range(3):
        done = attend(*inputs, pattern, canvas=Canvas((7, 11)), backend=backend)
        runs.append([done.out, done.lse, *torch.autograd.grad(done.out.sum() + done.lse.sum(), inputs)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_fault_12_halves_merged_by_lse_equal_the_whole(backend: str, generator: torch.Generator) -> None:
    """Holds only for a natural-log LSE, and its gradient must carry through the merge."""
    q, k, v = inputs = leaves(qkv(generator, (2, 2), 24))
    pattern = None if backend == "dense" else Everything()

    def part(of: slice) -> Attended:
        layout = Layout(Canvas((24,)), Canvas((12,)), {("*", "*"): "all"}) if pattern else None
        return attend(q, k[:, :, of], v[:, :, of], pattern, canvas=layout, backend=backend)

    a, b = part(slice(0, 12)), part(slice(12, 24))
    lse = torch.logaddexp(a.lse, b.lse)
    merged = a.out * (a.lse - lse).exp()[..., None] + b.out * (b.lse - lse).exp()[..., None]
    whole = attend(q, k, v, backend="reference")
    torch.testing.assert_close(merged, whole.out)
    torch.testing.assert_close(lse, whole.lse)
    along = torch.randn(merged.shape, generator=generator, dtype=torch.float64)
    found, want = (torch.autograd.grad(t, inputs, along) for t in (merged, whole.out))
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y)


def test_fault_17_the_choice_follows_dtype_grad_and_device(generator: torch.Generator) -> None:
    canvas, pattern = Canvas((5, 7)), Neighborhood((3, 5))
    q, k, v = qkv(generator, (1, 1), 35, d=16)
    assert attend(q, k, v, pattern, canvas=canvas).picked.name == "cpu"
    assert attend(q, k, v).picked.name == "dense"
    dropped = Score(dropout=0.1, generator=generator)
    assert attend(q, k, v, pattern, canvas=canvas, score=dropped).picked.name == "reference"
    assert attend(q, k, v, pattern, canvas=canvas).picked.name == "cpu"
    half = attend(q.half(), k.half(), v.half(), pattern, canvas=canvas)
    assert half.out.dtype == torch.float16 and half.lse.dtype == torch.float32


def test_fault_19_the_record_names_the_kernel_that_ran(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    honest = registry.implementation
    monkeypatch.setattr(registry, "implementation", lambda name: ran.append(name) or honest(name))
    q, k, v = qkv(generator, (1, 1), 35, d=16)
    for asked in ("cpu", "reference"):
        assert attend(q, k, v, Neighborhood((3, 5)), canvas=Canvas((5, 7)), backend=asked).picked.name == asked
    assert ran == ["cpu", "reference"]


def test_fault_22_a_scale_of_zero_is_a_scale(generator: torch.Generator) -> None:
    q, k, v = qkv(generator, (1, 1), 35)
    done = pair(q, k, v, None, None, score=Score(scale=0.0))
    torch.testing.assert_close(done.out[:, :, 0], v.mean(2))
    pair(q, k, v, Neighborhood((3, 5)), Canvas((5, 7)), score=Score(scale=0.0))


def test_fault_24_forward_and_backward_agree_on_scale_and_cap(generator: torch.Generator) -> None:
    canvas, made = Canvas((2, 3)), plan(Neighborhood((1, 3)), Canvas((2, 3)), PlanSpec(4, 2))
    q, k, v = (t.requires_grad_() for t in qkv(generator, (2, 1), 6, d=3))
    bias = torch.randn(1, 1, 6, generator=generator, dtype=torch.float64).requires_grad_()

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        score = Score(scale=0.37, softcap=1.3, bias=(PerKey(bias),))
        done = attend(q, k, v, made, canvas=canvas, score=score, backend="cpu")
        return done.out, done.lse

    assert torch.autograd.gradcheck(run, (q, k, v, bias))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_fault_26_what_is_not_finite_stays_with_the_rows_that_see_it(poison: float, generator: torch.Generator) -> None:
    canvas, pattern, n = Canvas((41,)), Neighborhood(5), 41
    made = plan(pattern, canvas, PlanSpec(8, 8))
    clean = qkv(generator, (2, 1), n)
    sees = pattern.mask(Layout.of(canvas))[0][:, 20]  # queries that see key 20
    want = attend(*clean, pattern, canvas=canvas, backend="reference")
    for which in (1, 2):
        dirty = [t.clone() for t in clean]
        dirty[which][:, :, 20] = poison
        inputs = leaves(dirty)
        done = attend(*inputs, made, backend="cpu")
        torch.testing.assert_close(done.out[:, :, ~sees], want.out[:, :, ~sees])
        assert not bool(done.out[:, :, sees].isfinite().all(-1).any())
        grads = torch.autograd.grad(done.out[:, :, ~sees].sum(), inputs[0])[0]
        assert bool(grads[:, :, ~sees].isfinite().all())


def test_fault_26_keys_that_nobody_sees_do_not_leak(generator: torch.Generator) -> None:
    clean = qkv(generator, (2, 2), 24)
    hidden = torch.zeros(24, dtype=torch.float64)
    hidden[[3, 17]] = -torch.inf
    score = Score(bias=(PerKey(hidden),))
    dirty = [t.clone() for t in clean]
    dirty[1][:, :, 3], dirty[2][:, :, 17] = torch.nan, torch.inf
    for pattern, backend in ((Everything(), "cpu"), (None, "dense")):
        canvas = Canvas((24,))
        want = attend(*clean, pattern, canvas=canvas, score=score, backend="reference")
        q, k, v = dirty
        equal(attend(q, k, v, pattern, canvas=canvas, score=score, backend=backend), want)


def test_fault_27_memory_stays_that_of_tiles_at_128_thousand_tokens(generator: torch.Generator) -> None:
    canvas = Canvas((32, 64, 64))
    q, k, v = (torch.randn(1, 1, canvas.size, 4, generator=generator) for _ in range(3))
    pattern = Neighborhood((3, 8, 8), stride=(1, 8, 8))
    peak = peak_memory(lambda: attention(q, k, v, pattern, canvas=canvas, backend="cpu"), device="cpu")
    assert peak.extra < 300 * 2**20  # one bool N x N array alone is 16 GiB


def test_fault_29_hostile_plans_are_refused_before_they_read(generator: torch.Generator) -> None:
    q, k, v = qkv(generator, (1, 1), 16)
    made = plan(Neighborhood(5), Canvas((16,)), PlanSpec(4, 4))
    far = BlockLists(made.partial.count, made.partial.index + 9, made.partial.mask)
    with pytest.raises(ValueError, match=r"partial.index holds \d+; legal: 0 to 3"):
        attention(q, k, v, replace(made, partial=far), backend="cpu")
    many = BlockLists(made.partial.count + 50, made.partial.index, made.partial.mask)
    with pytest.raises(ValueError, match=r"a count of \d+ exceeds partial.index"):
        attention(q, k, v, replace(made, partial=many), backend="cpu")
    assert made.partial.mask is not None
    wrong = BlockLists(made.partial.count, made.partial.index, made.partial.mask + 99)
    with pytest.raises(ValueError, match="partial.mask holds"):
        attention(q, k, v, replace(made, partial=wrong), backend="cpu")


def test_fault_29_unsorted_lists_mean_the_same(generator: torch.Generator) -> None:
    q, k, v = qkv(generator, (1, 1), 32)
    made = plan(Neighborhood(17), Canvas((32,)), PlanSpec(4, 4))
    turned = []
    for lists in (made.full, made.partial):
        count = int(lists.count.min())
        index = lists.index.clone()
        index[..., :count] = index[..., :count].flip(-1)
        mask = None if lists.mask is None else lists.mask.clone()
        if mask is not None:
            mask[..., :count] = mask[..., :count].flip(-1)
        turned.append(BlockLists(lists.count, index, mask))
    other = replace(made, full=turned[0], partial=turned[1])
    equal(attend(q, k, v, other, backend="cpu"), attend(q, k, v, made, backend="cpu"))


def test_fault_30_a_plan_of_another_geometry_raises(generator: torch.Generator) -> None:
    made = plan(Neighborhood(5), Canvas((16,)), PlanSpec(4, 4))
    with pytest.raises(ValueError, match="is for 16 queries and 16 keys .* but q has 20"):
        attention(*qkv(generator, (1, 1), 20), made, canvas=Canvas((20,)))


def test_fault_32_kept_is_what_was_computed(generator: torch.Generator) -> None:
    canvas, pattern = Canvas((7, 11)), Neighborhood((3, 5))
    done = attend(*qkv(generator, (1, 1), 77), pattern, canvas=canvas, backend="cpu")
    assert done.kept == pytest.approx(float(pattern.mask(Layout.of(canvas)).double().mean()))


def orders(q_order: list[int], kv_order: list[int], nq: int, nk: int, block: int = 4) -> BlockPlan:
    """All query blocks see all key blocks of two arbitrary orders."""
    rows, columns = len(q_order) // block, len(kv_order) // block
    return BlockPlan(
        layout=Layout(Canvas([Part("q", (nq,))]), Canvas([Part("k", (nk,))])),
        q_block=block,
        kv_block=block,
        q_order=torch.tensor(q_order, dtype=torch.int32)[None, None],
        kv_order=torch.tensor(kv_order, dtype=torch.int32)[None, None],
        full=BlockLists.from_dense(torch.ones(1, rows, columns, dtype=torch.bool)),
        partial=BlockLists.from_dense(
            torch.zeros(1, rows, columns, dtype=torch.bool), torch.zeros(1, rows, columns, dtype=torch.int32)
        ),
        masks=torch.zeros(0, block, 1, dtype=torch.int32),
        owner=torch.zeros(1, 1, dtype=torch.int32),
    )


@pytest.mark.parametrize(
    "q_order, kv_order",
    [
        ([7, 3, 1, 0, 2, 4, 6, 5], [0, 1, 2, 3, 4, 5, 6, 7]),
        ([0, 1, 2, -1], [7, 6, -1, 4]),  # a subset of the queries, and pads inside full blocks
        ([0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 1, 5, 5, 2, -1]),  # keys listed several times
        ([0, 1, 2, 3, 2, 3, 4, 5], [0, 1, 2, 3]),  # queries listed twice see their keys twice
    ],
)
def test_orders_with_pads_subsets_and_repeats(
    q_order: list[int], kv_order: list[int], generator: torch.Generator
) -> None:
    inputs = leaves(qkv(generator, (2, 1), 8))
    made = orders(q_order, kv_order, 8, 8)
    done = pair(*inputs, made, None)
    absent = sorted(set(range(8)) - set(q_order))
    assert bool((done.out[:, :, absent] == 0).all()) and bool((done.lse[:, :, absent] == -torch.inf).all())
    along = torch.randn(done.out.shape, generator=generator, dtype=torch.float64)
    want = attend(*inputs, made, backend="reference")
    for a, b in zip(*(torch.autograd.grad(t.out, inputs, along) for t in (done, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_lists_of_their_own_for_every_sample_and_head(generator: torch.Generator) -> None:
    q, k, v = (t.requires_grad_() for t in qkv(generator, (4, 2), 16, b=3))
    lists = torch.rand(5, 4, 4, generator=generator) < 0.5
    made = orders(list(range(16)), list(range(16)), 16, 16)
    none = torch.zeros(5, 4, 4, dtype=torch.bool)
    for heads in (1, 2, 4):
        owner = torch.randint(0, 5, (3, heads), generator=generator, dtype=torch.int32)
        own = replace(
            made,
            full=BlockLists.from_dense(lists),
            partial=BlockLists.from_dense(none, none.int()),
            owner=owner,
        )
        done = pair(q, k, v, own, None)
        want = attend(q, k, v, own, backend="reference")
        for a, b in zip(
            *(torch.autograd.grad(t.out.sum() + t.out.square().sum(), (q, k, v)) for t in (done, want)), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_documents_and_lengths_hide_at_run_time(generator: torch.Generator) -> None:
    inputs = leaves(qkv(generator, (2, 2), 35, b=2))
    layout = Layout(Canvas((5, 7)), Canvas((5, 7)), documents=torch.randint(-1, 3, (2, 35), generator=generator))
    for pattern in (Neighborhood((3, 5)), None):
        done = attend(*inputs, pattern, canvas=layout, backend="dense" if pattern is None else "cpu")
        want = attend(*inputs, pattern, canvas=layout, backend="reference")
        torch.testing.assert_close(done.out, want.out)
        for a, b in zip(*(torch.autograd.grad(t.out.square().sum(), inputs) for t in (done, want)), strict=True):
            torch.testing.assert_close(a, b)


def test_masks_beyond_the_table_limit_are_unpacked_piece_by_piece(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glocal.kernels import _tiles

    monkeypatch.setattr(_tiles, "_TABLE", 0)
    pair(*qkv(generator, (2, 2), 77), Neighborhood((3, 5)), Canvas((7, 11)))


@pytest.mark.parametrize("window", [27, 31])
def test_lists_of_nearly_all_blocks_are_widened(window: int, generator: torch.Generator) -> None:
    made = plan(Neighborhood(window), Canvas((32,)), PlanSpec(4, 4))
    assert made.visited >= 0.85
    q, k, v = leaves(qkv(generator, (2, 2), 32))
    done, want = pair(q, k, v, made, None), attend(q, k, v, made, backend="reference")
    for a, b in zip(*(torch.autograd.grad(t.out.square().sum(), (q, k, v)) for t in (done, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_small_limits_change_nothing(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    from glocal.kernels._jobs import Limits

    made = plan(Neighborhood((3, 5)), Canvas((7, 11)), PlanSpec(8, 8))
    q, k, v = qkv(generator, (4, 2), 77, b=2)
    call = Call("cpu", 0.3, q_block=8, kv_block=8, plan=PlanTensors(*made.tensors().values()))
    want = reference.forward(q, k, v, Call("reference", 0.3, counts=made.dense_counts()))
    monkeypatch.setattr(cpu, "_FORWARD", Limits(1, 1))
    monkeypatch.setattr(cpu, "_BACKWARD", Limits(1, 1))
    out, lse = cpu.forward(q, k, v, call)
    torch.testing.assert_close(out, want[0])
    grads = cpu.backward(out, lse, q, k, v, out, lse, call)
    other = reference.backward(out, lse, q, k, v, out, lse, Call("reference", 0.3, counts=made.dense_counts()))
    for a, b in zip((grads.q, grads.k, grads.v), (other.q, other.k, other.v), strict=True):
        torch.testing.assert_close(a, b)


def test_threads_change_nothing(generator: torch.Generator) -> None:
    inputs = leaves(t.float() for t in qkv(generator, (8, 4), 1024, d=32, b=2))
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            done = attend(*inputs, Neighborhood((5, 5)), canvas=Canvas((32, 32)), backend="cpu")
            runs.append([done.out, done.lse, *torch.autograd.grad(done.out.square().sum() + done.lse.sum(), inputs)])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(runs[0], runs[1])
    assert all(torch.equal(a, b) for a, b in zip(runs[1], runs[2], strict=True))
