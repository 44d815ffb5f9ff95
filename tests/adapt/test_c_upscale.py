"""C-Upscale's cross attention in tiny UNets and PixArt: maps kept, cropped, damped, mixed; by the invariants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glocal.adapt import c_upscale
from glocal.adapt.c_upscale import CUpscale, CUpscaleSettings, Row, crop, damping
from glocal.adapt.maps import Box

from .hosts.sizes import PIXART, SD15, SDXL
from .test_sparse_methods import FLUX, made

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")

WHOLE = Box(0, 0, 1, 1)
RIGHT = Box(0.5, 0, 1, 1)


def sd15() -> nn.Module:
    return diffusers.UNet2DConditionModel(**SD15)


def sdxl() -> nn.Module:
    return diffusers.UNet2DConditionModel(**SDXL)


def pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(**PIXART)


@pytest.fixture(params=[sd15, sdxl, pixart], ids=lambda build: build.__name__)
def model(request: pytest.FixtureRequest) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return request.param().eval()


def run(model: Any, latents: Tensor, words: Tensor, mask: Tensor | None = None) -> Tensor:
    more: dict[str, Any] = {"encoder_hidden_states": words, "return_dict": False}
    if isinstance(model, diffusers.PixArtTransformer2DModel):
        more["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        more["timestep"] = torch.full((len(latents),), 500)
        more["encoder_attention_mask"] = mask
    else:
        more["timestep"] = 500
        more["added_cond_kwargs"] = {
            "text_embeds": torch.ones(len(latents), 24),
            "time_ids": torch.ones(len(latents), 6),
        }
    with torch.no_grad():
        return model(latents, **more)[0]


@pytest.fixture
def latents(generator: torch.Generator) -> Tensor:
    return torch.randn(1, 4, 8, 12, generator=generator)


@pytest.fixture
def words(generator: torch.Generator) -> Tensor:
    """Without guidance, the global prompt, a regional prompt: [3, 7, 32]."""
    return torch.randn(3, 7, 32, generator=generator)


def test_keeping_maps_changes_nothing_and_undo_gives_the_model_back(
    model: nn.Module, latents: Tensor, words: Tensor
) -> None:
    before = run(model, latents, words[1:2])
    handle = c_upscale(model)
    method: Any = handle.method
    assert torch.equal(run(model, latents, words[1:2]), before)
    cross = [name for name, m in model.named_modules() if name.endswith("attn2")]
    for rap in ("off", "replace", "gate"):
        with method.whole(rap):
            assert torch.equal(run(model, latents, words[1:2]), before)
        assert sorted(method.seen) == ([] if rap == "off" else sorted(cross))
    assert torch.equal(run(model, latents, words[1:2]), before)
    for found in method.seen.values():  # maps, behind "gate"
        assert found.shape[0] == 1 and found.shape[4] == 7
        torch.testing.assert_close(found.sum(4), torch.ones_like(found[..., 0]))
    handle.undo()
    assert torch.equal(run(model, latents, words[1:2]), before)


def test_maps_are_softmax_of_queries_and_keys(latents: Tensor, words: Tensor) -> None:
    torch.manual_seed(0)
    model = sd15().eval()
    site: Any = model.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2")
    seen: list[Tensor] = []
    site.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    handle = c_upscale(model)
    method: Any = handle.method
    with method.whole("gate"):
        run(model, latents, words[1:2])
    q, k = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (site.to_q(seen[0]), site.to_k(words[1:2])))
    wanted = (q @ k.transpose(2, 3) * site.scale).softmax(-1)
    found = method.seen["down_blocks.0.attentions.0.transformer_blocks.0.attn2"]
    assert found.shape == (1, 4, 8, 12, 7)
    torch.testing.assert_close(found.flatten(2, 3), wanted, rtol=0, atol=1e-6)


def test_a_region_reads_the_crop_of_the_maps(latents: Tensor, words: Tensor) -> None:
    """What is kept are outputs; crops of them equal crops of the maps times the words' values."""
    torch.manual_seed(0)
    model = sd15().eval()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    site: Any = model.get_submodule(name)
    method: Any = c_upscale(model).method
    kept = {}
    for rap in ("replace", "gate"):
        with method.whole(rap):
            run(model, latents, words[1:2])
        kept[rap] = crop(method.seen[name], (RIGHT,), (5, 4))
    values = site.to_v(words[1:2]).unflatten(-1, (4, -1)).transpose(1, 2)
    torch.testing.assert_close(kept["replace"], kept["gate"] @ values, rtol=0, atol=1e-5)


