"""Radial, neighbourhood and tile-window methods in tiny hosts: the relation they say, the calls they leave dense, and
the words with which they refuse.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from glocal.adapt import Method, RunState, Site, attach, gna, radial, rectified_spaattn, tile_windows
from glocal.adapt.gna import PRESETS as GNA_PRESETS
from glocal.adapt.gna import GNASettings, Window
from glocal.adapt.radial import PRESETS, Radial, RadialSettings, density
from glocal.adapt.records import Core, SiteCall
from glocal.adapt.rectified_spaattn import SpaSettings
from glocal.adapt.sparse import Schedule, SparseMethod
from glocal.canvas import Canvas, Layout
from glocal.patterns import Neighborhood, Pattern, RadialBlocks, TileWindows

from .hosts import (
    test_diffusers_cogvideox,
    test_diffusers_flux,
    test_diffusers_hunyuan_video,
    test_diffusers_mochi,
    test_diffusers_pixart,
    test_diffusers_sd3,
    test_diffusers_wan,
)
from .hosts.exam import Inputs, run
from .test_pipelines import generate, wan

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")

WAN, HUNYUAN, FLUX, COGVIDEOX, MOCHI = (
    test_diffusers_wan.TestWan,
    test_diffusers_hunyuan_video.TestHunyuanVideo,
    test_diffusers_flux.TestFlux,
    test_diffusers_cogvideox.TestCogVideoX,
    test_diffusers_mochi.TestMochi,
)
SMALL = RadialSettings(decay=0.2, block=8)


def made(exam: Any, generator: torch.Generator, batch: int = 2) -> tuple[nn.Module, Inputs]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return exam().build().eval(), exam().inputs(generator, batch)


class Masked(Method):
    """Dense attention under the mask of a pattern, token by token."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self.hidden = 0

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(s for s in sites if s.kind != "cross")

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        seen = self.pattern.mask(call.layout)[0].expand(q.shape[0], 1, -1, -1)
        self.hidden += int((~seen).sum())
        return scaled_dot_product_attention(
            q, k, v, seen if call.native.mask is None else seen & call.native.mask, scale=call.site.scale
        )


def agrees(model: nn.Module, given: Inputs, pattern: Pattern, put: Any) -> Any:
    """Whether the method `put(model)` gives what `pattern` says; the method."""
    plain, masked = run(model, given), Masked(pattern)
    with attach(model, masked):
        wanted = run(model, given)
    assert masked.hidden and not torch.allclose(wanted, plain, rtol=0, atol=1e-5)
    with torch.no_grad(), put(model) as handle:
        torch.testing.assert_close(run(model, given), wanted, rtol=0, atol=1e-5)
        method = handle.method
    assert torch.equal(run(model, given), plain)
    return method


@pytest.mark.parametrize("exam", [WAN, HUNYUAN, MOCHI])
def test_radial_is_its_block_mask(exam: Any, generator: torch.Generator) -> None:
    model, given = made(exam, generator)
    method = agrees(model, given, RadialBlocks(8, 0.2, "wan"), lambda m: radial(m, settings=SMALL))
    assert all(r.sparse == r.calls and 0 < r.kept < 1 for r in method.ran.values())
    assert method.kept == pytest.approx(sum(r.kept for r in method.ran.values()) / len(method.ran))


@pytest.mark.parametrize("exam", [WAN, HUNYUAN, COGVIDEOX, MOCHI])
def test_words_merge_into_a_neighbourhood(exam: Any, generator: torch.Generator) -> None:
    model, given = made(exam, generator)
    pattern = Neighborhood((3, 2, 3), stride=(1, 2, 1))
    agrees(model, given, pattern, lambda m: gna(m, window=(-1, 2, 3), stride=(1, 2, 1)))
    agrees(model, given, TileWindows((1, 2, 2), (2, 1, 3)), lambda m: tile_windows(m, tile=(1, 2, 2), window=(2, 1, 3)))


def test_images_have_two_axes(generator: torch.Generator) -> None:
    model, given = made(FLUX, generator)
    agrees(model, given, Neighborhood((2, 3)), lambda m: gna(m, window=(2, 3)))


def test_a_whole_window_is_dense_attention(generator: torch.Generator) -> None:
    model, given = made(HUNYUAN, generator)
    plain = run(model, given)
    with torch.no_grad(), gna(model, window=(-1, -1, -1)) as handle:
        torch.testing.assert_close(run(model, given), plain, rtol=0, atol=1e-5)
        assert handle.method.kept == 1.0  # type: ignore[attr-defined]


