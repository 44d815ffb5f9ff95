"""Sources of pictures with labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from glocal.data.labelled import ImageFolder, Rows, scene_masks, scene_relations


def test_relations_say_what_the_scenes_show() -> None:
    made = scene_relations(64, size=32, seed=3)
    images, targets = made.batch(torch.arange(64))
    assert images.shape == (64, 3, 32, 32) and images.dtype == torch.uint8
    assert len(made.classes) == 8 and made.classes[1] == "plain, one colour"
    same = targets % 2 == 1
    assert 16 < int(same.sum()) < 48
    again = scene_relations(64, size=32, seed=3)
    assert torch.equal(again.images, made.images) and torch.equal(again.targets, made.targets)
    assert not torch.equal(scene_relations(64, size=32, seed=4).images, made.images)


def test_masks_lie_where_the_objects_are() -> None:
    images, targets = scene_masks(4, size=40, seed=1).batch(torch.tensor([2, 0]))
    assert images.shape == (2, 3, 40, 40) and targets.shape == (2, 40, 40)
    assert set(targets.unique().tolist()) <= set(range(7)) and 0 in targets and int((targets > 0).sum()) > 50


def test_folders_are_classes(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(2):
            pixels = np.full((30, 50, 3), 100 * number + 50, np.uint8)
            image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    made = ImageFolder(tmp_path, size=16)
    images, targets = made.batch(torch.tensor([0, 3]))
    assert made.classes == ("cat", "dog") and len(made) == 4 and targets.tolist() == [0, 1]
    assert (
        images.shape == (2, 3, 16, 16) and images[0].unique().tolist() == [50] and images[1].unique().tolist() == [150]
    )


def test_an_empty_or_missing_folder_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder of images"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no images in folders of classes; legal: CLASS/name\.png"):
        ImageFolder(tmp_path)


def test_rows_with_labels_and_with_maps() -> None:
    rows = [{"image": np.full((8, 12, 3), i, np.uint8), "label": i % 2} for i in range(3)]
    images, targets = Rows(rows, ("even", "odd"), size=8).batch(torch.tensor([2, 1]))
    assert targets.tolist() == [0, 1] and images[:, 0, 0, 0].tolist() == [2, 1]
    rows = [{"image": np.zeros((8, 8, 3), np.uint8), "label": np.eye(8, dtype=np.uint8)}]
    made = Rows(rows, ("off", "on"), size=8)
    assert made.segmentation and made.batch(torch.tensor([0]))[1].sum() == 8


def test_a_missing_column_is_named() -> None:
    with pytest.raises(ValueError, match=r"no column 'image'; there are 'picture', 'label'"):
        Rows([{"picture": 0, "label": 0}], ("a",))
    with pytest.raises(ValueError, match="has no rows"):
        Rows([], ("a",))
