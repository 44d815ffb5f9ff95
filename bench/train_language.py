"""Trains the built-in language model on text full of facts and questions, and ships its weights and loss curve.

    python bench/train_language.py --device cuda --seconds 200     # the budget meant for one GPU
    python bench/train_language.py --preset tiny                   # a dry run

Texts are drawn on the device, by the grammar of `glocal.data.make_text`. They grow from 128 to 4,096 bytes: a stage
ends when nearly all digits of answers come out right, or when its share of the time is over. Most of the loss is the
answers': what is looked up is learned by heads that match and copy (induction heads, arXiv 2209.11895), and those form
in short texts that hold little else. In every row of the curve stands how many needles the averaged model finds at five
depths of unseen texts of 4,096 bytes, by the very objective `glocal advise` judges it with.
"""

from __future__ import annotations

import argparse
import csv
import io
import platform
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal._files import write_atomic
from glocal.advise import Sample
from glocal.advise.next_token import NextToken
from glocal.data import FACT, QUESTION, TextSpec, make_text
from glocal.data.texts import CONSONANTS, SENTENCES, VOWELS
from glocal.models.language import Decoder, DecoderConfig, encode, save_decoder
from glocal.models.language.weights import SHIPPED
from glocal.train import build_optimizers, trapezoid
from glocal.train.average import Average

ROOT = Path(__file__).resolve().parent.parent
DIGITS = 4


@dataclass(frozen=True)
class Stage:
    """`batch` texts of `length` bytes of `texts`, until `enough` of the answers' digits are right, or `share` of the
    time (of the updates) is over.
    """

    length: int
    batch: int
    share: float
    texts: TextSpec
    enough: float = 0.995


@dataclass(frozen=True)
class Preset:
    """Stages in turn; updates in all where no time is given."""

    stages: tuple[Stage, ...]
    steps: int


DENSE, MIXED, USUAL = TextSpec(0.5, 0.5), TextSpec(0.4, 0.45), TextSpec()
PRESETS = {
    "tiny": Preset((Stage(128, 2, 0.5, DENSE), Stage(256, 2, 0.5, USUAL)), steps=6),
    "proof": Preset((Stage(128, 64, 1.0, DENSE, 2.0),), steps=800),
    "full": Preset(
        (
            Stage(128, 512, 0.3, DENSE),
            Stage(256, 256, 0.15, MIXED),
            Stage(1024, 64, 0.2, USUAL),
            Stage(4096, 24, 0.35, USUAL, 2.0),
        ),
        steps=12_000,
    ),
}


class Writer:
    """Texts of the language as tensors, drawn on a device."""

    def __init__(self, device: str, seed: int) -> None:
        self.draw = torch.Generator(device).manual_seed(seed)
        self.device = device
        said = [" ".join(words) for words in product(*SENTENCES)]
        rows = [encode(s[0].upper() + s[1:] + ". ") for s in said]
        fact, asked = (encode(t.format(name="", code="")) for t in (FACT, QUESTION + "{code}. "))
        self.fact, self.asked = fact.index(ord("=")), asked.index(ord("="))  # bytes before the name
        self.plain_at = 2
        rows = [self._frame(FACT), self._frame(QUESTION + "{code}. "), *rows]
        width = max(map(len, rows))
        self.rows = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)  # [kinds, W]
        self.lengths = torch.tensor([len(row) for row in rows], device=device)
        self.consonants = torch.tensor(encode(CONSONANTS), device=device)
        self.vowels = torch.tensor(encode(VOWELS), device=device)

    def _frame(self, words: str) -> list[int]:
        return encode(words.format(name="x" * 6, code="0" * DIGITS))

    def _integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.draw, device=self.device)

    def write(self, batch: int, length: int, spec: TextSpec) -> tuple[Tensor, Tensor]:
        """ids [batch, length] and whether a place is a digit of an answer."""
        count = length // int(self.lengths[:2].min()) + 2
        kind = torch.rand(batch, count, generator=self.draw, device=self.device)
        facts = kind < spec.facts
        before = facts.long().cumsum(1) - facts.long()  # facts said earlier [B, S]
        asks = ~facts & (kind < spec.facts + spec.questions) & (before > 0)
        place = torch.argsort((~facts).long(), dim=1, stable=True)  # sentences that are facts, first ones first
        pick = (torch.rand(batch, count, generator=self.draw, device=self.device) * before).long()
        own = torch.arange(count, device=self.device).expand(batch, -1)
        source = torch.where(asks, place.gather(1, pick), own)  # the sentence whose name and code are used
        row = torch.where(
            facts, 0, torch.where(asks, 1, self.plain_at + self._integers(len(self.rows) - 2, batch, count))
        )
        text = self.rows[row]  # [B, S, W]
        syllables = [self.consonants[self._integers(len(CONSONANTS), batch, count, 3)]]
        syllables.append(self.vowels[self._integers(len(VOWELS), batch, count, 3)])
        name = torch.stack(syllables, -1).flatten(2)  # [B, S, 6]
        code = self._integers(10, batch, count, DIGITS) + ord("0")
        name, code = (t.gather(1, source[..., None].expand_as(t)) for t in (name, code))
        answer = torch.zeros_like(text, dtype=torch.bool)
        for which, at in ((facts, self.fact), (asks, self.asked)):
            end = at + name.shape[-1] + 1  # behind the name and "="
            text[..., at : end - 1] = torch.where(which[..., None], name, text[..., at : end - 1])
            text[..., end : end + DIGITS] = torch.where(which[..., None], code, text[..., end : end + DIGITS])
        end = self.asked + name.shape[-1] + 1
        answer[..., end : end + DIGITS] = asks[..., None]
        ends = self.lengths[row].cumsum(1)  # [B, S]
        spot = torch.arange(length, device=self.device).expand(batch, -1).contiguous()
        sentence = torch.searchsorted(ends, spot, right=True)
        inside = spot - (ends - self.lengths[row]).gather(1, sentence)
        flat = sentence * text.shape[-1] + inside
        return text.flatten(1).gather(1, flat), answer.flatten(1).gather(1, flat)