def test_regions_need_what_they_read(model: nn.Module, latents: Tensor, words: Tensor) -> None:
    method: Any = c_upscale(model).method
    with method.whole("gate"):
        run(model, latents, words[1:2])
    with pytest.raises(ValueError, match=r"behind whole\('gate'\)"), method.regions([Row(0, WHOLE)], 7, 0.0, "replace"):
        pass


@pytest.mark.parametrize("rap", ["replace", "gate", "off"])
@pytest.mark.parametrize("doubled", [False, True])
def test_one_region_that_is_the_whole_picture_is_the_plain_model(
    rap: Any, doubled: bool, model: nn.Module, latents: Tensor, words: Tensor
) -> None:
    """Replaced by its own maps, damped by factors of one, or not damped, with nothing of the regional prompt."""
    both = torch.cat([latents, latents])
    plain = run(model, both, words[:2])
    handle = c_upscale(model)
    method: Any = handle.method
    with method.whole(rap):
        run(model, latents, words[1:2])
    given = torch.cat([words[:2], torch.stack([words[0], words[2]])], 1) if doubled else words[:2]
    with method.regions([Row(0, WHOLE)], 7, 0.0, rap):
        torch.testing.assert_close(run(model, both, given), plain, rtol=0, atol=2e-5)
    with method.regions([Row(0, WHOLE)], 7, 0.6, "off"):  # the same words twice
        torch.testing.assert_close(run(model, both, words[:2]), plain, rtol=0, atol=2e-5)


def test_the_regional_prompt_alone_is_the_model_under_it(model: nn.Module, latents: Tensor, words: Tensor) -> None:
    both = torch.cat([latents, latents])
    plain = run(model, both, words[[0, 2]])
    method: Any = c_upscale(model).method
    with method.whole():
        run(model, latents, words[1:2])
    given = torch.cat([words[:2], torch.stack([words[0], words[2]])], 1)
    with method.regions([Row(0, WHOLE)], 7, 1.0, "replace"):
        torch.testing.assert_close(run(model, both, given), plain, rtol=0, atol=2e-5)


def test_two_regions_are_each_their_own(model: nn.Module, words: Tensor, generator: torch.Generator) -> None:
    """A batch of regions equals one call a region; rows without guidance never change."""
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    method: Any = c_upscale(model).method
    with method.whole():
        run(model, torch.randn(1, 4, 8, 8, generator=generator), words[1:2])
    rows = [Row(0, Box(0, 0, 0.6, 0.7)), Row(0, RIGHT)]
    with method.regions(rows, 7, 0.0, "replace"):
        both = run(model, torch.cat([latents, latents]), words[[0, 0, 1, 1]])
    for number, row in enumerate(rows):
        with method.regions([row], 7, 0.0, "replace"):
            one = run(model, latents[[number, number]], words[:2])
        torch.testing.assert_close(both[[number, 2 + number]], one, rtol=0, atol=2e-5)
    plain = run(model, latents, words[[0, 0]])
    torch.testing.assert_close(both[:2], plain, rtol=0, atol=2e-5)
    assert not torch.allclose(both[2], both[3], atol=1e-3)


def test_masked_words_stay_hidden(latents: Tensor, words: Tensor) -> None:
    torch.manual_seed(0)
    model = pixart().eval()
    both, mask = torch.cat([latents, latents]), torch.ones(2, 7)
    mask[:, 5:] = 0
    plain = run(model, both, words[:2], mask)
    method: Any = c_upscale(model).method
    for rap in ("replace", "gate", "off"):
        with method.whole(rap):
            run(model, latents, words[1:2], mask[:1])
        assert rap != "gate" or all(bool((found[..., 5:] == 0).all()) for found in method.seen.values())
        with method.regions([Row(0, WHOLE)], 7, 0.0, rap):
            torch.testing.assert_close(run(model, both, words[:2], mask), plain, rtol=0, atol=2e-5)


