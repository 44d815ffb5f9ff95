"""Trains a built-in image model on procedural pictures and their captions, within a budget of minutes.

    python bench/train_image.py --model unet --device cuda --seconds 200
    python bench/train_image.py --model dit --device cuda --seconds 200 --cooldown 60

Start it again with the same `--folder` and it goes on. Writes weights (the average), the loss curve and a sheet of
samples. `--cooldown S` lowers the learning rate to zero over the last S seconds of this run.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import math
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
from glocal.models.generation.picture_weights import build_picture_model, save_picture_model
from glocal.report.pictures import png_bytes
from glocal.train import FlowSpec, Loop, LoopSpec
from glocal.train.pictures import draw_batch, picture_loss

ROOT = Path(__file__).resolve().parent.parent
CHUNK = 25  # updates between two looks at the clock


class Clocked(torch.optim.AdamW):
    """AdamW whose learning rate follows the clock: warm-up by updates, cool-down over the last seconds."""

    def __init__(self, parameters: list[torch.nn.Parameter], *, lr: float, end: float, cooldown: float) -> None:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        super().__init__(groups, lr=lr, betas=(0.9, 0.99), fused=parameters[0].is_cuda)
        self.end, self.cooldown = end, cooldown

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update at the rate of this moment."""
        factor = 1.0 if self.cooldown <= 0 else min(1.0, max(0.02, (self.end - time.monotonic()) / self.cooldown))
        before = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] *= factor
        super().step()
        for group, rate in zip(self.param_groups, before, strict=True):
            group["lr"] = rate


def samples(model: PictureModel, count: int, device: str) -> tuple[Tensor, list[str]]:
    """Pictures [count, 3, 64, 64] of captions that training never drew, and the captions."""
    layouts = draw_pictures(count, torch.Generator().manual_seed(99))
    tokens = caption_tokens(layouts)
    found = sample_pictures(model, draw_picture_noise(range(count)).to(device), tokens)
    return to_pictures(found).cpu(), [caption_of(layouts, i) for i in range(count)]


def sheet(pictures: Tensor, across: int = 6) -> bytes:
    """PNG of pictures [n, 3, H, W] in rows of `across`."""
    rows = [torch.cat(list(pictures[i : i + across]), 2) for i in range(0, len(pictures) // across * across, across)]
    whole = torch.cat(rows, 1).mul(255).round().byte().permute(1, 2, 0)
    return png_bytes(whole.numpy())


def write_curve(loop: Loop, path: Path, options: argparse.Namespace) -> None:
    """One row for every `every` updates, with batch, hardware and versions."""
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["model", "step", "batch", "loss", "gradient_norm", "seconds", "device", "torch", "python"])
    for row in loop.curve:
        shown = [f"{row.loss:.5f}", f"{row.norm:.4f}", f"{row.seconds:.1f}"]
        tail = [device, torch.__version__, platform.python_version()]
        writer.writerow([options.model, row.step, options.batch, *shown, *tail])
    write_atomic(path, table.getvalue())


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("unet", "dit"), required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=200.0, help="of this run, saving not included")
    parser.add_argument("--cooldown", type=float, default=0.0, help="last seconds in which the learning rate falls")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--shift", type=float, default=2.0, help="of training's noise levels")
    parser.add_argument("--folder", type=Path, help="resumable state, curve, samples; default out/train_image/MODEL")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    folder = ROOT / "out" / "train_image" / options.model if options.folder is None else options.folder

    end = time.monotonic() + options.seconds
    torch.manual_seed(0)
    torch.set_num_threads(min(torch.get_num_threads(), 4))
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    cuda = options.device.startswith("cuda")
    model = build_picture_model(options.model, {}, WORDS, LENGTH).to(options.device)
    if cuda and options.model == "unet":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shadow = copy.deepcopy(model)
    net = torch.compile(model, dynamic=False) if options.compile else model
    flow = FlowSpec(shift=options.shift, pure=0.03)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        batch = draw_batch(options.batch, generator, options.device)
        return picture_loss(net, batch, flow, generator, autocast=cuda)  # type: ignore[arg-type]

    optimizer = Clocked(list(model.parameters()), lr=options.lr, end=end, cooldown=options.cooldown)
    spec = LoopSpec(steps=10**9, warmup=200, ema=0.999, every=50, save=math.inf)
    loop = Loop(model, [optimizer], loss, spec, folder)
    begun, said = loop.step, time.monotonic()
    while time.monotonic() < end:
        for _ in range(CHUNK):
            loop.advance()
        if time.monotonic() - said > 10 and loop.curve:
            said = time.monotonic()
            print(f"{options.model} step {loop.step} loss {loop.curve[-1].loss:.4f}", flush=True)
    loop.save()
    loop.average.copy_to(shadow)
    notes = {"steps": str(loop.step), "batch": str(options.batch), "seconds": f"{loop.seconds:.0f}"}
    save_picture_model(shadow, folder / f"image_{options.model}.safetensors", notes)
    write_curve(loop, folder / f"train_image_{options.model}.csv", options)
    made, captions = samples(shadow.eval(), 24, options.device)
    write_atomic(folder / f"samples_{options.model}.png", sheet(made))
    write_atomic(folder / "captions.txt", "\n".join(captions) + "\n")
    print(
        f"{options.model}: steps {begun}..{loop.step}, loss {loop.curve[-1].loss if loop.curve else None}", flush=True
    )


if __name__ == "__main__":
    main()
