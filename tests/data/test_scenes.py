"""Scenes are fixed by their seed, and what is told about them agrees with the picture."""

from __future__ import annotations

import pytest
import torch

from glocal.data import SceneSpec, draw_layouts, make_scene, make_scenes, render
from glocal.data.objects import COLOURS
from glocal.data.scenes import boxes_of

SMALL = SceneSpec(frames=4, height=32, width=48)


def test_same_seed_same_bits_and_other_seed_differs():
    first, again, other = make_scene(5, SMALL), make_scene(5, SMALL), make_scene(6, SMALL)
    assert torch.equal(first.video, again.video) and torch.equal(first.depth, again.depth)
    assert first.caption == again.caption and first.questions == again.questions
    assert not torch.equal(first.video, other.video)


def test_shapes_and_range():
    scene = make_scene(1, SMALL)
    count = len(scene.objects)
    assert scene.video.shape == (4, 3, 32, 48) and scene.video.min() >= 0 and scene.video.max() <= 1
    assert scene.masks.shape == (4, count, 32, 48) and scene.boxes.shape == (4, count, 4)
    assert scene.depth.shape == (4, 32, 48) and scene.centres.shape == (4, count, 2)
    assert SMALL.objects[0] <= count <= SMALL.objects[1]


@pytest.mark.parametrize("seed", range(4))
def test_masks_are_disjoint_and_carry_their_depth(seed: int):
    scene = make_scene(seed, SMALL)
    assert (scene.masks.sum(1) <= 1).all()
    for k, thing in enumerate(scene.objects):
        assert torch.allclose(scene.depth[scene.masks[:, k]], torch.tensor(thing.distance))
    assert (scene.depth[~scene.masks.any(1)] == 1).all()
    distances = [thing.distance for thing in scene.objects]
    assert distances == sorted(distances, reverse=True)


@pytest.mark.parametrize("seed", range(4))
def test_pixels_inside_a_mask_have_the_colour_of_the_object(seed: int):
    scene = make_scene(seed, SMALL)
    for k, thing in enumerate(scene.objects):
        inside = scene.masks[:, k]
        # Away from the edge the paint is the object's colour, darkened by its texture by at most 0.4.
        core = -torch.nn.functional.max_pool2d(-inside.float(), 5, 1, 2) > 0
        if core.any():
            paint = scene.video.movedim(1, -1)[core]
            colour = torch.tensor(COLOURS[thing.colour])
            share = paint.sum(-1) / colour.sum()
            # A few pixels in concave corners may still mix with what lies behind.
            close = (paint - share[:, None] * colour).abs().amax(-1) < 1e-4
            assert close.float().mean() > 0.9
            assert share[close].min() >= 0.39 and share[close].max() <= 1.01


def test_nearer_object_covers_farther_one():
    layouts = draw_layouts(1, torch.Generator().manual_seed(0), SceneSpec(1, 32, 32, objects=(2, 2), pan=(0, 0)))
    layouts.middle[:] = 16.0
    layouts.shape[:] = 0
    layouts.bounces[:] = False
    owner = render(layouts).owner
    assert owner[0, 0, 16, 16] == 1


def test_boxes_are_tight():
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[0, 2:4, 3:7] = True
    assert boxes_of(masks).tolist() == [[3, 2, 7, 4], [0, 0, 0, 0]]
    scene = make_scene(2, SMALL)
    for t, k in ((0, 0), (3, 1)):
        left, top, right, bottom = scene.boxes[t, k].tolist()
        assert scene.masks[t, k].sum() == scene.masks[t, k, top:bottom, left:right].sum()


def test_chosen_times_equal_the_same_frames_of_the_clip():
    layouts = draw_layouts(3, torch.Generator().manual_seed(1), SMALL)
    every, some = render(layouts), render(layouts, torch.tensor([1, 3]))
    assert torch.allclose(every.video[:, [1, 3]], some.video, atol=1e-6)
    assert torch.equal(every.owner[:, [1, 3]], some.owner)


def test_objects_move_the_way_they_say():
    spec = SceneSpec(frames=8, height=64, width=64, pan=(0, 0), bounce=0.0)
    for scene in make_scenes(3, 0, spec):
        for k, thing in enumerate(scene.objects):
            way = scene.centres[-1, k] - scene.centres[0, k]
            signs = {"right": way[0] > 0, "left": way[0] < 0, "down": way[1] > 0, "up": way[1] < 0}
            assert all(signs[word] for word in thing.direction.split("-"))


def test_words_follow_from_the_objects():
    scene = make_scene(3, SMALL)
    assert all(thing.name in scene.caption for thing in scene.objects)
    answers = {(q.kind, q.text): q.answer for q in scene.questions}
    assert answers["count", "How many objects are there?"] == str(len(scene.objects))
    assert answers["front", "Which colour is the nearest object?"] == scene.objects[-1].colour
    assert [q.answer for q in scene.questions if q.kind == "exists"] == ["yes", "no"]


def test_bad_specs_say_what_is_legal():
    with pytest.raises(ValueError, match=r"objects=\(3, 2\): need 1 <= fewest <= most; nearest is \(3, 3\)"):
        SceneSpec(objects=(3, 2))
    with pytest.raises(ValueError, match=r"frames=0: a clip needs at least 1"):
        SceneSpec(frames=0)
    with pytest.raises(ValueError, match=r"count=0: draw at least 1"):
        draw_layouts(0, torch.Generator())
    with pytest.raises(ValueError, match=r"bounce=2\.0: a probability"):
        SceneSpec(bounce=2.0)
