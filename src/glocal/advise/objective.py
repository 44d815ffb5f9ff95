"""What is judged end to end: how a model runs on a sample, how far two results lie apart, and what "another sample" is.

The first entry of a distance is the main error, the relative L2 distance of the outputs; errors, floor and ceiling of a
drift are all taken in it. The entries behind it are the measures of the domain.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from glocal.adapt.records import Core, RunState, Site, SiteCall
from glocal.advise.capture import load_call
from glocal.advise.workload import Sample, Workload
from glocal.canvas import Canvas, Layout
from glocal.measure import flicker_difference, psnr, relative_l2, ssim
from glocal.models.generation import (
    SampleSpec,
    SampleStep,
    VideoDiT,
    draw_noise,
    noise_levels,
    to_pixels,
)
from glocal.models.generation.sampler import sample as draw_clip
from glocal.ops import Score, attend

Coordinate = Literal["sigma", "prefill", "always"]
PICTURES = ("psnr", "ssim", "flicker_difference")  # measures of frames


@dataclass(frozen=True, eq=False)
class Output:
    """A result. tensor: what the main error is taken of. frames [T, C, H, W] in [0, 1]: its picture, if it has one.
    notes: what else the objective needs to judge it, as tensors by name.
    """

    tensor: Tensor
    frames: Tensor | None = None
    notes: Mapping[str, Tensor] = field(default_factory=dict)


class Step(Protocol):
    """What `on_step` is given after a step."""

    @property
    def latent(self) -> Tensor:
        """The running result behind the step."""
        ...


class Objective(Protocol):
    """How a kind of model is run and judged.

    An objective whose samples say a size may tell it by `sizes(sample)`, its arguments of pixels and frames by name:
    step weights are then measured on a smaller canvas.
    measures: all that `distance` may give. A sample may lack some of them (small frames have no SSIM).
    coordinate: how phases of a recipe are said: "sigma" for models that run over noise levels, "prefill" for language,
    "always" for one pass. restart: whether `run` can go on from a latent. guidance: its scale, None without.
    higher: measures that are better when higher, so `--max` cannot bound them.
    """

    @property
    def name(self) -> str:
        """As in `recipe.objective`."""
        ...

    @property
    def measures(self) -> tuple[str, ...]:
        """See the class; the main error first."""
        ...

    @property
    def coordinate(self) -> Coordinate:
        """See the class."""
        ...

    @property
    def restart(self) -> bool:
        """See the class."""
        ...

    @property
    def higher(self) -> frozenset[str]:
        """See the class."""
        ...

    @property
    def guidance(self) -> float | None:
        """Guidance scale of a run."""
        ...

    def levels_of(self, model: Any, sample: Sample) -> tuple[float, ...]:
        """The steps + 1 noise levels of a run; (1, 0) for a model of one pass."""
        ...

    def check(self, model: Any, workload: Workload) -> None:
        """ValueError for the first sample this model cannot run, with its id and what is legal."""
        ...

    def run(
        self,
        model: Any,
        sample: Sample,
        *,
        start: int = 0,
        latent: Tensor | None = None,
        on_step: Callable[[Any], None] | None = None,
    ) -> Output:
        """The model's result on a sample; the same sample gives the same result."""
        ...

    def brief(self, model: Any, sample: Sample) -> Output:
        """The result of one step: the shortest run in which every attention site is called."""
        ...

    def distance(self, reference: Output, other: Output) -> Mapping[str, float]:
        """Measures by name, the main error first."""
        ...

    def ceiling(self, model: Any, sample: Sample) -> Output:
        """A result that has nothing to do with the reference beyond the call's arguments."""
        ...


class OnePass:
    """What objectives of models of one pass have in common: no middle, no guidance, no noise levels."""

    @property
    def restart(self) -> bool:
        """One pass has no middle."""
        return False

    @property
    def guidance(self) -> None:
        """None."""
        return None

    def levels_of(self, model: Any, sample: Sample) -> tuple[float, ...]:
        """One pass."""
        return (1.0, 0.0)


