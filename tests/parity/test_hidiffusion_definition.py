"""HiDiffusion in UNets of odd sizes, against the printed rules put into the modules of diffusers one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.testing import Case, Run, adapter
from glocal.testing.parity import check_case

pytest.importorskip("diffusers")

COMMON: dict[str, Any] = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 4,
}  # fmt: skip
SD: dict[str, Any] = COMMON | {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [8, 12, 16, 16],
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
}
XL: dict[str, Any] = COMMON | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [4, 8, 12],
    "cross_attention_dim": 4,
    "transformer_layers_per_block": [1, 2, 2],
    "attention_head_dim": [1, 2, 3],
    "use_linear_projection": True,
}


class Printed:
    """The rules in a UNet. step and draws are set by hand; strided and pooled: steps in which the parts act."""

    def __init__(self, unet: Any, stages: tuple[int, int, int | None], size: tuple[int, int]) -> None:
        down, up, strides = stages
        self.size, self.step = size, 0
        self.draws: Iterator[float] = iter(())
        self.kept: torch.Size | None = None
        self.strided: range = range(0)
        self.pooled: range = range(0)
        if strides is not None:
            conv = unet.down_blocks[strides].downsamplers[0].conv
            conv.forward = partial(self.stride, conv)
        for pairs, index, change in (
            (unet.down_blocks[down].attentions, 0, self.pool),
            (unet.up_blocks[up].attentions, 1, self.restore),
        ):
            pairs[index].forward = partial(self.after, pairs[index].forward, change)
        unet.num_upsamplers += 12  # every upsampler is told the size of its skip
        windowed = (0, 3) if len(unet.down_blocks) == 4 else (1, 1)
        for stage in (unet.down_blocks[windowed[0]], unet.up_blocks[windowed[1]]):
            for block in (b for t in stage.attentions for b in t.transformer_blocks):
                block.attn1.forward = partial(self.windows, block.attn1.forward)

    def stride(self, conv: Any, x: Tensor) -> Tensor:
        times = 2 if self.step in self.strided else 1
        return F.conv2d(x, conv.weight, conv.bias, 2 * times, times, times)

    def after(self, forward: Callable[..., Any], change: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        return (change(found[0]), *found[1:])

    def pool(self, x: Tensor) -> Tensor:
        self.kept = x.shape[-2:] if self.step in self.pooled else None
        return x if self.kept is None else F.avg_pool2d(x, 2, ceil_mode=True)

    def restore(self, x: Tensor) -> Tensor:
        return x if self.kept is None else F.interpolate(x, list(self.kept), mode="bicubic")

    def windows(self, attend: Callable[..., Tensor], x: Tensor, **_: Any) -> Tensor:
        """Four windows of the rolled map; its size follows from that of the latents and the number of tokens."""
        ratio = round((self.size[0] * self.size[1] / x.shape[1]) ** 0.5)
        height, width = (-(-n // ratio) for n in self.size)
        tall, wide = -(-height // 2), -(-width // 2)
        quarters = int(next(self.draws) * 4)
        down, right = tall // 4 * quarters, wide // 4 * quarters
        shift = (down, right) if down else (0, 0)
        image = x.mT.unflatten(-1, (height, width))
        if height % 2 or width % 2:
            image = F.interpolate(image, (2 * tall, 2 * wide), mode="bicubic")
        image = torch.roll(image, (-shift[0], -shift[1]), (2, 3)).clone()
        for row in (slice(tall), slice(tall, None)):
            for column in (slice(wide), slice(wide, None)):
                seen = attend(image[..., row, column].flatten(2).mT.contiguous())
                image[..., row, column] = seen.mT.unflatten(-1, (tall, wide))
        image = torch.roll(image, shift, (2, 3))
        if height % 2 or width % 2:
            image = F.interpolate(image, (height, width), mode="bicubic")
        return image.flatten(2).mT


@pytest.mark.parametrize(
    ("model", "size", "total", "strided", "pooled"),
    [
        ("sd15", (33, 47), 10, range(4), range(0)),
        ("sd21", (40, 26), 7, range(2), range(0)),
        ("sdxl", (33, 47), 13, range(2), range(2, 5)),
        ("sdxl", (30, 30), 6, range(0), range(2)),
        ("sdxl_turbo", (30, 42), 4, range(0), range(2)),
        ("sdxl_inpainting", (33, 40), 10, range(0), range(4)),
    ],
)
def test_unets_of_odd_sizes(model: str, size: tuple[int, int], total: int, strided: range, pooled: range) -> None:
    from diffusers import UNet2DConditionModel

    config = SD if model.startswith(("sd15", "sd21")) else XL
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet: Any = UNet2DConditionModel(**config).eval()
    state = {f"state.{name}": t.clone() for name, t in unet.state_dict().items()}
    given = {
        "in.sample": torch.randn(2, 4, *size, generator=generator),
        "in.encoder": torch.randn(2, 5, config["cross_attention_dim"], generator=generator),
        "in.timesteps": torch.linspace(981, 1, total).long(),
        "in.draws": torch.rand(total, 10, generator=generator, dtype=torch.float64),
    }
    saved = sorted({0, *(edge for r in (strided, pooled) if r for edge in (r.start, r.stop - 1, r.stop)), total - 1})
    stages = (1, 2, 0) if config is SD else (1, 1, None if "turbo" in model else 1)

    def noise(step: int) -> Tensor:
        return unet(given["in.sample"], given["in.timesteps"][step], given["in.encoder"]).sample

    with torch.no_grad():
        results = {"mid.unpatched_step0": noise(0)}
        rules = Printed(unet, stages, size)
        rules.strided, rules.pooled = strided, pooled
        for step in saved:
            rules.step, rules.draws = step, iter(given["in.draws"][step].tolist())
            results[f"out.step{step}"] = noise(step)
    published = {
        "unet": config, "model": model, "num_timesteps": total, "saved_steps": saved,
        "apply_raunet": True, "apply_window_attn": True,
    }  # fmt: skip
    found = adapter("hidiffusion")
    assert found is not None
    case = Case(Path("none"), "hidiffusion", "plain", config=published, tensors=given | state | results)
    done = check_case(case, found, Run())
    assert done.passed, done.verdict
