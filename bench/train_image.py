"""Trains a built-in image model on procedural pictures and their captions, within a budget of seconds.

    python bench/train_image.py --model unet --device cuda --seconds 200
    python bench/train_image.py --model dit --device cuda --seconds 200 --cooldown 60

Start it again with the same `--folder` and it goes on. Writes weights (the average), the loss curve and a sheet of
samples. `--cooldown S` lowers the learning rate to nearly zero over the last S seconds of this run. Pictures come from
a pool on the device, a part of which is painted anew all the time. On a GPU an update is one CUDA graph: the models
are so small that launching their kernels one by one would take most of the time.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import platform
import time
from pathlib import Path

import torch
from torch import Tensor

from glocal._files import write_atomic
from glocal.data.captions import LENGTH, WORDS, caption_of, caption_tokens
from glocal.data.pictures import draw_pictures
from glocal.models.generation.picture_model import PictureModel, draw_picture_noise, to_pictures
from glocal.models.generation.picture_sampler import sample_pictures
from glocal.models.generation.picture_weights import build_picture_model, load_picture_model, save_picture_model
from glocal.report.pictures import png_bytes
from glocal.train import FlowSpec
from glocal.train.graphed import Updates
from glocal.train.pictures import Pictures, draw_batch, picture_loss

ROOT = Path(__file__).resolve().parent.parent
EVERY = 100  # updates a row of the curve; as often a part of the pool is painted anew
WARMUP = 300  # updates


class Pool:
    """Pictures on the device. `draw(count)` takes any of them, `renew()` paints the oldest part anew."""

    def __init__(self, size: int, part: int, device: str, seed: int = 0) -> None:
        self.part, self.device, self.number, self.seed = part, device, 0, seed
        made = [draw_batch(part, self._generator(), device) for _ in range(size // part)]
        self.latents = torch.cat([m.latents for m in made]).bfloat16()
        self.tokens = torch.cat([m.tokens for m in made])

    def _generator(self) -> torch.Generator:
        self.number += 1
        return torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + self.number)

    def renew(self) -> None:
        """Paint as many as `part` anew, in place."""
        start = (self.number * self.part) % len(self.latents)
        fresh = draw_batch(self.part, self._generator(), self.device)
        self.latents[start : start + self.part] = fresh.latents
        self.tokens[start : start + self.part] = fresh.tokens

    def draw(self, count: int) -> Pictures:
        """Any pictures, from the device's own generator."""
        rows = torch.randint(len(self.latents), (count,), device=self.device)
        return Pictures(self.latents[rows].float(), self.tokens[rows])


class Trainer:
    """Model, updates and curve. state() and load() carry all of it from run to run."""

    def __init__(self, model: PictureModel, pool: Pool, options: argparse.Namespace) -> None:
        self.model, self.pool, self.options = model, pool, options
        self.updates = Updates(list(model.parameters()), options.lr)
        self.flow = FlowSpec(shift=options.shift, pure=0.03)
        self.step, self.seconds = 0, 0.0
        self.curve: list[list[object]] = []

    def loss(self) -> Tensor:
        """Of pictures from the pool."""
        drawn = self.pool.draw(self.options.batch)
        return picture_loss(self.model, drawn, self.flow, None)

    def factor(self, left: float) -> float:
        """Of the learning rate, with so many seconds left."""
        cool = self.options.cooldown
        return min(1.0, (self.step + 1) / WARMUP, max(0.02, left / cool) if cool > 0 else 1.0)

    def run(self, end: float) -> None:
        """Update until the clock says `end`."""

        def update() -> None:
            self.updates.update(self.loss)

        if self.updates.cuda and not self.options.eager:
            update = self.updates.graphed(self.loss)
            print(f"graph ready, {end - time.monotonic():.0f} s left", flush=True)
        mark = saved = time.monotonic()
        while time.monotonic() < end:
            rate = self.options.lr * self.factor(end - time.monotonic())
            self.updates.rate(rate)
            update()
            self.step += 1
            if self.step < 1000:
                self.updates.young()
            if self.step % EVERY == 0:
                loss, norm = self.updates.read(EVERY)
                now = time.monotonic()
                self.seconds, mark = self.seconds + now - mark, now
                self.curve.append([self.step, f"{loss:.5f}", f"{norm:.4f}", f"{rate:.6f}", f"{self.seconds:.1f}"])
                if loss != loss:
                    raise FloatingPointError(f"step {self.step}: loss {loss}; lower the learning rate")
                self.pool.renew()
                if self.step % (5 * EVERY) == 0:
                    print(self.options.model, *self.curve[-1], flush=True)
            elif self.step % 10 == 0 and self.updates.cuda:
                torch.cuda.synchronize()  # else the clock is far ahead of the device
            if time.monotonic() - saved > 40:
                publish(self, self.options.folder)
                saved = time.monotonic()

    def state(self) -> dict:
        """Everything."""
        return self.updates.state() | {"step": self.step, "seconds": self.seconds, "curve": self.curve}

    def load(self, state: dict) -> None:
        """Go on from a saved state."""
        self.updates.load(state)
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]


