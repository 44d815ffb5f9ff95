from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from glocal.canvas import Canvas, Layout, Part
from glocal.ops import Capture, Dense, PerKey, Relative, Score, attend
from glocal.ops.capture import BlockStats
from glocal.patterns import Causal, Neighborhood, per_head
from glocal.plan import selection as planning
from glocal.plan.build import PlanSpec, plan
from glocal.routing import Partition, from_mask, pooled_topk

N = 20
CANVAS = Canvas((4, 5))


def qk(generator: torch.Generator, heads: int = 2, kv_heads: int = 2, n: int = N) -> tuple[Tensor, Tensor]:
    q = torch.randn(2, heads, n, 8, dtype=torch.float64, generator=generator)
    return q, torch.randn(2, kv_heads, n, 8, dtype=torch.float64, generator=generator)


def dense(q: Tensor, k: Tensor, times: Tensor | None = None, bias: Tensor | float = 0.0) -> Tensor:
    """The whole map, as people write it."""
    s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
    if times is not None:
        s = s + times.double().log()
    return s.softmax(-1).nan_to_num()


SMALL = 400  # a few rows at a time


def test_rows_of_a_pattern(generator: torch.Generator) -> None:
    q, k = qk(generator, 4, 2)
    for pattern in (None, Neighborhood(3), Causal(), per_head([Neighborhood(3), Causal()])):
        mask = None if pattern is None else pattern.mask(Layout.of(CANVAS))
        if mask is not None and mask.shape[0] == 2:
            mask = mask.repeat_interleave(2, 0)
        want = dense(q, k, mask)
        for lse in (None, attend(q, k, k, pattern, canvas=CANVAS).lse):
            found = Capture(q, k, pattern, CANVAS, lse=lse, budget=SMALL)
            torch.testing.assert_close(found.rows(), want)
            index = torch.tensor([7, 0, 7])
            torch.testing.assert_close(found.rows(index), want[:, :, index])
            whole = torch.zeros_like(want)
            for rows, p in found.stream_rows():
                whole[:, :, rows] = p
            torch.testing.assert_close(whole, want)