def test_the_layers_of_a_table_have_windows_and_others_none(generator: torch.Generator) -> None:
    model, given = made(WAN, generator)
    settings = GNASettings({1: Window((-1, 2, 2))})
    with torch.no_grad(), gna(model, settings=settings) as handle:
        run(model, given)
        assert list(handle.method.ran) == [("transformer", "blocks.1.attn1")]  # type: ignore[attr-defined]


def test_published_windows_fit_their_grids() -> None:
    grids = {
        "cosmos-predict1-7b-56": (16, 44, 80),
        "cosmos-predict1-7b-89": (16, 44, 80),
        "cosmos-predict2-2b": (24, 44, 80),
        "hunyuanvideo-58": (30, 48, 80),
        "hunyuanvideo-91": (30, 48, 80),
        "flux-4k-90": (256, 256),
    }
    assert set(grids) == set(GNA_PRESETS)
    for name, axes in grids.items():
        window = GNA_PRESETS[name].settings.window
        for one in [window] if isinstance(window, Window) else window.values():
            pattern = one.pattern(axes)
            pattern.check(Layout.of(Canvas(axes)))
            share = torch.tensor(pattern.window).double().prod() / torch.tensor(axes).double().prod()
            if name[-2:].isdigit() and isinstance(window, Window):  # the sparsity stands in the name
                assert float(1 - share) == pytest.approx(int(name[-2:]) / 100, abs=0.01)
    assert set(GNA_PRESETS["cosmos-predict2-2b"].settings.window) == set(range(28))  # type: ignore[arg-type]


def test_density_of_the_published_masks() -> None:
    wan = PRESETS["wan2.1-14b"].settings
    assert density(wan, 18, 3840) == pytest.approx(0.2871, abs=5e-5)
    hunyuan = PRESETS["hunyuanvideo"].settings
    assert density(hunyuan, 30, 3840) == pytest.approx(0.2746, abs=5e-5)
    assert density(hunyuan, 64, 3840) == pytest.approx(0.1746, abs=5e-5)
    long = PRESETS["hunyuanvideo-long"].settings
    assert density(long, 128, 3840) == pytest.approx(0.1150, abs=5e-5)
    small = RadialSettings(decay=0.5, block=8)
    mask = small.pattern.block_mask(Layout.of(Canvas((6, 16))))
    assert density(small, 6, 16) == pytest.approx(float(mask.double().mean()))


def test_first_steps_and_layers_stay_dense() -> None:
    pipe = wan(boundary_ratio=0.8)
    plain = generate(pipe)
    with radial(pipe, settings=SMALL, dense_steps=1, dense_layers=1, dense_last_steps=1) as handle:
        generate(pipe)
        ran: dict[Any, Any] = handle.method.ran  # type: ignore[attr-defined]
    one, two = ran["transformer", "blocks.1.attn1"], ran["transformer_2", "blocks.1.attn1"]
    assert (one.calls, one.sparse, dict(one.dense)) == (4, 2, {"first steps": 2})
    assert (two.calls, two.sparse, dict(two.dense)) == (4, 2, {"last steps": 2})
    assert dict(ran["transformer", "blocks.0.attn1"].dense) == {"layer": 4}
    assert torch.equal(generate(pipe), plain)


def test_experts_have_first_steps_of_their_own() -> None:
    class Second(Radial):
        """Dense in the first step of the second expert alone."""

        schedule = Schedule(components={"transformer_2": 1})

        def __init__(self) -> None:
            super().__init__(SMALL)
            self.schedule = Second.schedule

    pipe, method = wan(boundary_ratio=0.8), Second()
    with attach(pipe, method):
        generate(pipe)
        generate(pipe)
    assert dict(method.ran["transformer_2", "blocks.0.attn1"].dense) == {"first steps": 4}
    assert not method.ran["transformer", "blocks.0.attn1"].dense


def test_last_steps_need_a_pipeline(generator: torch.Generator) -> None:
    model, given = made(WAN, generator)
    with radial(model, settings=SMALL, dense_last_steps=2), pytest.raises(ValueError, match="only a pipeline says"):
        run(model, given)


