"""A recipe at work: heads of equal method run in one launch, everything else goes to the dense kernel of the model."""

from __future__ import annotations

import logging
import shlex
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from glocal.adapt.attach import Handle, Method, media_sites
from glocal.adapt.attach import attach as attach_method
from glocal.adapt.host import HostAdapter
from glocal.adapt.records import Core, Site, SiteCall
from glocal.advise.methods import MethodSpec
from glocal.advise.recipe import Recipe, RecipeError
from glocal.plan.blockplan import BlockPlan

LOG = logging.getLogger("glocal.advise")
WATCHED = 20  # sparse calls watched on another device
T = TypeVar("T")


@dataclass
class SiteStats:
    """Of one site: calls, head-calls by method, kernels that ran, kept and visited shares summed over sparse
    head-calls, and head-calls left dense by reason. interpolated: calls on a canvas between two proven ones.
    """

    calls: int = 0
    methods: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    dense: Counter[str] = field(default_factory=Counter)
    kept_sum: float = 0.0
    visited_sum: float = 0.0
    interpolated: int = 0

    @property
    def sparse(self) -> int:
        """Head-calls that ran a method."""
        return sum(self.methods.values())

    @property
    def kept(self) -> float:
        """Visible share of sparse head-calls, 1.0 if there were none."""
        return self.kept_sum / self.sparse if self.sparse else 1.0


class RecipeMethod(Method):
    """Runs a recipe at the `core` of every site it names."""

    def __init__(self, recipe: Recipe, *, check_canvas: bool = True) -> None:
        self.recipe = recipe
        self.check_canvas = check_canvas
        self.stats: dict[str, SiteStats] = {}
        self._told: set[tuple[int, ...]] = set()
        self._elsewhere = Elsewhere(recipe)

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """Self and joint attention; cross attention stays dense, layers with a sliding window as they are."""
        return media_sites(sites)

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """q, k, v [B, H, N, D] -> [B, H, N, D]."""
        stats = self.stats.setdefault(call.site.name, SiteStats())
        stats.calls += 1
        reason = self._refusal(q, call)
        heads = q.shape[1]
        groups: dict[str, list[int]] = {}
        for head in range(heads):
            groups.setdefault("dense" if reason is not None else self._method(call, head), []).append(head)
        if set(groups) == {"dense"}:
            stats.dense[reason if reason is not None else "by the recipe"] += heads
            return inner(q, k, v, call)
        out = torch.empty_like(q)
        for name, members in groups.items():
            mine = _heads(q, k, v, members)
            here = call if len(members) == heads else replace(call, heads=tuple(members))
            if name == "dense":
                result = inner(*mine, here)
                stats.dense["by the recipe"] += len(members)
            else:
                method = self.recipe.methods[name]
                result, plan, kernel = self._elsewhere.watched(method, mine, here, inner)
                stats.methods[name] += len(members)
                stats.kernels[kernel] += 1
                stats.kept_sum += plan.kept * len(members)
                stats.visited_sum += plan.visited * len(members)
            if len(members) == heads:
                return result
            out[:, members] = result
        return out

    def _method(self, call: SiteCall, head: int) -> str:
        state = call.state
        progress = None if state.total is None else state.step / state.total
        return self.recipe.method_at(
            call.site.layer,
            head,
            component=call.site.component,
            kind=call.site.kind,
            branch=state.branch,
            sigma=state.timestep,
            progress=progress,
            tokens=call.layout.nk if state.phase == "prefill" else None,
        )

    def _refusal(self, q: Tensor, call: SiteCall) -> str | None:
        """Why this call runs dense whatever the rules say, or None."""
        fallback = self.recipe.fallback
        if torch.is_grad_enabled() and q.requires_grad:
            if fallback.training == "raise":
                raise RuntimeError(
                    "The attached recipe was proven for inference, but gradients are on; use torch.no_grad(), or set "
                    "fallback.training='dense' in the recipe."
                )
            return "training"
        if call.state.phase == "decode":
            return "decode"
        if getattr(call.native, "opaque", False):
            return "a mask"
        if call.layout.nk < fallback.min_tokens:
            return f"fewer than {fallback.min_tokens} tokens"
        if len(call.layout.kv.grids) != 1:
            return "a canvas of several grids, or none"
        return self._unproven(call) if self.check_canvas else None

    def _unproven(self, call: SiteCall) -> str | None:
        """Why a canvas or a batch that was not proven runs dense, or None."""
        workload, unseen = self.recipe.workload, self.recipe.fallback.unseen_canvas
        samples = len({sample for sample, _ in call.state.rows})
        batch = workload.get("batch")
        if batch is not None and samples and not batch[0] <= samples <= batch[1]:
            if unseen == "raise":
                raise RuntimeError(f"The recipe was proven on {batch[0]} to {batch[1]} samples at once, not {samples}.")
            if unseen == "dense":
                return "batch not proven"
        proven = [c["shape"] for c in workload.get("canvases", [])]
        shape = list(call.layout.kv.grid.axes)
        if not proven or shape in proven:
            return None
        if _between(shape, proven) and all(m.resolution == "free" for m in self.recipe.methods.values()):
            self.stats[call.site.name].interpolated += 1
            return None
        if unseen == "raise":
            raise RuntimeError(f"The recipe was not proven on a canvas of {shape}.")
        if tuple(shape) not in self._told:
            self._told.add(tuple(shape))
            words = "runs dense" if unseen == "dense" else "runs all the same"
            LOG.warning("The recipe was not proven on a canvas of %s, only on %s: it %s.", shape, proven, words)
        return "canvas not proven" if unseen == "dense" else None