@torch.no_grad()
def retrieval(model: Decoder, length: int, texts: int = 16) -> float:
    """Share of needles found at the depths of `NextToken` in unseen texts of `length` bytes."""
    judge = NextToken(encode, tokens=length, window=256, fact=FACT, question=QUESTION)
    found = 0.0
    for number in range(texts):
        out = judge.run(model, Sample(str(number), number, {"text": make_text(length, 1 << 40 | number)}))
        found += judge.distance(out, out)["retrieval"]
    return found / texts


def device_name(device: str) -> str:
    """What the run is on, for the record."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


def write_curve(rows: list[list[object]], path: Path, device: str) -> None:
    """The curve with hardware and versions, whole or not at all."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    columns = ["step", "length", "batch", "loss", "answer_loss", "answer_digits_right", "needles_found", "seconds"]
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
    parser.add_argument("--trunk-lr", type=float, default=4e-3)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--rest", type=float, default=0.3, help="what the loss outside answers counts for")
    parser.add_argument("--sizes", nargs="*", default=[], help="name=value of DecoderConfig, for comparisons")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    preset, device = PRESETS[options.preset], options.device
    config = DecoderConfig()
    for word in options.sizes:
        name, value = word.split("=")
        config = replace(config, **{name: type(getattr(config, name))(value)})
    model = Decoder(config).to(device)
    count = sum(p.numel() for p in model.parameters())
    print(config, f"{count} parameters", flush=True)
    optimizers = build_optimizers(model, trunk_lr=options.trunk_lr, lr=options.lr)
    rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    average = Average(model, 0.998)
    shadow = Decoder(config).to(device).eval()
    writer = Writer(device, options.seed)
    rows: list[list[object]] = []
    began, step, total = time.monotonic(), 0, 10_000  # of the schedule: parts of it done, in ten thousandths
    right = torch.zeros((), device=device)

    def part() -> float:
        """How much of the schedule is done, 0 to 1."""
        if options.seconds is None:
            return step / preset.steps
        return (time.monotonic() - began) / options.seconds

    def publish(stage: Stage, loss: float, answers: float) -> None:
        average.copy_to(shadow)
        found = retrieval(shadow, 1024 if options.preset in ("tiny", "proof") else 4096)
        done = [step, stage.length, stage.batch, f"{loss:.4f}", f"{answers:.4f}", f"{float(right):.4f}", f"{found:.4f}"]
        rows.append([*done, f"{time.monotonic() - began:.1f}"])
        print(rows[-1], flush=True)
        notes = {"step": str(step), "preset": options.preset, "needles_found": f"{found:.4f}"}
        save_decoder(shadow, options.weights, notes)
        write_curve(rows, options.curve, device)

    end = 0.0
    for stage in preset.stages:
        end = min(end + stage.share, 1.0)
        right.zero_()
        loss = asked = torch.zeros(())
        mine = 0
        while part() < end:
            factor = trapezoid(min(int(part() * total), total - 1), total, 100, 3500)
            for optimizer, own in zip(optimizers, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, own, strict=True):
                    group["lr"] = rate * factor
            ids, answer = writer.write(stage.batch, stage.length + 1, stage.texts)
            with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device != "cpu"):
                logits = model(ids[:, :-1])
            wanted, place = ids[:, 1:], answer[:, 1:].float()
            each = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="none").view_as(place)
            asked = (each * place).sum() / place.sum()
            loss = asked + options.rest * (each * (1 - place)).sum() / (1 - place).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            average.update(model)
            now = ((logits.argmax(-1) == wanted) * place).sum() / place.sum()
            right = torch.lerp(right, now.detach(), 0.05)
            step, mine = step + 1, mine + 1
            if step % options.every == 0:
                publish(stage, loss.item(), asked.item())
            if mine % 50 == 0 and float(right) > stage.enough:
                break
        publish(stage, loss.item(), asked.item())


if __name__ == "__main__":
    main()
