"""Backward kernels of Hopper: compiled for sm_90 anywhere, compared with the definition in float64 on a Hopper card."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout, Part
from glocal.kernels import reference
from glocal.kernels.call import Call, Grads, PlanTensors
from glocal.patterns import CausalWindow, Neighborhood, PerHead, StridedShards
from glocal.plan import BlockPlan, PlanSpec, plan
from glocal.plan.blockplan import BlockLists

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")
gpu = pytest.mark.gpu
BLOCKS = [128, 64]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Calls compile for sm_90 instead of starting anything; the list fills with names and compiled kernels."""
    if torch.cuda.is_available():
        pytest.skip("kernels run on this machine")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Pretended:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

    usual: Any = JITFunction.run
    made: list[tuple[str, Any]] = []

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = usual(self, *args, grid=grid, warmup=True, **options)
        made.append((self.__name__, kernel))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compiled)
    monkeypatch.setattr(driver, "_active", Pretended())
    return made


def stack(kernel: Any, folder: Path) -> int:
    """Bytes of stack a thread: registers that did not fit go there."""
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    return int(re.findall(r"STACK:(\d+)", found.stdout)[-1])


@pytest.mark.parametrize("whole", [True, False], ids=["fast", "equal bits"])
@pytest.mark.parametrize(
    ("block", "size", "dtype"),
    [(128, 128, torch.bfloat16), (128, 64, torch.float16), (64, 128, torch.bfloat16), (64, 64, torch.bfloat16)],
    ids=str,
)
def test_compiles_for_hopper(
    block: int, size: int, dtype: torch.dtype, whole: bool, kernels: list[tuple[str, Any]], tmp_path: Path
) -> None:
    from glocal.kernels.gluon import launch_backward
    from glocal.kernels.triton.launch import Known

    made = plan(Neighborhood((9, 13)), Canvas((24, 32)), PlanSpec(block, block))
    q, k, v, grad = (torch.zeros(1, 2, 768, size, dtype=dtype) for _ in range(4))
    call = Call("gluon", 0.3, q_block=block, kv_block=block, plan=PlanTensors(**made.tensors()))
    rows = torch.zeros(1, 2, 768)
    torch.use_deterministic_algorithms(not whole)
    launch_backward.backward(Known(grad, rows, grad, rows), q, k, v, call)
    torch.use_deterministic_algorithms(False)
    found = {name: kernel for name, kernel in kernels if name.startswith("backward")}
    whole = whole and block == 128
    assert set(found) == {"backward_kv_kernel"} | (set() if whole else {"backward_q_kernel"})
    for name, kernel in found.items():
        assert "wgmma.mma_async" in kernel.asm["ptx"] and "cp.async.bulk.tensor" in kernel.asm["ptx"]
        assert ("red.relaxed.gpu.global.add.v4.f32" in kernel.asm["ptx"]) == whole
        assert stack(kernel, tmp_path) <= STACK.get((name, block, size, whole), 0), name
        assert kernel.metadata.shared <= 232448


# Addresses that stay on the stack where two accumulators fill the registers, between steps and between key blocks.
STACK = {
    ("backward_kv_kernel", 128, 128, True): 120,
    ("backward_kv_kernel", 128, 64, True): 184,
    ("backward_kv_kernel", 128, 64, False): 8,
    ("backward_kv_kernel", 64, 128, False): 8,
}


@pytest.fixture(params=[False, True], ids=["fast", "equal bits"])
def deterministic(request: pytest.FixtureRequest) -> Any:
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


def inputs(
    made: BlockPlan, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, batch: int = 1
) -> list[Tensor]:
    """q, k, v, gradients of out and LSE."""
    g = torch.Generator().manual_seed(3)
    n, m = made.layout.nq, made.layout.nk
    shapes = ((heads[0], n, dims[0]), (heads[1], m, dims[0]), (heads[1], m, dims[1]), (heads[0], n, dims[1]))
    tensors = [torch.randn(batch, *s, generator=g).to(dtype).cuda() for s in shapes]
    return [*tensors, torch.randn(batch, heads[0], n, generator=g).cuda()]


