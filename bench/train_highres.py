"""Trains the parts that high-resolution systems add to the built-in image transformer, whose own weights stay.

    python bench/train_highres.py --part scale_dit --device cuda --seconds 100 --cooldown 40

Pictures of two and four times the trained side, drawn and painted anew for every update; Scale-DiT sees the picture of
the trained side beside them. Writes the parts as float16 and the loss curve.
"""

from __future__ import annotations

import argparse
import csv
import io
import platform
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from glocal._files import write_atomic
from glocal.adapt.attach import Handle
from glocal.adapt.scale_dit import TUNED_IMAGE, scale_dit
from glocal.data.captions import caption_tokens
from glocal.data.pictures import at_side, draw_pictures, paint
from glocal.models.generation import PictureModel, load_picture_model, to_latents
from glocal.models.generation.picture_model import SIDE
from glocal.models.generation.picture_weights import shipped
from glocal.nn.lora import LowRank, PartLora
from glocal.train import FlowSpec
from glocal.train.pictures import Pictures, picture_loss

ROOT = Path(__file__).resolve().parent.parent
FACTORS = ((2, 32), (4, 8))  # how many times the side, and pictures a batch


def lora_of(model: PictureModel, rank: int) -> PartLora:
    """Fresh updates of every layer Scale-DiT tunes."""
    updates = {}
    for number, block in enumerate(model.net.blocks):  # type: ignore[union-attr, arg-type]
        for name in TUNED_IMAGE:
            base = block.get_submodule(name)
            assert isinstance(base, nn.Linear)
            updates[f"blocks.{number}.{name}"] = LowRank.fresh(base, rank)
    return PartLora(updates)


def put(part: str, model: PictureModel, options: argparse.Namespace) -> tuple[Handle, Iterable[nn.Parameter]]:
    """Attach a method with fresh parts; its handle, and what is trained."""
    if part == "scale_dit":
        lora = lora_of(model, options.rank).to(options.device)
        handle = scale_dit(model.net, lora=lora, backend="reference")
        return handle, list(lora.parameters())
    raise ValueError(f"part={part!r}; legal: scale_dit")


def draw(factor: int, count: int, generator: torch.Generator, device: str) -> tuple[Pictures, Tensor]:
    """Large pictures with captions, and the small latents of the same scenes."""
    layouts = draw_pictures(count, generator)
    tokens = caption_tokens(layouts, 0.1, generator) * (torch.rand(count, 1, generator=generator) >= 0.1)
    layouts = layouts.to(device)
    large = to_latents(paint(at_side(layouts, factor * SIDE)))
    return Pictures(large, tokens.to(device)), to_latents(paint(layouts))


def train(model: PictureModel, options: argparse.Namespace) -> tuple[Handle, list[list[object]]]:
    """Update the parts until the time is over; the open handle, and rows of the loss curve."""
    handle, parameters = put(options.part, model, options)
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(0.9, 0.99), weight_decay=0.0)
    flow = FlowSpec(shift=options.shift, pure=0.05)
    begun = time.monotonic()
    end, step, rows = begun + options.seconds, 0, []
    sums = {factor: [0.0, 0] for factor, _ in FACTORS}
    while time.monotonic() < end:
        factor, count = FACTORS[step % len(FACTORS)]
        left = end - time.monotonic()
        rate = min(1.0, (step + 1) / 50) * (min(1.0, max(0.02, left / options.cooldown)) if options.cooldown else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        generator = torch.Generator().manual_seed(7_000_003 + step)
        batch, small = draw(factor, max(1, count // options.shrink), generator, options.device)
        if options.part == "scale_dit":
            handle.method.give(small)  # type: ignore[attr-defined]
        loss = picture_loss(model, batch, flow, generator, autocast=options.device.startswith("cuda"))
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums[factor][0] += float(loss.detach())
        sums[factor][1] += 1
        step += 1
        if step % 50 == 0:
            means = [total / max(n, 1) for total, n in sums.values()]
            rows.append([options.part, step, *[f"{m:.5f}" for m in means], f"{time.monotonic() - begun:.1f}"])
            sums = {f: [0.0, 0] for f, _ in FACTORS}
            if step % 200 == 0:
                print(*rows[-1], flush=True)
    return handle, rows


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("scale_dit",), default="scale_dit")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--cooldown", type=float, default=40.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shift", type=float, default=2.0)
    parser.add_argument("--shrink", type=int, default=1, help="divide the batches, for a trial on a CPU")
    parser.add_argument("--model", type=Path, default=shipped("dit"))
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "train_highres")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = load_picture_model(options.model, options.device).requires_grad_(False)
    handle, rows = train(model, options)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.part == "scale_dit":
        tensors = {n: t.half().cpu().contiguous() for n, t in handle.method.lora.write().items()}  # type: ignore[attr-defined]
        write_atomic(options.folder / "image_dit_scale_dit.safetensors", save(tensors))
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["part", "step", *[f"loss_{f}x" for f, _ in FACTORS], "seconds", "device", "torch"])
    writer.writerows([*row, device, torch.__version__] for row in rows)
    write_atomic(options.folder / f"train_highres_{options.part}.csv", table.getvalue())
    print("steps", rows[-1][1] if rows else 0, flush=True)


if __name__ == "__main__":
    main()