def test_presets_are_found_by_class_and_refused_by_name(generator: torch.Generator) -> None:
    model = made(HUNYUAN, generator)[0]
    with radial(model) as handle:
        assert handle.method.settings == PRESETS["hunyuanvideo"].settings  # type: ignore[attr-defined]
    with radial(wan(boundary_ratio=0.8)) as handle:
        assert handle.method.settings == PRESETS["wan2.2-a14b"].settings  # type: ignore[attr-defined]
    words = r"preset='wan2.1-14b' is for WanTransformer3DModel, this is HunyuanVideo\w+; for it: hunyuanvideo, hunyuan"
    with pytest.raises(ValueError, match=words):
        radial(model, "wan2.1-14b")
    with pytest.raises(ValueError, match=r"preset='hunyuan' is unknown; legal: .*; nearest: hunyuanvideo"):
        radial(model, "hunyuan")
    with pytest.raises(ValueError, match=r"nothing is published for FluxTransformer2DModel; known: wan2\.1-14b"):
        radial(made(FLUX, generator)[0])
    with pytest.raises(ValueError, match=r"radial: dekay=0\.2 is unknown; legal: decay, block"):
        radial(model, dekay=0.2)


def test_a_canvas_that_does_not_fit_is_named(generator: torch.Generator) -> None:
    model, given = made(FLUX, generator)
    with (
        radial(model, settings=SMALL),
        pytest.raises(ValueError, match=r"radial: site '.*attn' attends on .*frames of"),
    ):
        run(model, given)
    for sizes in ("3,3", 3, (3.0, 3)):
        with pytest.raises(TypeError, match="gna: window=.*; legal: a whole number for each axis of the media grid"):
            gna(model, window=sizes)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="tile_windows: tile=.*; legal: a whole number for each axis"):
            tile_windows(model, tile=sizes, window=(3, 3))  # type: ignore[arg-type]
    with gna(model, window=(8, 8)), pytest.raises(ValueError, match=r"window=8 .* does not fit axis 0 of length 4"):
        run(model, given)
    with gna(model, window=(1, 2, 2)), pytest.raises(ValueError, match=r"has 3 entries, but the media grid \(4, 6\)"):
        run(model, given)
    with tile_windows(model, tile=(2, 2, 2), window=(1, 1, 1)):
        with pytest.raises(
            ValueError, match=r"tile_windows: tile=\(2, 2, 2\) has 3 entries, but the media grid \(4, 6"
        ):
            run(model, given)
    given["img_ids"] = given["img_ids"].flip(0)
    with gna(model, window=(2, 2)), pytest.raises(ValueError, match="legal: one grid of media tokens and text around"):
        run(model, given)


def test_rows_of_an_image_are_no_frames(generator: torch.Generator) -> None:
    """SD3 has its words behind the image, PixArt none: the grid comes first there, as in a video."""
    for exam in (test_diffusers_sd3.TestSD3, test_diffusers_pixart.TestPixArt):
        model, given = made(exam, generator)
        with radial(model, settings=SMALL), pytest.raises(ValueError, match="image=.*; an image has no frames"):
            run(model, given)


def test_cross_attention_is_left_alone(generator: torch.Generator) -> None:
    model, given = made(WAN, generator)
    with torch.no_grad(), gna(model, window=(1, 2, 2)) as handle:
        run(model, given)
        assert [name for _, name in handle.method.ran] == ["blocks.0.attn1", "blocks.1.attn1"]  # type: ignore[attr-defined]

    class Cross(SparseMethod):
        def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
            return ()

    with pytest.raises(ValueError, match="Cross found no attention site it wants in WanTransformer3DModel"):
        attach(model, Cross())


def test_methods_nest_with_others(generator: torch.Generator) -> None:
    model, given = made(WAN, generator)
    plain = run(model, given)
    with torch.no_grad(), radial(model, settings=SMALL):
        once = run(model, given)
        with gna(model, window=(-1, -1, -1)):  # acts first: the one below is not asked
            torch.testing.assert_close(run(model, given), plain, rtol=0, atol=1e-5)
        assert torch.equal(run(model, given), once)


