"""Methods as the cases name them: how each is made for a model, at full size or at a size for a check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from generation.models import Grid, Kind, draw
from glocal.adapt import Method
from glocal.adapt.gna import GNA, GNASettings, Window
from glocal.adapt.gna import PRESETS as GNA_PRESETS
from glocal.adapt.hidiffusion import HiDiffusion
from glocal.adapt.hidiffusion_schedule import PRESETS as HI_PRESETS
from glocal.adapt.hidiffusion_schedule import Shares
from glocal.adapt.paro import Paro
from glocal.adapt.paro_plan import ParoPlan, pack_bits
from glocal.adapt.radial import PRESETS as RADIAL_PRESETS
from glocal.adapt.radial import Radial
from glocal.adapt.rectified_spaattn import PRESETS as SPA_PRESETS
from glocal.adapt.rectified_spaattn import RectifiedSpaAttn
from glocal.adapt.scale_dit import PRESETS as SCALE_PRESETS
from glocal.adapt.scale_dit import ScaleDiT
from glocal.adapt.tile_windows import TileMethod, TileSettings
from glocal.kernels.quant import Quant
from glocal.nn.lora import PartLora


@dataclass(frozen=True)
class Where:
    """What a method is made for. grid: media tokens; layers: blocks built; heads: of the model; small: for a check."""

    kind: Kind
    grid: Grid
    layers: int
    heads: int
    backend: str = "auto"
    small: bool = False


Make = Callable[[nn.Module, Where], Method]


@dataclass(frozen=True)
class Entry:
    """A method of a case. make: the method for a model, without its dense steps and layers.

    paper: what the paper says of whole runs, else of what it names. dense_steps, dense_layers: first steps of a
    published run, and blocks of each stack, that stay dense there. group, steps: entries of one group make up one run,
    each for so many steps; a method alone makes up all steps that are not dense. fused: queries and keys are normed
    and rotated in one pass (`glocal.adapt.fused_norms`), in dense steps too.
    """

    name: str
    make: Make
    paper: str
    dense_steps: int = 0
    dense_layers: tuple[int, ...] = ()
    group: str = ""
    steps: int | None = None
    fused: bool = False

    def with_fused(self) -> tuple[Entry, Entry]:
        """This one, and the same with fused norms."""
        return self, replace(self, name=f"{self.name}, fused norms", fused=True)


def radial(preset: str) -> Make:
    """A published mask."""
    settings = replace(RADIAL_PRESETS[preset].settings, dense_steps=0, dense_layers=0)
    return lambda model, at: Radial(settings, backend=at.backend)


def spa(preset: str, **changed: Any) -> Make:
    """Published settings, single ones changed."""
    settings = replace(
        SPA_PRESETS[preset].settings, **{"dense_steps": 0, "dense_layers": 0, "layers": frozenset()} | changed
    )
    small = replace(settings, drop=0.8, mass=0.0, neighbours=False)
    return lambda model, at: RectifiedSpaAttn(small if at.small else settings, backend=at.backend)


def gna(preset: str) -> Make:
    """A published window; at a small size half of each axis."""
    return _window(replace(GNA_PRESETS[preset].settings, dense_steps=0, dense_layers=0))


def neighbours(window: Grid, stride: Grid) -> Make:
    """A window that no paper names for the model."""
    return _window(GNASettings(Window(window, stride)))


def _window(settings: GNASettings) -> Make:
    def make(model: nn.Module, at: Where) -> Method:
        half = tuple(max(1, n // 2) for n in at.grid)
        small = replace(settings, window=Window(half, tuple(max(1, w // 2) for w in half)))
        return GNA(small if at.small else settings, backend=at.backend)

    return make


def tiles(tile: Grid, window: Grid) -> Make:
    """Tile windows; at a small size two tiles of a quarter on each axis."""

    def make(model: nn.Module, at: Where) -> Method:
        quarter = TileSettings(tuple(max(1, n // 4) for n in at.grid), (2,) * len(at.grid))
        return TileMethod(quarter if at.small else TileSettings(tile, window), backend=at.backend)

    return make


def paro(density: float, quant: Quant | None = None) -> Make:
    """Random orders and random blocks of the density asked for: a plan wants trained weights, its time does not.

    Rows that know nothing of each other are the hard case. quant: rounding; the definition does not round.
    """

    def make(model: nn.Module, at: Where) -> Method:
        rounding = None if at.backend == "reference" else quant
        return Paro(_plan(0.5 if at.small else density, at), quant=rounding, backend=at.backend)

    return make


def _plan(density: float, at: Where) -> ParoPlan:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    maker = torch.Generator(device).manual_seed(0)
    tokens = torch.Size(at.grid).numel() + at.kind.words
    blocks, front = -(-tokens // 64), -(-at.kind.words // 64)
    bits = torch.empty(1, at.layers, at.heads, blocks, -(-blocks // 8), dtype=torch.uint8)
    for layer in range(at.layers):
        mask = torch.rand(at.heads, blocks, blocks, generator=maker, device=device) < density
        mask[:, :front] = mask[:, :, :front] = mask[:, -1] = mask[..., -1] = True
        bits[0, layer] = pack_bits(mask).cpu()
    orders = torch.randint(6, (at.layers, at.heads), generator=torch.Generator().manual_seed(0))
    return ParoPlan(orders, bits, blocks, 1)


def scaled(low: tuple[int, int]) -> Make:
    """Scale-DiT with a small image of `low` tokens and no updates of weights."""

    def make(model: nn.Module, at: Where) -> Method:
        size = (max(1, at.grid[0] // 4), max(1, at.grid[1] // 4)) if at.small else low
        first = next(model.parameters())
        settings = SCALE_PRESETS["flux.1-dev"].settings
        settings = replace(settings, window=(4, 4)) if at.small else settings
        method = ScaleDiT(model, settings, PartLora({}), backend=at.backend)
        method.give(draw((1, size[0] * size[1], 64), first.device, first.dtype), size)
        return method

    return make


def hidi(strided: bool, pooled: bool) -> Make:
    """HiDiffusion in the state of some steps of its run: which of its two halvings act; windows always do."""

    def make(model: nn.Module, at: Where) -> Method:
        settings = HI_PRESETS["sdxl"].settings
        whole = (1.0 if pooled else 0.0, 1.0 if strided else 0.0)
        shares = Shares("pooled", None, small=whole)
        return HiDiffusion(replace(settings, shares=shares, raunet=strided or pooled))

    return make
