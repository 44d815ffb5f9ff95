"""The independent parts of a run: one sample probed, one bucket made sparse, one rung of the ladder, one pair.

Functions of (model, objective, ...), so that any process can run them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from glocal.adapt.attach import attach as attach_method
from glocal.advise.methods import MethodSpec
from glocal.advise.objective import Objective, Output, on_cpu
from glocal.advise.probe import Probe, ProbeRecord, ProbeSpec, Shrunk
from glocal.advise.sensitivity import GradientProbe
from glocal.advise.weights import Bucket
from glocal.advise.workload import Sample


@dataclass(frozen=True, eq=False)
class Probed:
    """What a dense run with the probe in it gave. latents: before every step of a model that can go on from one, and
    behind every step. errors: candidates that do not fit. shrunk: where memory did not suffice.
    """

    records: tuple[ProbeRecord, ...]
    output: Output
    latents: tuple[Tensor, ...]
    errors: Mapping[str, str]
    shrunk: tuple[Shrunk, ...] = ()


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
    return Probed(tuple(probe.records), on_cpu(output), tuple(latents), dict(probe.errors), shrunk)


def _pick(bucket: Bucket, count: int) -> list[int]:
    if count >= bucket.steps:
        return list(range(bucket.first, bucket.last + 1))
    return sorted({bucket.first + round(i * (bucket.steps - 1) / max(count - 1, 1)) for i in range(count)})
