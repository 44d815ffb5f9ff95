"""The training loop: a cut and resumed run ends like an uncut one; averages, schedule and loss are what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from glocal.data import SceneSpec
from glocal.models.generation import VideoDiT, VideoDiTConfig
from glocal.train import (
    SCENE_FIELDS,
    Average,
    ClipStage,
    FlowSpec,
    Loop,
    LoopSpec,
    build_optimizers,
    draw_clips,
    flow_loss,
    trapezoid,
)

STAGE = ClipStage(frames=2, batch=2, steps=6, shift=2.0)
SCENES = SceneSpec(frames=4, height=8, width=8, objects=(1, 2))


def build(folder: Path) -> Loop:
    torch.manual_seed(0)
    model = VideoDiT(VideoDiTConfig(dim=16, layers=1, heads=2, hidden=16, fields=SCENE_FIELDS))

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        clips = draw_clips(STAGE, SCENES, generator, "cpu")

        def predict(noisy: torch.Tensor, level: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
            return model(noisy, level, condition, clips.times)

        return flow_loss(predict, clips.video, clips.condition, FlowSpec(), generator)

    spec = LoopSpec(steps=6, warmup=1, cooldown=2, every=2)
    return Loop(model, build_optimizers(model), loss, spec, folder)


def test_cut_and_resumed_equals_uncut(tmp_path: Path):
    whole = build(tmp_path / "whole")
    whole.run()
    cut = build(tmp_path / "cut")
    cut.run(until=3)
    resumed = build(tmp_path / "cut")
    assert resumed.step == 3
    resumed.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for name, mean in whole.average.means.items():
        assert torch.equal(mean, resumed.average.means[name]), name
    rows = [(r.step, r.loss, r.norm, r.factor) for r in whole.curve]
    assert rows == [(r.step, r.loss, r.norm, r.factor) for r in resumed.curve]
    assert [r[0] for r in rows] == [2, 4, 6]


def test_loss_falls(tmp_path: Path):
    loop = build(tmp_path)
    before = loop.loss(0, torch.Generator().manual_seed(9))
    loop.run()
    assert loop.loss(0, torch.Generator().manual_seed(9)) < before


def test_broken_loss_stops(tmp_path: Path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = Loop(model, [optimizer], lambda s, g: model.weight.sum() * float("nan"), LoopSpec(2, warmup=0), tmp_path)
    with pytest.raises(FloatingPointError, match="step 0: loss nan"):
        loop.run()


def test_average_follows_its_formula():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
        average = Average(model, 0.5)
        model.weight.fill_(1.0)
        average.update(model)  # d = 1/10
        model.weight.fill_(2.0)
        average.update(model)  # d = 2/11
    assert average.means["weight"].item() == pytest.approx(0.9 * 2 / 11 + 2.0 * 9 / 11)
    average.copy_to(model)
    assert model.weight.item() == average.means["weight"].item()
    with pytest.raises(ValueError, match=r"decay=1\.0: must lie in"):
        Average(model, 1.0)


def test_trapezoid():
    shape = [trapezoid(s, 8, 2, 3) for s in range(8)]
    assert shape == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4])
    with pytest.raises(ValueError, match="warmup=5 and cooldown=4: must be >= 0 and together at most steps=8"):
        trapezoid(0, 8, 5, 4)


def test_optimizers_share_out_every_parameter_once():
    model = VideoDiT(VideoDiTConfig(dim=16, layers=1, heads=2, hidden=16))
    muon, adam = build_optimizers(model)
    groups = [{id(p) for g in o.param_groups for p in g["params"]} for o in (muon, adam)]
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == {id(p) for p in model.parameters()}
    assert len(groups[0]) == 4
    with pytest.raises(ValueError, match="trunk='nothing': no linear layer of VideoDiT"):
        build_optimizers(model, trunk="nothing")


def test_flow_loss_of_a_perfect_prediction_is_zero():
    clips = torch.randn(3, 2, 3, 4, 4)
    condition = torch.ones(3, 7, dtype=torch.long)
    loss = flow_loss(lambda x, s, c: clips, clips, condition, FlowSpec(), torch.Generator().manual_seed(0))
    assert loss == 0
    dropped: list[torch.Tensor] = []

    def predict(x: torch.Tensor, s: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        dropped.append(c)
        return x

    flow_loss(predict, clips, condition, FlowSpec(drop=1.0), torch.Generator().manual_seed(0))
    assert not dropped[0].any()


def test_clips_of_a_stage():
    clips = draw_clips(STAGE, SCENES, torch.Generator().manual_seed(0), "cpu")
    assert clips.video.shape == (2, 2, 3, 8, 8) and clips.condition.shape == (2, len(SCENE_FIELDS))
    assert clips.video.min() >= -1 and clips.video.max() <= 1
    assert clips.times.tolist() == sorted(set(clips.times.tolist()))
    sizes = torch.tensor([len(values) for _, values in SCENE_FIELDS])
    assert (clips.condition >= 1).all() and (clips.condition <= sizes).all()
    with pytest.raises(ValueError, match=r"frames=5: a scene has 1\.\.4; nearest is 4"):
        draw_clips(ClipStage(5, 1, 1, 1.0), SCENES, torch.Generator(), "cpu")
