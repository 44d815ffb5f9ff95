"""The Gluon backend for Hopper: layouts and compiled code here, results on a card of sm_90 (-m gpu)."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout, Part
from glocal.kernels import gluon, reference, registry
from glocal.kernels.call import Call, PlanTensors
from glocal.ops import attend
from glocal.patterns import CausalWindow, Neighborhood, PerHead, StridedShards, TileWindows
from glocal.plan.blockplan import BlockLists, BlockPlan, pack
from glocal.plan.build import PlanSpec, plan
from glocal.testing.tolerance import low_precision

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = pytest.mark.skipif(torch.cuda.is_available() and not HOPPER, reason="the card is not sm_90")


# Layouts and compiled code, on any machine.


@pytest.mark.parametrize("columns", [64, 128])
def test_words_hold_the_columns_a_lane_owns(columns: int, generator: torch.Generator) -> None:
    from glocal.kernels.gluon.masks import by_key, by_query, kept

    seen = torch.rand(2, 64, columns, generator=generator) < 0.5
    words, turned = by_query(pack(seen), columns), by_key(pack(seen), columns)
    assert words.shape == (3, 64, 4) and turned.shape == (3, columns, 4) and bool((words[2] == -1).all())
    order = torch.where(seen[0, 0], 7, -1)[None, None].int()
    live = kept(order, columns).reshape(4)
    for lane in range(4):
        for bit in range(columns // 4):
            column = 8 * (bit // 2) + 2 * lane + bit % 2
            assert torch.equal((words[:2, :, lane] >> bit & 1).bool(), seen[..., column])
            assert bool(live[lane] >> bit & 1) == bool(seen[0, 0, column])
        for bit in range(16):
            row = 8 * (bit // 2) + 2 * lane + bit % 2
            assert torch.equal((turned[:2, :, lane] >> bit & 1).bool(), seen[:, row])


def test_words_are_made_once_for_a_table(generator: torch.Generator) -> None:
    from glocal.kernels.gluon.masks import by_query

    table = pack(torch.rand(3, 128, 64, generator=generator) < 0.5)
    words = by_query(table, 64)
    assert by_query(table, 64) is words
    table[0] = 0
    assert by_query(table, 64) is not words and int(by_query(table, 64)[0].abs().sum()) == 0


def test_lists_made_for_one_call_are_not_looked_at() -> None:
    from glocal.plan.facts import declare_sound, worth_a_look

    made = window(300, 37)
    assert worth_a_look(made.full.index) and worth_a_look(made.to("cpu").full.index)
    own = BlockLists(made.full.count.clone(), made.full.index.clone())
    assert worth_a_look(own.index)
    declare_sound(own)
    assert not worth_a_look(own.index)


def test_query_blocks_are_joined_where_neighbours_visit_the_same(generator: torch.Generator) -> None:
    from glocal.kernels.gluon.reblocked import paired

    made = plan(StridedShards(64, 20, 2, heads_q=2), Canvas((2048,)), PlanSpec(64, 64))
    joined = paired(PlanTensors(**made.tensors()), 64)
    assert joined is not None
    assert joined.masks.shape[1] == 128
    full, partial = (
        BlockLists(joined.full_count, joined.full_index),
        BlockLists(joined.part_count, joined.part_index, joined.part_mask),
    )
    other = replace(made, q_block=128, full=full, partial=partial, masks=joined.masks)
    assert torch.equal(other.dense_counts(), made.dense_counts())
    assert other.visited_pairs < 1.1 * made.visited_pairs
    apart = lists(
        torch.arange(256)[None, None], torch.arange(256)[None, None], (256, 256), (64, 64), torch.eye(4).bool()[None]
    )
    assert paired(PlanTensors(**apart.tensors()), 64) is None


def test_key_blocks_are_cut_where_halves_of_them_are_hidden_or_whole() -> None:
    from glocal.kernels.gluon.reblocked import halved

    made = plan(Neighborhood(17), Canvas((48, 64)), PlanSpec(128, 128))
    cut = halved(PlanTensors(**made.tensors()), 128)
    assert cut is not None and cut.masks.shape[1:] == (128, 2)
    full, partial = (
        BlockLists(cut.full_count, cut.full_index),
        BlockLists(cut.part_count, cut.part_index, cut.part_mask),
    )
    other = replace(made, kv_block=64, full=full, partial=partial, masks=cut.masks)
    assert torch.equal(other.dense_counts(), made.dense_counts())
    assert other.visited_pairs < 0.95 * made.visited_pairs
    whole = plan(TileWindows((8, 16), 3), Canvas((32, 64)), PlanSpec(128, 128))
    assert halved(PlanTensors(**whole.tensors()), 128) is None


@dataclass(frozen=True)
class Kernel:
    """One way to compile the forward kernel. stack: bytes a thread may keep beside registers, outside of loops."""

    blocks: tuple[int, int] = (128, 128)
    dims: tuple[int, int] = (128, 128)
    masked: bool = True
    pads: bool = False
    softcap: bool = False
    changes: tuple[tuple[str, Any], ...] = ()
    boxes: bool = False
    stack: int = 0

    def compiled(self) -> Any:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon._runtime import GluonASTSource

        from glocal.kernels.gluon.forward_q import forward_kernel
        from glocal.kernels.gluon.tuning import Shape, tuning

        tuned = replace(tuning(self.blocks, max(self.dims)), **dict(self.changes))
        shape = Shape.of(self.blocks, self.dims, self.masked, tuned)

        def tile(rows: int, columns: int) -> str:
            box = [1, rows // 64, 8, 8, columns] if self.boxes else [1, 1, rows, columns]
            layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)
            return f"tensordesc<bf16{box},{layout!r}>"

        where: Any = ("*i64", ("i32", "i32", "i32", "i32")) if self.boxes else "constexpr"
        row = ("*i32", "i32", "i32", "i32")
        taken: dict[str, Any] = {
            "q": tile(64, shape.d),
            "k": tile(min(shape.keys, shape.block), min(shape.d, 64)),
            "v": tile(min(shape.keys, shape.block), min(shape.dv, 64)),
            "boxes": (where, where, where),
            "out": ("*bf16", "*fp32", row, "i32"),
            "lists": (row, ("*i32", "*i32", "i32"), ("*i32", "*i32", "i32", "*i32"), "i32"),
            "masks": ("*i32", row if self.pads else "constexpr"),
            "work": ("*i32", "i32", "i32"),
            "group": "i32",
            "score": ("fp32", "fp32" if self.softcap else "constexpr"),
            "tiles": "i32",
            "flags": ("*i32", "*i32") if self.masked else ("constexpr", "constexpr"),
            "C": "constexpr",
        }
        names = forward_kernel.arg_names
        fixed: dict[tuple[int, ...], Any] = {(names.index("C"),): shape}
        if not self.boxes:
            fixed |= {(names.index("boxes"), i): None for i in range(3)}
        if not self.masked:
            fixed |= {(names.index("flags"), i): None for i in range(2)}
        if not self.pads:
            fixed[(names.index("masks"), 1)] = None
        if not self.softcap:
            fixed[(names.index("score"), 1)] = None
        aligned = {(names.index("out"), i): [["tt.divisibility", 16]] for i in range(2)}
        source = GluonASTSource(forward_kernel, {name: taken[name] for name in names}, fixed, aligned)
        options = {"num_warps": 4, "maxnreg": tuned.most}
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


KERNELS = {
    "128 x 128, full blocks only": Kernel(masked=False),
    "128 x 128": Kernel(),
    "128 x 128, boxes": Kernel(boxes=True),
    "128 x 128, boxes, full blocks only": Kernel(boxes=True, masked=False),
    "64 x 64, boxes": Kernel((64, 64), boxes=True),
    "128 x 64, held": Kernel((128, 64), changes=(("keys", 64), ("stages", 4), ("held", True), ("pinned", True))),
    "64 x 64 twice, pads": Kernel((64, 64), pads=True, changes=(("keys", 128), ("most", 168), ("held", False))),
    "128 x 64 twice, boxes": Kernel((128, 64), boxes=True),
    "128 x 64 twice, D 64, boxes": Kernel((128, 64), dims=(64, 64), boxes=True, changes=(("keys", 128),)),
    "128 x 64 twice, joined": Kernel((128, 64), changes=(("queries", 2), ("joined", True))),
    "128 x 128, boxes, joined": Kernel(boxes=True, changes=(("queries", 2), ("joined", True))),
    "128 x 128, pads": Kernel(pads=True),
    "128 x 128, soft-cap": Kernel(softcap=True),
    "128 x 128, D 64": Kernel(dims=(64, 64)),
    "128 x 128, D 32, Dv 16": Kernel(dims=(32, 16)),
    "64 x 64": Kernel((64, 64)),
    "64 x 128": Kernel((64, 128)),
    "128 x 64": Kernel((128, 64)),
    "128 x 64, D 64": Kernel((128, 64), dims=(64, 64)),
    "128 x 128, D 256": Kernel(dims=(256, 256), stack=64),
    "64 x 64, D 256": Kernel((64, 64), dims=(256, 256)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_compiles_for_hopper_without_spills(name: str, tmp_path: Path) -> None:
    import triton

    made = KERNELS[name].compiled()
    assert made.metadata.shared <= 227 * 1024
    ptx = made.asm["ptx"]
    loads = f"cp.async.bulk.tensor.{4 + KERNELS[name].boxes}d"
    assert "wgmma.mma_async" in ptx and loads in ptx and "setmaxnreg" in ptx
    (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("Triton came without cuobjdump: registers cannot be read")
    command = [str(tool), "-res-usage", str(tmp_path / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+) .*LOCAL:(\d+) ", usage)
    assert found is not None and int(found[1]) <= KERNELS[name].stack and found[2] == "0", usage


def test_auto_passes_over_it_and_its_limits_are_said() -> None:
    asked = registry.Request("cuda", torch.bfloat16, 1, 2, 2, 512, 512, 128, 128)
    record = gluon.CAPABILITY
    assert registry.refusals(record, asked, (128, 128), "2.11.0") == []
    wrong = replace(asked, head_dim=20, dtype=torch.float32, bias=("dense",), segments=True)
    words = "; ".join(registry.refusals(record, wrong, (32, 128), "2.11.0"))
    for part in (
        "dtype float32 (legal: bfloat16, float16)",
        "head size 20 (legal: multiples of 8 from 16 to 256)",
        "query block 32 (legal: powers of two from 64 to 128)",
        "a dense bias (legal: none)",
        "lengths or documents (not supported)",
    ):
        assert part in words
    assert record.by_name_only is not None


# On a card.


@dataclass(frozen=True)
class Sizes:
    """Heads (query, key), head size and value size, batch."""

    heads: tuple[int, int] = (2, 2)
    dims: tuple[int, int] = (64, 64)
    batch: int = 1


QKV = tuple[Tensor, Tensor, Tensor]


def window(n: int, size: int, blocks: tuple[int, int] = (128, 128)) -> BlockPlan:
    return plan(Neighborhood(size), Canvas((n,)), PlanSpec(*blocks))


def lists(q_order: Tensor, kv_order: Tensor, n: tuple[int, int], blocks: tuple[int, int], seen: Tensor) -> BlockPlan:
    """A plan of orders [b|1, h|1, room] and full blocks `seen`, bool [U, query blocks, key blocks], owner all 0."""
    nothing = torch.zeros_like(seen)
    return BlockPlan(
        layout=Layout(Canvas([Part("q", (n[0],))]), Canvas([Part("k", (n[1],))])),
        q_block=blocks[0],
        kv_block=blocks[1],
        q_order=q_order.int(),
        kv_order=kv_order.int(),
        full=BlockLists.from_dense(seen),
        partial=BlockLists.from_dense(nothing, nothing.int()),
        masks=torch.zeros(0, blocks[0], -(-blocks[1] // 32), dtype=torch.int32),
        owner=torch.zeros(1, 1, dtype=torch.int32),
    )


def inputs(made: BlockPlan, sizes: Sizes, g: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> QKV:
    (h, hk), (d, dv), b = sizes.heads, sizes.dims, sizes.batch
    shapes = ((b, h, made.layout.nq, d), (b, hk, made.layout.nk, d), (b, hk, made.layout.nk, dv))
    q, k, v = (torch.randn(s, generator=g).to(dtype).cuda() for s in shapes)
    return q, k, v


def call_of(made: BlockPlan, scale: float = 0.2, softcap: float | None = None) -> Call:
    made = made.to("cuda")
    tensors = PlanTensors(**made.tensors())
    return Call("gluon", scale, softcap, q_block=made.q_block, kv_block=made.kv_block, plan=tensors)


def plain(x: QKV, counts: Tensor, scale: float, softcap: float | None) -> Tensor:
    """A few lines of torch in the precision of the inputs; counts [B|1, H|1, Nq, Nk]."""
    q, k, v = x
    group = q.shape[1] // k.shape[1]
    s = q @ k.repeat_interleave(group, 1).mT * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    counts = counts.repeat_interleave(q.shape[1] // counts.shape[1], 1)
    s = torch.where(counts > 0, s + counts.clamp(min=1).log().to(s.dtype), -torch.inf)
    return s.softmax(-1).nan_to_num(0) @ v.repeat_interleave(group, 1)


def examined(made: BlockPlan, x: QKV, scale: float = 0.2, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Run and hold against the definition in float64: at most twice the error of plain torch."""
    q, k, v = x
    out, lse = gluon.forward(q, k, v, call_of(made, scale, softcap))
    counts = made.to("cuda").dense_counts()
    exact, exact_lse = reference.forward(
        q.double(), k.double(), v.double(), Call("reference", scale, softcap, counts=counts)
    )
    assert out.dtype == x[0].dtype and lse.dtype == torch.float32 and out.shape == exact.shape
    found = low_precision(out, plain(x, counts, scale, softcap), exact)
    assert found.passed, found
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=5e-4)
    unseen = exact_lse == -torch.inf
    assert bool((lse[unseen] == -torch.inf).all()) and bool((out[unseen] == 0).all())
    return out, lse


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("blocks", [(128, 128), (64, 64), (128, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (7, 1)], ids=str)
def test_blocks_and_grouped_heads(heads: tuple[int, int], blocks: tuple[int, int], generator: torch.Generator) -> None:
    made = plan(Neighborhood((9, 11)), Canvas((23, 31)), PlanSpec(*blocks))
    for dtype in (torch.bfloat16, torch.float16):
        examined(made, inputs(made, Sizes(heads, batch=2), generator, dtype))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    "dims", [(16, 16), (24, 200), (32, 32), (40, 80), (64, 128), (80, 80), (96, 96), (128, 64), (256, 32), (256, 256)]
)
@pytest.mark.parametrize("blocks", [(128, 128), (64, 64)], ids=str)
def test_head_sizes(dims: tuple[int, int], blocks: tuple[int, int], generator: torch.Generator) -> None:
    made = window(500, 301, blocks)
    assert int(made.full.count.sum()) > 0 and int(made.partial.count.sum()) > 0
    examined(made, inputs(made, Sizes(dims=dims), generator), scale=dims[0] ** -0.5)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("block", [64, 128])