def publish(trainer: Trainer, folder: Path) -> PictureModel:
    """Write weights (the average) and the curve; the averaged model."""
    shadow = copy.deepcopy(trainer.model).float()
    with torch.no_grad():
        for p, mean in zip(shadow.parameters(), trainer.updates.means, strict=True):
            p.copy_(mean)
    options = trainer.options
    notes = {"steps": str(trainer.step), "batch": str(options.batch), "seconds": f"{trainer.seconds:.0f}"}
    save_picture_model(shadow, folder / f"image_{options.model}.safetensors", notes)
    write_curve(trainer, folder / f"train_image_{options.model}.csv")
    return shadow.eval()


def samples(model: PictureModel, count: int, device: str) -> tuple[Tensor, list[str]]:
    """Pictures [count, 3, 64, 64] of captions that training never drew, and the captions."""
    layouts = draw_pictures(count, torch.Generator().manual_seed(99))
    tokens = caption_tokens(layouts)
    found = sample_pictures(model, draw_picture_noise(range(count)).to(device), tokens)
    return to_pictures(found).cpu(), [caption_of(layouts, i) for i in range(count)]


def sheet(pictures: Tensor, across: int = 6) -> bytes:
    """PNG of pictures [n, 3, H, W] in rows of `across`."""
    across = min(across, len(pictures))
    rows = [torch.cat(list(pictures[i : i + across]), 2) for i in range(0, len(pictures) - across + 1, across)]
    whole = torch.cat(rows, 1).mul(255).round().byte().permute(1, 2, 0)
    return png_bytes(whole.numpy())


def write_curve(trainer: Trainer, path: Path) -> None:
    """One row for every `EVERY` updates, with batch, hardware and versions."""
    options = trainer.options
    device = torch.cuda.get_device_name() if trainer.updates.cuda else platform.machine()
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    names = ["step", "loss", "gradient_norm", "rate", "seconds"]
    writer.writerow(["model", "batch", *names, "device", "torch", "python"])
    for row in trainer.curve:
        writer.writerow([options.model, options.batch, *row, device, torch.__version__, platform.python_version()])
    write_atomic(path, table.getvalue())


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("unet", "dit"), required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=200.0, help="of this run, saving not included")
    parser.add_argument("--until", type=float, help="instead: until this time, in seconds since 1970")
    parser.add_argument("--cooldown", type=float, default=0.0, help="last seconds in which the learning rate falls")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pool", type=int, default=16384, help="pictures on the device")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--shift", type=float, default=2.0, help="of training's noise levels")
    parser.add_argument("--folder", type=Path, help="resumable state, curve, samples; default out/train_image/MODEL")
    parser.add_argument("--state", type=Path, help="folder of the resumable state, if not that of the results")
    parser.add_argument("--start", type=Path, help="weights to begin with, where there is no state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--eager", action="store_true", help="no CUDA graph")
    options = parser.parse_args()
    if options.folder is None:
        options.folder = ROOT / "out" / "train_image" / options.model
    options.folder.mkdir(parents=True, exist_ok=True)

    left = options.seconds if options.until is None else options.until - time.time()
    end = time.monotonic() + left
    # Another run draws other pictures and noises than the one it goes on from.
    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    model = build_picture_model(options.model, {}, WORDS, LENGTH).to(options.device)
    if options.start is not None:
        model.load_state_dict(load_picture_model(options.start, options.device).state_dict())
    if options.device.startswith("cuda"):
        model.bfloat16()
    trainer = Trainer(model, Pool(options.pool, min(4096, options.pool), options.device, options.seed), options)
    saved = (options.folder if options.state is None else options.state) / "state.pt"
    saved.parent.mkdir(parents=True, exist_ok=True)
    if saved.is_file():
        trainer.load(torch.load(saved, map_location=options.device, weights_only=True))
    print(f"{options.model}: from step {trainer.step}, {end - time.monotonic():.0f} s left", flush=True)
    begun = trainer.step
    trainer.run(end)
    content = io.BytesIO()
    torch.save(trainer.state(), content)
    write_atomic(saved, content.getvalue())
    shadow = publish(trainer, options.folder)
    made, captions = samples(shadow, options.samples, options.device)
    write_atomic(options.folder / f"samples_{options.model}.png", sheet(made))
    write_atomic(options.folder / "captions.txt", "\n".join(captions) + "\n")
    print(f"{options.model}: steps {begun}..{trainer.step}", flush=True)


if __name__ == "__main__":
    main()
