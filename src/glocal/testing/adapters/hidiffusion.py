"""HiDiffusion (arXiv 2311.17528): transformer blocks in four windows, and whole tiny UNets over the steps of a run.

A UNet runs all steps up to the last recorded one, since steps are counted; the recorded draws of each step take the
place of the generator.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glocal.adapt import attach
from glocal.adapt.hidiffusion import HiDiffusion
from glocal.adapt.hidiffusion_schedule import PRESETS, HiSettings
from glocal.adapt.hidiffusion_windows import window_attention
from glocal.adapt.host import replace_forward
from glocal.adapt.records import RunState
from glocal.testing.adapter import Adapter, Run
from glocal.testing.case import Case, load


def _preset(model: str) -> str:
    """Our name for a published kind of model."""
    if model.startswith(("sd15", "sd21")):
        return "sd"
    gentle = "inpaint" in model or "playground" in model
    return "sdxl-turbo" if "turbo" in model else "sdxl-gentle" if gentle else "sdxl"


def run(case: Case, where: Run) -> dict[str, Tensor]:
    """Our results of one case."""
    with torch.no_grad():
        return _block(case) if "in.x" in case else _unet(case)


def _block(case: Case) -> dict[str, Tensor]:
    """A transformer block of diffusers, untouched and with windows in its self-attention."""
    from diffusers.models.attention import BasicTransformerBlock

    c = case.config
    block: Any = BasicTransformerBlock(
        c["dim"], c["heads"], c["head_dim"], cross_attention_dim=c["cross_attention_dim"]
    )
    x, words = case["in.x"], case["in.encoder"]
    block.load_state_dict(case.group("state"))
    block = block.to(x.device).eval()
    dense = block(x, encoder_hidden_states=words)
    height, width = c["token_hw"]
    replace_forward(
        block.attn1,
        lambda attend: lambda y, **_: window_attention(y, (height, width), attend, c["shift_case"]),
    )
    return {"mid.dense_y": dense, "out.y": block(x, encoder_hidden_states=words)}


class _Recorded(HiDiffusion):
    """The method with recorded draws [steps, windowed sites], in the order the sites run."""

    def __init__(self, settings: HiSettings, draws: Tensor) -> None:
        super().__init__(settings)
        self.draws: list[list[float]] = draws.tolist()
        self.used: dict[int, int] = {}

    def draw(self, state: RunState) -> float:
        """The next one of the step."""
        at = self.used.get(state.step, 0)
        self.used[state.step] = at + 1
        return self.draws[state.step][at]


def _unet(case: Case) -> dict[str, Tensor]:
    """A UNet, untouched at the first step, then with the method in it."""
    from diffusers import UNet2DConditionModel

    c = case.config
    unet: Any = UNet2DConditionModel(**c["unet"])
    unet.load_state_dict(_state(case))
    sample = case["in.sample"]
    unet = unet.to(sample.device).eval()
    added = {name: case[f"in.{name}"] for name in ("text_embeds", "time_ids") if f"in.{name}" in case}

    def noise(step: int) -> Tensor:
        given = {"added_cond_kwargs": added} if added else {}
        return unet(sample, case["in.timesteps"][step], case["in.encoder"], **given).sample

    found = {"mid.unpatched_step0": noise(0)}
    settings = PRESETS[_preset(c["model"])].settings
    settings = replace(settings, raunet=c["apply_raunet"], window_attention=c["apply_window_attn"])
    handle = attach(unet, _Recorded(settings, case["in.draws"]))
    handle.state.total = c["num_timesteps"]
    for step in range(max(c["saved_steps"]) + 1):
        out = noise(step)
        if step in c["saved_steps"]:
            found[f"out.step{step}"] = out
    return found


def _state(case: Case) -> dict[str, Tensor]:
    """The weights; a Turbo case takes those of the XL case beside it."""
    own = case.group("state")
    return own if own else load(_weights(case)).group("state")


def _weights(case: Case) -> Path:
    return case.path.with_name("unet_sdxl.safetensors")


def skip(case: Case) -> str | None:
    """Without diffusers, or without the file that holds the weights, nothing runs."""
    if find_spec("diffusers") is None:
        return "diffusers is not installed: pip install 'glocal[diffusers]'"
    if not case.group("state") and not _weights(case).exists():
        return "its weights are in unet_sdxl.safetensors, which is not beside it"
    return None


ADAPTER = Adapter("hidiffusion", run, skip=skip, attends=lambda case: False)
