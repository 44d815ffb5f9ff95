"""The recipe for backbones: learns, resumes to the same bits, evaluates the average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from glocal.data.labelled import Stored, scene_masks
from glocal.models import create_model
from glocal.models.segment import Segmenter
from glocal.models.vision.plain import PlainBackbone
from glocal.train.vision import Recipe, Trainer, accelerator_for, scores

pytest.importorskip("accelerate", reason="training needs accelerate")


def bright_or_dark(count: int = 48) -> Stored:
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 60, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return Stored((noise + 150 * labels[:, None, None, None]).to(torch.uint8), labels, ("dark", "bright"))


def small(**keywords: object) -> PlainBackbone:
    torch.manual_seed(0)
    made = {"num_classes": 2, **keywords}
    return PlainBackbone("hilo", (16, 16, 32, 32), (1, 1, 1, 1), 8, 2.0, 0.1, **made)  # type: ignore[arg-type]


def recipe(**changes: object) -> Recipe:
    fields = {
        "steps": 8,
        "batch": 12,
        "warmup": 2,
        "every": 2,
        "save": 3,
        "precision": "no",
        "mixup": 0.2,
        "cutmix": 1.0,
    }
    return Recipe(**{**fields, **changes})  # type: ignore[arg-type]


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_run_that_was_cut_ends_with_the_same_bits(tmp_path: Path) -> None:
    data, cpu = bright_or_dark(), accelerator_for(cpu=True)
    whole = Trainer(small(), data, recipe(), tmp_path / "whole", cpu)
    whole.run()
    first = Trainer(small(), data, recipe(), tmp_path / "cut", cpu)
    first.run(until=5)
    with torch.no_grad():
        for value in first.plain.parameters():
            value.fill_(7.0)  # what a killed process had in memory does not matter
    second = Trainer(small(), data, recipe(), tmp_path / "cut", cpu)
    assert second.step == 5
    second.run()
    assert torch.equal(weights(second.plain), weights(whole.plain))
    assert all(torch.equal(a, whole.average.means[n]) for n, a in second.average.means.items())
    assert [r.step for r in second.curve] == [2, 4, 6, 8]


def test_a_graph_is_refused_without_a_gpu() -> None:
    with pytest.raises(ValueError, match="graph=True takes one process on a GPU, not 1 on cpu; legal: graph=False"):
        Trainer(small(), bright_or_dark(), recipe(graph=True), None, accelerator_for(cpu=True))


@pytest.mark.gpu
def test_a_graph_learns_like_single_launches_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    data, found = bright_or_dark(), {}
    for graph in (False, True):
        trainer = Trainer(small(), data, recipe(graph=graph), tmp_path / str(graph))
        trainer.run()
        found[graph] = trainer
    single, whole = found[False], found[True]
    assert [row.step for row in whole.curve] == [row.step for row in single.curve]
    for a, b in zip(whole.curve, single.curve, strict=True):
        assert abs(a.loss - b.loss) < 1e-3 * b.loss and a.lr == b.lr
    torch.testing.assert_close(weights(whole.plain), weights(single.plain), rtol=1e-2, atol=1e-3)
    first = Trainer(small(), data, recipe(graph=True), tmp_path / "cut")
    first.run(until=5)
    second = Trainer(small(), data, recipe(graph=True), tmp_path / "cut")
    second.run()
    assert torch.equal(weights(second.plain), weights(whole.plain))
    with pytest.raises(ValueError, match="was made with graph=True, the recipe has graph=False"):
        Trainer(small(), data, recipe(), tmp_path / "cut")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["swin_tiny", "gc_vit_xxtiny", "maxvit_tiny_tf_224", "litv2_s", "inline_swin_tiny"])
def test_backbones_train_as_graphs(name: str) -> None:
    data = Stored(torch.randint(0, 255, (16, 3, 224, 224), dtype=torch.uint8), torch.arange(16) % 2, ("a", "b"))
    curves = []
    for graph in (False, True):
        torch.manual_seed(0)
        model = create_model(name, num_classes=2, drop_path=0.0)
        plan = recipe(graph=graph, precision="bf16", batch=8, steps=4, warmup=1, mixup=0.0, cutmix=0.0)
        trainer = Trainer(model, data, plan)
        trainer.run()
        curves.append([row.loss for row in trainer.curve])
    assert curves[1] == pytest.approx(curves[0], rel=2e-2)


def test_it_learns_and_evaluates_the_average() -> None:
    data = bright_or_dark()
    trainer = Trainer(
        small(), data, recipe(steps=40, mixup=0.0, cutmix=0.0, lr=3e-3, ema=0.8), None, accelerator_for(True)
    )
    before = trainer.evaluate(data)["accuracy"]
    trainer.run()
    kept = weights(trainer.plain).clone()
    assert trainer.evaluate(data)["accuracy"] > 0.95 > before
    assert torch.equal(weights(trainer.plain), kept)


def test_segmentation_with_a_dense_head() -> None:
    torch.manual_seed(0)
    data = scene_masks(8, size=32)
    model = Segmenter(small(features_only=True), len(data.classes), width=16)
    trainer = Trainer(model, data, recipe(steps=3, batch=4, warmup=1, precision="bf16"), None, accelerator_for(True))
    trainer.run()
    found = trainer.evaluate(data, batch=4)
    assert set(found) == {"accuracy", "miou"} and 0 <= found["miou"] <= found["accuracy"] <= 1


def test_another_recipe_does_not_go_on_from_a_state(tmp_path: Path) -> None:
    data, cpu = bright_or_dark(), accelerator_for(cpu=True)
    Trainer(small(), data, recipe(steps=3), tmp_path, cpu).run()
    with pytest.raises(ValueError, match=r"was made with lr=0\.001, the recipe has lr=0\.002"):
        Trainer(small(), data, recipe(steps=3, lr=2e-3), tmp_path, cpu)


def test_scores() -> None:
    table = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    found = scores(table, segmentation=True)
    assert found["accuracy"] == 7 / 8 and found["miou"] == pytest.approx((3 / 4 + 4 / 5) / 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"precision": "fp8"}, "precision='fp8'; legal: 'bf16', 'no'"),
        ({"warmup": 9}, "warmup=9 must be below steps=8"),
        ({"batch": 0}, "batch=0 must be at least 1"),
    ],
)
def test_bad_recipes_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recipe(**change)
