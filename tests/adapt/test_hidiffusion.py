"""HiDiffusion: four windows, schedules, smaller levels in tiny UNets, pipelines, ControlNets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.adapt import attach, hidiffusion, open_handles
from glocal.adapt.hidiffusion import HiDiffusion
from glocal.adapt.hidiffusion_control import control_size
from glocal.adapt.hidiffusion_schedule import PRESETS, HiSettings, Shares, phases, recognised
from glocal.adapt.hidiffusion_windows import shift_of, window_attention
from glocal.models.generation.video_dit import VideoDiT

SD: dict[str, Any] = {
    "sample_size": 16,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (8, 8, 8, 8),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}
XL: dict[str, Any] = {
    **SD,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 8, 8),
    "transformer_layers_per_block": (1, 2, 1),
}


def own(x: Tensor) -> Tensor:
    """Self-attention [B, N, C] -> [B, N, C] of one head."""
    return F.scaled_dot_product_attention(x, x, x)


def test_quadrants_attend_alone_where_nothing_is_rolled(generator: torch.Generator) -> None:
    x = torch.randn(2, 8 * 12, 4, generator=generator)
    row, column = torch.arange(96) // 12, torch.arange(96) % 12
    quadrant = (row >= 4).int() * 2 + (column >= 6).int()
    wanted = F.scaled_dot_product_attention(x, x, x, attn_mask=quadrant[:, None] == quadrant)
    torch.testing.assert_close(window_attention(x, (8, 12), own), wanted)


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_windows_are_those_of_the_rolled_map(generator: torch.Generator, quarters: int) -> None:
    x = torch.randn(1, 16 * 8, 4, generator=generator)
    row, column = (torch.arange(128) // 8 - 2 * quarters) % 16, (torch.arange(128) % 8 - quarters) % 8
    window = (row >= 8).int() * 2 + (column >= 4).int()  # the seam of the roll hides nothing
    wanted = F.scaled_dot_product_attention(x, x, x, attn_mask=window[:, None] == window)
    torch.testing.assert_close(window_attention(x, (16, 8), own, quarters), wanted)


@pytest.mark.parametrize("quarters", [0, 3])
def test_four_equal_windows_see_what_the_whole_map_sees(generator: torch.Generator, quarters: int) -> None:
    x = torch.randn(1, 8, 8, 4, generator=generator).repeat(1, 2, 2, 1).flatten(1, 2)
    torch.testing.assert_close(window_attention(x, (16, 16), own, quarters), own(x))


def test_odd_maps_are_resized_and_back(generator: torch.Generator) -> None:
    x = torch.randn(2, 9 * 11, 4, generator=generator)
    sizes: list[tuple[int, ...]] = []

    def keep(windows: Tensor) -> Tensor:
        sizes.append(tuple(windows.shape))
        return windows

    there = F.interpolate(x.unflatten(1, (9, 11)).permute(0, 3, 1, 2), (10, 12), mode="bicubic")
    wanted = F.interpolate(there, (9, 11), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(window_attention(x, (9, 11), keep, 1), wanted)
    assert sizes == [(8, 30, 4)]


def test_shifts() -> None:
    assert [shift_of((16, 24), k) for k in range(4)] == [(0, 0), (2, 3), (4, 6), (6, 9)]
    assert shift_of((6, 24), 3) == (0, 0)  # windows of three rows: the authors' code does not roll
    with pytest.raises(ValueError, match=r"window_attention: x has 5 tokens; legal: 6 for size=\(2, 3\)\."):
        window_attention(torch.zeros(1, 5, 4), (2, 3), own)
    with pytest.raises(ValueError, match=r"window_attention: quarters=4; legal: 0, 1, 2, 3\."):
        window_attention(torch.zeros(1, 6, 4), (2, 3), own, 4)


@pytest.mark.parametrize(
    ("preset", "latent", "total", "strided", "pooled"),
    [
        ("sd", (128, 128), 50, range(20), range(0)),
        ("sd", (256, 256), 50, range(35), range(15)),
        ("sd", (256, 255), 50, range(20), range(0)),
        ("sdxl", (256, 256), 50, range(8), range(8, 20)),
        ("sdxl", (512, 512), 50, range(15), range(35)),
        ("sdxl-controlnet", (256, 256), 50, range(8), range(8, 25)),
        ("sdxl-gentle", (256, 256), 50, range(0), range(20)),
        ("sdxl-turbo", (128, 128), 4, range(0), range(2)),
    ],
)
def test_schedules(preset: str, latent: tuple[int, int], total: int, strided: range, pooled: range) -> None:
    settings = PRESETS[preset].settings
    found = phases(settings, latent, total)
    assert (found.strided, found.pooled) == (strided, pooled)
    off = phases(replace(settings, raunet=False), latent, total)
    assert not off.strided and not off.pooled


class TestUNets:
    """In tiny UNets of diffusers."""

    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")

    def unet(self, **config: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.diffusers.UNet2DConditionModel(**config).eval()

    def noise(self, unet: Any, size: tuple[int, int], t: int = 999, batch: int = 1, **more: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(1, unet.config.in_channels, *size, generator=generator).repeat(batch, 1, 1, 1)
        words = torch.randn(batch, 5, 8, generator=generator)
        with torch.no_grad():
            return unet(x, t, words, **more).sample

    @pytest.mark.parametrize("config", [SD, XL])
    @pytest.mark.parametrize("size", [(32, 32), (22, 35)])
    def test_undo_gives_the_untouched_model_back(self, config: dict[str, Any], size: tuple[int, int]) -> None:
        unet = self.unet(**config)
        plain, kept = self.noise(unet, size), dict(vars(unet))
        with hidiffusion(unet, steps=4) as handle:
            out = [self.noise(unet, size, t) for t in (999, 800, 700, 600)]
            assert list(open_handles(unet)) == ["HiDiffusion"]
            assert all(o.shape == plain.shape for o in out)
            assert not torch.equal(out[0], plain)
            assert handle.state.step == 3
        assert torch.equal(self.noise(unet, size), plain)
        assert dict(vars(unet)) == kept
        assert not any("forward" in vars(m) for m in unet.modules())

    @pytest.mark.parametrize("config", [SD, XL])
    def test_without_windows_the_late_steps_are_untouched(self, config: dict[str, Any]) -> None:
        unet = self.unet(**config)
        for size in ((32, 32), (22, 35)):
            early, late = self.noise(unet, size), self.noise(unet, size, 100)
            with hidiffusion(unet, window_attention=False, steps=2, shares=Shares("strided", small=(0.5, 0.5))):
                assert not torch.equal(self.noise(unet, size), early)
                assert torch.equal(self.noise(unet, size, 100), late)

    def test_levels_are_smaller_while_the_schedule_says_so(self) -> None:
        unet, sizes = self.unet(**XL), []
        mid = unet.mid_block.register_forward_pre_hook(
            lambda m, args, kw: sizes.append(tuple(args[0].shape[-2:])), with_kwargs=True
        )
        with hidiffusion(unet, steps=25):
            for t in range(999, 979, -1):
                self.noise(unet, (32, 24), t)
        mid.remove()
        assert sizes == [(4, 3)] * 10 + [(8, 6)] * 10
        kinds = {n: m for n, m in unet.named_modules() if n == "down_blocks.1.downsamplers.0.conv"}
        conv = kinds["down_blocks.1.downsamplers.0.conv"]
        assert (conv.stride, conv.padding, conv.dilation) == ((2, 2), (1, 1), (1, 1))

    def test_seeds_reproduce_and_the_global_generator_is_left_alone(self) -> None:
        unet = self.unet(**SD)

        def run() -> list[Tensor]:
            return [self.noise(unet, (32, 32), t) for t in (999, 800, 600)]

        before = torch.get_rng_state()
        with hidiffusion(unet, steps=3):
            one, two = run(), run()
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))  # runs draw the same shifts
        with hidiffusion(unet, steps=3, generator=torch.Generator().manual_seed(5)):
            three, other = run(), run()
        with hidiffusion(unet, steps=3, generator=torch.Generator().manual_seed(5)):
            again = run()
        assert all(torch.equal(a, b) for a, b in zip(three, again, strict=True))
        assert not torch.equal(three[-1], other[-1])
        assert torch.equal(torch.get_rng_state(), before)

    def test_guided_rows_share_the_shift(self) -> None:
        unet, drawn = self.unet(**SD), []

        class Counting(HiDiffusion):
            def draw(self, state: Any) -> float:
                drawn.append(state.step)
                return super().draw(state)

        settings = replace(PRESETS["sd"].settings, raunet=False)
        x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
        words = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
        with attach(unet, Counting(settings)), torch.no_grad():
            for t in (999, 500):  # two calls a step, then both in one
                apart = [unet(x, t, w[None]).sample for w in words]
                assert drawn == [0] * 5 + [1] * 5 * (t == 500)
                together = unet(x.repeat(2, 1, 1, 1), t, words).sample
                torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)

    def test_models_are_recognised(self) -> None:
        unets = {name: self.unet(**XL) for name in ("stabilityai/sdxl-turbo", "playgroundai/playground-v2", "x/y")}
        for name, unet in unets.items():
            unet.register_to_config(_name_or_path=name)
        assert [recognised(u) for u in unets.values()] == ["sdxl-turbo", "sdxl-gentle", "sdxl"]
        assert recognised(self.unet(**XL, in_channels=9)) == "sdxl-gentle"
        assert recognised(self.unet(**SD)) == "sd"
        assert recognised(object()) is None

    def test_refusals(self) -> None:
        unet = self.unet(**SD)
        with pytest.raises(
            ValueError,
            match=r"preset='sdxl' is for another UNet than this UNet2DConditionModel with stages Cross.*; for it: sd\.",
        ):
            hidiffusion(unet, "sdxl")
        with pytest.raises(ValueError, match="preset='sdx' is unknown; legal: sd, sdxl, .*; nearest: sdxl"):
            hidiffusion(unet, "sdx")
        with pytest.raises(ValueError, match="hidiffusion: window=2 is unknown; legal: places, shares, raunet, "):
            hidiffusion(unet, window=2)
        with pytest.raises(
            ValueError, match=r"the model has no 'up_blocks\.4'; its stages: down_blocks\.0, .*, up_blocks\.3\."
        ):
            hidiffusion(unet, places=replace(PRESETS["sd"].settings.places, unpooled="up_blocks.4"))
        with pytest.raises(
            ValueError,
            match=r"pooled='down_blocks\.1' has 2 transformers, unpooled='up_blocks\.0' 0; legal: n and n \+ 1",
        ):
            hidiffusion(unet, places=replace(PRESETS["sd"].settings.places, unpooled="up_blocks.0"))
        with pytest.raises(ValueError, match="raunet=False and window_attention=False leave nothing to do"):
            hidiffusion(unet, raunet=False, window_attention=False)
        with (
            hidiffusion(unet),
            pytest.raises(
                ValueError, match=r"steps=None: nobody says how many steps .* give hidiffusion\(unet, steps=\.\.\.\)"
            ),
        ):
            self.noise(unet, (32, 32))
        with hidiffusion(unet, raunet=False):
            self.noise(unet, (32, 32))
            with pytest.raises(ValueError, match="an attention mask arrives, which windows cannot take"):
                self.noise(unet, (32, 32), attention_mask=torch.ones(1, 1024))

    def test_convolutions_with_a_lora_stride_together(self) -> None:
        peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'glocal[diffusers]'")
        unet, target = self.unet(**SD), "down_blocks.0.downsamplers.0.conv"
        tuned = self.unet(**SD)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            tuned.add_adapter(peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
        conv = tuned.get_submodule(target)
        added = conv.get_delta_weight("default").detach()
        with torch.no_grad():
            unet.get_submodule(target).weight += added
        with hidiffusion(unet, steps=3), hidiffusion(tuned, steps=3):
            torch.testing.assert_close(self.noise(tuned, (32, 32)), self.noise(unet, (32, 32)), rtol=1e-4, atol=1e-5)

    def test_a_unet_whose_weights_wait_elsewhere(self) -> None:
        reason = "accelerate is not installed: pip install 'glocal[diffusers]'"
        accelerate = pytest.importorskip("accelerate", reason=reason)
        unet = self.unet(**SD)
        plain = self.noise(unet, (32, 32))
        with hidiffusion(unet, steps=3):
            wanted = self.noise(unet, (32, 32))
        accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
        with hidiffusion(unet, steps=3):
            assert torch.equal(self.noise(unet, (32, 32)), wanted)
        assert torch.equal(self.noise(unet, (32, 32)), plain)

    def test_a_compiled_unet_gives_the_same(self) -> None:
        unet = self.unet(**SD, layers_per_block=1)

        def run() -> list[Tensor]:
            with hidiffusion(unet, steps=3):
                return [self.noise(unet, (32, 32), t) for t in (999, 800)]

        eager = run()
        unet.compile(backend="eager")
        for a, b in zip(run(), eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_a_pipeline_with_a_controlnet(self) -> None:
        unet, diffusers = self.unet(**SD, layers_per_block=1), self.diffusers
        with torch.random.fork_rng():
            torch.manual_seed(0)
            controlnet = diffusers.ControlNetModel.from_unet(unet).eval()
            for parameter in controlnet.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
            vae = diffusers.AutoencoderKL(
                latent_channels=4,
                block_out_channels=(4,) * 4,
                norm_num_groups=4,
                down_block_types=down,
                up_block_types=up,
            )
        none = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        models = {
            "unet": unet,
            "vae": vae,
            "controlnet": controlnet,
            "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        }
        pipe = diffusers.StableDiffusionControlNetPipeline(**models, **none, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        words = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
        seen: list[tuple[int, ...]] = []
        controlnet.conv_in.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[-2:])))
        unet.mid_block.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[-2:])))

        def generate(scale: float = 1.0) -> Tensor:
            seen.clear()
            return pipe(
                prompt_embeds=words[:1],
                negative_prompt_embeds=words[1:],
                image=torch.rand(1, 3, 256, 192, generator=torch.Generator().manual_seed(2)),
                height=256,
                width=192,
                num_inference_steps=5,
                controlnet_conditioning_scale=scale,
                output_type="latent",
                generator=torch.Generator().manual_seed(1),
            ).images

        plain = generate()
        with hidiffusion(pipe, control_side=16) as handle:
            out = generate()
            assert seen == [(16, 8), (2, 2)] * 2 + [(16, 8), (4, 3)] * 3
            assert handle.state.total == 5
            assert torch.equal(generate(), out)
            assert not torch.equal(generate(0.5), out)
        with hidiffusion(pipe, control_side=16, control_share=0.0):
            assert torch.equal(generate(0.5), generate())  # the ControlNet has no say
        assert torch.equal(generate(), plain)
        assert seen == [(32, 24), (4, 3)] * 5


def test_other_models_are_refused(model: VideoDiT) -> None:
    with pytest.raises(
        ValueError, match="hidiffusion: VideoDiT with no down stages is not known; legal: a UNet of Stable"
    ):
        hidiffusion(model)
    with pytest.raises(
        ValueError, match="preset='sd' is for another UNet than this VideoDiT with no down .*; for it: none"
    ):
        hidiffusion(model, "sd")
    settings: HiSettings = PRESETS["sd"].settings
    with pytest.raises(ValueError, match="hidiffusion: VideoDiT with no down stages; legal: a UNet"):
        hidiffusion(model, settings=settings)


def test_sizes_of_a_controlnet() -> None:
    assert control_size((256, 256), 128) == (128, 128)
    assert control_size((256, 192), 128) == (128, 96)
    assert control_size((300, 160), 128) == (128, 64)  # floored to a multiple of 8
    assert control_size((128, 64), 128) == (128, 64)
