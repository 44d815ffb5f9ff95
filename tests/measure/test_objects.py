"""Objects found in pictures: exact on painted scenes, and on copies, moves and losses of their objects."""

from __future__ import annotations

import pytest
import torch

from glocal.data import draw_pictures, paint, picture_spec
from glocal.data.objects import COLOURS
from glocal.measure import WantedObject, agreement, find_objects
from glocal.measure.objects import connected

PALETTE = torch.tensor(list(COLOURS.values()))


def drawn(count: int, side: int):
    layouts = draw_pictures(count, torch.Generator().manual_seed(0), picture_spec(side))
    wanted = []
    for i in range(count):
        mine = []
        for k in layouts.present[i].nonzero().flatten().tolist():
            x, y = (layouts.middle[i, k] / side).tolist()
            mine.append(WantedObject(int(layouts.colour[i, k]), (x - 0.06, y - 0.06, x + 0.06, y + 0.06)))
        wanted.append(mine)
    return paint(layouts), wanted


@pytest.mark.parametrize("side", [64, 256])
def test_every_object_of_painted_scenes_is_found_once_in_its_place(side):
    pictures, wanted = drawn(60, side)
    for found, want in zip(find_objects(pictures, PALETTE), wanted, strict=True):
        a = agreement(found, want)
        assert (a.right, a.once, a.found) == (a.wanted,) * 3
        assert (a.missing, a.repeated, a.strange) == (0, 0, 0)


def test_tiled_copies_count_as_repeated():
    pictures, wanted = drawn(12, 64)
    for times in (2, 4):
        for found, want in zip(find_objects(pictures.repeat(1, 1, times, times), PALETTE), wanted, strict=True):
            a = agreement(found, want)
            assert a.found == a.wanted * times**2
            assert a.repeated == a.wanted * (times**2 - 1)
            assert (a.right, a.once, a.missing) == (0, 0, 0)


def test_mirrored_pictures_are_found_at_another_place():
    pictures, wanted = drawn(12, 64)
    right = once = 0
    for found, want in zip(find_objects(pictures.flip(-1).flip(-2), PALETTE), wanted, strict=True):
        a = agreement(found, want)
        right, once = right + a.right, once + a.once
    assert once == sum(map(len, wanted))
    assert right < once / 4


def test_other_objects_are_missing_and_strange():
    pictures, _ = drawn(1, 64)
    found = find_objects(pictures, PALETTE)[0]
    absent = next(c for c in range(len(PALETTE)) if c not in {o.colour for o in found})
    a = agreement(found, [WantedObject(absent, (0, 0, 1, 1))])
    assert (a.missing, a.strange, a.right) == (1, len(found), 0)
    with pytest.raises(ValueError, match=r"colours \[1, 1\]; legal: each colour once"):
        agreement(found, [WantedObject(1, (0, 0, 1, 1))] * 2)


def test_soft_edges_are_no_objects():
    pictures, wanted = drawn(30, 64)
    soft = torch.nn.functional.interpolate(pictures, (256, 256), mode="bicubic").clamp(0, 1)
    for found, want in zip(find_objects(soft, PALETTE), wanted, strict=True):
        a = agreement(found, want)
        assert (a.right, a.strange) == (a.wanted, 0)


def test_labels_part_what_does_not_touch():
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 1], [0, 1, 0, 0, 0], [0, 0, 1, 1, 0]], dtype=torch.bool)
    labels = connected(mask[None])[0]
    assert len(labels.unique()) == 4  # three parts (corners touch) and the outside
    assert labels[2, 1] == labels[3, 3] != labels[0, 0]
    assert not labels[~mask].any()


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"pictures have shape \(3, 8, 8\); legal: \[B, 3, H, W\]"):
        find_objects(torch.zeros(3, 8, 8), PALETTE)
