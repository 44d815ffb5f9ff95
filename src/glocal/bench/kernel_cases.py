"""What `glocal bench kernels` runs: shapes, and the contenders that can serve each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from glocal.canvas import Canvas, tile
from glocal.kernels import registry
from glocal.ops import attention
from glocal.patterns import Neighborhood, StridedShards
from glocal.patterns.base import Pattern
from glocal.plan.blockplan import BlockPlan
from glocal.plan.build import PlanSpec, plan

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A pattern on a canvas of tokens, batch 1.

    tile: tokens of a block as a box; () for a sequence cut into blocks of `block`. ordered: tokens already lie in the
    order of the plan, so that the kernel alone is timed. pattern None: dense. causal: what the dense contenders do.
    passes: "forward", "backward" (alone), or "both".
    """

    name: str
    canvas: tuple[int, ...]
    heads: int
    head_dim: int
    passes: str = "forward"
    window: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    ordered: bool = False
    shards: tuple[int, int] = ()  # type: ignore[assignment]
    block: int = 128

    @property
    def causal(self) -> bool:
        """Whether dense attention would be causal too."""
        return bool(self.shards)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return prod(self.canvas)

    @property
    def pattern(self) -> Pattern | None:
        """Who sees whom; None is everybody."""
        if self.shards:
            local, stride = self.shards
            return StridedShards(self.block, local, stride, self.heads)
        return Neighborhood(self.window, self.stride) if self.window else None

    @property
    def free(self) -> bool:
        """Whether the planner chooses the boxes: none are aligned to windows that move token by token."""
        return bool(self.stride) and max(self.stride) == 1 and not self.ordered

    @property
    def small(self) -> Case:
        """The same on few tokens, for checks against float64."""
        if self.shards:
            return replace(self, canvas=(16 * self.block,), shards=(2, 4), heads=4)
        if not self.window:
            return replace(self, canvas=(700,), heads=2)
        box = self.tile
        axes = tuple(3 * t for t in box)
        step = tuple(t if s > 1 else 1 for t, s in zip(box, self.stride, strict=True))
        return replace(self, canvas=axes, window=tuple(2 * t + t % 2 for t in box), stride=step, heads=2)

    def compiled(self, device: str) -> BlockPlan:
        """The plan."""
        assert self.pattern is not None
        canvas = Canvas(self.canvas)
        if not self.tile or self.free:
            return plan(self.pattern, canvas, PlanSpec(self.block, self.block), device=device)
        order = tile(canvas, self.tile)
        made = plan(self.pattern, canvas, PlanSpec(order.block, order.block, order, order), device=device)
        if not self.ordered:
            return made
        lie = torch.arange(self.tokens, dtype=torch.int32, device=device)[None, None]
        return replace(made, q_order=lie, kv_order=lie.clone())


def _windows(name: str, canvas: tuple[int, ...], window: tuple[int, ...], moves: tuple[int, ...], box: tuple[int, ...],
             half: tuple[int, ...], heads: int, dim: int) -> list[Case]:  # fmt: skip
    """Aligned (whole operator and kernel alone, blocks of 128 and 64) and stride 1, forward and backward."""
    one = (1,) * len(canvas)
    base = Case(name, canvas, heads, dim, window=window, tile=box)
    found = []
    for passes in ("forward", "backward"):
        found += [
            replace(base, name=f"{name} aligned", stride=moves, passes=passes),
            replace(base, name=f"{name} aligned, kernel alone", stride=moves, passes=passes, ordered=True),
            replace(base, name=f"{name} stride 1", stride=one, passes=passes),
        ]
        if dim == 128:
            found.append(replace(base, name=f"{name} aligned, blocks of 64", stride=moves, tile=half, passes=passes))
    return found


VIDEO, IMAGE256, IMAGE128 = (30, 48, 80), (256, 256), (128, 128)
_DENSE = tuple(
    Case(f"{name} dense", canvas, heads, dim, passes=passes)
    for passes in ("forward", "backward")
    for name, canvas, heads, dim in (
        ("video", VIDEO, 8, 128),
        ("image256", IMAGE256, 8, 128),
        ("image128d64", IMAGE128, 16, 64),
    )
)
_SHARDS = tuple(
    Case(f"S2 local {local} stride {stride}", (1 << 17,), 8, 128, passes, shards=(local, stride), block=64)
    for local, stride in ((16, 16), (4, 64))
    for passes in ("forward", "both")
)
CASES = (
    *_windows("image256", IMAGE256, (80, 80), (16, 16), (16, 8), (8, 8), 8, 128),
    *_windows("image128d64", IMAGE128, (48, 48), (16, 16), (16, 8), (8, 8), 16, 64),
    *_windows("video", VIDEO, (18, 24, 24), (6, 8, 8), (2, 8, 8), (1, 8, 8), 8, 128),
    *_DENSE,
    *_SHARDS,
)


def dense_contenders(case: Case, device: str) -> dict[str, Attend]:
    """Dense kernels of torch, and the guest where it is present; causal where the case is."""

    def torch_kernel(kind: SDPBackend) -> Attend:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kind):
                return scaled_dot_product_attention(q, k, v, is_causal=case.causal)

        return run

    found = {"cuDNN dense": torch_kernel(SDPBackend.CUDNN_ATTENTION)}
    if not case.window:  # beside windows the faster one is enough
        found["FlashAttention-2 dense"] = torch_kernel(SDPBackend.FLASH_ATTENTION)
    if case.pattern is None:
        found["glocal auto"] = lambda q, k, v: attention(q, k, v)
        if _able("fa4_dense", device):
            found["FA4 dense"] = lambda q, k, v: attention(q, k, v, backend="fa4_dense")
    return found


def sparse_contenders(case: Case, made: BlockPlan, device: str) -> dict[str, Attend]:
    """Every backend of this machine that runs plans, by name."""
    found: dict[str, Attend] = {}
    for backend in registry.backends():
        can = backend.capability
        runs = can.sparse and can.needs == "plan" and device.split(":")[0] in can.devices
        slow = can.name == "flex" and case.passes != "forward"  # its backward is the definition, block by block
        if runs and not slow and can.name != "quantised" and _able(can.name, device):
            found[can.name] = lambda q, k, v, name=can.name: attention(q, k, v, made, backend=name)
    return found


def _able(name: str, device: str) -> bool:
    return next(b for b in registry.backends() if b.name == name).missing(device.split(":")[0]) is None


def inputs(case: Case, device: str, dtype: torch.dtype = DTYPE) -> list[Tensor]:
    """q, k, v and a gradient of out, [1, H, N, D]."""
    g = torch.Generator(device).manual_seed(0)
    shape = (1, case.heads, case.tokens, case.head_dim)
    return [torch.randn(shape, generator=g, device=device, dtype=torch.float32).to(dtype) for _ in range(4)]
