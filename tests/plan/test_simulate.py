"""The tile simulator against published figures, golden counts and a naive count of every pair."""

import itertools
import json
import math
import random

import pytest

from glocal.canvas import Canvas, tile
from glocal.patterns import Neighborhood
from glocal.patterns.axis import AxisWindow
from glocal.plan.build import PlanSpec, plan
from glocal.plan.raster import simulate_raster
from glocal.plan.simulate import end_to_end, simulate
from glocal.plan.tiles import legal_tiles, search_strides, search_tiles

HUNYUAN = (30, 48, 80)
HUNYUAN_TILES = ((4, 8, 8), (2, 8, 8))


def rules(window, stride=None, dilation=None, causal=None):
    rank = len(window)
    stride, dilation, causal = stride or [1] * rank, dilation or [1] * rank, causal or [False] * rank
    return [AxisWindow(k, s, d, bool(c)) for k, s, d, c in zip(window, stride, dilation, causal)]


def naive_keys(i, length, rule):
    """Keys of query i on one axis, written from the rule's text alone."""
    g, p = i % rule.dilation, i // rule.dilation
    n = len(range(g, length, rule.dilation))
    left = rule.window // 2
    right = rule.window - 1 - left
    group = p // rule.stride
    if rule.causal:
        leader = min(group * rule.stride + rule.stride - 1, n - 1)
        places = range(max(leader - rule.window + 1, 0), min(p + 1, n))
    else:
        leader = min(group * rule.stride + rule.stride // 2, n - 1)
        low, high = leader - left, leader + right
        if rule.border == "shift":
            shift = max(-low, 0) - max(high - (n - 1), 0)
            low, high = max(low + shift, 0), min(high + shift, n - 1)
        places = range(max(low, 0), min(high, n - 1) + 1)
    return {g + rule.dilation * place for place in places}


def naive_blocks(canvas, axes, q_tile, kv_tile):
    """(query block, key block) -> visible pairs, and the size of every block, by listing all pairs."""

    def block(token, tile):
        return tuple((x % r.dilation, x // r.dilation // t) for x, r, t in zip(token, axes, tile))

    tokens = list(itertools.product(*(range(n) for n in canvas)))
    pairs, q_sizes, kv_sizes = {}, {}, {}
    for q in tokens:
        a = block(q, q_tile)
        q_sizes[a] = q_sizes.get(a, 0) + 1
        kv_sizes[block(q, kv_tile)] = kv_sizes.get(block(q, kv_tile), 0) + 1
        for k in itertools.product(*(naive_keys(x, n, r) for x, n, r in zip(q, canvas, axes))):
            key = (a, block(k, kv_tile))
            pairs[key] = pairs.get(key, 0) + 1
    return pairs, q_sizes, kv_sizes


def random_case(seed, limit):
    rng = random.Random(seed)
    rank = rng.choice([1, 1, 2, 2, 3])
    canvas = [rng.randint(2, max(2, int(limit ** (1 / rank)))) for _ in range(rank)]
    axes = []
    for n in canvas:
        d = rng.choice([1, 1, 2, 3])
        k = rng.randint(1, max(n // d, 1))
        d = min(d, n // k)
        axes.append(AxisWindow(k, rng.randint(1, k), d, rng.random() < 0.3, rng.choice(["shift", "clip"])))
    return canvas, axes, [rng.randint(1, 5) for _ in canvas], [rng.randint(1, 5) for _ in canvas]


@pytest.mark.parametrize("seed", range(60))
def test_counts_equal_a_count_of_every_pair(seed):
    canvas, axes, q_tile, kv_tile = random_case(seed, 60)
    pairs, q_sizes, kv_sizes = naive_blocks(canvas, axes, q_tile, kv_tile)
    result = simulate(canvas, axes, q_tile, kv_tile)
    rows = {a: sum(1 for x, _ in pairs if x == a) for a in q_sizes}
    columns = {b: sum(1 for _, y in pairs if y == b) for b in kv_sizes}
    assert result.q_tiles == len(q_sizes)
    assert result.worst == max(rows.values())
    assert result.visited_blocks == len(pairs)
    whole = [(a, b) for (a, b), n in pairs.items() if n == q_sizes[a] * kv_sizes[b]]
    assert result.full_blocks == sum(kv_sizes[b] == math.prod(kv_tile) for _, b in whole)
    assert result.perfectly_block_sparse == (len(whole) == len(pairs))
    assert result.visible_pairs == sum(pairs.values())
    assert result.backward.kv_tiles == len(kv_sizes)
    assert result.backward.worst == max(columns.values())
    assert result.backward.mean == pytest.approx(len(pairs) / len(kv_sizes))
    assert result.kept == pytest.approx(sum(pairs.values()) / math.prod(canvas) ** 2)
    assert result.effective_speedup <= result.flop_bound + 1e-9


@pytest.mark.parametrize("seed", range(60))
def test_dynamic_tiles_start_where_the_window_starts(seed):
    canvas, axes, q_tile, kv_tile = random_case(1000 + seed, 60)
    result = simulate(canvas, axes, q_tile, kv_tile, tiling="dynamic")
    for axis in result.axes:
        rule, visits, full = axis.window, [], []
        for g in range(rule.dilation):
            members = list(range(g, axis.length, rule.dilation))
            for a in range(0, len(members), axis.q_tile):
                seen = [
                    {k // rule.dilation for k in naive_keys(i, axis.length, rule)} for i in members[a : a + axis.q_tile]
                ]
                union, common = set.union(*seen), set.intersection(*seen)
                tiles = [
                    set(range(b, min(b + axis.kv_tile, len(members))))
                    for b in range(min(union), max(union) + 1, axis.kv_tile)
                ]
                visits.append(len(tiles))
                full.append(sum(t <= common and len(t) == axis.kv_tile for t in tiles))
        assert axis.visits == tuple(visits)
        assert axis.full == tuple(full)


def test_every_published_point(golden):
    """Source: the GNA paper's simulator column; 19 of 22 within 0.0125, all within 0.015 after rounding."""
    points = json.loads(golden("gna/simulator.json").read_text())["published_points"]
    misses = []
    for point in points:
        result = simulate(
            point["token_layout"], rules(point["window"], point["stride"]), point["q_tile"], point["kv_tile"]
        )
        share, ours, paper = point["attention_share_of_e2e"], point["reconstruction"], point["published_e2e"]
        assert result.worst_speedup == pytest.approx(ours["op_speedup_worst_tile"], abs=5e-5)
        assert result.mean_speedup == pytest.approx(ours["op_speedup_mean_tile"], abs=5e-5)
        assert result.flop_bound == pytest.approx(ours["flop_wise_op"], abs=5e-5)
        assert result.end_to_end(share) == pytest.approx(ours["e2e_from_worst"], abs=5e-4)
        assert result.end_to_end(share, result.flop_bound) == pytest.approx(ours["e2e_flop_wise"], abs=5e-4)
        assert result.end_to_end(share, result.flop_bound) == pytest.approx(paper["flop_wise"], abs=0.0075)
        assert result.perfectly_block_sparse == math.isclose(result.op_speedup, result.flop_bound)
        misses.append(abs(round(result.end_to_end(share), 3) - paper["simulator"]))
    assert len(points) == 22
    assert sum(miss <= 0.0125 for miss in misses) >= 19
    assert max(misses) <= 0.015 + 1e-9


def test_every_golden_tile_count(golden):
    cases = json.loads(golden("gna/simulator.json").read_text())["reconstruction_cases"]
    assert cases
    for case in cases:
        axes = rules(case["window"], case["stride"], causal=case["is_causal"])
        static = simulate(case["token_layout"], axes, case["q_tile"], case["kv_tile"])
        dynamic = simulate(case["token_layout"], axes, case["q_tile"], case["kv_tile"], tiling="dynamic")
        assert [list(axis.visits) for axis in static.axes] == case["static_tiles_per_axis"]
        assert [list(axis.visits) for axis in dynamic.axes] == case["dynamic_tiles_per_axis"]
        assert static.worst_speedup == pytest.approx(case["op_speedup_worst"], rel=1e-12)
        assert static.mean_speedup == pytest.approx(case["op_speedup_mean"], rel=1e-12)


@pytest.mark.parametrize(
    ("canvas", "window", "tile", "waste"),
    [
        ((30, 48, 80), (18, 24, 24), (2, 8, 8), 2.04),
        ((256, 256), (80, 80), (16, 8), 1.36),
        ((128, 128), (48, 48), (16, 8), 1.56),
    ],
)
def test_waste_of_stride_one(canvas, window, tile, waste):
    assert simulate(canvas, rules(window), tile, tile).waste == pytest.approx(waste, abs=0.005)


def test_one_dimensional_example_of_the_paper():
    """L 32768, window 2048, tiles 256 and 128: stride 128 gives 15.06x (window-based key tiles), stride 256 all 16x."""
    fine = simulate((32768,), rules([2048], [128]), (256,), (128,), tiling="dynamic")
    perfect = simulate((32768,), rules([2048], [256]), (256,), (128,))
    assert fine.op_speedup == pytest.approx(15.06, abs=0.005)
    assert perfect.op_speedup == 16 and perfect.perfectly_block_sparse


def test_dilation_groups_are_problems_of_their_own():
    """7 tokens, dilation 2: groups of 4 and 3 tokens are tiled apart."""
    result = simulate((7,), rules([3], dilation=[2]), (2,), (2,))
    four = simulate((4,), rules([3]), (2,), (2,)).axes[0]
    three = simulate((3,), rules([3]), (2,), (2,)).axes[0]
    assert result.axes[0].visits == four.visits + three.visits
    assert result.visible_pairs == 7 * 3


def test_schedule_mean_follows_the_average_tile():
    args = (HUNYUAN, rules([18, 24, 24]), *HUNYUAN_TILES)
    worst, mean = simulate(*args), simulate(*args, schedule="mean")
    assert worst.op_speedup == worst.worst_speedup < mean.op_speedup == mean.mean_speedup


def test_effective_speedup_charges_ragged_tiles():
    """30 frames in query tiles of 4 compute 32: the dense kernel in raster order does not."""
    result = simulate(HUNYUAN, rules([18, 24, 24], [16, 8, 8]), *HUNYUAN_TILES)
    assert result.op_speedup == pytest.approx(100 / 9)
    assert result.effective_speedup == pytest.approx(100 / 9 * 30 / 32)


def test_end_to_end_is_amdahls_law():
    assert end_to_end(0.0, 100.0) == 1.0
    assert end_to_end(1.0, 4.0) == 4.0
    with pytest.raises(ValueError, match=r"share=1\.2 is not a fraction of the time; legal: 0 to 1; nearest: 1"):
        end_to_end(1.2, 4.0)


def test_a_full_window_is_dense():
    result = simulate((6, 10), rules([6, 10]), (4, 4), (4, 4))
    assert result.op_speedup == result.flop_bound == 1 and result.perfectly_block_sparse


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"axes": rules([25, 4])},
            r"window=25 is larger than axis 0 of the canvas 24x6 \(24 tokens\); legal: 1 to 24; nearest: 24",
        ),
        (
            {"axes": rules([6, 4], dilation=[5, 1])},
            r"dilation=5 does not fit: window=6 then spans 30 .* axis 0 .* has 24; legal: 1 to 4; nearest: 4",
        ),
        ({"axes": rules([6, 4], [7, 1])}, r"stride=7 is larger than window=6 on axis 0; legal: 1 to 6; nearest: 6"),
        ({"axes": rules([6, 0])}, r"window=0 on axis 1; legal: at least 1; nearest: 1"),
        ({"axes": rules([6])}, r"1 window axes for the canvas 24x6 of 2 axes; give one window per axis"),
        ({"q_tile": (64,)}, r"q_tile=64 has 1 axes, the canvas 24x6 has 2; legal: 2 numbers; nearest: 1x64"),
        ({"kv_tile": (2, 4, 8)}, r"kv_tile=2x4x8 has 3 axes, the canvas 24x6 has 2; legal: 2 numbers; nearest: 4x8"),
        ({"kv_tile": (0, 8)}, r"kv_tile=0x8; legal: at least 1 per axis; nearest: 1x8"),
        ({"tiling": "diagonal"}, r"tiling='diagonal' is unknown; legal: static, dynamic"),
        ({"schedule": "best"}, r"schedule='best' is unknown; legal: worst, mean"),
        ({"canvas_shape": (24, 0)}, r"canvas='24x0' needs at least one axis, each of at least 1 token"),
    ],
)
def test_bad_arguments_are_told_back(kwargs, message):
    call = {"canvas_shape": (24, 6), "axes": rules([6, 4]), "q_tile": (4, 2), "kv_tile": (4, 2), **kwargs}
    with pytest.raises(ValueError, match=message):
        simulate(**call)


@pytest.mark.parametrize("schedule", ["worst", "mean"])
@pytest.mark.parametrize("seed", range(12))
def test_stride_search_equals_trying_all(seed, schedule):
    rng = random.Random(seed)
    canvas = [rng.randint(4, 16) for _ in range(rng.choice([1, 2, 3]))]
    axes = rules([rng.randint(2, min(n, 7)) for n in canvas], causal=[rng.random() < 0.3 for _ in canvas])
    q_tile, kv_tile = ([rng.choice([1, 2, 4]) for _ in canvas] for _ in range(2))
    search = search_strides(canvas, axes, q_tile, kv_tile, schedule=schedule)
    best_at, finest = {}, math.inf
    for stride in itertools.product(*(range(1, r.window + 1) for r in axes)):
        given = [AxisWindow(r.window, s, r.dilation, r.causal, r.border) for r, s in zip(axes, stride)]
        result = simulate(canvas, given, q_tile, kv_tile, schedule=schedule)
        shared = math.prod(stride)
        best_at[shared] = max(best_at.get(shared, 0), result.op_speedup)
        if result.perfectly_block_sparse:
            finest = min(finest, shared)
    expected, record = [], 0.0
    for shared in sorted(best_at):
        if best_at[shared] > record * (1 + 1e-12):
            record = best_at[shared]
            expected.append((shared, pytest.approx(record)))
    found = [(math.prod(a.window.stride for a in s.axes), s.op_speedup) for s in search.front]
    assert found == expected
    assert search.considered == math.prod(r.window for r in axes)
    perfect = None if search.perfect is None else math.prod(a.window.stride for a in search.perfect.axes)
    assert perfect == (None if finest == math.inf else finest)


def test_stride_search_finds_the_strides_of_the_paper():
    search = search_strides(HUNYUAN, rules([18, 24, 24]), *HUNYUAN_TILES)
    strides = [tuple(a.window.stride for a in s.axes) for s in search.front]
    assert strides == [(1, 1, 1), (2, 1, 1), (1, 1, 8), (2, 1, 8), (1, 8, 8), (2, 8, 8), (16, 8, 8)]
    assert search.perfect is not None
    assert tuple(a.window.stride for a in search.perfect.axes) == (16, 8, 8)


def test_legal_tiles_are_all_factorisations_that_fit():
    assert legal_tiles(8, 2, (4, 16)) == ((1, 8), (2, 4), (4, 2))
    assert all(math.prod(t) == 128 for t in legal_tiles(128, 3, HUNYUAN))
    assert (6, 8, 8) in legal_tiles(384, 3, HUNYUAN)
    with pytest.raises(ValueError, match=r"size=64: no tile of 64 tokens fits the canvas 4x8; .* nearest: 32"):
        legal_tiles(64, 2, (4, 8))
    with pytest.raises(ValueError, match=r"rank=3 for the canvas 4x8; legal and nearest: 2"):
        legal_tiles(64, 3, (4, 8))


def test_tile_search_is_sorted_and_complete():
    axes = rules([9, 12])
    search = search_tiles((24, 30), axes, q_sizes=(16,), kv_sizes=(8, 16), top=1000)
    pairs = [(q, k) for q in legal_tiles(16, 2, (24, 30)) for n in (8, 16) for k in legal_tiles(n, 2, (24, 30))]
    assert search.considered == len(pairs) == len(search.best)
    assert {(s.q_tile, s.kv_tile) for s in search.best} == set(pairs)
    speeds = [s.effective_speedup for s in search.best]
    assert speeds == sorted(speeds, reverse=True)
    best = search.best[0]
    assert best == simulate((24, 30), axes, best.q_tile, best.kv_tile)
    with pytest.raises(ValueError, match=r"size=4096: no tile of 4096 tokens fits the canvas 24x30; .* nearest: 720"):
        search_tiles((24, 30), axes, q_sizes=(4096,), kv_sizes=(8,))


@pytest.mark.parametrize("seed", range(40))
def test_raster_blocks_equal_a_count_of_every_pair(seed):
    canvas, axes, _, _ = random_case(2000 + seed, 80)
    rng = random.Random(seed)
    q_block, kv_block = rng.randint(1, 12), rng.randint(1, 12)
    result = simulate_raster(canvas, axes, q_block, kv_block)
    place = {token: i for i, token in enumerate(itertools.product(*(range(n) for n in canvas)))}
    touched, pairs = {}, 0
    for q, i in place.items():
        for k in itertools.product(*(naive_keys(x, n, r) for x, n, r in zip(q, canvas, axes))):
            touched.setdefault(i // q_block, set()).add(place[k] // kv_block)
            pairs += 1
    assert result.visits == tuple(len(touched[b]) for b in sorted(touched))
    assert result.visible_pairs == pairs
    assert result.waste == pytest.approx(sum(map(len, touched.values())) * q_block * kv_block / pairs)


def test_raster_order_visits_more_than_tiles():
    tiles = simulate(HUNYUAN, rules([18, 24, 24]), (2, 8, 8), (2, 8, 8))
    raster = simulate_raster(HUNYUAN, rules([18, 24, 24]), 128, 128)
    assert raster.visible_pairs == tiles.visible_pairs
    assert raster.waste > 1.5 * tiles.waste
    with pytest.raises(ValueError, match="kv_block=0; legal: at least 1 token; nearest: 1"):
        simulate_raster((16, 32), rules([8, 8]), 32, 0)


@pytest.mark.parametrize("tiling_shape", [((8, 12), (4, 4), (2, 6)), ((6, 8, 8), (2, 4, 4), (3, 2, 4))])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_plan_in_tile_order_has_the_simulated_blocks(tiling_shape, stride, dilation):
    """The planner classifies blocks by its own means; both must count the same."""
    shape, q_tile, kv_tile = tiling_shape
    if dilation == 2:
        q_tile = kv_tile = (2,) * len(shape)
    canvas = Canvas(shape)
    steps = (dilation,) * len(shape)
    built = plan(
        Neighborhood(3, stride, dilation),
        canvas,
        PlanSpec(
            q_block=math.prod(q_tile),
            kv_block=math.prod(kv_tile),
            q_order=tile(canvas, q_tile, steps),
            kv_order=tile(canvas, kv_tile, steps),
        ),
    )
    rank = len(shape)
    result = simulate(shape, rules([3] * rank, [stride] * rank, [dilation] * rank), q_tile, kv_tile)
    assert built.visible_pairs == result.visible_pairs
    assert built.visited_pairs == result.visited_blocks * math.prod(q_tile) * math.prod(kv_tile)
    assert int(built.full.count.sum()) == result.full_blocks
    assert int(built.partial.count.sum()) == result.partial_blocks