class Elsewhere:
    """Watches a recipe on another GPU than the one its times were taken on: the first calls run dense as well, and a
    recipe that is slower than dense there is told of once.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.home = recipe.device.get("device")
        self.sparse: list[float] = []
        self.dense: list[float] = []

    def watched(
        self, method: MethodSpec, qkv: tuple[Tensor, Tensor, Tensor], call: SiteCall, inner: Core
    ) -> tuple[Tensor, BlockPlan, str]:
        """What `method.run` gives."""
        here = device_name(qkv[0])
        if self.home is None or here is None or here == self.home or len(self.sparse) >= WATCHED:
            return method.run(*qkv, call)
        done, seconds = _clocked(lambda: method.run(*qkv, call), qkv[0])
        self.sparse.append(seconds)
        self.dense.append(_clocked(lambda: inner(*qkv, call), qkv[0])[1])
        sparse, dense = median(self.sparse), median(self.dense)
        if len(self.sparse) == WATCHED and sparse > dense:
            warnings.warn(
                f"The recipe's times were taken on {self.home}, not measured here: on {here} its attention takes "
                f"{sparse * 1e3:.2f} ms a call and dense {dense * 1e3:.2f} ms. Make one here: glocal advise.",
                stacklevel=2,
            )
        return done


def device_name(tensor: Tensor) -> str | None:
    """The GPU a tensor lies on; None on a CPU, whose name says little of its speed."""
    return torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else None


def _clocked(run: Callable[[], T], tensor: Tensor) -> tuple[T, float]:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    began = time.perf_counter()
    out = run()
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return out, time.perf_counter() - began


def _heads(q: Tensor, k: Tensor, v: Tensor, members: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The query heads `members` and the key heads they use; as they are if that is all of them."""
    if len(members) == q.shape[1]:
        return q, k, v
    group = q.shape[1] // k.shape[1]
    keys = [head // group for head in members]
    return q[:, members], k[:, keys], v[:, keys]


def _between(shape: Sequence[int], proven: Sequence[Sequence[int]]) -> bool:
    """Whether every axis lies between those of the proven canvases."""
    if any(len(p) != len(shape) for p in proven):
        return False
    return all(min(p[a] for p in proven) <= n <= max(p[a] for p in proven) for a, n in enumerate(shape))


def attach(
    model: Any,
    recipe: Recipe | str | Path,
    *,
    host: HostAdapter | None = None,
    on_mismatch: Literal["raise", "warn"] | None = None,
    on_unseen: Literal["dense", "run", "raise"] | None = None,
) -> Handle:
    """Put a recipe into a model: ``handle = attach(model, "recipe.json")``; ``handle.undo()`` takes it out.

    on_mismatch: what to do if class, configuration, weights or dtype are not those the recipe was proven on.
    on_unseen: what a call on a canvas does that it was not proven on. None: as the recipe's `fallback` says.
    ``handle.method.stats`` counts what ran, by site. Raises RecipeError for a broken recipe and for a mismatch,
    ValueError for a model without a host adapter.
    """
    if not isinstance(recipe, (Recipe, str, Path)):
        raise TypeError(f"attach: recipe is a {type(recipe).__name__}; legal: a Recipe, or the path of a recipe.json.")
    loaded = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    for name, value, legal in (
        ("on_mismatch", on_mismatch, ("raise", "warn")),
        ("on_unseen", on_unseen, ("dense", "run", "raise")),
    ):
        if value is not None and value not in legal:
            raise ValueError(f"{name}={value!r}; legal: {', '.join(legal)}, or None for what the recipe says.")
    _match(model, loaded, "recipe.json" if isinstance(recipe, Recipe) else str(recipe), on_mismatch)
    if on_unseen is not None:
        loaded = replace(loaded, fallback=replace(loaded.fallback, unseen_canvas=on_unseen))
    return attach_method(model, RecipeMethod(loaded), host=host)


def _match(model: Any, recipe: Recipe, path: str, wanted: str | None) -> None:
    """Raise or warn for the first difference between the model and the one the recipe was proven on."""
    found = recipe.check(model)
    if not found:
        return
    first = found[0]
    more = f" ({len(found) - 1} more differ)" if len(found) > 1 else ""
    text = (
        f"{first.field}: the recipe was proven on {first.recipe}, this model has {first.model}{more}. Prove it here: "
        f"glocal validate {shlex.quote(path)} MODEL --workload FILE -o OUT"
    )
    if (recipe.fallback.mismatch if wanted is None else wanted) == "raise":
        raise RecipeError(f"{text}; or attach with on_mismatch='warn'.")
    warnings.warn(text, stacklevel=3)
