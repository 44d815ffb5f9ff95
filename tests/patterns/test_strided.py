import json
import warnings

import pytest
import torch
from safetensors import safe_open

from glocal.canvas import Canvas, Layout
from glocal.patterns import StridedShards, cache_efficient, row_lists


def published(config):
    local = config["local_blocks"]
    return StridedShards(
        config["block_size"],
        tuple(local) if isinstance(local, list) else local,
        config["vert_stride"],
        config["num_heads"],
        num_kv_heads=config.get("num_kv_heads"),
        num_dense_heads=config.get("num_dense_heads", 0),
        homo_head=config.get("homo_head", False),
        head_sliding_offset=config.get("head_sliding_offset", 0),
        causal=config.get("causal", True),
        position=config.get("vert_position_type"),
    )


@pytest.mark.parametrize("number", range(11))
def test_published_patterns(golden, number):
    with safe_open(golden("s2_attention/patterns.safetensors"), "pt") as case:
        config = json.loads(case.metadata()["meta"])["config"][number]
        want = {k.removeprefix("out."): case.get_tensor(k) for k in case.keys() if k.endswith(str(number))}  # noqa: SIM118
    pattern, block = published(config), config["block_size"]
    q_start, kv_start = config.get("q_start_position", 0), config.get("kv_start_position", 0)
    queries, keys = config["seqlen"], config.get("kv_seqlen", config["seqlen"])
    canvas = Canvas((max(q_start + queries, kv_start + keys),))
    layout = Layout(canvas, canvas, q_start=q_start, kv_start=kv_start, q_tokens=queries, kv_tokens=keys)
    pattern.check(layout)
    rows, columns = (
        slice(start // block, -(-(start + n) // block)) for start, n in ((q_start, queries), (kv_start, keys))
    )
    mask = pattern.shards.block_mask(layout)[:, rows, columns]
    blocks = want[f"block_mask{number}"].bool()
    if mask.shape[0] > 1:
        mask = mask.repeat_interleave(blocks.shape[0] // mask.shape[0], 0)
    assert torch.equal(mask, blocks)
    lists = row_lists(mask)
    assert torch.equal(lists.crow, want[f"crow{number}"]) and torch.equal(lists.col, want[f"col{number}"])
    assert cache_efficient(mask, (q_start - kv_start) // block) == config["kv_cache_efficient"]
    if f"token_mask{number}" in want:
        assert torch.equal(pattern.mask(layout), want[f"token_mask{number}"].bool())


@pytest.mark.parametrize("causal", [True, False])
def test_definition_token_by_token(agrees, causal):
    b, local, stride, heads, shift, n = 3, 2, 4, 2, 1, 26
    pattern = StridedShards(b, local, stride, heads, head_sliding_offset=shift, causal=causal, position="absolute")
    for head in range(heads):

        def rule(q, k, head=head):
            i, j = q[0] // b, k[0] // b
            near = abs(i - j) < local
            return (near or (j + head * 2 + shift) % stride == 0) and (k[0] <= q[0] or not causal)

        agrees_1d(pattern, n, rule, head)


def agrees_1d(pattern, n, rule, head):
    got = pattern.mask(Layout.of(Canvas((n,))))[head]
    want = torch.tensor([[rule((q,), (k,)) for k in range(n)] for q in range(n)])
    assert torch.equal(got, want)
    if pattern.causal:
        assert bool(got.diagonal().all())


def test_stride_one_is_dense_and_wide_windows_too():
    layout = Layout.of(Canvas((20,)))
    triangle = torch.ones(20, 20).tril().bool()
    assert bool((StridedShards(4, 1, 1, 2).mask(layout) == triangle).all())
    assert bool((StridedShards(4, 5, 7, 2).mask(layout) == triangle).all())


def test_chunks_tile_the_whole_mask():
    pattern, canvas = StridedShards(4, 1, 3, 3), Canvas((24,))
    whole = pattern.mask(Layout.of(canvas))
    parts = [pattern.mask(Layout(canvas, canvas, q_start=s, q_tokens=8)) for s in (0, 8, 16)]
    assert torch.equal(torch.cat(parts, 1), whole)
    step = Layout(canvas, canvas, q_start=17, q_tokens=1, kv_tokens=18)
    assert torch.equal(pattern.mask(step), whole[:, 17:18, :18])


def test_heads_cover_everything_only_if_there_are_enough():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert StridedShards(16, 2, 4, 4).covers(640)
        assert StridedShards(16, 2, 8, 4, num_dense_heads=1).covers(640)
    with pytest.warns(UserWarning, match="4 sparse heads cannot cover vert_stride=8"):
        assert not StridedShards(16, 2, 8, 4).covers(640)
    with pytest.warns(UserWarning, match="2 sparse heads cannot cover vert_stride=4"):
        assert not StridedShards(16, 2, 4, 8, num_kv_heads=2).covers(640)


def test_cache_efficiency_of_a_broken_pattern():
    good = torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]]).bool()
    assert cache_efficient(good)
    bad = good.clone()
    bad[0, 3, 0] = True  # dropped at row 2, wanted again at row 3
    assert not cache_efficient(bad)


def test_density_of_long_sequences():
    """S = 8192, blocks of 64, 16 local, stride 8: 33 % of the causal blocks."""
    mask = StridedShards(64, 16, 8, 32).shards.block_mask(Layout.of(Canvas((8192,))))
    assert mask.float().mean().item() / (129 / 256) == pytest.approx(0.33, abs=0.01)


def test_errors():
    with pytest.raises(ValueError, match=r"num_kv_heads=3 must divide heads_q=8; legal: \[1, 2, 4, 8\]"):
        StridedShards(16, 2, 4, 8, num_kv_heads=3)
    with pytest.raises(ValueError, match="vert_stride=0 must be at least 1"):
        StridedShards(16, 2, 0, 8)
    with pytest.raises(ValueError, match=r"num_dense_heads=9 must lie in 0..8"):
        StridedShards(16, 2, 4, 8, num_dense_heads=9)
    with pytest.raises(ValueError, match="position='relative' with causal=True"):
        StridedShards(16, 2, 4, 8, position="relative")
    with pytest.raises(ValueError, match="needs one sequence of tokens, such as Canvas"):
        StridedShards(16, 2, 4, 8).check(Layout.of(Canvas((4, 4))))
    with pytest.raises(ValueError, match="num_dense_heads=1 with homo_head=True"):
        StridedShards(16, 2, 4, 8, num_dense_heads=1, homo_head=True)
