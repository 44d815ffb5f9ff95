"""The independent parts of a run: one sample probed, one bucket made sparse, one rung of the ladder, one pair.

Functions of (model, objective, ...), so that any process can run them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glocal.adapt.attach import attach as attach_method
from glocal.advise.ladder import Anchors
from glocal.advise.methods import MethodSpec
from glocal.advise.objective import Objective, Output, main_error, on_cpu
from glocal.advise.preflight import AdviceError
from glocal.advise.probe import Probe, ProbeRecord, ProbeSpec, Shrunk
from glocal.advise.sensitivity import GradientProbe
from glocal.advise.validation import OtherKernel, timed
from glocal.advise.weights import Bucket
from glocal.advise.workload import Sample


@dataclass(frozen=True, eq=False)
class Probed:
    """What a dense run with the probe in it gave. latents: before every step of a model that can go on from one, and
    behind every step. errors: candidates that do not fit. shrunk: where memory did not suffice. steps: those measured.
    """

    records: tuple[ProbeRecord, ...]
    output: Output
    latents: tuple[Tensor, ...]
    errors: Mapping[str, str]
    shrunk: tuple[Shrunk, ...] = ()
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Looks:
    """How to probe. per_bucket: steps probed of each bucket; sensitivity: as in `AdviseOptions`."""

    buckets: tuple[Bucket, ...]
    per_bucket: int
    blocks: int
    sensitivity: str = "forward"


def probe_sample(
    model: Any, objective: Objective, sample: Sample, methods: Mapping[str, MethodSpec], looks: Looks
) -> Probed:
    """One dense run with measurement in place."""
    bucket_of = {step: b.number for b in looks.buckets for step in range(b.first, b.last + 1)}
    steps = frozenset(s for b in looks.buckets for s in _pick(b, looks.per_bucket))
    spec = ProbeSpec(methods, bucket_of.__getitem__, steps, looks.blocks, sample.id)
    probe = GradientProbe(spec) if looks.sensitivity == "gradient" else Probe(spec)
    latents: list[Tensor] = []
    with attach_method(model, probe):
        output = objective.run(model, sample, on_step=lambda step: latents.append(step.latent.detach().cpu().clone()))
    shrunk = () if probe.share is None else tuple(probe.share.shrunk)
    kept = tuple(latents), dict(probe.errors), shrunk
    return Probed(tuple(probe.records), on_cpu(output), *kept, tuple(sorted(steps)))


def measure_anchors(model: Any, objective: Objective, sample: Sample, probed: Probed) -> Anchors:
    """The two ends of the scale of drift beside the probed dense run of a sample; AdviceError where the probe changed
    that run. A model that can go on from a latent is checked from the last probed step on, any other one whole.
    """
    last, seconds = probed.steps[-1], 0.0
    short = objective.restart and 0 < last < len(probed.latents)
    if short:
        before = probed.latents[last - 1].to(probed.output.tensor.device)
        again = objective.run(model, sample, start=last, latent=before)
    else:
        again, seconds = timed(lambda: objective.run(model, sample))
    if not torch.equal(on_cpu(again).tensor, probed.output.tensor):
        raise AdviceError("The probe changed the model's own output; the host adapter or the probe is at fault.")
    with attach_method(model, OtherKernel()):
        other = objective.run(model, sample)
    measures = dict(objective.distance(probed.output, on_cpu(other)))
    far, spent = timed(lambda: objective.ceiling(model, sample))
    ceiling = main_error(objective.distance(probed.output, on_cpu(far)))
    # From another noise a dense run takes as long as from its own.
    return Anchors(spent if short else seconds, main_error(measures), ceiling, measures)


def _pick(bucket: Bucket, count: int) -> list[int]:
    if count >= bucket.steps:
        return list(range(bucket.first, bucket.last + 1))
    if count == 1:  # not the first: in pure noise attention is like nowhere else
        return [bucket.first + bucket.steps // 2]
    return sorted({bucket.first + round(i * (bucket.steps - 1) / (count - 1)) for i in range(count)})
