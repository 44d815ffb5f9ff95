"""The second stage of FreeSwim (arXiv 2511.14712): a video enlarged, noised part of the way (SDEdit, arXiv 2108.01073)
and denoised at the large size, with `freeswim` in the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from glocal.adapt.freeswim import FreeSwimSettings, freeswim


def refine(
    pipe: Any,
    video: Tensor | np.ndarray | Sequence[Any],
    height: int,
    width: int,
    *,
    preset: str | None = None,
    settings: FreeSwimSettings | None = None,
    strength: float = 0.7,
    flow_shift: float = 9.0,
    **call: Any,
) -> Any:
    """Denoise `video` again at height x width pixels, multiples of 16.

    pipe: a text-to-video or video-to-video pipeline of Wan with one transformer; it is left as it was. video: frames of
    any size, [F, 3, h, w] in [0, 1], an array [F, h, w, 3] in [0, 1] or of bytes, or images of PIL. preset and settings
    are those of `freeswim`. strength: the last share of the steps that is run. flow_shift: of this stage's schedule.
    call: further arguments of diffusers' WanVideoToVideoPipeline, such as prompt, num_inference_steps (50) and
    guidance_scale (5), whose result is returned. Frames are enlarged bilinearly, as published.
    Raises ValueError for sizes, a strength or a pipeline that do not fit.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"refine: strength={strength} must lie above 0 and at most at 1; the published one is 0.7.")
    for name, value in (("height", height), ("width", width)):
        if value < 16 or value % 16:
            raise ValueError(
                f"refine: {name}={value} must be a multiple of 16; nearest: {max(round(value / 16), 1) * 16}."
            )
    stage = second_stage(pipe, flow_shift)
    frames = interpolate(frames_of(video), (height, width), mode="bilinear", align_corners=False)
    with freeswim(stage, preset, settings=settings):
        return stage(video=[frames], height=height, width=width, strength=strength, **call)


def second_stage(pipe: Any, flow_shift: float = 9.0) -> Any:
    """A video-to-video pipeline of the same models with a UniPC scheduler of its own; attach `freeswim` to it."""
    from diffusers import UniPCMultistepScheduler, WanVideoToVideoPipeline  # type: ignore[attr-defined]

    names = ("tokenizer", "text_encoder", "transformer", "vae")
    missing = [name for name in names if not hasattr(pipe, name)]
    if missing or getattr(pipe, "transformer_2", None) is not None:
        why = f"has no {missing[0]}" if missing else "has two transformers"
        raise ValueError(f"refine: {type(pipe).__name__} {why}; legal: a pipeline of Wan 2.1 with one transformer.")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": flow_shift}
    scheduler: Any = UniPCMultistepScheduler.from_config(pipe.scheduler.config, **flow)
    stage: Any = WanVideoToVideoPipeline(**{name: getattr(pipe, name) for name in names}, scheduler=scheduler)
    stage.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return stage


def frames_of(video: Tensor | np.ndarray | Sequence[Any]) -> Tensor:
    """Frames as [F, 3, h, w], float32 in [0, 1]; ValueError for another shape."""
    if isinstance(video, Tensor):
        frames = video.float()
    else:
        found = torch.from_numpy(np.stack([np.asarray(frame) for frame in video]))
        found = found.movedim(-1, 1) if found.dim() == 4 else found  # [F, h, w, 3] -> [F, 3, h, w]
        frames = found.float() if found.is_floating_point() else found.float() / 255
    if frames.dim() != 4 or frames.shape[1] != 3:
        raise ValueError(
            f"refine: frames of shape {tuple(frames.shape)}; legal: a tensor [F, 3, h, w], an array [F, h, w, 3], or "
            "images in colour."
        )
    return frames
