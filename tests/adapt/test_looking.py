"""Reductions of attention maps from the sites of hosts, and what is done with maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glocal.adapt import attach
from glocal.adapt.looking import Look, block_mass, column_mean, columns, entropy, rows
from glocal.adapt.maps import Box, above, boxes, gaussian, regions, to_image

from .hosts.exam import AtCore, run
from .test_sparse_methods import HUNYUAN, MOCHI, WAN, made


@pytest.mark.parametrize("exam", [WAN, HUNYUAN, MOCHI])
def test_readings_are_reductions_of_the_map(exam: Any, generator: torch.Generator) -> None:
    model, given = made(exam, generator, batch=1)
    plain = run(model, given)
    readings = {"rows": rows([0, 5]), "mean": column_mean(), "entropy": entropy(), "blocks": block_mass(8)}
    look, spy = Look(readings, layers=(1,)), AtCore()
    with attach(model, spy), attach(model, look):
        assert torch.equal(run(model, given), plain)
    assert [f.site.layer for f in look.found] == [1]
    found, number = look.found[0], [c.site.layer for c in spy.calls].index(1)
    q, k, call = spy.queries[number], spy.keys[number], spy.calls[number]
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if call.native.mask is not None:
        logits = logits.masked_fill(~call.native.mask, -torch.inf)
    p = logits.softmax(-1)
    live = slice(None) if call.native.mask is None else slice(0, 75)  # padded queries see nothing here
    torch.testing.assert_close(found.values["rows"], p[:, :, [0, 5]], rtol=0, atol=1e-5)
    wanted = p[:, :, live].sum(2) / p.shape[2]
    torch.testing.assert_close(found.values["mean"], wanted, rtol=0, atol=1e-5)
    rest = -(p * p.clamp(min=1e-30).log()).sum(-1)
    torch.testing.assert_close(found.values["entropy"][:, :, live], rest[:, :, live], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.values["blocks"][:, :, 0, 0], p[:, :, :8, :8].sum((2, 3)), rtol=0, atol=1e-4)
    assert (found.step, found.branch) == (0, "cond")


def test_words_alone_or_as_they_are_seen(generator: torch.Generator) -> None:
    model, given = made(HUNYUAN, generator, batch=1)
    shares, alone = Look({"words": columns("text")}, heads="mean"), Look({"mean": column_mean()}, keys="text")
    with attach(model, shares), attach(model, alone):
        run(model, given)
    words = shares.found[0].values["words"]
    assert words.shape == (1, 77, 5)
    assert bool((words[:, :, 3:] == 0).all()) and bool((words[:, :72, :3] > 0).all())
    share = alone.found[0].values["mean"][..., :3].sum(-1)  # over valid words alone they sum to one, for valid queries
    torch.testing.assert_close(share, torch.full((1, 2), 75 / 77), rtol=0, atol=1e-5)


def test_only_the_steps_asked_for(generator: torch.Generator) -> None:
    model, given = made(WAN, generator, batch=1)
    look = Look({"mean": column_mean()}, steps=(1,), kinds=("cross",))
    with attach(model, look):
        run(model, given)
        assert not look.found
        run(model, {**given, "timestep": given["timestep"] - 100})
    assert [(f.site.name, f.step, f.values["mean"].shape[-1]) for f in look.found] == [
        ("blocks.0.attn2", 1, 5),
        ("blocks.1.attn2", 1, 5),
    ]
    with pytest.raises(ValueError, match="heads='sum'; legal: 'each', 'mean'"):
        Look({}, heads="sum")


def test_smoothing_and_percentiles_are_those_of_scipy_and_numpy(generator: torch.Generator) -> None:
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed")
    import numpy as np

    image = torch.rand(2, 9, 7, generator=generator, dtype=torch.float64)
    for sigma in (0.6, 1.5, 4.0):
        wanted = torch.stack([torch.from_numpy(ndimage.gaussian_filter(x.numpy(), sigma)) for x in image])
        torch.testing.assert_close(gaussian(image, sigma), wanted)
    limit = np.percentile(image[0].float().numpy(), 80)
    assert torch.equal(above(image, 80)[0], image[0].float() >= float(limit))
    with pytest.raises(ValueError, match="sigma=0 must be positive"):
        gaussian(image, 0)
    with pytest.raises(ValueError, match="percentile=101 must lie between 0 and 100"):
        above(image, 101)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_regions_are_those_of_scipy(share: float, generator: torch.Generator) -> None:
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed")
    for _ in range(5):
        mask = torch.rand(13, 17, generator=generator) < share
        labels, count = ndimage.label(mask.numpy())
        assert torch.equal(regions(mask), torch.from_numpy(labels).long())
        assert len(boxes(regions(mask))) == count
    assert not regions(torch.zeros(3, 3)).any() and boxes(torch.zeros(3, 3)) == []
    with pytest.raises(ValueError, match=r"mask of shape \(3,\) must be \[height, width\]"):
        regions(torch.zeros(3))


def test_boxes_are_fractions() -> None:
    mask = torch.zeros(4, 8)
    mask[1:3, 2:5] = 1
    assert boxes(regions(mask)) == [Box(0.25, 0.25, 0.625, 0.75)]
    assert Box(0.25, 0.25, 0.625, 0.75).pixels(40, 80) == (20, 10, 50, 30)
    assert Box(0.0, 0.0, 0.34, 1.0).pixels(10, 10) == (0, 0, 4, 10)


def test_tokens_to_pictures(generator: torch.Generator) -> None:
    values = torch.rand(2, 3, 12, generator=generator)
    assert to_image(values, (3, 4), (6, 8)).shape == (2, 3, 6, 8)
    assert torch.equal(to_image(values, (3, 4), (3, 4)), values.unflatten(-1, (3, 4)))
    nearest = to_image(values, (3, 4), (6, 8), "nearest")
    assert torch.equal(nearest[..., ::2, ::2], values.unflatten(-1, (3, 4)))
    with pytest.raises(ValueError, match="12 values are not a grid of 4 x 4"):
        to_image(values, (4, 4), (8, 8))
