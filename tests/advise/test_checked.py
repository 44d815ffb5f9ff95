"""Names in a job are told before the model runs: measures that limits bound, sites that stay dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from glocal.advise import (
    AdviseOptions,
    Frames,
    Latents,
    MethodSpec,
    Recipe,
    Rule,
    Target,
    Workload,
    advise,
    forecast_advice,
    validate,
)
from glocal.advise.checked import check_measured
from glocal.advise.next_token import NextToken
from glocal.advise.objective import Objective, Operator, Output
from glocal.advise.preflight import preflight
from glocal.advise.segmentation import Segmentation
from glocal.models.generation import SampleSpec, VideoDiT

HALF = MethodSpec("tile_windows", {"tile": [2, 4, 4], "window": [{"fraction": 0.5}] * 3}, {"tile": [2, 4, 4]}, (32, 32))
RECIPE = Recipe("candidate", {"half": HALF}, (Rule("half", ((0, 1),)),))


@pytest.fixture
def idle(model: VideoDiT, monkeypatch: pytest.MonkeyPatch) -> VideoDiT:
    """The model, which must not run."""
    monkeypatch.setattr(VideoDiT, "forward", lambda *args: pytest.fail("the model ran"))
    return model


def proven(model: Any, workload: Workload, *, options: AdviseOptions, **more: Any) -> Any:
    return validate(model, RECIPE, workload, **more)


@pytest.mark.parametrize("verb", [advise, forecast_advice, proven])
@pytest.mark.parametrize(
    ("limit", "text"),
    [
        ("psnr", "'psnr' is better when higher"),
        (
            "flicker",
            "frames has no measure 'flicker'; legal: drift, relative_l2, flicker_difference; nearest: flicker_",
        ),
    ],
)
def test_limits_are_checked_before_the_model_runs(
    verb: Callable[..., Any], limit: str, text: str, idle: VideoDiT, workload: Workload, objective: Frames
) -> None:
    target = Target(limits={"drift": 0.1, limit: 1.0})
    with pytest.raises(ValueError, match=text):
        verb(idle, workload, objective=objective, target=target, options=AdviseOptions())


@pytest.mark.parametrize("verb", [advise, forecast_advice])
@pytest.mark.parametrize(
    ("globs", "text"),
    [
        (("block.*",), r"'block\.\*' fits no attention site; there are blocks\.0\.attn, blocks\.1\.attn\."),
        (("blocks.0.attn", "*.1.*"), "leaves no site to advise on of blocks.0.attn, blocks.1.attn"),
    ],
)
def test_sites_that_stay_dense_are_checked_before_the_model_runs(
    verb: Callable[..., Any],
    globs: tuple[str, ...],
    text: str,
    idle: VideoDiT,
    workload: Workload,
    objective: Frames,
) -> None:
    with pytest.raises(ValueError, match=text):
        verb(idle, workload, objective=objective, options=AdviseOptions(keep_dense=globs))


def test_a_measure_that_small_frames_do_not_have_is_told_behind_the_preflight(
    model: VideoDiT, workload: Workload
) -> None:
    objective = Frames(SampleSpec(steps=2), frames=1, height=32, width=32)
    with torch.no_grad():
        before = preflight(model, workload.samples[0], objective)
    target = Target(limits={"drift": 0.1, "flicker_difference": 1.0})
    with pytest.raises(ValueError, match="samples of this workload give no 'flicker_difference'; legal: drift, rel"):
        check_measured(target, before, objective)


def outputs(kind: Objective) -> Output:
    if isinstance(kind, NextToken):
        notes = {"answers": torch.zeros(5, 1).long(), "wanted": torch.zeros(5, 1).long()}
        return Output(torch.randn(3, 7), None, notes)
    if isinstance(kind, Segmentation):
        return Output(torch.randn(3, 4, 4), None, {"label": torch.zeros(4, 4).long()})
    return Output(torch.randn(1, 2, 9, 4), torch.rand(2, 3, 16, 16))


@pytest.mark.parametrize(
    "kind", [Latents(), Frames(), Operator(), NextToken(lambda text: []), Segmentation(3)], ids=lambda k: k.name
)
def test_objectives_declare_what_they_measure(kind: Any) -> None:
    one = outputs(kind)
    assert tuple(kind.distance(one, one)) == kind.measures