@dataclass(frozen=True)
class Latents:
    """A rectified-flow model judged by its last latent: relative L2.

    spec: steps, shift, guidance. frames, height, width: of the clip in pixels, where a sample does not say otherwise.
    Samples name values of the model's condition fields, and may set `frames`, `height` and `width`.
    """

    spec: SampleSpec = field(default_factory=SampleSpec)
    frames: int = 16
    height: int = 64
    width: int = 64

    @property
    def name(self) -> str:
        """As in `recipe.objective`."""
        return type(self).__name__.lower()

    @property
    def measures(self) -> tuple[str, ...]:
        """Of the latents."""
        return ("relative_l2",)

    @property
    def coordinate(self) -> Coordinate:
        """Phases are noise levels."""
        return "sigma"

    @property
    def restart(self) -> bool:
        """A run can be taken up at any step."""
        return True

    @property
    def higher(self) -> frozenset[str]:
        """None of the measures of latents."""
        return frozenset()

    @property
    def levels(self) -> tuple[float, ...]:
        """The steps + 1 noise levels of a run; the step between two of them is a step's length in sigma."""
        return noise_levels(self.spec)

    @property
    def guidance(self) -> float | None:
        """Guidance scale of a run."""
        return self.spec.guidance

    def levels_of(self, model: VideoDiT, sample: Sample) -> tuple[float, ...]:
        """The same for every sample."""
        return self.levels

    def fields(self, model: VideoDiT) -> tuple[str, ...]:
        """Legal arguments of a sample."""
        return (*(name for name, _ in model.config.fields), "frames", "height", "width")

    def check(self, model: VideoDiT, workload: Workload) -> None:
        """ValueError for the first sample this model cannot run, with its id, the argument and what is legal."""
        for item in workload.samples:
            try:
                self._condition(model, item)
                model.canvas(torch.empty(1, *self._clip(model, item), device="meta"))
            except ValueError as error:
                raise ValueError(f"sample {item.id!r}: {error}") from error

    def sizes(self, item: Sample) -> Mapping[str, int]:
        """Arguments of a sample that say its size, in pixels and frames."""
        return {name: item.args.get(name, getattr(self, name)) for name in ("frames", "height", "width")}

    def first_latent(self, model: VideoDiT, item: Sample) -> Tensor:
        """The noise [1, T, C, H, W] of a sample."""
        frames, channels, height, width = self._clip(model, item)
        return draw_noise(item.seed, 1, frames, height, width, channels)

    def run(
        self,
        model: VideoDiT,
        sample: Sample,
        *,
        start: int = 0,
        latent: Tensor | None = None,
        on_step: Callable[[SampleStep], None] | None = None,
    ) -> Output:
        """Draw the sample. start, latent: go on before step `start` from the latent [1, T, C, H, W] found there.

        on_step is called after each step with the latent behind it. Raises ValueError for a start without its latent.
        """
        if (latent is None) != (start == 0):
            raise ValueError(
                f"start={start} and latent={'none' if latent is None else 'given'}: a later start needs the latent "
                f"before that step, and start=0 draws its own."
            )
        first = self.first_latent(model, sample) if latent is None else latent
        clip = draw_clip(model, first, self._condition(model, sample), self.spec, start=start, callback=on_step)
        return Output(clip, to_pixels(clip[0]))

    def brief(self, model: VideoDiT, sample: Sample) -> Output:
        """The last step alone, from the noise."""
        last = self.spec.steps - 1
        return self.run(model, sample, start=last, latent=self.first_latent(model, sample) if last else None)

    def distance(self, reference: Output, other: Output) -> Mapping[str, float]:
        """`relative_l2` of the latents."""
        return {"relative_l2": float(relative_l2(reference.tensor, other.tensor))}

    def ceiling(self, model: VideoDiT, sample: Sample) -> Output:
        """The same condition from another noise."""
        return self.run(model, Sample(sample.id, other_seed(sample.seed), sample.args))

    def _clip(self, model: VideoDiT, item: Sample) -> tuple[int, int, int, int]:
        sizes = {}
        for name in ("frames", "height", "width"):
            value = item.args.get(name, getattr(self, name))
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}; legal: whole numbers from 1.")
            sizes[name] = value
        return sizes["frames"], model.config.channels, sizes["height"], sizes["width"]

    def _condition(self, model: VideoDiT, item: Sample) -> Tensor:
        legal = self.fields(model)
        for name in item.args:
            if name not in legal:
                near = get_close_matches(name, legal, n=1, cutoff=0.0)[0]
                raise ValueError(f"argument {name!r} is unknown; legal: {', '.join(legal)}; nearest: {near!r}.")
        return model.condition(**{k: v for k, v in item.args.items() if k not in ("frames", "height", "width")})