def test_every_tail_in_memory_full_of_nan(block: int, generator: torch.Generator) -> None:
    lengths = range(1, 2 * block + 2) if block == 64 else (*range(1, 20, 3), *range(120, 140), 200, *range(250, 258))
    for n in lengths:
        made = window(n, min(n, 37 if n % 2 else 200), (block, block))
        x = inputs(made, Sizes(dims=(32, 32)), generator)
        rooms = [torch.full((*t.shape[:2], n + 40, 48), torch.nan, dtype=t.dtype, device="cuda") for t in x]
        views = [room[:, :, 13 : 13 + n, 8:40] for room in rooms]
        for view, t in zip(views, x, strict=True):
            view.copy_(t)
        examined(made, (views[0], views[1], views[2]))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("extra", [{"softcap": 3.0}, {"scale": 0.0}, {"scale": -0.3}, {"softcap": 2.0, "scale": -1.0}])
def test_scores(extra: dict[str, float], generator: torch.Generator) -> None:
    made = plan(CausalWindow(190), Canvas((410,)), PlanSpec(128, 128))
    examined(made, inputs(made, Sizes((2, 1)), generator), **extra)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("axes", [(6, 16, 24), (5, 12, 20), (32, 64), (37, 44)], ids=str)
@pytest.mark.parametrize("blocks", [(128, 128), (64, 64)], ids=str)
def test_tiles_are_read_where_they_lie(
    axes: tuple[int, ...], blocks: tuple[int, int], generator: torch.Generator
) -> None:
    from glocal.kernels.gluon import launch

    whole = TileWindows((2, 8, 8) if len(axes) == 3 else (16, 8), 1)
    for pattern in (whole, Neighborhood(tuple(min(9, n) for n in axes))):
        made = plan(pattern, Canvas(axes), PlanSpec(*blocks))
        for dims in ((64, 64), (128, 40)):
            x = inputs(made, Sizes((4, 2), dims, 2), generator)
            q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in x)
            for a, b, c in (x, (q, k, v)):
                read = launch.placed(launch.work_of(a, b, c, call_of(made)), a, b, c)
                assert axes[-1] % 8 or (read.q.boxes is not None and read.k.boxes is not None)
                examined(made, (a, b, c))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("keys", [64, 128])
