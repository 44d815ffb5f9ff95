"""Updates that never wait for the device, so that a whole one can be a CUDA graph.

An update of a small model is a few thousand kernels of a few microseconds; launched one by one they take most of the
time, and more where other processes use the same GPU. A graph launches all of them at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Loss = Callable[[], Tensor]
"""Draws its data itself, from the device's own generator, and gives a scalar."""
Made = TypeVar("Made")


def captured(run: Callable[[], Made], back: Callable[[], None]) -> tuple[Callable[[], None], Made]:
    """`run` as a CUDA graph: a call that launches it, and what it returned, which every launch writes anew.

    run: is called three times first, so that nothing is compiled or planned any more; `back` takes back what it
    changed. Raises RuntimeError for a run that waits for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()
    back()
    return graph.replay, made


class Updates:
    """AdamW on `parameters`, gradients clipped to norm 1, and a running average of the parameters.

    Parameters of low precision are copies of `masters` in float32, which the optimiser changes; others are masters
    themselves. means: averages of the masters. sums [2]: loss and gradient norm, added up until `read`. decay: of
    matrices.
    """

    def __init__(
        self, parameters: Sequence[Tensor], rate: float, *, average: float = 0.999, decay: float = 0.01
    ) -> None:
        self.parameters = list(parameters)
        low = any(p.dtype != torch.float32 for p in self.parameters)
        self.masters = [p.detach().float().clone() for p in self.parameters] if low else self.parameters
        self.means = [p.detach().clone() for p in self.masters]
        device = self.parameters[0].device
        self.cuda = device.type == "cuda"
        self._rate = torch.tensor(rate, device=device)
        self._forget, self.count = 1 - average, 0
        groups = [
            {"params": [p for p in self.masters if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in self.masters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        first = self._rate if self.cuda else rate
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=first, betas=(0.9, 0.99), fused=self.cuda, capturable=self.cuda
        )
        self.sums = torch.zeros(2, device=device)

    def rate(self, value: float) -> None:
        """Set the learning rate; a graph sees it too."""
        self._rate.fill_(value)
        if not self.cuda:
            for group in self.optimizer.param_groups:
                group["lr"] = value

    def update(self, loss: Loss) -> None:
        """One update."""
        found = loss()
        found.backward()
        if self.masters is not self.parameters:
            for master, p in zip(self.masters, self.parameters, strict=True):
                master.grad = None if p.grad is None else p.grad.float()
                p.grad = None
        norm = nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            if self.masters is not self.parameters:
                torch._foreach_copy_(self.parameters, self.masters)
            torch._foreach_lerp_(self.means, self.masters, self._forget)
            self.sums += torch.stack([found.detach(), norm])

    def young(self) -> None:
        """Call it after each of the first updates: the average forgets where the parameters began."""
        self.count += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.means, self.masters, 1 / (1 + self.count) ** 0.75)

    def graphed(self, loss: Loss) -> Callable[[], None]:
        """`update(loss)` as a CUDA graph; the updates that warm it up are taken back. Raises RuntimeError for a loss
        that waits for the device.
        """
        kept = copy.deepcopy(self.state())

        def back() -> None:
            self._write(kept)
            self.sums.zero_()

        return captured(lambda: self.update(loss), back)[0]

    def read(self, updates: int) -> tuple[float, float]:
        """Mean loss and gradient norm of the `updates` since the last reading; waits for the device."""
        loss, norm = (self.sums / updates).tolist()
        self.sums.zero_()
        return loss, norm

    def state(self) -> dict[str, Any]:
        """Masters, averages and the optimiser's tensors, as they are (not copied)."""
        return {
            "masters": [p.detach() for p in self.masters],
            "means": self.means,
            "optimizer": [dict(self.optimizer.state.get(p, {})) for p in self.masters],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        for p, values in zip(self.masters, state["optimizer"], strict=True):
            self.optimizer.state[p] = {n: v.to(p.device) for n, v in values.items()}
        self._write(state)

    @torch.no_grad()
    def _write(self, state: dict[str, Any]) -> None:
        """Values of a state into the tensors that graphs know."""
        for p, value, mean, old in zip(self.masters, state["masters"], self.means, state["means"], strict=True):
            p.copy_(value)
            mean.copy_(old)
        if self.masters is not self.parameters:
            torch._foreach_copy_(self.parameters, self.masters)
        for p, values in zip(self.masters, state["optimizer"], strict=True):
            for name, tensor in self.optimizer.state.get(p, {}).items():
                if values:
                    tensor.copy_(values[name])
                else:
                    tensor.zero_()
