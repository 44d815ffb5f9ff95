"""Trains the parts that high-resolution systems add to the built-in image transformer; its own weights stay, or not.

    python bench/train_highres.py --part scale_dit --device cuda --seconds 100 --cooldown 40
    python bench/train_highres.py --part ultragen --device cuda
    python bench/train_highres.py --part ultragen --own --lr 3e-4 --start image_dit_ultragen.safetensors

Pictures of two and four times the trained side, drawn and painted anew for every update; Scale-DiT sees the picture of
the trained side beside them. Writes the parts as float16 and the loss curve; with --own, the transformer's own weights
are trained too and written.
"""

from __future__ import annotations

import argparse
import csv
import io
import platform
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from highres_methods import ULTRAGEN
from safetensors.torch import save
from torch import Tensor, nn

from glocal._files import write_atomic
from glocal.adapt.attach import Handle
from glocal.adapt.scale_dit import scale_dit
from glocal.adapt.scale_dit_image_blocks import TUNED
from glocal.adapt.ultragen import UltraGen, ultragen
from glocal.data.captions import caption_tokens
from glocal.data.pictures import at_side, draw_pictures, paint
from glocal.models.generation import PictureModel, load_picture_model, to_latents
from glocal.models.generation.picture_model import SIDE
from glocal.models.generation.picture_weights import save_picture_model, shipped
from glocal.nn.lora import LowRank, PartLora
from glocal.train import FlowSpec
from glocal.train.graphed import Loss, Updates
from glocal.train.pictures import Pictures, picture_loss

ROOT = Path(__file__).resolve().parent.parent
FACTORS = ((2, 32, 2048), (4, 8, 512))  # how many times the side, pictures a batch, pictures in memory
EVERY = 20  # updates at one side, then at the other


def lora_of(model: PictureModel, rank: int) -> PartLora:
    """Fresh updates of every layer Scale-DiT tunes."""
    updates = {}
    for number, block in enumerate(model.net.blocks):  # type: ignore[union-attr, arg-type]
        for name in TUNED:
            base = block.get_submodule(name)
            assert isinstance(base, nn.Linear)
            updates[f"blocks.{number}.{name}"] = LowRank.fresh(base, rank)
    return PartLora(updates)


def put(part: str, model: PictureModel, options: argparse.Namespace) -> tuple[Handle, Iterable[nn.Parameter]]:
    """Attach a method with fresh parts; its handle, and what is trained."""
    if part == "scale_dit":
        lora = lora_of(model, options.rank).to(options.device)
        handle = scale_dit(model.net, lora=lora, backend="mask")
        return handle, list(lora.parameters())
    if part == "ultragen":
        handle = ultragen(model.net, settings=ULTRAGEN if options.start is None else None, parts=options.start)
        parts = handle.method.parts  # type: ignore[attr-defined]
        return handle, list(parts.parameters())
    raise ValueError(f"part={part!r}; legal: scale_dit, ultragen")


def parts_of(handle: Handle) -> nn.Module:
    """What was trained."""
    method: Any = handle.method
    return method.parts if isinstance(method, UltraGen) else method.lora