def test_two_key_blocks_in_a_step(keys: int, generator: torch.Generator) -> None:
    from glocal.kernels.gluon import launch
    from glocal.kernels.gluon.tuning import tuning

    for blocks, dims in (((64, 64), (64, 64)), ((64, 64), (128, 128)), ((128, 64), (128, 128)), ((128, 64), (32, 80))):
        tuned = replace(tuning(blocks, max(dims)), keys=keys, stages=2, most=168, held=False)
        causal = plan(CausalWindow(190), Canvas((410,)), PlanSpec(*blocks))
        for made in (window(500, 301, blocks), window(450, 70, blocks), causal):
            x = inputs(made, Sizes((2, 1), dims), generator)
            out, lse = launch.forward(*x, call_of(made), tuned)
            want, want_lse = launch.forward(*x, call_of(made))
            torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=5e-4)


@pytest.mark.gpu
@on_hopper
def test_joined_query_blocks(generator: torch.Generator) -> None:
    from glocal.kernels.gluon.reblocked import paired

    made = plan(StridedShards(64, 20, 2, heads_q=4, num_kv_heads=2), Canvas((2048,)), PlanSpec(64, 64))
    tensors = PlanTensors(**made.tensors())
    assert paired(tensors, 64) is not None
    examined(made, inputs(made, Sizes((4, 2), (128, 128)), generator))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dims", [(96, 96), (128, 128), (128, 32)], ids=str)