@pytest.mark.parametrize("names", ["original", "peft", "diffusers"])
def test_radial_brings_a_lora_and_takes_it_away(names: str, tmp_path: Any) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    from safetensors.torch import save_file

    pipe = wan()
    form = {
        "original": "diffusion_model.blocks.{n}.self_attn.{short}.lora_{part}.weight",
        "peft": "base_model.model.blocks.{n}.attn1.{long}.lora_{part}.default.weight",
        "diffusers": "transformer.blocks.{n}.attn1.{long}.lora_{part}.weight",
    }[names]
    draw, tensors = torch.Generator().manual_seed(0), {}
    for n in range(2):
        for short, long in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
            for part, shape in (("A", (2, 24)), ("B", (24, 2))):
                tensors[form.format(n=n, short=short, long=long, part=part)] = torch.randn(shape, generator=draw)
    save_file(tensors, str(tmp_path / "long.safetensors"))
    plain = generate(pipe)
    keys = list(pipe.transformer.state_dict())
    with radial(pipe, settings=SMALL):
        sparse = generate(pipe)
    with radial(pipe, settings=SMALL, lora=tmp_path / "long.safetensors"):
        assert not torch.allclose(generate(pipe), sparse, rtol=0, atol=1e-3)
    assert torch.equal(generate(pipe), plain)
    assert list(pipe.transformer.state_dict()) == keys


def test_lora_needs_a_pipeline_and_lora_weights(generator: torch.Generator) -> None:
    model = made(WAN, generator)[0]
    with pytest.raises(ValueError, match=r"lora='x.safetensors': WanTransformer3DModel loads no LoRA weights"):
        radial(model, settings=SMALL, lora="x.safetensors")
    with pytest.raises(ValueError, match=r"lora: no tensor is a LoRA weight; names begin with transformer\.proj"):
        radial(wan(), settings=SMALL, lora={"proj.weight": torch.ones(1)})


@pytest.mark.parametrize("exam", [WAN, HUNYUAN, MOCHI])
def test_radial_may_be_rectified(exam: Any, generator: torch.Generator) -> None:
    model, given = made(exam, generator)
    plain = run(model, given)
    with torch.no_grad():
        with radial(model, settings=SMALL):
            bare = run(model, given)
        with radial(model, settings=SMALL, rectify=True):
            rectified = run(model, given)
        assert not torch.allclose(rectified, bare, rtol=0, atol=1e-4)
    assert torch.equal(run(model, given), plain)


def test_rectified_radial_loses_nothing_on_constant_blocks(generator: torch.Generator) -> None:
    layout = Layout.of(Canvas((8, 16), after=5))
    q, k, v = (torch.randn(1, 2, 16, 8, generator=generator).repeat_interleave(8, 2) for _ in "qkv")
    words = (torch.randn(1, 2, 5, 8, generator=generator) for _ in "qkv")
    q, k, v = (torch.cat([t, w], 2) for t, w in zip((q, k, v), words, strict=True))
    method = Radial(RadialSettings(decay=0.1, block=8, sink=False, rectify=True))
    call = SiteCall(Site("here", 0, 2, 8), layout, RunState())
    out = method.core(q, k, v, call, lambda *_: torch.empty(0))
    assert method.kept < 0.8
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-5)


def test_two_pipelines_in_one_process() -> None:
    one, other = wan(), wan()
    plain = generate(other)
    with gna(one, window=(1, 1, 1)):
        sparse = generate(one)
        assert torch.equal(generate(other), plain) and not torch.equal(sparse, plain)
        with tile_windows(other, tile=(1, 1, 1), window=(1, 1, 1), dense_layers=1):
            assert torch.equal(generate(one), sparse)
            assert not torch.equal(generate(other), plain)
    assert torch.equal(generate(other), plain) and torch.equal(generate(one), plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["radial", "rectified_spaattn"])
def test_methods_in_a_compiled_model(name: str, generator: torch.Generator) -> None:
    torch.compiler.reset()  # graphs of other tests do not look for the hooks of this one
    model, given = made(WAN, generator, batch=1)
    spa = SpaSettings(drop=0.7, mass=0.0, block=4, neighbours=False)

    def put() -> Any:
        return radial(model, settings=SMALL) if name == "radial" else rectified_spaattn(model, settings=spa)

    plain = run(model, given)
    with torch.no_grad(), put():
        wanted = run(model, given)
    assert not torch.allclose(wanted, plain, rtol=0, atol=1e-5)
    model.compile(backend="eager")
    with torch.no_grad(), put():
        for _ in range(2):
            torch.testing.assert_close(run(model, given), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(run(model, given), plain, rtol=0, atol=1e-5)