class Large:
    """Large pictures with captions and the small latents of the same scenes, on the device; `renew` draws others."""

    def __init__(self, factor: int, size: int, device: str) -> None:
        self.factor, self.device, self.number = factor, device, 0
        made = [self._paint(size // 4) for _ in range(4)]
        self.latents, self.small, self.tokens = (torch.cat([m[n] for m in made]) for n in range(3))

    def _paint(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        self.number += 1
        generator = torch.Generator().manual_seed(7_000_003 * self.factor + self.number)
        layouts = draw_pictures(count, generator)
        tokens = caption_tokens(layouts, 0.1, generator) * (torch.rand(count, 1, generator=generator) >= 0.1)
        layouts = layouts.to(self.device)
        large = to_latents(paint(at_side(layouts, self.factor * SIDE)))
        return large.bfloat16(), to_latents(paint(layouts)).bfloat16(), tokens.to(self.device)

    def renew(self) -> None:
        """Paint a quarter anew, in place."""
        count = len(self.latents) // 4
        start = (self.number % 4) * count
        for mine, fresh in zip((self.latents, self.small, self.tokens), self._paint(count), strict=True):
            mine[start : start + count] = fresh

    def draw(self, count: int) -> tuple[Pictures, Tensor]:
        """Any pictures and their small latents."""
        rows = torch.randint(len(self.latents), (count,), device=self.device)
        return Pictures(self.latents[rows].float(), self.tokens[rows]), self.small[rows].float()


def name_of(options: argparse.Namespace) -> str:
    """Of what is trained, in files and rows."""
    return f"{options.part}_own" if options.own else options.part


def unwatched(net: nn.Module) -> None:
    """Take the host's watch off: it reads the noise level on the CPU, and a graph cannot wait for that."""
    net._forward_pre_hooks.clear()


def train(model: PictureModel, sides: list[tuple[Large, int]], options: argparse.Namespace) -> tuple[Handle, list]:
    """Update the parts until the time is over; the open handle with the averaged parts, and rows of the loss curve.

    sides: pictures, and how many of them a batch.
    """
    begun = time.monotonic()
    handle, parameters = put(options.part, model, options)
    unwatched(model.net)
    own = list(model.net.requires_grad_().parameters()) if options.own else []
    updates = Updates([*parameters, *own], options.lr, average=0.99, decay=0.0)
    flow = FlowSpec(shift=options.shift, pure=0.05)

    def loss_of(side: Large, count: int) -> Loss:
        def loss() -> Tensor:
            batch, small = side.draw(count)
            if options.part == "scale_dit":
                handle.method.give(small)  # type: ignore[attr-defined]
            return picture_loss(model, batch, flow, None)

        return loss

    steps: list[Callable[[], None]] = []
    for side, count in sides:
        loss = loss_of(side, count)
        steps.append(updates.graphed(loss) if updates.cuda and not options.eager else partial(updates.update, loss))
    print(f"ready after {time.monotonic() - begun:.0f} s", flush=True)
    left = options.seconds if options.until is None else options.until - time.time()
    end, step, rows = time.monotonic() + left, 0, []
    while time.monotonic() < end:
        left = end - time.monotonic()
        rate = min(1.0, (step + 1) / 50) * (min(1.0, max(0.02, left / options.cooldown)) if options.cooldown else 1.0)
        updates.rate(options.lr * rate)
        steps[step // EVERY % len(steps)]()
        step += 1
        if step % 10 == 0 and updates.cuda:
            torch.cuda.synchronize()
        if step % EVERY == 0:
            side = sides[(step - 1) // EVERY % len(sides)][0]
            loss, norm = updates.read(EVERY)
            rows.append(
                [name_of(options), step, side.factor, f"{loss:.5f}", f"{norm:.4f}", f"{time.monotonic() - begun:.1f}"]
            )
            side.renew()
            if step % (10 * EVERY) in (0, EVERY):
                print(*rows[-1], flush=True)
    parts_of(handle).float()
    model.float()
    with torch.no_grad():
        for p, mean in zip(updates.parameters, updates.means, strict=True):
            p.copy_(mean)
    return handle, rows


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("scale_dit", "ultragen"), default="scale_dit")
    parser.add_argument(
        "--own", action="store_true", help="train the model's own weights too, as UltraGen's paper does"
    )
    parser.add_argument("--start", type=Path, help="UltraGen's parts to begin with, instead of fresh ones")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--until", type=float, help="instead: until this time, in seconds since 1970")
    parser.add_argument("--wait", action="store_true", help="for the file of the model to be written")
    parser.add_argument("--cooldown", type=float, default=40.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=5)
    parser.add_argument("--shift", type=float, default=2.0)
    parser.add_argument("--shrink", type=int, default=1, help="divide the batches, for a trial on a CPU")
    parser.add_argument("--eager", action="store_true", help="no CUDA graph")
    parser.add_argument("--model", type=Path, default=shipped("dit"))
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "train_highres")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    sides = [
        (Large(f, max(4, size // options.shrink), options.device), max(1, n // options.shrink))
        for f, n, size in FACTORS
    ]
    while options.wait and not options.model.is_file():
        time.sleep(0.2)
    model = load_picture_model(options.model, options.device).requires_grad_(False)
    if options.device.startswith("cuda"):
        model.bfloat16()
    handle, rows = train(model, sides, options)
    options.folder.mkdir(parents=True, exist_ok=True)
    name = name_of(options)
    file = options.folder / f"image_dit_{name}.safetensors"
    parts: Any = parts_of(handle).cpu()
    if options.part == "scale_dit":
        write_atomic(file, save({n: t.half().contiguous() for n, t in parts.write().items()}))
    else:
        parts.half().save(file)
    if options.own:
        save_picture_model(model, options.folder / f"image_dit_{name}_model.safetensors")
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["part", "step", "factor", "loss", "gradient_norm", "seconds", "device", "torch"])
    writer.writerows([*row, device, torch.__version__] for row in rows)
    write_atomic(options.folder / f"train_highres_{name}.csv", table.getvalue())
    print("steps", rows[-1][1] if rows else 0, flush=True)


if __name__ == "__main__":
    main()
