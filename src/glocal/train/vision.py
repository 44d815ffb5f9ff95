"""A recipe that trains any backbone for classification, or with a dense head for segmentation.

AdamW, warm-up and cosine, gradient clipping, bfloat16, an average of the weights, mixup and cutmix, stochastic depth
(the model's own `drop_path`), on one or several GPUs through accelerate. All that is random in an update comes from
generators seeded by (seed, step) and the process, and the whole state is saved together: a run that was killed and
started again ends with the same numbers as one that was not.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal._files import write_atomic
from glocal.data.labelled import IGNORED, Labelled
from glocal.train.augment import flip_and_shift, mixed
from glocal.train.average import Average
from glocal.train.graphed import captured

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels


@dataclass(frozen=True)
class Recipe:
    """How to train.

    steps: updates in all. batch: samples of an update, all processes together. lr: at `batch` samples. warmup: updates.
    mixup, cutmix, smoothing: see `glocal.train.augment.mixed`. shift: px that images move. ema: decay of the average.
    precision: "bf16" or "no". graph: an update is one CUDA graph, which a small model is trained with much faster: the
    host then launches nothing but it. It takes one GPU, batches of one shape, and a model that never waits for the
    device (not BiFormer, which plans by content). every: updates a row of the curve. save: updates between saved
    states.
    """

    steps: int
    batch: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 100
    clip: float = 1.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.1
    shift: int = 4
    ema: float = 0.998
    precision: str = "bf16"
    graph: bool = False
    seed: int = 0
    every: int = 50
    save: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "every", "save"):
            if getattr(self, name) < 1:
                raise ValueError(f"Recipe: {name}={getattr(self, name)} must be at least 1.")
        if self.precision not in ("bf16", "no"):
            raise ValueError(f"Recipe: precision={self.precision!r}; legal: 'bf16', 'no'.")
        if self.warmup >= self.steps:
            raise ValueError(
                f"Recipe: warmup={self.warmup} must be below steps={self.steps}; for example {self.steps // 10}."
            )


@dataclass(frozen=True)
class Row:
    """Mean loss over the updates up to `step`, learning rate there, seconds of training, all runs together."""

    step: int
    loss: float
    lr: float
    seconds: float


class Trainer:
    """model: gives logits [B, classes] or [B, classes, H, W]. train: its data. folder: where the state lies.

    A state in `folder` is gone on from. accelerator: an `accelerate.Accelerator`; None makes one for the recipe.
    """

    def __init__(
        self, model: nn.Module, train: Labelled, recipe: Recipe, folder: Path | None = None, accelerator: Any = None
    ) -> None:
        if accelerator is None:
            accelerator = accelerator_for()
        processes = accelerator.num_processes
        if recipe.batch % processes:
            raise ValueError(f"Recipe: batch={recipe.batch} must be a multiple of the {processes} processes.")
        if recipe.graph and (accelerator.device.type != "cuda" or processes > 1):
            raise ValueError(
                f"Recipe: graph=True takes one process on a GPU, not {processes} on {accelerator.device.type}; "
                "legal: graph=False."
            )
        self.accelerator, self.recipe, self.data = accelerator, recipe, train
        self.average = Average(model.to(accelerator.device), recipe.ema)
        groups, fused = _groups(model, recipe.weight_decay), accelerator.device.type == "cuda"
        self._lr = torch.tensor(recipe.lr, device=accelerator.device)  # a graph reads it
        self._graph: tuple[Callable[[], None], Tensor, Tensor, Tensor] | None = None
        lr = self._lr if recipe.graph else recipe.lr
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=fused, capturable=recipe.graph)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.step, self.seconds = 0, 0.0
        self.curve: list[Row] = []
        self._sums = [0, 0.0]  # updates and their losses since the last row
        self.path = None if folder is None else folder / "state.pt"
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                self._load(self.path)

    @property
    def plain(self) -> nn.Module:
        """The model without wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def run(self, until: int | None = None, after: Callable[[Trainer], None] | None = None) -> None:
        """Update until step `until` (None: the end); `after` is called whenever a row of the curve was written."""
        recipe = self.recipe
        until = recipe.steps if until is None else min(until, recipe.steps)
        losses: list[Tensor] = []
        mark = time.monotonic()
        while self.step < until:
            losses.append(self._update())
            self.step += 1
            last = self.step == recipe.steps
            if self.step % recipe.every == 0 or last or self.step % recipe.save == 0 or self.step == until:
                self._sums = [self._sums[0] + len(losses), self._sums[1] + float(torch.stack(losses).sum())]
                losses = []
                if not math.isfinite(self._sums[1]):
                    raise FloatingPointError(f"step {self.step}: the loss is not finite; lower the learning rate")
            now = time.monotonic()
            self.seconds, mark = self.seconds + now - mark, now
            if self.step % recipe.every == 0 or last:
                self.curve.append(
                    Row(self.step, self._sums[1] / self._sums[0], self._rate(self.step - 1), self.seconds)
                )
                self._sums = [0, 0.0]
                if after is not None:
                    after(self)
            if self.step % recipe.save == 0 or self.step == until:
                self.save()

    def _rate(self, step: int) -> float:
        recipe = self.recipe
        if step < recipe.warmup:
            return recipe.lr * (step + 1) / (recipe.warmup + 1)
        done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * done)) + 1e-2 * recipe.lr

    def _update(self) -> Tensor:
        images, targets = self._drawn(self.step)
        rate = self._rate(self.step)
        if self.recipe.graph:
            self._lr.fill_(rate)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr if self.recipe.graph else rate
        self.model.train()
        loss = self._launched(images, targets) if self.recipe.graph else self._learn(images, targets)
        self.average.update(self.plain)
        return loss

    def _seed(self) -> None:
        """Dropout and stochastic depth draw from torch's own generators."""
        where = self.accelerator
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.step * where.num_processes + where.process_index)

    def _learn(self, images: Tensor, targets: Tensor, seed: bool = True) -> Tensor:
        """One update of the parameters; its loss. seed: first."""
        if seed:
            self._seed()
        with self._autocast():
            logits = self.model(images)
        loss = _loss(logits.float(), targets, self.recipe.smoothing)
        self.accelerator.backward(loss)
        if self.recipe.clip > 0:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _launched(self, images: Tensor, targets: Tensor) -> Tensor:
        """The same as a CUDA graph, made at the first call."""
        if self._graph is None:
            own = images.clone(), targets.clone()
            back = _kept([*self.plain.parameters(), *self.plain.buffers()], self.optimizer)
            launch, loss = captured(lambda: self._learn(*own, seed=False), back)
            self._graph = launch, loss, *own
        launch, loss, *own = self._graph
        for have, new in zip(own, (images, targets), strict=True):
            if have.shape != new.shape or have.dtype != new.dtype:
                raise ValueError(
                    f"step {self.step}: graph=True takes batches of one shape; this one has {tuple(new.shape)}, "
                    f"{new.dtype}, the first had {tuple(have.shape)}, {have.dtype}. Give images of one size, or "
                    "graph=False."
                )
            have.copy_(new)
        self._seed()
        launch()
        return loss.clone()

    def _autocast(self) -> Any:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")

    def _drawn(self, step: int) -> tuple[Tensor, Tensor]:
        """Images and targets of an update for this process."""
        recipe, where = self.recipe, self.accelerator
        count, start = len(self.data), step * recipe.batch
        index = torch.cat(
            [
                _order(count, recipe.seed, epoch)[max(start - epoch * count, 0) : start + recipe.batch - epoch * count]
                for epoch in range(start // count, (start + recipe.batch - 1) // count + 1)
            ]
        )
        share = recipe.batch // where.num_processes
        mine = index[where.process_index * share : (where.process_index + 1) * share]
        images, targets = (t.to(where.device, non_blocking=True) for t in self.data.batch(mine))
        generator = torch.Generator().manual_seed((recipe.seed * 1_000_003 + step) * 4099 + where.process_index)
        images, targets = flip_and_shift(images, targets, recipe.shift, generator)
        images = normalised(images)
        if self.data.segmentation:
            return images, targets
        rates = (recipe.mixup, recipe.cutmix, recipe.smoothing)
        return mixed(images, targets, len(self.data.classes), rates, generator)

    def evaluate(self, data: Labelled, averaged: bool = True, batch: int = 256) -> dict[str, float]:
        """Scores of the averaged weights (or the present ones) on `data`: accuracy, or mean IoU and pixel accuracy."""
        model, where = self.plain, self.accelerator
        kept = {name: value.detach().clone() for name, value in model.named_parameters()}
        if averaged:
            self.average.copy_to(model)
        model.eval()
        try:
            with torch.no_grad(), self._autocast():
                table = confusion(model, data, where.device, batch, (where.process_index, where.num_processes))
        finally:
            with torch.no_grad():
                for name, value in model.named_parameters():
                    value.copy_(kept[name])
        return scores(where.reduce(table, reduction="sum"), data.segmentation)

    def save(self) -> None:
        """Write the whole state at once, by the first process."""
        if self.path is None:
            return
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        state = {
            "model": self.plain.state_dict(),
            "average": self.average.state(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "sums": self._sums,
            "curve": [asdict(row) for row in self.curve],
            "recipe": asdict(self.recipe),
        }
        content = io.BytesIO()
        torch.save(state, content)
        write_atomic(self.path, content.getvalue())

    def _load(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = {field.name: field.default for field in fields(Recipe)} | state["recipe"]
        changed = [k for k, v in asdict(self.recipe).items() if before[k] != v and k not in ("every", "save")]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{path}: was made with {name}={before[name]!r}, the recipe has "
                f"{name}={getattr(self.recipe, name)!r}; use the same recipe, or another folder."
            )
        self.plain.load_state_dict(state["model"])
        self.average.load(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self._sums = state["step"], state["seconds"], state["sums"]
        self.curve = [Row(**row) for row in state["curve"]]


def _kept(tensors: Sequence[Tensor], optimizer: Any) -> Callable[[], None]:
    """A call that puts tensors and the state of an optimiser back to what they are now, in place."""
    before = [t.detach().clone() for t in tensors]
    states = {p: {n: t.clone() for n, t in found.items()} for p, found in optimizer.state.items()}

    @torch.no_grad()
    def back() -> None:
        for t, old in zip(tensors, before, strict=True):
            t.copy_(old)
        for p, found in optimizer.state.items():
            for name, t in found.items():
                if p in states:
                    t.copy_(states[p][name])
                else:
                    t.zero_()

    return back


def normalised(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 with the mean and spread of ImageNet's channels."""
    mean, std = (torch.tensor(t, device=images.device)[:, None, None] for t in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def confusion(
    model: nn.Module, data: Labelled, device: torch.device, batch: int, share: tuple[int, int] = (0, 1)
) -> Tensor:
    """How often each class (row) was given each class (column), int64. share: (number, count) of this process."""
    classes = len(data.classes)
    table = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    for index in torch.arange(share[0], len(data), share[1]).split(batch):
        images, targets = (t.to(device) for t in data.batch(index))
        found = model(normalised(images)).argmax(1)
        counted = targets != IGNORED
        pairs = targets[counted] * classes + found[counted]
        table += torch.bincount(pairs.flatten(), minlength=classes * classes)
    return table.reshape(classes, classes)


def scores(table: Tensor, segmentation: bool) -> dict[str, float]:
    """accuracy, and for segmentation miou: mean over classes that occur of intersection over union."""
    table = table.double()
    right = table.diag()
    found = {"accuracy": float(right.sum() / table.sum().clamp(min=1))}
    if segmentation:
        union = table.sum(0) + table.sum(1) - right
        found["miou"] = float((right / union.clamp(min=1))[union > 0].mean())
    return found


def _loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    if targets.is_floating_point():
        return F.cross_entropy(logits, targets)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=smoothing)


def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7919 + epoch))


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Parameters with weight decay, and those without: vectors, and what the model names."""
    spared = getattr(model, "no_weight_decay", set)()
    named = dict(model.named_parameters())
    without = {name for name, value in named.items() if value.dim() <= 1 or name in spared}
    return [
        {"params": [value for name, value in named.items() if name not in without], "weight_decay": decay},
        {"params": [value for name, value in named.items() if name in without], "weight_decay": 0.0},
    ]


def accelerator_for(cpu: bool = False) -> Any:
    """An accelerator for the devices of this machine, or for its CPU. Raises ModuleNotFoundError without accelerate."""
    try:
        from accelerate import Accelerator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "training needs accelerate: pip install 'glocal[train]'", name="accelerate"
        ) from error
    return Accelerator(cpu=cpu)
