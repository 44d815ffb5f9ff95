"""The cases: a published model at a published size, and the methods that make a claim there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from generation.entries import Entry, gna, hidi, neighbours, paro, radial, scaled, spa, tiles
from generation.models import COGVIDEOX, COSMOS, FLUX, HUNYUAN, SDXL, WAN, Grid, Kind
from glocal.kernels.quant import Quant


@dataclass(frozen=True)
class Case:
    """A model at a size. grid: media tokens (latents of a UNet). steps: of a published run. built: blocks of each
    stack that are made; heads: None for all. small: methods
    are made as for a check.
    """

    name: str
    kind: Kind
    grid: Grid
    entries: tuple[Entry, ...]
    steps: int = 50
    built: tuple[int, ...] = ()
    heads: int | None = None
    rounds: int | None = None
    small: bool = False

    @property
    def tokens(self) -> int:
        """Of the whole sequence."""
        return torch.Size(self.grid).numel() + self.kind.words

    @property
    def attended(self) -> int:
        """Tokens of its largest attention: that of a UNet stands behind one halving."""
        return self.tokens if self.kind.stacks else self.tokens // 4

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks that are made: two of one kind, or one of each of two kinds."""
        few = (2,) if len(self.kind.stacks) == 1 else (1,) * len(self.kind.stacks)
        return self.built if self.built else few

    @property
    def width(self) -> int:
        """Heads that are made."""
        return self.kind.heads if self.heads is None else self.heads

    @property
    def checked(self) -> Grid:
        """A grid for checks, of at most 6 x 16 x 16 tokens or 32 x 32."""
        if self.small:
            return self.grid
        most = (32, 32) if len(self.grid) == 2 else (6, 16, 16)
        return tuple(min(-(-n // 4), m) if n > 16 else min(n, m) for n, m in zip(self.grid, most, strict=True))

    def tiny(self) -> Case:
        """The same with few heads on a small grid, to see that it runs."""
        return replace(self, grid=self.checked, heads=4 if self.kind is SDXL else 2, small=True)


_PARO = "2.71x operator against FlashAttention-2 on A100; 1.9-2.7x end to end"
_PARO_HALF = "1.73x operator against FlashAttention-2 on A100; 1.9-2.7x end to end"

CASES = (
    Case(
        "wan2.1-14b 81 frames 720p",
        WAN,
        (21, 45, 80),
        (
            *Entry("radial", radial("wan2.1-14b"), "1.77x end to end (69 frames)", 12, (1,)).with_fused(),
            *Entry("rectified_spaattn", spa("wan2.1-t2v"), "1.68x end to end at 74.9 % dropped", 5, (2,)).with_fused(),
            *Entry(
                "rectified_spaattn drop=0.84 mass=0",
                spa("wan2.1-t2v", drop=0.84, mass=0.0),
                "2.08x end to end (I2V) at 83.9 % dropped",
                0,
                (2,),
            ).with_fused(),
            *Entry("paro 0.3", paro(0.3), _PARO).with_fused(),
            *Entry("paro 0.5", paro(0.5), _PARO_HALF).with_fused(),
            Entry("paro 0.3, int8", paro(0.3, Quant("int8")), "5.72x with densities of 0.3 and INT8"),
            Entry("gna 18x24x24", neighbours((18, 24, 24), (16, 8, 8)), ""),
            Entry("tile_windows 6x8x8 3x3x3", tiles((6, 8, 8), (3, 3, 3)), ""),
        ),
    ),
    Case(
        "wan2.1-14b 69 frames 768x1280",
        WAN,
        (18, 48, 80),
        Entry("radial", radial("wan2.1-14b"), "1.77x end to end", 12, (1,)).with_fused(),
    ),
    Case(
        "wan2.1-14b 161 frames 768x1280",
        WAN,
        (41, 48, 80),
        (Entry("radial", radial("wan2.1-14b-long"), "2.01x end to end", 2, (2,)),),
        built=(1,),
        rounds=2,
    ),
    Case(
        "hunyuanvideo 129 frames 720p",
        HUNYUAN,
        (33, 45, 80),
        (
            *Entry("rectified_spaattn", spa("hunyuanvideo"), "2.50x end to end at 79.7 % dropped").with_fused(),
            *Entry(
                "rectified_spaattn drop=0.9 mass=0",
                spa("hunyuanvideo", drop=0.9, mass=0.0),
                "3.33x end to end at 89.0 % dropped",
            ).with_fused(),
        ),
    ),
    Case(
        "hunyuanvideo 117 frames 768x1280",
        HUNYUAN,
        (30, 48, 80),
        (
            *Entry("radial", radial("hunyuanvideo"), "1.88x end to end", 12).with_fused(),
            *Entry(
                "gna 91", gna("hunyuanvideo-91"), "2.23x end to end (B200), 1.63x with 15 dense steps", 15
            ).with_fused(),
            Entry("gna 58", gna("hunyuanvideo-58"), "1.53x end to end (B200)"),
            Entry("tile_windows 6x8x8 3x3x3", tiles((6, 8, 8), (3, 3, 3)), "", 15),
        ),
    ),
    Case(
        "hunyuanvideo 509 frames 768x1280",
        HUNYUAN,
        (128, 48, 80),
        Entry("radial", radial("hunyuanvideo-long"), "3.71x end to end", 2, (2, 0)).with_fused(),
    ),
    Case(
        "flux 4096x4096",
        FLUX,
        (256, 256),
        (
            *Entry("rectified_spaattn mass=0", spa("flux-4k", mass=0.0), "1.60x end to end", 0, (0, 20)).with_fused(),
            *Entry("gna 90", gna("flux-4k-90"), "1.82x end to end (B200), 1.45x with 9 dense steps", 9).with_fused(),
            Entry("scale_dit", scaled((64, 64)), "17.89 -> 7.81 s an iteration (2.3x); > 2x end to end"),
        ),
        steps=28,
    ),
    Case(
        "cogvideox-5b 49 frames 480x720",
        COGVIDEOX,
        (13, 30, 45),
        (
            *Entry("paro 0.3", paro(0.3), _PARO).with_fused(),
            *Entry("paro 0.5", paro(0.5), _PARO_HALF).with_fused(),
            Entry("paro 0.3, int8", paro(0.3, Quant("int8")), "5.72x with densities of 0.3 and INT8"),
        ),
        steps=30,
    ),
    Case(
        "cosmos-predict1-7b 121 frames 720p",
        COSMOS,
        (16, 44, 80),
        (
            Entry("gna 56", gna("cosmos-predict1-7b-56"), "1.46x end to end (B200)"),
            Entry("gna 89", gna("cosmos-predict1-7b-89"), "2.05x end to end (B200), 1.50x with 12 dense steps", 12),
        ),
        steps=35,
    ),
    Case(
        "sdxl 2048x2048",
        SDXL,
        (256, 256),
        (
            Entry("hidiffusion, strided", hidi(True, False), "165 -> 58 s (2.8x)", group="hidiffusion", steps=8),
            Entry("hidiffusion, pooled", hidi(False, True), "165 -> 58 s (2.8x)", group="hidiffusion", steps=12),
            Entry("hidiffusion, windows", hidi(False, False), "165 -> 58 s (2.8x)", group="hidiffusion", steps=30),
        ),
    ),
    Case(
        "sdxl 4096x4096",
        SDXL,
        (512, 512),
        (
            Entry("hidiffusion, both", hidi(True, True), "769 -> 287 s (2.7x)", group="hidiffusion", steps=15),
            Entry("hidiffusion, pooled", hidi(False, True), "769 -> 287 s (2.7x)", group="hidiffusion", steps=20),
            Entry("hidiffusion, windows", hidi(False, False), "769 -> 287 s (2.7x)", group="hidiffusion", steps=15),
        ),
        rounds=2,
    ),
)
