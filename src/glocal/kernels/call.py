"""What crosses the operator boundary: tensors and one constant string, and the record that kernels read.

A call carries either block lists (`plan`) or, for the reference alone, how often each query sees each key (`counts`).
Additive bias comes in two kinds: `dense` tensors that broadcast to [B, H, Nq, Nk], and `table` lookups
``table[h, k_code[j] - q_code[i]]`` (entries out of range add nothing), which serve relative positions and biases
between parts without an N x N array.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from glocal.kernels.quant import Quant


@dataclass(frozen=True, eq=False)
class PlanTensors:
    """The tensors of a BlockPlan, as `glocal.plan.blockplan.BlockPlan` documents them."""

    q_order: Tensor
    kv_order: Tensor
    full_count: Tensor
    full_index: Tensor
    part_count: Tensor
    part_index: Tensor
    part_mask: Tensor
    masks: Tensor
    owner: Tensor


@dataclass(frozen=True, eq=False)
class DenseBias:
    """values: [B|1, H|1, Nq|1, Nk|1], added after scale and soft-cap."""

    values: Tensor


@dataclass(frozen=True, eq=False)
class TableBias:
    """table: [H|1, T]; q_code, k_code: int64 [Nq], [Nk]. Adds ``table[h, k_code[j] - q_code[i]]`` where that exists."""

    table: Tensor
    q_code: Tensor
    k_code: Tensor

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors, the differentiable one first."""
        return self.table, self.q_code, self.k_code


Bias = DenseBias | TableBias


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call as a kernel sees it.

    scale: factor on the logits. softcap: logits become ``softcap * tanh(logits / softcap)``; None for no cap.
    q_block, kv_block: block sizes of `plan`.
    counts: int32 [B|1, H|1, Nq, Nk] for the reference backend, else None.
    segments: int32 [B, Nq] and [B, Nk] document numbers, -1 for padding; None if all tokens see each other.
    dropout: probability of dropping a weight; seed: int64 [1] for its generator.
    quant: how to round, None for exact attention.
    lse_grad, bias_grad: whether backward has a gradient of the LSE to carry through, and owes gradients of biases.
    """

    backend: str
    scale: float
    softcap: float | None = None
    q_block: int = 0
    kv_block: int = 0
    plan: PlanTensors | None = None
    counts: Tensor | None = None
    bias: tuple[Bias, ...] = ()
    segments: tuple[Tensor, Tensor] | None = None
    dropout: float = 0.0
    seed: Tensor | None = None
    quant: Quant | None = None
    lse_grad: bool = True
    bias_grad: bool = True

    def differentiable(self) -> tuple[Tensor, ...]:
        """The tensor of every bias that gradients belong to."""
        return tuple(b.values if isinstance(b, DenseBias) else b.table for b in self.bias)

    def tensors(self) -> list[Tensor]:
        """All of them."""
        found = [] if self.plan is None else [*vars(self.plan).values()]
        for group in ((self.counts,), self.segments, (self.seed,)):
            found += [t for t in group if t is not None] if group is not None else []
        for bias in self.bias:
            found += [bias.values] if isinstance(bias, DenseBias) else bias.parts()
        return found

    def encode(self) -> tuple[list[Tensor], str]:
        """Tensors and the constant string that says what each of them is."""
        tensors: list[Tensor] = []

        def put(*new: Tensor) -> str:
            tensors.extend(new)
            return ",".join([f"{i}" for i in range(len(tensors) - len(new), len(tensors))])

        words = [
            f"backend={self.backend}",
            f"scale={self.scale}",
            f"softcap={self.softcap}",
            f"blocks={self.q_block},{self.kv_block}",
            f"dropout={self.dropout}",
        ]
        if self.quant is not None:
            words.append(f"quant={self.quant.word}")
        if self.plan is not None:
            p = self.plan
            lists = (p.full_count, p.full_index, p.part_count, p.part_index, p.part_mask)
            words.append("plan=" + put(p.q_order, p.kv_order, *lists, p.masks, p.owner))
        if self.counts is not None:
            words.append("counts=" + put(self.counts))
        if self.segments is not None:
            words.append("segments=" + put(*self.segments))
        if self.seed is not None:
            words.append("seed=" + put(self.seed))
        for bias in self.bias:
            words.append("bias=" + (put(bias.values) if isinstance(bias, DenseBias) else put(*bias.parts())))
        return tensors, "|".join(words)

    @staticmethod
    def decode(tensors: list[Tensor], spec: str) -> Call:
        """The inverse of `encode`."""
        s = parse(spec)

        def take(places: tuple[int, ...]) -> list[Tensor]:
            return [tensors[i] for i in places]

        return Call(
            backend=s.backend,
            scale=s.scale,
            softcap=s.softcap,
            q_block=s.blocks[0],
            kv_block=s.blocks[1],
            plan=PlanTensors(*take(s.plan)) if s.plan else None,
            counts=take(s.counts)[0] if s.counts else None,
            bias=tuple(DenseBias(*take(at)) if len(at) == 1 else TableBias(*take(at)) for at in s.bias),
            segments=(tensors[s.segments[0]], tensors[s.segments[1]]) if s.segments else None,
            dropout=s.dropout,
            seed=take(s.seed)[0] if s.seed else None,
            quant=s.quant,
            lse_grad=s.lse_grad,
            bias_grad=s.bias_grad,
        )


@dataclass(frozen=True)
class Spec:
    """The constant string as a record: plain values, and the places of each tensor."""

    backend: str
    scale: float
    softcap: float | None
    blocks: tuple[int, ...]
    dropout: float
    plan: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    segments: tuple[int, ...] = ()
    seed: tuple[int, ...] = ()
    quant: Quant | None = None
    bias: tuple[tuple[int, ...], ...] = ()
    lse_grad: bool = True
    bias_grad: bool = True


@lru_cache(maxsize=4096)
def parse(spec: str) -> Spec:
    """Read the constant string of `Call.encode`."""
    words: dict[str, Any] = {"bias": ()}
    for word in spec.split("|"):
        name, _, value = word.partition("=")
        if name in ("scale", "dropout"):
            words[name] = float(value)
        elif name == "softcap":
            words[name] = None if value == "None" else float(value)
        elif name == "backend":
            words[name] = value
        elif name == "quant":
            words[name] = Quant.of_word(value)
        elif name == "without":  # said by the caller of backward alone
            words |= {f"{kind}_grad": False for kind in value.split(",")}
        else:
            places = tuple(int(i) for i in value.split(","))
            words[name] = (*words["bias"], places) if name == "bias" else places
    return Spec(**words)


def bias_places(spec: str) -> list[int]:
    """Positions of the tensors that bias gradients belong to, one for each bias; none if backward owes none."""
    found = parse(spec)
    return [at[0] for at in found.bias] if found.bias_grad else []


def without(spec: str, *, lse: bool, bias: bool) -> str:
    """The constant string for a backward that has no gradient of the LSE, or owes none of biases."""
    words = [name for name, absent in (("lse", lse), ("bias", bias)) if absent]
    return spec + ("|without=" + ",".join(words) if words else "")


@dataclass(frozen=True, eq=False)
class Grads:
    """Gradients of one call; `bias` has one entry for each bias, in the shape of its values or table."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: tuple[Tensor, ...] = ()