def test_rows_of_plans_and_selections(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_SMALL", 1)
    q, k = qk(generator)
    part = Partition.blocks(CANVAS, 4)
    repeated = from_mask(Layout.of(CANVAS), part, part, torch.randint(0, 3, (2, 2, 5, 5), generator=generator))
    routed = pooled_topk(q, k, CANVAS, (2, 3), 2, within=Causal())
    compiled = plan(Neighborhood(3), CANVAS, PlanSpec(4, 4))
    for relation in (repeated, routed, compiled):
        times = (relation if relation is compiled else planning.plan_selection(relation)).dense_counts()  # type: ignore[union-attr,arg-type]
        found = Capture(q, k, relation, budget=SMALL)
        torch.testing.assert_close(found.rows(), dense(q, k, times))
        torch.testing.assert_close(Capture(q, k, relation, lse=attend(q, k, k, relation).lse).rows(), found.rows())


def test_score_lengths_and_documents(generator: torch.Generator) -> None:
    q, k = qk(generator)
    per_key = torch.randn(2, 1, N, dtype=torch.float64, generator=generator)
    table = torch.randn(2, 7, 9, dtype=torch.float64, generator=generator)
    full = torch.randn(N, N, dtype=torch.float64, generator=generator)
    score = Score(bias=(PerKey(per_key), Relative(table), Dense(full)), softcap=2.0, scale=0.7)
    layout = Layout(CANVAS, CANVAS, lengths={"grid": torch.tensor([N, 13])})
    lse = attend(q, k, k, Neighborhood(3), canvas=layout, score=score).lse
    own = Capture(q, k, Neighborhood(3), layout, score, budget=SMALL)
    given = Capture(q, k, Neighborhood(3), layout, score, lse, budget=SMALL)
    torch.testing.assert_close(own.rows(), given.rows())
    sums = own.rows().sum(-1)
    assert sums[0].allclose(torch.ones_like(sums[0])) and sums[1, :, 13:].eq(0).all()
    torch.testing.assert_close(own.window("probabilities").sum(-1), sums)


def test_reductions_equal_those_of_the_map(generator: torch.Generator) -> None:
    q, k = qk(generator, 4, 2)
    p = dense(q, k, Causal().mask(Layout.of(CANVAS)))
    found = Capture(q, k, Causal(), CANVAS, budget=SMALL)
    torch.testing.assert_close(found.column_mean(), p.mean(2))
    torch.testing.assert_close(found.column_mean(power=2), p.square().mean(2))
    weight = torch.randn(2, 1, 3, N, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(found.weighted(weight), weight @ p)
    torch.testing.assert_close(found.weighted(weight[0, 0], power=3), weight[:1] @ p**3)
    r = torch.rand(2, N, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(found.rollout(r, 0.25), 0.25 * r + 0.75 * torch.einsum("bi,bhij->bj", r, p) / 4)
    torch.testing.assert_close(found.entropy(), torch.special.entr(p).sum(-1))
    torch.testing.assert_close(found.row_max(), p.amax(-1))
    s = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
    s = s.masked_fill(~Causal().mask(Layout.of(CANVAS)), -torch.inf)
    torch.testing.assert_close(found.row_max("logit"), s.amax(-1))


@pytest.mark.parametrize("cut", ["raster", "boxes", "ragged", "per head"])
def test_block_statistics(cut: str, generator: torch.Generator) -> None:
    q, k = qk(generator)
    if cut == "raster":
        rows = columns = Partition.blocks(CANVAS, 3)
    elif cut == "boxes":
        rows, columns = Partition.blocks(CANVAS, (2, 2)), Partition.regions(CANVAS, 2)
    else:
        labels = torch.randint(-1, 3, (2, 2 if cut == "per head" else 1, N), generator=generator)
        rows = Partition.clusters(labels, 3)
        columns = Partition.chunks(torch.tensor([[0, 5, 5, N], [0, 1, 2, N]]))
    p = dense(q, k, Neighborhood(3).mask(Layout.of(CANVAS)))
    found = Capture(q, k, Neighborhood(3), CANVAS, budget=SMALL).blocks(rows, columns, eps=0.1)
    for b in range(2):
        for h in range(2):
            mine, theirs = (
                t[b if t.shape[0] > 1 else 0, h if t.shape[1] > 1 else 0].tolist()
                for t in (rows.members, columns.members)
            )
            for i, some in enumerate(mine):
                for j, keys in enumerate(theirs):
                    block = p[b, h][[t for t in some if t >= 0]][:, [t for t in keys if t >= 0]]
                    empty = block.numel() == 0
                    want = BlockStats(
                        block.sum(),
                        block.square().sum(),
                        block.new_zeros(()) if empty else block.max(),
                        block.new_zeros(()) if empty else block.mean(),
                        block.new_zeros(()) if empty else (block < 0.1).double().mean(),
                    )
                    for name, value in vars(want).items():
                        torch.testing.assert_close(getattr(found, name)[b, h, i, j], value, msg=name)


def test_over_a_key_subset(generator: torch.Generator) -> None:
    """With its own normaliser, or under that of all keys."""
    q, k = qk(generator)
    keys = torch.tensor([3, 1, 11, 19])
    torch.testing.assert_close(Capture(q, k, keys=keys, budget=SMALL).rows(), dense(q, k[:, :, keys]))
    whole = Capture(q, k, lse=attend(q, k, k).lse, keys=keys, budget=SMALL)
    torch.testing.assert_close(whole.rows(), dense(q, k)[..., keys])
    torch.testing.assert_close(whole.column_mean(), dense(q, k)[..., keys].mean(2))
    causal = Capture(q, k, Causal(), CANVAS, keys=keys)
    mask = Causal().mask(Layout.of(CANVAS))[..., keys]
    torch.testing.assert_close(causal.rows(), dense(q, k[:, :, keys], mask))


CASES = [
    "na1d_odd",
    "na1d_dilated_rpb",
    "na1d_causal_dilated",
    "na2d_rpb",
    "na2d_dilated_rpb_ragged",
    "na2d_axis_causal",
    "na2d_additional_kv",
    "na3d_axis_causal",
    "na3d_rpb_dilated",
]


@pytest.mark.parametrize("case", CASES)
def test_published_window_logits(case: str, golden: Callable[[str], Path]) -> None:
    path = golden(f"fna/{case}.safetensors")
    data = load_file(path)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["meta"])["config"]
    shape, dilation = tuple(config["token_layout"]), tuple(config["dilation"])
    q, k = (data[f"in.{name}"].flatten(2, -2) for name in ("query", "key"))
    extra = int(config["additional_kv"])
    kv = Canvas([Part("grid", shape), Part("extra", extra)]) if extra else Canvas(shape)
    if extra:
        k = torch.cat([k, data["in.additional_keys"]], 2)
    bias = (Relative(data["in.rpb"], step=dilation),) if "in.rpb" in data else ()
    pattern = Neighborhood(tuple(config["kernel_size"]), dilation=dilation, causal=tuple(config["is_causal"]))
    score = Score(scale=config["scale"], bias=bias)
    found = Capture(q, k, pattern, Layout(Canvas(shape), kv), score, budget=5000).window()
    want = data["mid.attn_logits"].flatten(2, -2)
    assert torch.equal(found.isinf(), want.isinf())
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"border": "clip"}, {"stride": 2}, {"dilation": 2}, {"causal": True}])
def test_window_is_the_map_in_other_places(options: dict, generator: torch.Generator) -> None:
    q, k = qk(generator)
    pattern = Neighborhood(3 if "dilation" not in options else 2, **options)
    found = Capture(q, k, pattern, CANVAS)
    p, slots = found.rows(), found.window("probabilities")
    torch.testing.assert_close(slots.sort(-1, descending=True).values, p.topk(slots.shape[-1], -1).values)
    rows = torch.tensor([4, 9])
    torch.testing.assert_close(found.window("probabilities", rows), slots[:, :, rows])


