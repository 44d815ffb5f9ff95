"""Trains the built-in video model on procedural scenes and ships its weights and loss curve.

    python bench/train_demo.py --device cuda --preset full     # the budget meant for one GPU
    python bench/train_demo.py --device cpu --preset core      # about 90 minutes on one shared CPU core with bf16 units

Kill it at any time and start it again: it goes on from `--folder`. Weights (the average) and the curve are rewritten at
every saved state.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glocal._files import write_atomic
from glocal.data import SceneSpec
from glocal.models.generation import AttentionSite, VideoDiT, VideoDiTConfig, save_weights
from glocal.models.generation.weights import SHIPPED
from glocal.train import SCENE_FIELDS, ClipStage, FlowSpec, Loop, LoopSpec, build_optimizers, draw_clips, flow_loss

ROOT = Path(__file__).resolve().parent.parent
SCENES = SceneSpec(objects=(1, 3), radius=(0.16, 0.25))


@dataclass(frozen=True)
class Preset:
    """A budget: stages of the curriculum, cool-down at the end, learning rates (trunk, rest), average."""

    stages: tuple[ClipStage, ...]
    cooldown: int
    trunk_lr: float = 4e-3
    lr: float = 2e-3
    ema: float = 0.996

    @property
    def steps(self) -> int:
        """Updates in all."""
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> ClipStage:
        """The stage that update `step` belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise ValueError(f"step is {step} past the last of {self.steps} updates")


PRESETS = {
    "tiny": Preset((ClipStage(1, 2, 2, 2.5), ClipStage(2, 1, 2, 3.0)), cooldown=2),
    "core": Preset(
        (
            ClipStage(1, 32, 1400, 2.5),
            ClipStage(4, 8, 370, 3.0),
            ClipStage(16, 1, 460, 6.0),
        ),
        cooldown=700,
        trunk_lr=3e-3,
        lr=1.5e-3,
    ),
    "full": Preset(
        (ClipStage(1, 256, 2500, 2.5), ClipStage(4, 64, 2500, 4.0), ClipStage(16, 32, 900, 6.0)),
        cooldown=1800,
        ema=0.999,
    ),
}


def explicit_core(q: Tensor, k: Tensor, v: Tensor, *, site: AttentionSite) -> Tensor:
    """Exact attention by two products: on CPUs with bf16 units faster to train than the fused operator."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


def device_name(device: str) -> str:
    """What the run is on, for the record."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    model = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ": unknown")
    return f"{model.split(': ', 1)[1]}, {torch.get_num_threads()} thread(s)"


def write_curve(loop: Loop, preset: Preset, path: Path, device: str) -> None:
    """One row for every `every` updates, with hardware and versions, whole or not at all."""
    columns = ["step", "frames", "batch", "loss", "gradient_norm", "lr_factor", "seconds", "device", "torch", "python"]
    tail = [device_name(device), torch.__version__, platform.python_version()]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    for row in loop.curve:
        stage = preset.stage(row.step - 1)
        shown = [f"{row.loss:.5f}", f"{row.norm:.4f}", f"{row.factor:.4f}", f"{row.seconds:.1f}"]
        writer.writerow([row.step, stage.frames, stage.batch, *shown, *tail])
    write_atomic(path, table.getvalue())


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="core")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "out" / "train_demo", help="where the resumable state lives"
    )
    parser.add_argument("--weights", type=Path, default=SHIPPED)
    parser.add_argument("--curve", type=Path, default=ROOT / "results" / "train_demo.csv")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    preset = PRESETS[options.preset]
    model = VideoDiT(VideoDiTConfig(fields=SCENE_FIELDS)).to(options.device)
    shadow = copy.deepcopy(model)
    if options.device == "cpu":
        for site in model.sites():
            site.core = explicit_core
    forward = model if options.no_compile else torch.compile(model, dynamic=False)
    kind = options.device.split(":")[0]

    def loss(step: int, generator: torch.Generator) -> Tensor:
        stage = preset.stage(step)
        clips = draw_clips(stage, SCENES, generator, options.device)

        def predict(noisy: Tensor, level: Tensor, condition: Tensor) -> Tensor:
            with torch.autocast(kind, torch.bfloat16):
                return forward(noisy, level, condition, clips.times)

        return flow_loss(predict, clips.video, clips.condition, FlowSpec(shift=stage.shift), generator)

    def publish(loop: Loop) -> None:
        loop.average.copy_to(shadow)
        notes = {"step": str(loop.step), "steps": str(preset.steps), "preset": options.preset, "scenes": repr(SCENES)}
        save_weights(shadow, options.weights, notes)
        write_curve(loop, preset, options.curve, options.device)
        row = loop.curve[-1] if loop.curve else None
        print(f"{time.strftime('%H:%M:%S')} step {loop.step}/{preset.steps} {row}", flush=True)

    spec = LoopSpec(steps=preset.steps, cooldown=preset.cooldown, ema=preset.ema, warmup=min(60, preset.steps // 4))
    optimizers = build_optimizers(model, trunk_lr=preset.trunk_lr, lr=preset.lr)
    Loop(model, optimizers, loss, spec, options.folder).run(after=publish)


if __name__ == "__main__":
    main()
