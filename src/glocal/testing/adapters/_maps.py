"""What the adapters of neighbourhood attention share: maps of tokens as sequences, and one call with its gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout
from glocal.nn import NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d
from glocal.ops import Score, attend
from glocal.patterns import Pattern
from glocal.plan.blockplan import BlockPlan
from glocal.testing.adapter import Run
from glocal.testing.case import Case

LAYERS = {1: NeighborhoodAttention1d, 2: NeighborhoodAttention2d, 3: NeighborhoodAttention3d}


def heads_last(x: Tensor, rank: int) -> Tensor:
    """[B, *map, heads, D] -> [B, heads, N, D]."""
    return x.flatten(1, rank).transpose(1, 2)


def heads_first(x: Tensor, rank: int) -> Tensor:
    """[B, heads, *map, D] -> [B, heads, N, D]."""
    return x.flatten(2, rank + 1)


def extra_layout(shape: Sequence[int], extra: int) -> Layout:
    """Queries on a map, keys on the map and then `extra` keys that everybody sees."""
    return Layout(Canvas(tuple(shape)), Canvas(tuple(shape), after=extra))


def tuples(config: Mapping[str, object], *names: str) -> dict[str, tuple]:
    """Per-axis settings of a config as tuples."""
    return {name: tuple(config[name]) if isinstance(config[name], list) else (config[name],) for name in names}  # type: ignore[arg-type]


def leaves(case: Case, names: Sequence[str]) -> dict[str, Tensor]:
    """Inputs that gradients are asked of."""
    return {name: case[f"in.{name}"].clone().requires_grad_() for name in names if f"in.{name}" in case}


def outputs_and_gradients(
    outputs: Mapping[str, Tensor], grads: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`out.*` of `outputs` and `grad.*` of `inputs`, given the gradients of some outputs."""
    found = torch.autograd.grad([outputs[name] for name in grads], list(inputs.values()), list(grads.values()))
    named = zip(inputs, found, strict=True)
    return {f"out.{n}": t.detach() for n, t in outputs.items()} | {f"grad.{n}": t for n, t in named}


def sequences(inputs: Mapping[str, Tensor], rank: int, first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value as [B, heads, N, D], extra keys behind those of the map; `first`: heads lie before the map."""
    flat = heads_first if first else heads_last
    q, k, v = (flat(inputs[name], rank) for name in ("query", "key", "value"))
    if "additional_keys" in inputs:
        extra = [inputs[name] for name in ("additional_keys", "additional_values")]
        k, v = (torch.cat((a, b if first else b.transpose(1, 2)), 2) for a, b in zip((k, v), extra, strict=True))
    return q, k, v


def attend_map(
    inputs: Mapping[str, Tensor], pattern: Pattern | BlockPlan, layout: Layout, score: Score, where: Run, first: bool
) -> dict[str, Tensor]:
    """Attention over a map, results in the layout of the inputs (heads before the map if `first`).

    inputs: query, key, value and, where a case has them, additional_keys and additional_values.
    """
    q, k, v = sequences(inputs, len(layout.q.grid.axes), first)
    done = attend(q, k, v, pattern, canvas=layout, score=score, backend=where.backend)
    out, lse = (done.out, done.lse) if first else (done.out.transpose(1, 2), done.lse.transpose(1, 2))
    shape = inputs["query"].shape
    return {"output": out.reshape(*shape[:-1], out.shape[-1]), "logsumexp": lse.reshape(shape[:-1])}


def run_layer(case: Case, layer: torch.nn.Module) -> dict[str, Tensor]:
    """A published layer with its weights: `out.y`, `grad.x` and the gradient of every parameter."""
    layer.load_state_dict(case.group("state"), strict=True)
    layer = layer.to(case["in.x"].device)
    x = case["in.x"].clone().requires_grad_()
    return outputs_and_gradients({"y": layer(x)}, {"y": case["in.grad_y"]}, {"x": x, **dict(layer.named_parameters())})


def seen_mask(pattern: Pattern, shape: Sequence[int]) -> Tensor:
    """uint8 [N, N] over one map."""
    canvas = Layout.of(Canvas(tuple(shape)))
    pattern.check(canvas)
    return pattern.mask(canvas)[0].reshape(prod(shape), prod(shape)).to(torch.uint8)
