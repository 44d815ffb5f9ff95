"""Pipelines of diffusers judged by their last latents, and by their pictures where those are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from glocal.advise.objective import PICTURES, Coordinate, Output, other_seed
from glocal.advise.workload import Sample, Workload
from glocal.measure import flicker_difference, psnr, relative_l2, ssim

OWN = ("generator", "output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs")


@dataclass(frozen=True)
class _Step:
    latent: Tensor


class Pipeline:
    """`pipe(**arguments of a sample)` from the seed's noise; the main error is the relative L2 of the last latents.

    pictures: decode as well (needs the VAE) and measure PSNR, SSIM and flicker of the frames.
    A sample's arguments are those of the pipeline's call, such as prompt, height, width, num_inference_steps. A run
    cannot be taken up half way: pipelines begin at their first step.
    """

    def __init__(self, pipe: Any, *, pictures: bool = False) -> None:
        self.pipe, self.pictures = pipe, pictures
        self._levels: dict[str, tuple[float, ...]] = {}
        self._legal = [n for n in signature(type(pipe).__call__).parameters if n != "self" and n not in OWN]

    @property
    def name(self) -> str:
        """As in `recipe.objective`."""
        return "frames" if self.pictures else "latents"

    @property
    def measures(self) -> tuple[str, ...]:
        """Of the latents, and of the pictures where those are asked for."""
        return ("relative_l2", *PICTURES) if self.pictures else ("relative_l2",)

    @property
    def coordinate(self) -> Coordinate:
        """Phases are noise levels."""
        return "sigma"

    @property
    def restart(self) -> bool:
        """Pipelines begin at their first step."""
        return False

    @property
    def higher(self) -> frozenset[str]:
        """PSNR and SSIM."""
        return frozenset({"psnr", "ssim"})

    @property
    def guidance(self) -> float | None:
        """What the pipeline was last called with."""
        scale = getattr(self.pipe, "_guidance_scale", None)
        return None if scale is None or scale <= 1 else float(scale)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.pipe).__name__}, pictures={self.pictures})"

    def check(self, model: Any, workload: Workload) -> None:
        """ValueError for an argument the pipeline does not take, with what is legal."""
        for sample in workload.samples:
            for name in sample.args:
                if name not in self._legal:
                    raise ValueError(
                        f"sample {sample.id!r}: {type(self.pipe).__name__} takes no {name!r}; legal: "
                        f"{', '.join(self._legal)}."
                    )

    def sizes(self, sample: Sample) -> Mapping[str, int]:
        """Arguments of a sample that say its size, where it does."""
        return {name: sample.args[name] for name in ("num_frames", "height", "width") if name in sample.args}

    def levels_of(self, model: Any, sample: Sample) -> tuple[float, ...]:
        """Noise levels of the schedule that `sample` runs: what its scheduler was set to in one step."""
        if sample.key not in self._levels:
            self.brief(model, sample)
        return self._levels[sample.key]

    def run(
        self,
        model: Any,
        sample: Sample,
        *,
        start: int = 0,
        latent: Tensor | None = None,
        on_step: Callable[[Any], None] | None = None,
    ) -> Output:
        """The last latents, float32. ValueError for a start."""
        if start or latent is not None:
            raise ValueError(f"start={start}: {type(self.pipe).__name__} begins at its first step; legal: 0.")
        return self._call(sample, on_step, stop=False)

    def brief(self, model: Any, sample: Sample) -> Output:
        """The latents behind the first step; the pipeline is told to stop there."""
        return self._call(sample, None, stop=True)

    def distance(self, reference: Output, other: Output) -> Mapping[str, float]:
        """`relative_l2` of the latents; with pictures `psnr`, `ssim`, `flicker_difference`."""
        measures = {"relative_l2": float(relative_l2(reference.tensor, other.tensor))}
        a, b = reference.frames, other.frames
        if a is not None and b is not None:
            measures["psnr"] = float(psnr(a, b, 1.0, dims=4))
            if min(a.shape[-2:]) >= 11:
                measures["ssim"] = float(ssim(a, b, 1.0).mean())
            if a.shape[0] >= 2:
                measures["flicker_difference"] = float(flicker_difference(a, b))
        return measures

    def ceiling(self, model: Any, sample: Sample) -> Output:
        """The same call from another noise."""
        return self.run(model, Sample(sample.id, other_seed(sample.seed), sample.args))

    def _call(self, sample: Sample, on_step: Callable[[Any], None] | None, *, stop: bool) -> Output:
        last: list[Tensor] = []

        def after(pipe: Any, step: int, timestep: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
            if not (stop and last):
                last[:] = [given["latents"].detach()]
            if on_step is not None:
                on_step(_Step(given["latents"]))
            if stop:
                pipe._interrupt = True
            return {}

        decoded = self.pictures and not stop
        # Pipelines draw on the CPU so that devices agree; a generator of its own touches no global one.
        made = self.pipe(
            **sample.args,
            generator=torch.Generator().manual_seed(sample.seed),
            output_type="pt" if decoded else "latent",
            return_dict=False,
            callback_on_step_end=after,
            callback_on_step_end_tensor_inputs=["latents"],
        )
        times = self.pipe.scheduler.timesteps
        self._levels[sample.key] = (*(float(t) / 1000.0 for t in times), 0.0)
        frames = None
        if decoded:
            frames = made[0].float()
            frames = frames[0] if frames.dim() == 5 else frames[:1]  # [T, C, H, W]
        return Output(last[0].float(), frames)