def expected(made: BlockPlan, x: list[Tensor]) -> tuple[Tensor, Tensor, Grads]:
    """out, lse and gradients in float64."""
    call = Call("reference", 0.3, counts=made.dense_counts().cuda())
    q, k, v, grad = (t.double() for t in x[:4])
    out, lse = reference.forward(q, k, v, call)
    return out, lse, reference.backward(grad, x[4].double(), q, k, v, out, lse, call)


def found(made: BlockPlan, x: list[Tensor], out: Tensor, lse: Tensor) -> Grads:
    from glocal.kernels.gluon import launch_backward
    from glocal.kernels.triton.launch import Known

    made = made.to("cuda")
    call = Call("gluon", 0.3, q_block=made.q_block, kv_block=made.kv_block, plan=PlanTensors(**made.tensors()))
    known = Known(x[3], x[4], out.to(x[0].dtype), lse.float())
    return launch_backward.backward(known, x[0], x[1], x[2], call)


def same(made: BlockPlan, x: list[Tensor]) -> Grads:
    """Errors stay below the rounding of weights and results to 16 bits."""
    out, lse, want = expected(made, x)
    got = found(made, x, out, lse)
    bound = 2e-2 if x[0].dtype == torch.bfloat16 else 4e-3
    for name, a, b in (("q", got.q, want.q), ("k", got.k, want.k), ("v", got.v, want.v)):
        assert a.shape == b.shape and a.dtype == x[0].dtype
        error = float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30))
        assert error < bound, f"gradient of {name}: {error:.2e}"
    return got


def lists(q_order: Tensor, kv_order: Tensor, n: tuple[int, int], block: int, seen: Tensor) -> BlockPlan:
    nothing = torch.zeros_like(seen)
    return BlockPlan(
        layout=Layout(Canvas([Part("q", (n[0],))]), Canvas([Part("k", (n[1],))])),
        q_block=block,
        kv_block=block,
        q_order=q_order.int(),
        kv_order=kv_order.int(),
        full=BlockLists.from_dense(seen),
        partial=BlockLists.from_dense(nothing, nothing.int()),
        masks=torch.zeros(0, block, block // 32, dtype=torch.int32),
        owner=torch.zeros(1, 1, dtype=torch.int32),
    )


@gpu
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dims", [(128, 128), (64, 64), (80, 80), (40, 40), (64, 128), (16, 16)], ids=str)
def test_head_sizes(dims: tuple[int, int], dtype: torch.dtype, block: int, deterministic: bool) -> None:
    made = plan(Neighborhood(301), Canvas((700,)), PlanSpec(block, block))
    assert int(made.full.count.sum()) and int(made.partial.count.sum())
    same(made, inputs(made, (2, 2), dims, dtype))


@gpu
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (7, 1), (4, 2)], ids=str)
def test_grouped_heads(heads: tuple[int, int], block: int, deterministic: bool) -> None:
    made = plan(Neighborhood((9, 13)), Canvas((24, 32)), PlanSpec(block, block))
    same(made, inputs(made, heads, (64, 64), torch.bfloat16, batch=2))


@gpu
@pytest.mark.parametrize("programs", [1, 3])
def test_a_program_takes_many_key_blocks(programs: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from glocal.kernels.gluon import launch_backward

    monkeypatch.setattr(launch_backward, "processors", lambda device: programs)
    made = plan(Neighborhood((9, 13)), Canvas((40, 48)))
    for heads in ((2, 2), (4, 2)):
        same(made, inputs(made, heads, (64, 64), torch.bfloat16, batch=2))


@gpu
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 127, 128, 129, 255, 257])
def test_every_tail(n: int, deterministic: bool) -> None:
    for block in BLOCKS:
        made = plan(CausalWindow(min(n, 99)), Canvas((n,)), PlanSpec(block, block))
        same(made, inputs(made, (2, 1), (64, 64), torch.bfloat16))