def test_key_blocks_in_halves(dims: tuple[int, int], generator: torch.Generator) -> None:
    from glocal.kernels.gluon.reblocked import halved

    for pattern, shape in ((Neighborhood(17), (48, 64)), (Neighborhood((9, 11)), (23, 31))):
        made = plan(pattern, Canvas(shape), PlanSpec(128, 128))
        assert halved(PlanTensors(**made.tensors()), 128) is not None
        examined(made, inputs(made, Sizes((4, 2), dims), generator))


@pytest.mark.gpu
@on_hopper
def test_lists_by_head(generator: torch.Generator) -> None:
    for heads, patterns in (((4, 2), 2), ((4, 2), 4)):
        made = plan(PerHead(tuple(Neighborhood(30 + 40 * i) for i in range(patterns))), Canvas((300,)))
        assert made.heads == patterns
        examined(made, inputs(made, Sizes(heads), generator))


@pytest.mark.gpu
@on_hopper
def test_lists_by_sample_and_head_in_their_own_order(generator: torch.Generator) -> None:
    q_order = torch.stack([torch.randperm(192, generator=generator) for _ in range(4)]).view(2, 2, 192)
    kv_order = torch.stack([torch.randperm(192, generator=generator) for _ in range(2)]).view(1, 2, 192)
    seen = torch.rand(3, 3, 3, generator=generator) < 0.5
    made = lists(q_order, kv_order, (192, 192), (64, 64), seen)
    made = replace(made, owner=torch.randint(0, 3, (2, 2), generator=generator).int())
    for heads in ((2, 2), (4, 2), (2, 1)):
        examined(made, inputs(made, Sizes(heads, batch=2), generator))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("kind", ["subset", "pads", "repeated keys", "repeated queries", "repeated blocks"])