@dataclass(frozen=True)
class Frames(Latents):
    """As `Latents`, with the measures of video beside the main error: PSNR in dB, SSIM and the flicker difference.

    SSIM needs frames of at least 11 x 11 px and the flicker difference two frames; where a clip is smaller they are
    left out.
    """

    @property
    def measures(self) -> tuple[str, ...]:
        """Of the latents, then of the frames."""
        return (*super().measures, *PICTURES)

    @property
    def higher(self) -> frozenset[str]:
        """PSNR and SSIM."""
        return frozenset({"psnr", "ssim"})

    def distance(self, reference: Output, other: Output) -> Mapping[str, float]:
        """`relative_l2`, then `psnr` (inf where equal), `ssim` (mean over frames), `flicker_difference`."""
        measures = dict(super().distance(reference, other))
        a, b = reference.frames, other.frames
        if a is None or b is None:
            raise ValueError("Frames: both outputs need frames; use Latents() for outputs without.")
        measures["psnr"] = float(psnr(a, b, 1.0, dims=4))
        if min(a.shape[-2:]) >= 11:
            measures["ssim"] = float(ssim(a, b, 1.0).mean())
        if a.shape[0] >= 2:
            measures["flicker_difference"] = float(flicker_difference(a, b))
        return measures


@dataclass(frozen=True)
class Operator:
    """Captured attention calls judged by the attention output; figures are of the operator alone.

    The model is a `Core` (q, k, v, call -> out), such as `dense` of this class or a recipe's; samples come from
    `Workload.from_tensors`.
    """

    device: str = "cpu"

    @property
    def name(self) -> str:
        """As in `recipe.objective`."""
        return "operator"

    @property
    def measures(self) -> tuple[str, ...]:
        """Of all heads together, and of the worst one."""
        return ("relative_l2", "worst_head")

    def run(self, model: Core, sample: Sample) -> Output:
        """The output [B, H, N, Dv] of one captured call."""
        q, k, v, call = self.inputs(sample)
        return Output(model(q, k, v, call))

    def inputs(self, sample: Sample) -> tuple[Tensor, Tensor, Tensor, SiteCall]:
        """q, k, v of a sample on the device, and where they were captured."""
        legal = ("file", "call", "canvas")
        unknown = [name for name in sample.args if name not in legal]
        if unknown or not {"file", "call"} <= set(sample.args):
            raise ValueError(
                f"sample {sample.id!r} has arguments {sorted(sample.args)}; Operator needs file and call, as "
                f"Workload.from_tensors makes them."
            )
        canvas = sample.args.get("canvas")
        assert canvas is None or isinstance(canvas, Canvas)
        captured = load_call(sample.args["file"], sample.args["call"], canvas)
        info = captured.info
        q, k, v = (t.to(self.device) for t in (captured.q, captured.k, captured.v))
        site = Site(
            name=info.name if not info.site else info.site,
            layer=info.layer,
            heads=q.shape[1],
            head_dim=q.shape[3],
            kv_heads=k.shape[1],
            scale=info.scale,
        )
        branch = {"both": "both", "cond": "cond", "uncond": "uncond"}.get(info.branch)
        if branch is None:
            raise ValueError(f"call {info.name!r} has branch={info.branch!r}; legal: both, cond, uncond.")
        state = RunState(info.step, info.total, info.sigma, rows=((0, branch),))  # type: ignore[arg-type]
        return q, k, v, SiteCall(site, Layout.of(info.canvas), state)

    @staticmethod
    def dense(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> Tensor:
        """Exact attention: q [B, H, N, D], k [B, Hkv, N, D], v [B, Hkv, N, Dv] -> [B, H, N, Dv]."""
        return attend(q, k, v, score=Score(scale=call.site.scale)).out

    def distance(self, reference: Output, other: Output) -> Mapping[str, float]:
        """`relative_l2` of the outputs, then the worst head's."""
        heads = relative_l2(reference.tensor.transpose(0, 1), other.tensor.transpose(0, 1), dims=3)  # [H]
        return {
            "relative_l2": float(relative_l2(reference.tensor, other.tensor)),
            "worst_head": float(heads.max()),
        }

    def ceiling(self, model: Core, sample: Sample) -> Output:
        """The mean output over all tokens, at every token: attention that knows no place."""
        out = self.run(model, sample).tensor
        return Output(out.mean(2, keepdim=True).expand_as(out))


def other_seed(seed: int) -> int:
    """A seed made from another one; it does not meet those of a workload by counting on."""
    return int.from_bytes(hashlib.sha256(f"other {seed}".encode()).digest()[:6], "big")


def main_error(distance: Mapping[str, float]) -> float:
    """The first entry. Raises ValueError if it is not finite: such a result cannot be judged."""
    name, value = next(iter(distance.items()))
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; the result holds NaN or infinity.")
    return value


def on_cpu(output: Output) -> Output:
    """A result that holds no memory of a device."""
    frames = None if output.frames is None else output.frames.cpu()
    return Output(output.tensor.cpu(), frames, {name: t.cpu() for name, t in output.notes.items()})
