"""Backward of block-sparse attention on Hopper: checked against the definition, then timed beside dense cuDNN.

    python bench/backward_hopper.py [--rows image256:128:aligned:fast,image256:dense] [--repeats 7] [--out FILE.csv]

Cases and inputs are those of `glocal bench kernels`; the level-2 cache is as the call before left it. One head of every
case is checked first, at full size, block by block in float32 and with a gradient of the LSE; a case that fails prints
no speed. Tokens lie in plan order, as a model permuted once has them.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glocal.bench.kernel_cases import CASES, Case, dense_contenders, inputs
from glocal.bench.kernels import one_pass
from glocal.kernels.call import Call, Grads, PlanTensors
from glocal.kernels.gluon import launch_backward
from glocal.kernels.triton.launch import Known
from glocal.measure import time_call
from glocal.plan.blockplan import BlockPlan, unpack

NAMES = {
    "video": "video aligned",
    "image256": "image256 aligned",
    "image128d64": "image128d64 aligned",
    "s2-4-64": "S2 local 4 stride 64",
    "s2-16-16": "S2 local 16 stride 16",
}  # ours to those of `glocal bench kernels`
KINDS = ("aligned", "stride1")
MODES = ("fast", "deterministic")


@dataclass(frozen=True, eq=False)
class Ready:
    """Inputs of one backward in plan order; flops of its visible pairs, visited pairs over visible ones."""

    name: str
    made: BlockPlan
    flops: float
    visited: float
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    grad_lse: Tensor
    out: Tensor
    lse: Tensor

    @property
    def scale(self) -> float:
        """Factor on the logits."""
        return self.q.shape[-1] ** -0.5

    def backward(self, deterministic: bool = False) -> Grads:
        """Ours, with equal bits from call to call or without."""
        call = Call(
            "gluon", self.scale, q_block=self.made.q_block, kv_block=self.made.kv_block,
            plan=PlanTensors(**self.made.tensors()),
        )  # fmt: skip
        known = Known(self.grad, self.grad_lse, self.out, self.lse)
        torch.use_deterministic_algorithms(deterministic)
        try:
            return launch_backward.backward(known, self.q, self.k, self.v, call)
        finally:
            torch.use_deterministic_algorithms(False)


def definition(
    made: BlockPlan, x: tuple[Tensor, ...], scale: float, head: int = 0, chunk: int = 24
) -> tuple[Tensor, ...]:
    """out, lse and, where x = (q, k, v, grad, grad_lse) holds them, dq, dk, dv of one head, each [N, D], float32."""
    u = int(made.owner[0, head % made.owner.shape[1]])
    q, k, v = (t.float() for t in x[:3])
    size, wide = made.q_block, made.kv_block
    out, lse = torch.empty(q.shape[0], v.shape[1], device=q.device), torch.empty(q.shape[0], device=q.device)
    grads = [torch.zeros_like(t) for t in (q, k, v)]
    seen = unpack(made.masks, wide)
    seen = torch.cat([seen, torch.ones_like(seen[:1]) if len(seen) else seen.new_ones(1, size, wide)])
    full, part = made.full, made.partial
    assert part.mask is not None
    for start in range(0, made.q_blocks, chunk):
        some = slice(start, min(start + chunk, made.q_blocks))
        index = torch.cat([full.index[u, some], part.index[u, some]], 1).long()
        mask = torch.cat([torch.full_like(full.index[u, some], len(seen) - 1), part.mask[u, some]], 1).long()
        live = torch.cat([full.live[u, some], part.live[u, some]], 1)
        c, most = index.shape
        tokens = (index[..., None] * wide + torch.arange(wide, device=q.device)).reshape(c, most * wide)
        visible = (seen[mask] & live[..., None, None]).transpose(1, 2).reshape(c, size, most * wide)
        rows = slice(start * size, some.stop * size)
        mine = q[rows].reshape(c, size, -1)
        keys, values = k[tokens], v[tokens]
        s = (mine @ keys.mT * scale).masked_fill(~visible, -torch.inf)
        end = s.logsumexp(-1)
        p = (s - end.masked_fill(end == -torch.inf, 0)[..., None]).exp()
        result = p @ values
        out[rows], lse[rows] = result.flatten(0, 1), end.flatten()
        if len(x) > 3:
            grad, extra = x[3][rows].float().reshape(c, size, -1), x[4][rows].float().reshape(c, size)
            delta = (grad * result).sum(-1) - extra
            ds = p * (grad @ values.mT - delta[..., None]) * scale
            grads[0][rows] = (ds @ keys).flatten(0, 1)
            grads[1].index_add_(0, tokens.flatten(), (ds.mT @ mine).flatten(0, 1))
            grads[2].index_add_(0, tokens.flatten(), (p.mT @ grad).flatten(0, 1))
    return (out, lse, *grads) if len(x) > 3 else (out, lse)


def shared(name: str) -> Case:
    """The case of `glocal bench kernels`."""
    return next(case for case in CASES if case.name == NAMES[name])


def ready(name: str, block: int, stride_one: bool) -> Ready:
    """Random inputs of a case, in blocks that the planner chooses."""
    case = replace(shared(name), tile=(), block=block)
    if stride_one:
        case = replace(case, stride=(1,) * len(case.canvas))
    made, heads, d = case.compiled("cuda"), case.heads, case.head_dim
    flops, visited = made.flops(heads, d, backward=True), made.visited / made.kept
    n = made.q_order.shape[-1]  # slots without a token stand as tokens that nobody needs
    order = torch.arange(n, dtype=torch.int32)[None, None]
    made = replace(made, q_order=order, kv_order=order.clone()).to("cuda")
    q, k, v, grad = inputs(replace(case, canvas=(n,)), "cuda")
    grad_lse = torch.randn(1, heads, n, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    found = [definition(made, (q[0, h], k[0, h], v[0, h]), d**-0.5, h) for h in range(heads)]
    out = torch.stack([f[0] for f in found])[None].to(q.dtype)
    lse = torch.stack([f[1] for f in found])[None]
    return Ready(name, made, flops, visited, q, k, v, grad, grad_lse, out, lse)


def checked(c: Ready, found: Grads) -> tuple[float, ...]:
    """Largest error of each gradient of the first head over its largest entry; RuntimeError beyond 2 %."""
    x = tuple(t[0, 0] for t in (c.q, c.k, c.v, c.grad, c.grad_lse))
    want = definition(c.made, x, c.scale)[2:]
    errors = []
    for name, a, b in zip("qkv", (found.q, found.k, found.v), want, strict=True):
        error = float((a[0, 0].float() - b).abs().max() / b.abs().max())
        errors.append(error)
        if not error < 2e-2:
            raise RuntimeError(f"{c.name}: gradient of {name} differs by {error:.3e} of its largest entry.")
    return tuple(errors)


def timed(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and spread (largest less smallest) of the device's time, ms."""
    time = time_call(run, device="cuda", repeats=repeats)
    return time.median * 1e3, (max(time.samples) - min(time.samples)) * 1e3


