"""What the host of the built-in model tells a method: sites, calls and where the run is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.adapt import RunState, SiteCall, attach, host_of
from glocal.adapt.records import Core
from glocal.models.generation import SampleSpec, noise_levels, sample
from glocal.models.generation.video_dit import VideoDiT

from .conftest import AtCore

Seen = tuple[int, float | None, str, int, int]


class Notes(AtCore):
    """Writes down the state at every first site, and uses the store."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.seen: list[Seen] = []

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        if call.site.layer == 0:
            s = call.state
            self.seen.append((s.step, s.timestep, s.branch, s.call, len(s.store)))
            s.store[call.site.name, len(s.store)] = q
        return super().core(q, k, v, call, inner)


def run(model: VideoDiT, clip: Tensor, times: int = 1, **spec: Any) -> list[Seen]:
    method = Notes()
    with attach(model, method):
        for _ in range(times):
            sample(model, clip, model.condition(shape="disc"), SampleSpec(**spec))
    return method.seen


def test_sites(model: VideoDiT) -> None:
    sites = host_of(model).sites(model)
    assert [(s.name, s.layer, s.heads, s.head_dim, s.kind) for s in sites] == [
        ("blocks.0.attn", 0, 2, 12, "self"),
        ("blocks.1.attn", 1, 2, 12, "self"),
    ]


def test_a_call_says_where_tokens_lie_and_what_they_count_for(model: VideoDiT, clip: Tensor) -> None:
    method = AtCore(1.0)
    with attach(model, method):
        model(clip, torch.tensor([0.5]))
    call = method.calls[0]
    assert call.layout.q.grid.axes == (2, 3, 4)
    assert call.layout.nq == call.layout.nk == 24
    assert call.residual is not None
    assert call.residual.shape == (1, 24, 24)
    assert call.contribution is not None
    assert call.contribution(torch.randn(1, 2, 5, 12)).shape == (1, 2, 5, 24)
    assert call.site.name == "blocks.0.attn"


def test_steps_count_executed_steps_and_carry_the_noise_level(model: VideoDiT, clip: Tensor) -> None:
    seen = run(model, clip, steps=3)
    levels = noise_levels(SampleSpec(steps=3))
    assert [s[0] for s in seen] == [0, 1, 2]
    assert [s[1] for s in seen] == pytest.approx(levels[:3])
    assert {s[2] for s in seen} == {"cond"}


def test_guidance_is_two_calls_of_one_step(model: VideoDiT, clip: Tensor) -> None:
    seen = run(model, clip, steps=2, guidance=3.0)
    assert [(s[0], s[2], s[3]) for s in seen] == [(0, "cond", 0), (0, "uncond", 1), (1, "cond", 0), (1, "uncond", 1)]


def test_the_store_lasts_a_run_and_no_longer(model: VideoDiT, clip: Tensor) -> None:
    seen = run(model, clip, times=2, steps=3)
    assert [(s[0], s[4]) for s in seen] == [(0, 0), (1, 1), (2, 2)] * 2


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_runs_of_one_step_are_runs_too(model: VideoDiT, clip: Tensor, guidance: float | None) -> None:
    seen = run(model, clip, times=2, steps=1, guidance=guidance)
    calls = 1 if guidance is None else 2
    assert [(s[0], s[4]) for s in seen] == [(0, i) for i in range(calls)] * 2


def test_a_run_that_broke_off_does_not_leak_into_the_next(model: VideoDiT, clip: Tensor) -> None:
    method = Notes()

    def stop(step: Any) -> None:
        if step.step == 1:
            raise KeyboardInterrupt

    with attach(model, method):
        with pytest.raises(KeyboardInterrupt):
            sample(model, clip, spec=SampleSpec(steps=4), callback=stop)
        sample(model, clip, spec=SampleSpec(steps=2))
    assert [(s[0], s[4]) for s in method.seen] == [(0, 0), (1, 1), (0, 0), (1, 1)]


def test_undo_clears_the_store(model: VideoDiT, clip: Tensor) -> None:
    handle = attach(model, Notes())
    model(clip, torch.tensor([0.5]))
    assert handle.state.store
    handle.undo()
    assert handle.state.store == {}


def test_two_handles_have_states_of_their_own(model: VideoDiT, clip: Tensor) -> None:
    first = attach(model, Notes())
    model(clip, torch.tensor([1.0]))
    second = attach(model, Notes())
    model(clip, torch.tensor([0.5]))
    assert (first.state.step, second.state.step) == (1, 0)
    assert len(first.state.store) == 2
    assert len(second.state.store) == 1


def test_the_branch_of_mixed_rows_is_both() -> None:
    assert RunState(rows=((0, "cond"), (0, "uncond"))).branch == "both"
    assert RunState(rows=((0, "uncond"), (1, "uncond"))).branch == "uncond"
    assert RunState().branch == "both"