@gpu
def test_lists_by_head(deterministic: bool) -> None:
    for patterns in (2, 4):
        made = plan(PerHead(tuple(Neighborhood(41 + 60 * i) for i in range(patterns))), Canvas((500,)))
        same(made, inputs(made, (4, 2), (64, 64), torch.bfloat16))


@gpu
@pytest.mark.parametrize("kind", ["subset", "pads", "repeated keys", "repeated queries", "repeated blocks", "own"])
def test_orders(kind: str, deterministic: bool) -> None:
    g = torch.Generator().manual_seed(0)
    q_order, kv_order = torch.arange(256), torch.arange(256)
    seen = torch.tensor([[[True, False], [True, True]]])
    batch = 1
    if kind == "subset":
        q_order = q_order.flip(0)[:128]
        seen = seen[:, :1]
    elif kind == "pads":
        q_order[::5] = -1
        q_order = q_order.sort(descending=True).values
    elif kind == "repeated keys":
        kv_order = kv_order // 3
    elif kind == "repeated queries":
        q_order = torch.cat([torch.arange(128), torch.arange(128)])
    made = lists(q_order[None, None], kv_order[None, None], (256, 256), 128, seen)
    if kind == "repeated blocks":
        count = torch.tensor([[3, 2]], dtype=torch.int32)
        made = replace(made, full=BlockLists(count, torch.tensor([[[0, 1, 0], [1, 1, 0]]], dtype=torch.int32)))
    elif kind == "own":
        batch = 2
        orders = [torch.stack([torch.randperm(256, generator=g) for _ in range(m)]) for m in (4, 2)]
        owner = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)
        made = lists(
            orders[0].view(2, 2, 256),
            orders[1].view(1, 2, 256),
            (256, 256),
            128,
            torch.rand(3, 2, 2, generator=g) < 0.6,
        )
        made = replace(made, owner=owner)
    same(made, inputs(made, (4, 2), (64, 64), torch.bfloat16, batch))


@gpu
def test_rows_that_see_nothing(deterministic: bool) -> None:
    seen = torch.tensor([[[True, False], [False, False], [True, False]]])
    made = lists(torch.arange(384)[None, None], torch.arange(256)[None, None], (384, 256), 128, seen)
    got = same(made, inputs(made, (2, 1), (128, 128), torch.bfloat16))
    assert bool((got.q[:, :, 128:256] == 0).all())
    assert bool((got.k[:, :, 128:] == 0).all()) and bool((got.v[:, :, 128:] == 0).all())


@gpu
def test_strides(deterministic: bool) -> None:
    made = plan(Neighborhood(151), Canvas((400,)))
    x = inputs(made, (2, 2), (64, 64), torch.bfloat16)
    same(made, [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x])
    same(made, [t.mT.contiguous().mT if t.dim() == 4 else t for t in x])
    spread = torch.ones((), device="cuda", dtype=torch.bfloat16).expand(x[3].shape)
    same(made, [*x[:3], spread, torch.zeros((), device="cuda").expand(x[4].shape)])


@gpu
@pytest.mark.parametrize("ill", [torch.nan, torch.inf])
def test_bad_keys_reach_only_rows_that_see_them(ill: float, deterministic: bool) -> None:
    made = plan(Neighborhood(41), Canvas((400,)))
    x = inputs(made, (2, 1), (64, 64), torch.bfloat16)
    out, lse, _ = expected(made, x)
    usual = found(made, x, out, lse)
    bad = [t.clone() for t in x]
    bad[1][:, :, 200], bad[2][:, :, 230] = ill, ill
    seen = made.dense_counts()[0, 0][:, [200, 230]].bool().any(1).cuda()
    got = found(made, bad, torch.where(seen[:, None], torch.nan, out), torch.where(seen, torch.nan, lse))
    assert bool(got.q[:, :, seen].isnan().all())
    torch.testing.assert_close(got.q[:, :, ~seen], usual.q[:, :, ~seen], rtol=1e-2, atol=1e-3)
    far = made.dense_counts()[0, 0][seen.cpu()].sum(0).cuda() == 0  # keys that no bad row sees
    for a, b in ((got.k, usual.k), (got.v, usual.v)):
        torch.testing.assert_close(a[:, :, far], b[:, :, far], rtol=1e-2, atol=1e-3)


