"""A training loop that can be killed at any moment and goes on as if nothing had happened.

Everything random in an update comes from a generator seeded by (seed, step); parameters, averages, optimisers, step and
loss curve are saved together. So a run that was cut and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from glocal._files import write_atomic
from glocal.train.average import Average
from glocal.train.schedule import trapezoid


@dataclass(frozen=True)
class LoopSpec:
    """steps: updates in all. warmup, cooldown: see `trapezoid`. clip: largest gradient norm. ema: decay of the average.

    every: updates a row of the curve. save: seconds between saved states.
    """

    steps: int
    warmup: int = 50
    cooldown: int = 0
    clip: float = 1.0
    ema: float = 0.998
    seed: int = 0
    every: int = 20
    save: float = 180.0


@dataclass(frozen=True)
class CurveRow:
    """Means of loss and gradient norm over the updates up to `step`; `seconds` of training, all runs together."""

    step: int
    loss: float
    norm: float
    factor: float
    seconds: float


class Loop:
    """Runs updates on `model` and its average.

    loss(step, generator) computes the scalar to minimise with the model's present parameters. State lives in
    `folder`/state.pt; if it exists, the loop goes on from it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        loss: Callable[[int, torch.Generator], Tensor],
        spec: LoopSpec,
        folder: Path,
    ) -> None:
        self.model, self.optimizers, self.loss, self.spec = model, list(optimizers), loss, spec
        self.path = folder / "state.pt"
        self.average = Average(model, spec.ema)
        self.rates = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.step, self.seconds = 0, 0.0
        self.curve: list[CurveRow] = []
        # Running sums over the updates since the last row: count, loss, norm.
        self._sums = [0.0, 0.0, 0.0]
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            self._load()

    def run(self, until: int | None = None, after: Callable[[Loop], None] | None = None) -> None:
        """Update until step `until` (default: the end); `after` is called whenever the state was saved."""
        until = self.spec.steps if until is None else min(until, self.spec.steps)
        saved = mark = time.monotonic()
        while self.step < until:
            self._update()
            now = time.monotonic()
            self.seconds, mark = self.seconds + now - mark, now
            if self.step % self.spec.every == 0 or self.step == self.spec.steps:
                self._write_row()
            if now - saved >= self.spec.save or self.step == until:
                self.save()
                saved = now
                if after is not None:
                    after(self)

    def _update(self) -> None:
        spec = self.spec
        factor = trapezoid(self.step, spec.steps, spec.warmup, spec.cooldown)
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        # One stream an update: what is drawn does not depend on where the run was cut.
        generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + self.step)
        loss = self.loss(self.step, generator)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), spec.clip)
        value, size = loss.item(), norm.item()
        if not (value == value and abs(size) != float("inf") and size == size):
            raise FloatingPointError(f"step {self.step}: loss {value}, gradient norm {size}; lower the learning rate")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update(self.model)
        self.step += 1
        self._sums = [self._sums[0] + 1, self._sums[1] + value, self._sums[2] + size]

    def _write_row(self) -> None:
        count, loss, norm = self._sums
        factor = trapezoid(self.step - 1, self.spec.steps, self.spec.warmup, self.spec.cooldown)
        self.curve.append(CurveRow(self.step, loss / count, norm / count, factor, self.seconds))
        self._sums = [0.0, 0.0, 0.0]

    def save(self) -> None:
        """Write the whole state in one step."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "sums": self._sums,
            "curve": [asdict(row) for row in self.curve],
        }
        content = io.BytesIO()
        torch.save(state, content)
        write_atomic(self.path, content.getvalue())

    def _load(self) -> None:
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self._sums = state["step"], state["seconds"], state["sums"]
        self.curve = [CurveRow(**row) for row in state["curve"]]
