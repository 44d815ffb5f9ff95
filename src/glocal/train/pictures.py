"""Training batches and loss of the built-in image models: procedural pictures and their captions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.data.captions import caption_tokens
from glocal.data.objects import SceneSpec
from glocal.data.pictures import draw_pictures, paint
from glocal.models.generation.picture_model import PictureModel, to_latents
from glocal.train.flow import FlowSpec, draw_levels


@dataclass(frozen=True)
class Pictures:
    """latents [B, 12, h, w] of pictures; tokens [B, L] long of their captions."""

    latents: Tensor
    tokens: Tensor


def draw_batch(
    count: int,
    generator: torch.Generator,
    device: torch.device | str,
    spec: SceneSpec | None = None,
    *,
    partial: float = 0.1,
    silent: float = 0.1,
) -> Pictures:
    """Draw and paint pictures. partial: share of attributes that captions leave out; silent: of captions left out."""
    layouts = draw_pictures(count, generator, spec)
    tokens = caption_tokens(layouts, partial, generator)
    tokens = tokens * (torch.rand(count, 1, generator=generator) >= silent)
    return Pictures(to_latents(paint(layouts.to(device))), tokens.to(device))


def picture_loss(model: PictureModel, batch: Pictures, spec: FlowSpec, generator: torch.Generator | None) -> Tensor:
    """Mean velocity error of the predicted clean latents, a scalar.

    Levels come from `generator` (of the CPU), and so does the seed of the noise, which is drawn where the latents are.
    None: everything comes from the device's own generator and nothing waits for it, as a CUDA graph needs. The model
    computes in the precision of its parameters, the loss in float32.
    """
    clean, device = batch.latents, batch.latents.device
    if generator is None:
        level, noise = draw_levels(len(clean), spec, None, device), torch.randn_like(clean)
    else:
        level = draw_levels(len(clean), spec, generator).to(device)
        seed = int(torch.randint(2**31, (), generator=generator))
        noise = torch.randn(clean.shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    share = level.view(-1, 1, 1, 1)
    mixed = torch.lerp(clean, noise, share).to(next(model.parameters()).dtype)
    found = model(mixed, level, model.encoder(batch.tokens))
    return ((found.float() - clean) / share.clamp(min=spec.floor)).square().mean()