def test_a_word_of_the_left_half_is_silent_on_the_right() -> None:
    maps = torch.zeros(1, 8, 8, 2)
    maps[:, :, :4, 0], maps[:, :, 4:, 1] = 1, 1
    right = crop(maps, RIGHT, (6, 3))
    assert right.shape == (1, 18, 2) and float(right[0, :, 0].mean()) < 0.02
    assert float(crop(maps, Box(0.55, 0, 1, 1), (6, 3))[..., 0].max()) < 1e-6
    factors = damping(maps, right)
    assert float(factors[0, 0]) < 0.04 and float(factors[0, 1]) == 1
    kept = damping(maps, right, torch.tensor([False, True]))
    assert kept.tolist() == [[1, 1]]


@pytest.mark.parametrize("box", [WHOLE, RIGHT, Box(0.13, 0.27, 0.61, 0.94)])
def test_crops_are_rows_of_attention(box: Box, generator: torch.Generator) -> None:
    maps = torch.rand(3, 7, 9, 5, generator=generator).softmax(-1)
    found = crop(maps, box, (4, 6))
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 24))
    torch.testing.assert_close(crop(maps, WHOLE, (7, 9)), maps.flatten(1, 2), rtol=0, atol=1e-6)


def test_a_crop_of_whole_cells_is_those_cells(generator: torch.Generator) -> None:
    maps = torch.rand(1, 8, 8, 5, generator=generator).softmax(-1)
    found = crop(maps, Box(0.25, 0.5, 0.75, 1), (4, 4)).unflatten(1, (4, 4))
    torch.testing.assert_close(found, maps[:, 4:, 2:6], rtol=0, atol=1e-6)


def test_crops_are_bilinear(generator: torch.Generator) -> None:
    """As torch samples a picture at the centres of the cells."""
    maps, box = torch.rand(2, 7, 9, 5, generator=generator), Box(0.13, 0.27, 0.61, 0.94)
    y = (torch.arange(4) + 0.5) / 4 * (box.bottom - box.top) + box.top
    x = (torch.arange(6) + 0.5) / 6 * (box.right - box.left) + box.left
    points = 2 * torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1) - 1
    wanted = torch.nn.functional.grid_sample(
        maps.movedim(-1, 1), points.expand(2, 4, 6, 2), padding_mode="border", align_corners=False
    )
    torch.testing.assert_close(crop(maps, box, (4, 6)), wanted.flatten(2).transpose(1, 2), rtol=0, atol=1e-6)


def test_schedules() -> None:
    settings = CUpscaleSettings()
    assert settings.run_steps == 35
    assert settings.structure_weight(0) == 1 and settings.structure_weight(17) == pytest.approx(0.522, abs=1e-3)
    assert settings.structure_weight(18) == 0
    assert settings.regional_share(0) == 0.3 and settings.regional_share(34) == pytest.approx(0.7)
    assert replace(settings, steps=1, strength=1.0).regional_share(0) == 0.3


def test_refusals(latents: Tensor, words: Tensor, generator: torch.Generator) -> None:
    flux, _ = made(FLUX, generator)
    with pytest.raises(ValueError, match="attention of kind joint; legal: cross attention to words"):
        c_upscale(flux)
    model = sd15().eval()
    method: Any = c_upscale(model).method
    assert isinstance(method, CUpscale)
    with (
        method.regions([Row(0, WHOLE)], 5, 0.0, "off"),
        pytest.raises(ValueError, match=r"has 2 rows and 7 words; legal: 2 rows .* and 5 or 10 words"),
    ):
        run(model, torch.cat([latents, latents]), words[:2])
    for changed, why in (
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"strength": 0.0}, "strength=0.0 must lie between 0 and 1"),
        ({"overlap": 1.0}, "overlap=1.0 must lie"),
        ({"mix": (0.5, 1.5)}, r"mix=\(0.5, 1.5\); legal: two shares"),
        ({"rap": "on"}, "rap='on'; legal: 'replace', 'gate', 'off'"),
        ({"cutoff": 0.0}, "cutoff=0.0 must be above 0"),
    ):
        with pytest.raises(ValueError, match=why):
            CUpscaleSettings(**changed)  # type: ignore[arg-type]