def profiled(run: Callable[[], object]) -> dict[str, float]:
    """Time of each kernel of one call, ms."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    events: Any = found.events()
    for event in events:
        name = event.name.split("(")[0].split("<")[0][:40]
        times[name] = times.get(name, 0.0) + event.device_time / 1e3
    return {name: round(ms, 3) for name, ms in sorted(times.items(), key=lambda x: -x[1])[:6]}


def dense(name: str, repeats: int) -> tuple[float, float]:
    """cuDNN's dense backward through torch for the same tokens."""
    case = replace(shared(name), passes="backward")
    *qkv, grad = inputs(case, "cuda")
    return timed(one_pass(case, dense_contenders(case, "cuda")["cuDNN dense"], tuple(qkv), grad), repeats)


def write(rows: list[dict[str, Any]], path: Path | None) -> None:
    """All rows so far."""
    if path is None:
        return
    fields = list(dict.fromkeys(f for row in rows for f in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Check, time, print and write, one row after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    every = [f"{n}:{b}:{k}:{m}" for b in (128, 64) for n in NAMES if not shared(n).shards for k in KINDS for m in MODES]
    every += [f"{n}:64:aligned:{m}" for n in NAMES if shared(n).shards for m in MODES]
    parser.add_argument(
        "--rows", default=",".join(every), help="name:block:kind:mode, or name:dense, one after the other"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="print the time of each kernel")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[dict[str, Any]] = []
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(device, flush=True)
    known: dict[str, Ready] = {}
    for asked in a.rows.split(","):
        name, *rest = asked.split(":")
        row: dict[str, Any] = {"case": name, "mode": "dense cuDNN"}
        if rest == ["dense"]:
            row["ms"], row["spread"] = dense(name, a.repeats)
        else:
            block, kind, mode = rest
            key = f"{name} {kind} block {block}"
            if key not in known:
                known = {key: ready(name, int(block), kind == "stride1")}
            c = known[key]
            run = partial(c.backward, deterministic=mode == "deterministic")
            errors = checked(c, run())
            row |= {"case": key, "mode": mode}
            row["ms"], row["spread"] = timed(run, a.repeats)
            row |= {"tflops": c.flops / row["ms"] / 1e9, "visited_tflops": c.flops * c.visited / row["ms"] / 1e9}
            row |= dict(zip(("error_q", "error_k", "error_v"), errors, strict=True))
            if a.profile:
                print(profiled(run), flush=True)
        rows.append(row | {"device": device})
        write(rows, a.out)
        print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


if __name__ == "__main__":
    main()
