"""Models of the papers with random weights, made where they run, and the inputs of one forward at a size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
Grid = tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """A family of models. build: blocks of each stack, heads -> model. inputs: grid, device, dtype -> of a forward.

    stacks: module lists of its blocks; the blocks of one stack cost the same. whole: their lengths in the published
    model; none where the model is built whole.
    """

    build: Callable[[tuple[int, ...], int], nn.Module]
    inputs: Callable[[Grid, torch.device, torch.dtype], Inputs]
    stacks: tuple[str, ...]
    whole: tuple[int, ...]
    heads: int
    dim: int = 128
    words: int = 0


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New tensors, and so the weights of new models, lie on `device` in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def draw(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normal numbers, the same ones every time."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)


def _wan(layers: tuple[int, ...], heads: int) -> nn.Module:
    import diffusers

    return diffusers.WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=128, ffn_dim=heads * 13824 // 40, num_layers=layers[0]
    )


def _wan_inputs(grid: Grid, device: torch.device, dtype: torch.dtype) -> Inputs:
    f, h, w = grid
    return {
        "hidden_states": draw((1, 16, f, 2 * h, 2 * w), device, dtype),
        "timestep": torch.full((1,), 500.0, device=device),
        "encoder_hidden_states": draw((1, 512, 4096), device, dtype),
    }


def _hunyuan(layers: tuple[int, ...], heads: int) -> nn.Module:
    import diffusers

    return diffusers.HunyuanVideoTransformer3DModel(
        num_attention_heads=heads, num_layers=layers[0], num_single_layers=layers[1]
    )


def _hunyuan_inputs(grid: Grid, device: torch.device, dtype: torch.dtype) -> Inputs:
    f, h, w = grid
    mask = torch.zeros(1, 256, dtype=torch.long, device=device)
    mask[:, :77] = 1
    return {
        "hidden_states": draw((1, 16, f, 2 * h, 2 * w), device, dtype),
        "timestep": torch.full((1,), 500.0, device=device),
        "encoder_hidden_states": draw((1, 256, 4096), device, dtype),
        "encoder_attention_mask": mask,
        "pooled_projections": draw((1, 768), device, dtype),
        "guidance": torch.full((1,), 6000.0, device=device, dtype=dtype),
    }


def _flux(layers: tuple[int, ...], heads: int) -> nn.Module:
    import diffusers

    return diffusers.FluxTransformer2DModel(
        num_attention_heads=heads, num_layers=layers[0], num_single_layers=layers[1], guidance_embeds=True
    )


def _flux_inputs(grid: Grid, device: torch.device, dtype: torch.dtype) -> Inputs:
    h, w = grid
    ids = torch.zeros(h, w, 3, device=device)
    ids[..., 1] = torch.arange(h, device=device)[:, None]
    ids[..., 2] = torch.arange(w, device=device)
    return {
        "hidden_states": draw((1, h * w, 64), device, dtype),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "encoder_hidden_states": draw((1, 512, 4096), device, dtype),
        "pooled_projections": draw((1, 768), device, dtype),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(512, 3, device=device),
        "guidance": torch.full((1,), 3.5, device=device, dtype=dtype),
    }


def _cogvideox(layers: tuple[int, ...], heads: int) -> nn.Module:
    import diffusers

    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=64, num_layers=layers[0], use_rotary_positional_embeddings=True
    )


def _cogvideox_inputs(grid: Grid, device: torch.device, dtype: torch.dtype) -> Inputs:
    f, h, w = grid
    angles = torch.rand(f * h * w, 32, device=device).repeat_interleave(2, 1)  # a pair of channels turns together
    return {
        "hidden_states": draw((2, f, 16, 2 * h, 2 * w), device, dtype),  # guidance: two samples
        "timestep": torch.full((2,), 500, device=device),
        "encoder_hidden_states": draw((2, 226, 4096), device, dtype),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _cosmos(layers: tuple[int, ...], heads: int) -> nn.Module:
    import diffusers

    return diffusers.CosmosTransformer3DModel(
        num_attention_heads=heads, num_layers=layers[0], concat_padding_mask=False, extra_pos_embed_type=None
    )


def _cosmos_inputs(grid: Grid, device: torch.device, dtype: torch.dtype) -> Inputs:
    f, h, w = grid
    return {
        "hidden_states": draw((1, 16, f, 2 * h, 2 * w), device, dtype),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "encoder_hidden_states": draw((1, 512, 1024), device, dtype),
        "fps": 24,
    }


def _sdxl(layers: tuple[int, ...], heads: int) -> nn.Module:
    import diffusers

    side = 32 * heads  # heads of 64 channels: 5, 10 and 20 of them, or fewer in a small model
    return diffusers.UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(side, 2 * side, 4 * side),
        transformer_layers_per_block=[1, 2, 10],  # pyright: ignore[reportArgumentType]
        attention_head_dim=[heads // 2, heads, 2 * heads],  # pyright: ignore[reportArgumentType]
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
        sample_size=128,
    )


def _sdxl_inputs(grid: Grid, device: torch.device, dtype: torch.dtype) -> Inputs:
    h, w = grid
    return {
        "sample": draw((2, 4, h, w), device, dtype),  # guidance: two samples
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": draw((2, 77, 2048), device, dtype),
        "added_cond_kwargs": {
            "text_embeds": draw((2, 1280), device, dtype),
            "time_ids": torch.tensor([[8.0 * h, 8.0 * w, 0, 0, 8.0 * h, 8.0 * w]] * 2, device=device, dtype=dtype),
        },
    }


_TWO = ("transformer_blocks", "single_transformer_blocks")
WAN = Kind(_wan, _wan_inputs, ("blocks",), (40,), 40)
HUNYUAN = Kind(_hunyuan, _hunyuan_inputs, _TWO, (20, 40), 24, words=256)
FLUX = Kind(_flux, _flux_inputs, _TWO, (19, 38), 24, words=512)
COGVIDEOX = Kind(_cogvideox, _cogvideox_inputs, ("transformer_blocks",), (42,), 48, 64, 226)
COSMOS = Kind(_cosmos, _cosmos_inputs, ("transformer_blocks",), (28,), 32)
SDXL = Kind(_sdxl, _sdxl_inputs, (), (), 10, 64)
