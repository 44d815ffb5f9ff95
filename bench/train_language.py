"""Trains the built-in language model on text full of facts and questions, and ships its weights and loss curve.

    python bench/train_language.py --device cuda --seconds 270     # the budget meant for one GPU
    python bench/train_language.py --preset tiny                     # a dry run

Texts grow from 128 to 4,096 bytes. Kill it at any time and start it again: it goes on from `--folder`. With `--seconds`
the rest of the schedule is shortened so that the run ends in time. Behind the last update, and in every row that
`--every` asks for, stands how often the code of a fact is answered right.
"""

from __future__ import annotations

import argparse
import csv
import io
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from glocal._files import write_atomic
from glocal.data import QUESTION, TextSpec, make_text
from glocal.models.language import Decoder, DecoderConfig, save_decoder
from glocal.models.language.weights import SHIPPED
from glocal.train import build_optimizers, trapezoid
from glocal.train.average import Average

ROOT = Path(__file__).resolve().parent.parent
TEXTS = TextSpec()
ASKED = len(QUESTION.format(name="kadubo")) - 1  # from the first letter of a question to its last
WEIGHT = 4.0  # an answer's digits count so much more: they are few, and the rest is learned soon


@dataclass(frozen=True)
class Stage:
    """`share` of the updates (of the time, with --seconds) on `batch` texts of `length` bytes."""

    length: int
    batch: int
    share: float


@dataclass(frozen=True)
class Preset:
    """Stages in turn; learning rates of trunk and rest; updates in all where no time is given."""

    stages: tuple[Stage, ...]
    steps: int
    trunk_lr: float = 4e-3
    lr: float = 3e-3


PRESETS = {
    "tiny": Preset((Stage(64, 2, 0.5), Stage(128, 2, 0.5)), steps=6),
    "full": Preset(
        (Stage(128, 512, 0.3), Stage(256, 256, 0.15), Stage(1024, 64, 0.2), Stage(4096, 16, 0.35)), steps=12_000
    ),
    "short": Preset((Stage(128, 64, 1.0),), steps=4000),
}


class Texts(Dataset[Tensor]):
    """Text number `index` of a stage, as bytes [length + 1]."""

    def __init__(self, stage: Stage, first: int, count: int) -> None:
        self.stage, self.first, self.count = stage, first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        text = make_text(self.stage.length + 1, self.first + index, TEXTS)
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def batches(stage: Stage, first: int, workers: int) -> Iterator[Tensor]:
    """Batches [batch, length + 1] without end."""
    loader = DataLoader(Texts(stage, first, 1 << 30), stage.batch, num_workers=workers, drop_last=True)
    yield from loader


def answers(ids: Tensor) -> Tensor:
    """Whether a place [B, N] predicts a digit of an answer: the four behind "Recall name="."""
    asked = torch.zeros_like(ids, dtype=torch.bool)
    asked[:, ASKED:] = (ids[:, ASKED:] == ord("=")) & (ids[:, :-ASKED] == ord("R"))  # at the "="
    out = asked.clone()
    for digit in range(1, 4):
        out[:, digit:] |= asked[:, :-digit]
    return out


@torch.no_grad()
def accuracy(model: Decoder, length: int, device: str, texts: int = 8) -> tuple[float, float]:
    """Share of codes' digits predicted right on unseen texts, and the loss there in nats a byte."""
    rows = [make_text(length + 1, 1 << 40 | number, TEXTS).encode() for number in range(texts)]
    ids = torch.tensor([list(row) for row in rows], device=device)
    right, asked, loss = 0, 0, 0.0
    for row in ids:
        logits = model(row[None, :-1]).float()
        wanted, seen = row[None, 1:], answers(row[None, :-1])
        right += int((logits.argmax(-1) == wanted)[seen].sum())
        asked += int(seen.sum())
        loss += float(F.cross_entropy(logits[0], wanted[0]))
    return right / max(asked, 1), loss / texts


def device_name(device: str) -> str:
    """What the run is on, for the record."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


def write_curve(rows: list[list[object]], path: Path, device: str) -> None:
    """The curve with hardware and versions, whole or not at all."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    columns = ["step", "length", "batch", "loss", "held_out_loss", "answer_digits_right", "at_length", "seconds"]
    writer.writerow([*columns, "device", "torch", "python"])
    for row in rows:
        writer.writerow([*row, device_name(device), torch.__version__, platform.python_version()])
    write_atomic(path, table.getvalue())


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="full")
    parser.add_argument("--seconds", type=float, help="end the schedule in this time instead of a number of updates")
    parser.add_argument("--weights", type=Path, default=SHIPPED)
    parser.add_argument("--curve", type=Path, default=ROOT / "results" / "train_language.csv")
    parser.add_argument("--every", type=int, default=250, help="updates a row of the curve")
    parser.add_argument("--workers", type=int, default=0, help="processes that write texts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    preset, device = PRESETS[options.preset], options.device
    model = Decoder(DecoderConfig()).to(device)
    forward = torch.compile(model, dynamic=False) if options.compile else model
    optimizers = build_optimizers(model, trunk_lr=preset.trunk_lr, lr=preset.lr)
    rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    average = Average(model, 0.998)
    shadow = Decoder(model.config).to(device).eval()
    rows: list[list[object]] = []
    began, step, total = time.monotonic(), 0, 10_000  # of the schedule: parts of it done, in ten thousandths

    def part() -> float:
        """How much of the schedule is done, 0 to 1."""
        if options.seconds is None:
            return step / preset.steps
        return (time.monotonic() - began) / options.seconds

    def publish(stage: Stage, loss: float) -> None:
        average.copy_to(shadow)
        right, held_out = accuracy(shadow, stage.length, device)
        done = [step, stage.length, stage.batch, f"{loss:.4f}", f"{held_out:.4f}", f"{right:.4f}", stage.length]
        rows.append([*done, f"{time.monotonic() - began:.1f}"])
        print(rows[-1], flush=True)
        save_decoder(shadow, options.weights, {"step": str(step), "preset": options.preset, "texts": repr(TEXTS)})
        write_curve(rows, options.curve, device)

    end = 0.0
    for number, stage in enumerate(preset.stages):
        end += stage.share
        loss = torch.zeros(())
        for ids in batches(stage, number << 36, options.workers):
            if part() >= min(end, 1.0):
                break
            factor = trapezoid(min(int(part() * total), total - 1), total, 200, 3500)
            for optimizer, own in zip(optimizers, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, own, strict=True):
                    group["lr"] = rate * factor
            ids = ids.to(device, torch.long, non_blocking=True)
            with torch.autocast(device.split(":")[0], torch.bfloat16):
                logits = forward(ids[:, :-1])
            each = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            worth = 1 + (WEIGHT - 1) * answers(ids[:, :-1]).flatten().float()
            loss = (each * worth).sum() / worth.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            average.update(model)
            step += 1
            if step % options.every == 0:
                publish(stage, loss.item())
        publish(stage, loss.item())


if __name__ == "__main__":
    main()
