"""Scale-DiT (arXiv 2510.16325) in the built-in image model, whose words are in an attention of their own.

As in FLUX.1, tokens of the small image run beside those of the large one through the same weights: modulated for noise
level 0, with the low-rank updates on, seen by large tokens that otherwise see a window. What differs: words are no part
of that attention; in the phase "training" low tokens look at them in cross attention, in "inference" they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal._kept import ordinary
from glocal.adapt.records import Block, RunState, Site
from glocal.adapt.scale_dit import ScaleDiT
from glocal.adapt.scale_dit_flux import Guided
from glocal.adapt.scale_dit_image_blocks import guided_block
from glocal.canvas import Canvas, Layout
from glocal.models.generation.image_dit import DiTBlock, ImageDiT, RotaryPositions
from glocal.ops import attend
from glocal.patterns import Pattern
from glocal.patterns.guided_blocks import guided_canvas


class ScaleDiTImage(ScaleDiT):
    """The method in an `ImageDiT`; `give` takes its clean latents [B or 1, C, h, w], `give(None)` switches it off.

    backend: of the attention, or "mask": torch's own under the whole mask of tokens, which a CUDA graph of a training
    step can hold.
    """

    def give(self, latents: Tensor | None, size: tuple[int, int] | None = None) -> None:
        """latents: of the small picture. size: left out, they say it."""
        if latents is None:
            self._low = None
            return
        patch = self.model.config.patch_size[1:]
        grid = tuple(n // p for n, p in zip(latents.shape[2:], patch, strict=True))
        if latents.dim() != 4 or (size is not None and grid != size):
            raise ValueError(
                f"scale_dit: latents of shape {tuple(latents.shape)} with size={size}; legal: [batch, channels, rows, "
                "columns] and no size."
            )
        self._low = latents, (grid[0], grid[1])

    def module(self, original: Callable[..., Any], site: Site | Block, state: RunState) -> Callable[..., Any]:
        """A block: as it was, or with the low tokens beside the others."""
        if not isinstance(site, Block):
            raise TypeError("ScaleDiT acts at whole blocks.")
        arguments = signature(DiTBlock.forward)

        def layer(*args: Any, **kwargs: Any) -> Any:
            if self._now is None:
                return original(*args, **kwargs)
            given = arguments.bind(site.module, *args, **kwargs).arguments
            words = given["encoder_hidden_states"]
            low_words = words if self.settings.phase == "training" else None
            return guided_block(
                site.module, site.name, given["hidden_states"], words, given["temb"], self._now, low_words
            )

        return layer

    def forward(self, original: Callable[..., Any], state: RunState) -> Callable[..., Any]:
        """The model; the low tokens are made anew for each forward."""
        arguments = signature(ImageDiT.forward)

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._low is None:
                return original(*args, **kwargs)
            try:
                self._now = self._begin(arguments.bind(self.model, *args, **kwargs).arguments, (0, 0))
                return original(*args, **kwargs)
            finally:
                self._now = None

        return run

    def _begin(self, given: Mapping[str, Any], shape: tuple[int, int]) -> Guided:
        """Everything the blocks share."""
        assert self._low is not None
        model, settings, (latents, size) = self.model, self.settings, self._low
        image = given["hidden_states"]
        if latents.shape[0] not in (1, image.shape[0]):
            raise ValueError(
                f"scale_dit: {latents.shape[0]} small images for a batch of {image.shape[0]}; legal: 1 or as many."
            )
        patch = model.config.patch_size
        shape = image.shape[3] // patch[1], image.shape[4] // patch[2]
        far = shape[0] // size[0]
        if (size[0] * far, size[1] * far) != shape:
            raise ValueError(
                f"scale_dit: {shape[0]} x {shape[1]} tokens under a small image of {size[0]} x {size[1]}; legal: the "
                "same whole factor on both sides."
            )
        latents = latents.to(image).expand(image.shape[0], -1, -1, -1)
        low = model.patch_embedding(latents[:, :, None]).flatten(2).transpose(1, 2)  # [B, L, C]
        _, level, _ = model.condition_embedder(torch.zeros_like(given["timestep"]), given["encoder_hidden_states"])
        rope: RotaryPositions = model.rope
        wide = RotaryPositions(model.config.attention_head_dim, patch, rope.base * settings.ntk)
        places = [
            [torch.arange(n, device=image.device) * step for n in (1, *grid)]
            for grid, step in ((shape, 1), (size, far if settings.scale_positions else 1))
        ]
        tables = [wide.at(place) for place in places]
        cos, sin = (torch.cat(both, 1) for both in zip(*tables, strict=True))  # [1, N + L, 1, D]
        canvas = _canvas(shape, size)
        relation = settings.relation(canvas)

        def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.backend == "mask":
                return F.scaled_dot_product_attention(q, k, v, _mask(relation, canvas, str(q.device)))
            return attend(q, k, v, relation, canvas=canvas, backend=self.backend).out

        return Guided(low, level, (cos, sin), core, self.lora, settings.tuned_image)


@lru_cache(maxsize=16)
def _canvas(shape: tuple[int, int], size: tuple[int, int]) -> Canvas:
    return guided_canvas(0, shape, size)


@lru_cache(maxsize=4)
@ordinary()
def _mask(relation: Pattern, canvas: Canvas, device: str) -> Tensor:
    return relation.mask(Layout.of(canvas), device)  # [N + L, N + L]