def test_detached_unless_asked(generator: torch.Generator) -> None:
    q, k = qk(generator)
    q.requires_grad_()
    assert not Capture(q, k).column_mean().requires_grad
    assert Capture(q, k, differentiable=True).column_mean().requires_grad


def test_gradients(generator: torch.Generator) -> None:
    canvas = Canvas((6,))
    q, k = (t[:1, :, :6, :3].clone().requires_grad_() for t in qk(generator))
    bias = torch.randn(6, dtype=torch.float64, generator=generator).requires_grad_()
    part = Partition.blocks(6, 4)
    weight = torch.rand(1, 1, 1, 6, dtype=torch.float64, generator=generator)

    def source(q: Tensor, k: Tensor, bias: Tensor, lse: bool) -> Capture:
        score = Score(bias=(PerKey(bias),))
        given = attend(q, k, k, Neighborhood(3), canvas=canvas, score=score).lse if lse else None
        return Capture(q, k, Neighborhood(3), canvas, score, given, differentiable=True, budget=24)

    for lse in (False, True):
        for read in (
            lambda c: c.rows(),
            lambda c: c.weighted(weight),
            lambda c: c.column_mean(2),
            lambda c: c.entropy(),
            lambda c: c.blocks(part, part).sum,
            lambda c: c.blocks(part, part).square,
            lambda c: c.window(),
        ):
            assert torch.autograd.gradcheck(
                lambda q, k, b, r=read, w=lse: r(source(q, k, b, w)), (q, k, bias), fast_mode=True
            )


def test_nothing_leaks_from_hidden_keys(generator: torch.Generator) -> None:
    """NaN in a key that nobody sees; a query that sees nothing."""
    q, k = qk(generator)
    layout = Layout(CANVAS, CANVAS, lengths={"grid": torch.tensor([15, 15])})
    k[:, :, 15:] = torch.nan
    q.requires_grad_()
    found = Capture(q, k, None, layout, differentiable=True, budget=SMALL)
    loss = found.column_mean().square().sum() + found.entropy().sum() + found.row_max().sum()
    loss.backward()
    assert loss.isfinite() and q.grad is not None and q.grad.isfinite().all()
    assert q.grad[:, :, 15:].eq(0).all()


def test_bfloat16_is_read_in_float32(generator: torch.Generator) -> None:
    q, k = (t.bfloat16() for t in qk(generator))
    found = Capture(q, k, Neighborhood(3), CANVAS).column_mean()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, Capture(q.float(), k.float(), Neighborhood(3), CANVAS).column_mean())


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No chunk of a long sequence holds more than the budget."""
    from glocal.ops._rows import Rows

    sizes = []
    logits = Rows.logits

    def spy(self: Rows, rows: Tensor, keys: Tensor | None = None) -> Tensor:
        s = logits(self, rows, keys)
        sizes.append(s.numel())
        return s

    monkeypatch.setattr(Rows, "logits", spy)
    q = torch.randn(1, 1, 3000, 4)
    found = Capture(q, q, Neighborhood(5), Canvas((3000,)), budget=300_000)
    found.column_mean()
    found.blocks(Partition.blocks(3000, 64), Partition.blocks(3000, 64))
    assert max(sizes) <= 300_000 and sum(sizes) == 2 * 3000 * 3000


def test_errors(generator: torch.Generator) -> None:
    q, k = qk(generator)
    part = Partition.blocks(N, 4)
    with pytest.raises(ValueError, match=r"lse of shape \(2, 2, 3\) must be \(2, 2, 20\)"):
        Capture(q, k, lse=torch.zeros(2, 2, 3))
    with pytest.raises(ValueError, match="pattern=Causal needs canvas="):
        Capture(q, k, Causal())
    with pytest.raises(ValueError, match="q has 20 and k 20 tokens, but the layout has 6 and 6"):
        Capture(q, k, Causal(), Canvas((6,)))
    with pytest.raises(ValueError, match="the relation has 3 heads; legal: 1, 2 or 2"):
        Capture(q, k, per_head([Causal()] * 3), CANVAS)
    with pytest.raises(ValueError, match=r"weight of shape \(1, 3\) must be \[B\|1, H\|1, m, 20\]"):
        Capture(q, k).weighted(torch.ones(1, 3))
    with pytest.raises(ValueError, match="pattern=Causal; only a Neighborhood has window slots"):
        Capture(q, k, Causal(), CANVAS).window()
    with pytest.raises(ValueError, match="groups speak about all keys"):
        Capture(q, k, keys=torch.arange(3)).blocks(part, part)
    with pytest.raises(ValueError, match="has a query in several groups"):
        Capture(q, k).blocks(Partition(torch.zeros(1, 1, 2, 1, dtype=torch.int32), "twice"), part)
    with pytest.raises(ValueError, match="kind='logs'; legal"):
        Capture(q, k).row_max("logs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rollout: relevance of shape \(2, 3\)"):
        Capture(q, k).rollout(torch.ones(2, 3))
    text = Layout(CANVAS, CANVAS, q_start=2)
    with pytest.raises(ValueError, match="must lie on one whole grid|has 18"):
        Capture(q[:, :, 2:], k, Neighborhood(3), text).window()
