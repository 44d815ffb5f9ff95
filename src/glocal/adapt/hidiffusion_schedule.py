"""Which part of HiDiffusion (arXiv 2311.17528) acts where in a UNet, and in which steps of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from glocal.adapt.pipelines import is_pipeline, parts
from glocal.adapt.presets import Preset


@dataclass(frozen=True)
class Places:
    """Stages of a UNet by path.

    windows: their self-attention runs in four shifted windows, at every step.
    pooled, unpooled: down stage that halves its map after its first attention, up stage that restores it.
    strided: down stage whose downsampler takes every fourth pixel instead of every second; None for no such stage.
    """

    windows: tuple[str, ...]
    pooled: str
    unpooled: str
    strided: str | None = None


@dataclass(frozen=True)
class Shares:
    """In which shares of a run the maps are made smaller.

    longer: which of the two lasts for the first share of a pair; the other one lasts for the second share.
    border: latents with both sides of at least `border` take the pair `large`, others `small`; None: always `small`.
    aggressive: first share of the run, below `border` only, in which the strided stage acts alone.
    """

    longer: Literal["strided", "pooled"] = "pooled"
    border: int | None = None
    small: tuple[float, float] = (0.4, 0.0)
    large: tuple[float, float] = (0.7, 0.3)
    aggressive: float | None = None


@dataclass(frozen=True)
class HiSettings:
    """places, shares: where and when. raunet, window_attention: switch a half of the method off.

    control_side, control_share: a ControlNet sees latents with no side above this, in the first share of the run.
    """

    places: Places
    shares: Shares
    raunet: bool = True
    window_attention: bool = True
    control_side: int = 128
    control_share: float = 0.6


@dataclass(frozen=True)
class Phases:
    """The steps in which the strided downsampler and the pool act."""

    strided: range
    pooled: range


def phases(settings: HiSettings, latent: tuple[int, int], total: int) -> Phases:
    """For latents of a size (height, width) and a run of `total` steps; computed anew for every run."""
    none = range(0)
    if not settings.raunet:
        return Phases(none, none)
    shares, has_strided = settings.shares, settings.places.strided is not None
    below = shares.border is None or min(latent) < shares.border
    first, second = (int(share * total) for share in (shares.small if below else shares.large))
    if below and shares.aggressive is not None and has_strided:
        switch = int(shares.aggressive * total)
        return Phases(range(switch), range(switch, first))
    strided, pooled = (first, second) if shares.longer == "strided" else (second, first)
    return Phases(range(strided) if has_strided else none, range(pooled))


_SD = Places(("down_blocks.0", "up_blocks.3"), "down_blocks.1", "up_blocks.2", "down_blocks.0")
_XL_WINDOWS = ("down_blocks.1", "up_blocks.1")
_XL = Places(_XL_WINDOWS, "down_blocks.1", "up_blocks.1", "down_blocks.1")
_TURBO = Places(_XL_WINDOWS, "down_blocks.1", "up_blocks.1")
SD_STAGES = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
XL_STAGES = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
AGGRESSIVE = 8 / 50


@dataclass(frozen=True)
class UNetPreset(Preset[HiSettings]):
    """Settings for UNets whose down stages are of the classes `stages`, in this order."""

    stages: tuple[str, ...] = ()

    def fits(self, model: Any) -> bool:
        """Whether model, or the UNet of a pipeline, has these stages."""
        return super().fits(model) and stages_of(model) == self.stages


_UNET, _CODE = ("UNet2DConditionModel",), "authors' repository"


def _sdxl(places: Places, **shares: Any) -> UNetPreset:
    return UNetPreset(HiSettings(places, Shares(**shares)), _UNET, _CODE, stages=XL_STAGES)


PRESETS: Mapping[str, Preset[HiSettings]] = {
    "sd": UNetPreset(HiSettings(_SD, Shares("strided", 256), control_side=64), _UNET, _CODE, stages=SD_STAGES),
    "sdxl": _sdxl(_XL, border=512, aggressive=AGGRESSIVE),
    "sdxl-controlnet": _sdxl(_XL, border=512, aggressive=AGGRESSIVE, small=(0.5, 0.0)),
    "sdxl-gentle": _sdxl(_XL, border=512),
    "sdxl-turbo": _sdxl(_TURBO, small=(0.5, 0.0)),
    # The built-in UNet was trained on 32 x 32 latents where SDXL had 128 x 128: the border is four times that again.
    "demo-image": UNetPreset(
        HiSettings(_XL, Shares(border=128, aggressive=AGGRESSIVE)),
        ("ImageUNet",),
        "the rule of sdxl, for the built-in model",
        stages=XL_STAGES,
    ),
}


def stages_of(model: Any) -> tuple[str, ...]:
    """Classes of the down stages of a UNet, or of the UNet of a pipeline; empty where there is none."""
    unet = parts(model).get("unet") if is_pipeline(model) else model
    return tuple(type(stage).__name__ for stage in getattr(unet, "down_blocks", ()))


def recognised(model: Any) -> str | None:
    """The preset for a UNet or pipeline, by its stages, its name and what its pipeline holds; None for other models.

    "turbo" in its name makes it Turbo; "inpainting" or "playground", or the 9 channels of an inpainting UNet, ask for
    the gentle schedule, a ControlNet of a pipeline that starts from noise for the longer one.
    """
    stages = stages_of(model)
    if stages == SD_STAGES:
        return "sd"
    if stages != XL_STAGES:
        return None
    if PRESETS["demo-image"].fits(model):
        return "demo-image"
    unet: Any = parts(model)["unet"] if is_pipeline(model) else model
    names = [str(getattr(model, "name_or_path", "")), str(getattr(unet.config, "_name_or_path", ""))]
    name = " ".join(names).lower()
    if "turbo" in name:
        return "sdxl-turbo"
    if "inpainting" in name or "playground" in name or unet.config.in_channels == 9:
        return "sdxl-gentle"
    starts = not any(word in type(model).__name__ for word in ("Img2Img", "Inpaint"))
    return "sdxl-controlnet" if starts and getattr(model, "controlnet", None) is not None else "sdxl"
