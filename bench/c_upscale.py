"""What C-Upscale's priors cost: one denoising step over all regions with the priors and without, on the architecture of
Stable Diffusion XL with random weights, into results/c_upscale.csv.

python bench/c_upscale.py                           # 2048 x 2048 and 4096 x 4096 pixels on the GPU
python bench/c_upscale.py --tiny --device cpu --out /dev/stdout

Time does not depend on weights. "plain" denoises the same regions without any prior (MultiDiffusion); rounds run
interleaved in one process. First a check: with one region that is the whole picture, in the first step, the priors
change nothing. The VAE is left out on both sides. How good the pictures are needs trained weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from generation.rows import merged, write
from torch import Tensor

from glocal.adapt.c_upscale_hosts import StableDiffusionXL, Words
from glocal.adapt.c_upscale_run import upscale

Rows = list[dict[str, object]]
CSV = Path(__file__).resolve().parent.parent / "results" / "c_upscale.csv"
PLAIN: dict[str, Any] = {"structure": 0.0, "rap": "off", "mix": (0.0, 0.0)}
VARIANTS: dict[str, dict[str, Any]] = {
    "all priors": {},
    "gate": {"rap": "gate"},
    "structure and attention": {"mix": (0.0, 0.0)},
    "structure": {**PLAIN, "structure": 1.0},
}


class Bare(StableDiffusionXL):
    """The model and a schedule; latents are drawn, not encoded."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=(1, 1, 1, 1)))
        super().__init__(SimpleNamespace(unet=unet, vae=vae, scheduler=scheduler))

    def encode(self, picture: Tensor, generator: torch.Generator | None) -> Tensor:
        """Noise of the latents' size."""
        size = (len(picture), 4, picture.shape[2] // 8, picture.shape[3] // 8)
        draw = torch.Generator().manual_seed(0)
        return torch.randn(size, generator=draw).to(self.model.device, self.model.dtype)


def model(tiny: bool, device: torch.device, dtype: torch.dtype) -> Any:
    """The UNet of SDXL."""
    import diffusers

    sizes: dict[str, Any] = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    if tiny:
        sizes |= {
            "sample_size": 8,
            "block_out_channels": (32, 64, 64),
            "transformer_layers_per_block": 1,
            "attention_head_dim": (2, 4, 4),
        }
    torch.manual_seed(0)
    with device:
        made: Any = diffusers.UNet2DConditionModel(**sizes)
    return made.to(device, dtype).eval().requires_grad_(False)


def words(seed: int, device: torch.device, dtype: torch.dtype) -> Words:
    """77 of them."""
    draw = torch.Generator().manual_seed(seed)
    embeds, pooled = (torch.randn(shape, generator=draw).to(device, dtype) for shape in ((1, 77, 2048), (1, 1280)))
    return Words(embeds, None, pooled)


def step(denoiser: Bare, pixels: int, small: int, device: torch.device, **more: Any) -> Tensor:
    """The first of 50 steps, on all regions."""
    dtype = denoiser.model.dtype
    return upscale(
        denoiser, torch.zeros(1, 3, small, small), pixels, pixels, words(1, device, dtype),
        negative=words(2, device, dtype), prompter=lambda region, prompt: words(3, device, dtype), output_type="latent",
        steps=50, strength=0.02, jitter=False, region_batch=8, **more,
    )  # fmt: skip


def seconds(run: Any, device: torch.device) -> float:
    """Of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(denoiser: Bare, pixels: int, small: int, rounds: int, device: torch.device) -> Iterator[Rows]:
    """Rows of one size, after every round anew."""
    runs: dict[str, list[float]] = {name: [] for name in ("plain", *VARIANTS)}
    side = -(-(pixels - small) // (small // 2)) + 1
    for turn in range(rounds + 1):  # the first one is not kept
        for name in runs:
            changed = PLAIN if name == "plain" else VARIANTS[name]
            took = seconds(lambda changed=changed: step(denoiser, pixels, small, device, **changed), device)
            print(f"  {pixels} px, round {turn}, {name}: {took:.3f} s", flush=True)
            if turn:
                runs[name].append(took)
        if turn:
            yield [_row(name, runs, device, pixels=pixels, regions=side**2) for name in VARIANTS]


def _row(name: str, runs: dict[str, list[float]], device: torch.device, **size: int) -> dict[str, object]:
    ratios = sorted(m / p for m, p in zip(runs[name], runs["plain"], strict=True))
    return {
        **size,
        "variant": name,
        "plain_s": f"{median(runs['plain']):.4f}",
        "seconds": f"{median(runs[name]):.4f}",
        "overhead": f"{median(ratios) - 1:.4f}",
        "overhead_low": f"{ratios[0] - 1:.4f}",
        "overhead_high": f"{ratios[-1] - 1:.4f}",
        "rounds": len(ratios),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, action="append", help="sides of the large picture; default 2048 and 4096")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model and small pictures, to see that it runs")
    parser.add_argument("--out", type=Path, default=CSV)
    args = parser.parse_args()
    import diffusers

    device = torch.device(args.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    scheduler: Any = diffusers.EulerDiscreteScheduler()  # type: ignore[attr-defined]
    denoiser = Bare(model(args.tiny, device, dtype), scheduler)
    small = 64 if args.tiny else 1024
    plain = step(denoiser, small, small, device, **PLAIN).float()
    error = (step(denoiser, small, small, device, mix=(0.0, 0.0)).float() - plain).norm() / plain.norm()
    if not error < 1e-2:
        raise RuntimeError(f"one region that is the whole picture is off plain denoising by {float(error):.1e}")
    for pixels in (2048, 4096) if args.pixels is None else args.pixels:
        for rows in measure(denoiser, pixels // 16 if args.tiny else pixels, small, args.rounds, device):
            write(merged(args.out, rows, ("pixels", "variant")), args.out)


if __name__ == "__main__":
    main()