@pytest.mark.parametrize("block", [64, 128])
def test_orders(kind: str, block: int, generator: torch.Generator) -> None:
    n = 2 * block
    q_order, kv_order = torch.arange(n), torch.arange(n)
    seen = torch.tensor([[[True, False], [True, True]]])
    if kind == "subset":
        q_order, seen = q_order.flip(0)[:block], seen[:, :1]
    elif kind == "pads":
        q_order[::5], kv_order[::3] = -1, -1
    elif kind == "repeated keys":
        kv_order = kv_order // 3
    elif kind == "repeated queries":
        q_order = torch.cat([torch.arange(block), torch.arange(block)])
    made = lists(q_order[None, None], kv_order[None, None], (n, n), (block, block), seen)
    if kind == "repeated blocks":
        count = torch.tensor([[3, 2]], dtype=torch.int32)
        made = replace(made, full=BlockLists(count, torch.tensor([[[0, 1, 0], [1, 1, 0]]], dtype=torch.int32)))
    out, lse = examined(made, inputs(made, Sizes((2, 1)), generator))
    absent = sorted(set(range(n)) - set(q_order.tolist()))
    assert bool((out[:, :, absent] == 0).all()) and bool((lse[:, :, absent] == -torch.inf).all())


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", [[0], [2], [4], [0, 1, 2, 3, 4], [1, 3]], ids=str)
def test_rows_that_see_nothing(rows: list[int], generator: torch.Generator) -> None:
    seen = torch.rand(1, 5, 4, generator=generator) < 0.7
    seen[:, rows] = False
    made = lists(torch.arange(640)[None, None], torch.arange(512)[None, None], (640, 512), (128, 128), seen)
    examined(made, inputs(made, Sizes((2, 1)), generator))
    bits = torch.rand(1, 128, 128, generator=generator) < 0.5
    bits[:, :50] = False  # rows inside a block
    hidden = replace(made, full=made.partial, partial=BlockLists.from_dense(seen, torch.zeros_like(seen).int()))
    examined(replace(hidden, masks=pack(bits)), inputs(made, Sizes((2, 1)), generator))


