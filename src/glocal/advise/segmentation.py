"""Dense prediction judged by its class scores: relative error, changed pixels, and mIoU where there are labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from glocal.adapt.attach import attach
from glocal.adapt.records import Core, SiteCall
from glocal.advise.next_token import Finished
from glocal.advise.objective import Coordinate, OnePass, Output
from glocal.advise.probe import MediaMethod
from glocal.advise.workload import Sample, Workload
from glocal.measure import relative_l2

_ARGUMENTS = ("image", "label", "file")


@dataclass(frozen=True)
class Segmentation(OnePass):
    """A model from images to class scores; the main error is the relative L2 distance of the scores.

    num_classes: of the scores. Samples hold `image` [C, H, W] and, if known, `label` [H, W] (classes, -1 ignored), or
    `file`, a safetensors file with these names. The model maps [1, C, H, W] to [1, num_classes, h, w], or to a mapping
    with it under "out".
    """

    num_classes: int

    @property
    def name(self) -> str:
        """As in `recipe.objective`."""
        return "segmentation"

    @property
    def measures(self) -> tuple[str, ...]:
        """The last two need labels."""
        return ("relative_l2", "pixels_changed", "miou", "miou_lost")

    @property
    def coordinate(self) -> Coordinate:
        """Rules hold always."""
        return "always"

    @property
    def higher(self) -> frozenset[str]:
        """MIoU itself; what is lost of it is better when lower."""
        return frozenset({"miou"})

    def check(self, model: Any, workload: Workload) -> None:
        """ValueError for the first sample without an image, with its id and what is legal."""
        for sample in workload.samples:
            image, label = _read(sample)
            if image.dim() != 3 or (label is not None and label.shape != image.shape[1:]):
                shape = None if label is None else tuple(label.shape)
                raise ValueError(
                    f"sample {sample.id!r}: image {tuple(image.shape)} and label {shape}; legal: [C, H, W] and [H, W]."
                )

    def run(
        self,
        model: Any,
        sample: Sample,
        *,
        start: int = 0,
        latent: Tensor | None = None,
        on_step: Callable[[Any], None] | None = None,
    ) -> Output:
        """Class scores [num_classes, h, w], float32. ValueError for a start: one pass has none."""
        if start or latent is not None:
            raise ValueError(f"start={start}: a prediction is one pass; legal: 0.")
        image, label = _read(sample)
        first = next(model.parameters())
        with torch.no_grad():
            made = model(image[None].to(first))
        scores = (made["out"] if isinstance(made, Mapping) else made)[0]
        if scores.shape[0] != self.num_classes:
            raise ValueError(f"num_classes={self.num_classes}: the model gives {scores.shape[0]} classes.")
        if on_step is not None:
            on_step(Finished(scores))
        return Output(scores.float(), None, {} if label is None else {"label": label})

    def brief(self, model: Any, sample: Sample) -> Output:
        """The run itself."""
        return self.run(model, sample)

    def distance(self, reference: Output, other: Output) -> Mapping[str, float]:
        """`relative_l2` of the scores, `pixels_changed` (share), and with labels `miou` of the other one and
        `miou_lost` against the reference.
        """
        a, b = reference.tensor, other.tensor
        measures = {
            "relative_l2": float(relative_l2(a, b)),
            "pixels_changed": float((a.argmax(0) != b.argmax(0)).float().mean()),
        }
        if "label" in reference.notes:
            first, second = (miou(t.argmax(0).cpu(), reference.notes["label"], self.num_classes) for t in (a, b))
            measures |= {"miou": second, "miou_lost": first - second}
        return measures

    def ceiling(self, model: Any, sample: Sample) -> Output:
        """Every attention output replaced by its mean over all places: attention that knows no place."""
        with attach(model, SpatialMean()):
            return self.run(model, sample)


class SpatialMean(MediaMethod):
    """The mean of the attention output over all tokens, at every token."""

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """q [B, H, N, D] -> [B, H, N, D]."""
        out = inner(q, k, v, call)
        return out.mean(2, keepdim=True).expand_as(out).contiguous()


def miou(found: Tensor, label: Tensor, classes: int) -> float:
    """Mean intersection over union of the classes that occur: found, label [H, W] (nearest resize of `found`)."""
    if found.shape != label.shape:
        found = torch.nn.functional.interpolate(found[None, None].float(), label.shape, mode="nearest")[0, 0].long()
    known = label >= 0
    pairs = torch.bincount(label[known] * classes + found[known], minlength=classes**2).reshape(classes, classes)
    both = pairs.diag().double()
    either = pairs.sum(0) + pairs.sum(1) - both
    there = either > 0
    return float((both[there] / either[there]).mean()) if bool(there.any()) else 1.0


def _read(sample: Sample) -> tuple[Tensor, Tensor | None]:
    for name in sample.args:
        if name not in _ARGUMENTS:
            raise ValueError(f"sample {sample.id!r}: argument {name!r} is unknown; legal: {', '.join(_ARGUMENTS)}.")
    given = dict(sample.args)
    if "file" in given:
        given = dict(load_file(str(Path(given["file"]))))
    if "image" not in given:
        raise ValueError(f"sample {sample.id!r}: needs image, or a file with it.")
    return given["image"], given.get("label")
