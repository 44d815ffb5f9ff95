"""What an error of one attention does to the model's output, by one-step gradients.

For random cotangents r_k of the output y, g_k = J^T r_k at the output of every attention site: one backward each gives
all sites, heads and candidates at once. With r_k standard normal, the mean over k of (g_k . err)^2 is the square of
what the error moves y by, to first order. Only some query blocks are measured; the rest is taken to err alike and
independently of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from glocal.adapt.records import Core, RunState, SiteCall
from glocal.advise.probe import Probe, ProbeSpec

COTANGENTS = 4


class GradientProbe(Probe):
    """A probe whose `residual` is the one-step error of the output, relative to the output.

    At a probed step the forward runs once more with gradients, so its activations must fit in memory.
    """

    def __init__(self, spec: ProbeSpec, cotangents: int = COTANGENTS) -> None:
        super().__init__(spec)
        self.cotangents = cotangents
        self.weigh = self._weigh
        self._tape: list[tuple[str, Tensor]] | None = None
        self._gradients: dict[str, Tensor] = {}  # site -> [K, H, N, D] of sample 0
        self._size = 1.0
        self._generator = torch.Generator().manual_seed(0)

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """On the tape while gradients are taken, as a `Probe` else."""
        if self._tape is None:
            return super().core(q, k, v, call, inner)
        out = inner(q, k, v, call)
        if not out.requires_grad:
            out = out.requires_grad_()
        self._tape.append((call.site.name, out))
        return out

    def forward(self, original: Callable[..., Any], state: RunState) -> Callable[..., Any]:
        """The model's forward; at probed steps with gradients first."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if state.step in self.spec.steps:
                self._take(original, args, kwargs)
            return original(*args, **kwargs)

        return run

    def _take(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tape = []
        try:
            with torch.enable_grad():
                made = original(*args, **kwargs)
                y = next(leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and leaf.requires_grad)
                outs = [out for _, out in self._tape]
                rows: list[tuple[Tensor, ...]] = []
                for number in range(self.cotangents):
                    r = torch.randn(y.shape, generator=self._generator).to(y)
                    more = number < self.cotangents - 1
                    rows.append(torch.autograd.grad(y, outs, r, retain_graph=more, allow_unused=False))
            names = [name for name, _ in self._tape]
        finally:
            self._tape = None
        self._gradients = {name: torch.stack([row[i][0].float() for row in rows]) for i, name in enumerate(names)}
        self._size = max(float(y[0].detach().float().norm()), 1e-12)

    def _weigh(self, call: SiteCall, heads: tuple[int, int], rows: Tensor, errors: Tensor) -> Tensor:
        """errors [C, h, R, D] at `rows` -> [C, h, R], equal for all rows: its mean square is that of the whole head."""
        g = self._gradients[call.site.name][:, slice(*heads), rows]  # [K, h, R, D]
        moved = torch.einsum("khrd,chrd->kch", g, errors)
        size = moved.square().mean(0).sqrt() / self._size  # [C, h]
        return (size * (call.layout.nq / len(rows)) ** 0.5)[..., None].expand(*errors.shape[:3])