@gpu
@pytest.mark.parametrize("ill", [torch.nan, torch.inf])
def test_bad_queries_reach_only_keys_that_they_see(ill: float, deterministic: bool) -> None:
    made = plan(CausalWindow(41), Canvas((400,)))
    x = inputs(made, (2, 1), (64, 64), torch.bfloat16)
    out, lse, _ = expected(made, x)
    usual = found(made, x, out, lse)
    bad = [t.clone() for t in x]
    bad[0][:, :, 200], bad[3][:, :, 230] = ill, ill
    rows = torch.zeros(400, dtype=torch.bool, device="cuda")
    rows[200] = True
    got = found(made, bad, torch.where(rows[:, None], torch.nan, out), torch.where(rows, torch.nan, lse))
    rows[230] = True
    assert bool(got.q[:, :, rows].isnan().all())
    torch.testing.assert_close(got.q[:, :, ~rows], usual.q[:, :, ~rows], rtol=1e-2, atol=1e-3)
    seen = made.dense_counts()[0, 0][rows.cpu()].any(0).cuda()
    for a, b in ((got.k, usual.k), (got.v, usual.v)):
        assert bool(a[:, :, seen].isnan().any(-1).all())
        torch.testing.assert_close(a[:, :, ~seen], b[:, :, ~seen], rtol=1e-2, atol=1e-3)


@gpu
@pytest.mark.parametrize("size", [128, 64])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
def test_lists_in_portions(
    heads: tuple[int, int], size: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glocal.kernels.gluon import portions, reblocked

    monkeypatch.setattr(portions, "_LEAST", 6)
    made = plan(StridedShards(64, 4, 16, heads_q=heads[0], num_kv_heads=2), Canvas((4096,)), PlanSpec(64, 64))
    for more in (1.0, 2.0):  # key blocks alone and in pairs
        monkeypatch.setattr(reblocked, "MORE_BACKWARD", more)
        same(made, inputs(made, heads, (size, size), torch.bfloat16, batch=2))


@gpu
def test_equal_bits() -> None:
    torch.use_deterministic_algorithms(True)
    made = plan(Neighborhood((9, 13)), Canvas((40, 48)))
    x = inputs(made, (4, 2), (128, 128), torch.bfloat16)
    out, lse, _ = expected(made, x)
    first = found(made, x, out, lse)
    for _ in range(1000):
        again = found(made, x, out, lse)
        assert all(
            torch.equal(a, b) for a, b in zip((first.q, first.k, first.v), (again.q, again.k, again.v), strict=True)
        )
    torch.use_deterministic_algorithms(False)


@gpu
def test_captured_in_a_graph(deterministic: bool) -> None:
    from glocal.kernels.gluon import launch_backward
    from glocal.kernels.triton.launch import Known

    made = plan(Neighborhood((9, 13)), Canvas((24, 32))).to("cuda")
    x = inputs(made, (2, 2), (64, 64), torch.bfloat16)
    out, lse, want = expected(made, x)
    call = Call("gluon", 0.3, q_block=made.q_block, kv_block=made.kv_block, plan=PlanTensors(**made.tensors()))
    place = [torch.zeros_like(t) for t in x]
    known = Known(place[3], place[4], torch.zeros_like(out, dtype=x[0].dtype), torch.zeros_like(lse).float())
    launch_backward.backward(known, place[0], place[1], place[2], call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = launch_backward.backward(known, place[0], place[1], place[2], call)
    for to, t in zip([*place, known.out, known.lse], [*x, out, lse], strict=True):
        to.copy_(t)
    for _ in range(3):
        graph.replay()
    for a, b in zip((got.q, got.k, got.v), (want.q, want.k, want.v), strict=True):
        assert float((a.double() - b).abs().max() / b.abs().max()) < 2e-2