@pytest.mark.gpu
@on_hopper
def test_strides(generator: torch.Generator) -> None:
    made = window(300, 131)
    x = inputs(made, Sizes((2, 2), (64, 64), 2), generator)
    usual = gluon.forward(*x, call_of(made))

    def turned(t: Tensor) -> Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    def columns_first(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT

    def odd(t: Tensor) -> Tensor:
        room = torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, dtype=t.dtype, device="cuda")
        room[..., 1:-2] = t
        return room[..., 1:-2]

    for change in (turned, columns_first, odd):
        found = gluon.forward(change(x[0]), change(x[1]), change(x[2]), call_of(made))
        assert torch.equal(found[0], usual[0]) and torch.equal(found[1], usual[1])
    one = (x[0], x[1][:, :1].expand(-1, 2, -1, -1), x[2][:1, :1].expand(2, 2, -1, -1))
    examined(made, one)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("ill", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("blocks", [(128, 128), (64, 64)], ids=str)
def test_what_is_not_finite_reaches_only_rows_that_see_it(
    ill: float, blocks: tuple[int, int], generator: torch.Generator
) -> None:
    for made in (window(400, 61, blocks), plan(Neighborhood(5), Canvas((20, 20)), PlanSpec(*blocks))):
        x = inputs(made, Sizes((2, 1)), generator)
        k, v = x[1].clone(), x[2].clone()
        k[:, :, 170], v[:, :, 200] = ill, ill
        out, lse = gluon.forward(x[0], k, v, call_of(made))
        seen = made.dense_counts()[0, 0][:, [170, 200]].bool().any(1).cuda()
        usual = gluon.forward(*x, call_of(made))
        assert bool((~out[:, :, seen].isfinite()).any(-1).all())
        torch.testing.assert_close(out[:, :, ~seen], usual[0][:, :, ~seen], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse[:, :, ~seen], usual[1][:, :, ~seen], rtol=1e-4, atol=5e-4)


@pytest.mark.gpu
@on_hopper
def test_a_thousand_calls_give_equal_bits(generator: torch.Generator) -> None:
    made = plan(Neighborhood((20, 20)), Canvas((48, 48)), PlanSpec(128, 128))
    x = inputs(made, Sizes((8, 4)), generator)
    call = call_of(made)
    out, lse = gluon.forward(*x, call)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        again, again_lse = gluon.forward(*x, call)
        wrong += (again != out).sum() + (again_lse != lse).sum()
    assert int(wrong) == 0


@pytest.mark.gpu
@on_hopper
def test_capture_and_replay_with_other_contents(generator: torch.Generator) -> None:
    made = plan(Neighborhood((20, 20)), Canvas((32, 32)), PlanSpec(128, 128))
    x = inputs(made, Sizes(), generator)
    other = inputs(made, Sizes(), generator)
    call = call_of(made)
    gluon.forward(*x, call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = gluon.forward(*x, call)
    for held, new in zip(x, other, strict=True):
        held.copy_(new)
    graph.replay()
    want = gluon.forward(*other, call)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


@pytest.mark.gpu
@on_hopper
def test_many_heads(generator: torch.Generator) -> None:
    made = window(1, 1, (64, 64))
    x = inputs(made, Sizes((70_000, 70_000), (16, 16)), generator)
    out, _ = gluon.forward(*x, call_of(made))
    assert torch.equal(out, x[2])


@pytest.mark.gpu
@on_hopper
def test_strides_beyond_two_to_the_31(generator: torch.Generator) -> None:
    made = window(256, 100)
    x = inputs(made, Sizes(), generator)
    far = 2**31 + 64
    if torch.cuda.mem_get_info()[0] < 3 * far:
        pytest.skip("less than 6 GiB free on the card")
    room = torch.empty(far + 256 * 64, dtype=torch.bfloat16, device="cuda")
    views = []
    for t in x:
        view = room.as_strided(t.shape, (far, far, 64, 1))
        view.copy_(t)
        q, k, v = (view if u is t else u for u in x)
        got = gluon.forward(q, k, v, call_of(made))
        want = gluon.forward(*x, call_of(made))
        views.append(torch.equal(got[0], want[0]))
    assert views == [True, True, True]


@pytest.mark.gpu
@on_hopper
def test_hostile_lists_are_refused(generator: torch.Generator) -> None:
    made = window(300, 37)
    x = inputs(made, Sizes(), generator)
    full = BlockLists(made.full.count, made.full.index.clone())  # nobody vouches for a copy
    far = BlockLists(made.partial.count, made.partial.index + 9, made.partial.mask)
    with pytest.raises(ValueError, match=r"partial.index holds \d+; legal: 0 to 2"):
        gluon.forward(*x, call_of(replace(made, full=full, partial=far)))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("axis", ["batch", "queries", "keys"])
def test_empty_axes(axis: str, generator: torch.Generator) -> None:
    n = (0 if axis == "queries" else 64, 0 if axis == "keys" else 64)
    seen = torch.ones(1, n[0] // 64, n[1] // 64, dtype=torch.bool)
    made = lists(torch.arange(n[0])[None, None], torch.arange(n[1])[None, None], n, (64, 64), seen)
    out, lse = gluon.forward(*inputs(made, Sizes(batch=int(axis != "batch")), generator), call_of(made))
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())


@pytest.mark.gpu
@on_hopper
def test_whole_calls_with_autograd(generator: torch.Generator) -> None:
    canvas, pattern = Canvas((15, 17)), Neighborhood((5, 7))
    leaves = [torch.randn(1, 2, 255, 64, generator=generator).bfloat16().cuda().requires_grad_() for _ in "qkv"]
    results = []
    for name in ("gluon", "reference"):
        done = attend(leaves[0], leaves[1], leaves[2], pattern, canvas=canvas, backend=name)
        assert done.picked.name == name
        results.append(torch.autograd.grad(done.out.float().square().sum() + done.lse.sum(), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)
