"""Scale-DiT (arXiv 2510.16325): large images from FLUX.1 under the guidance of a small one.

``handle = scale_dit(pipe, lora="weights.safetensors")``; ``handle.method.give(latents, (64, 64))`` gives the small
image, and from then on every forward runs [text, image, low] with local attention. Without it the model is untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glocal.adapt.attach import Handle, Method, attach
from glocal.adapt.lora import lora_tensors
from glocal.adapt.pipelines import is_pipeline, parts
from glocal.adapt.presets import Preset, chosen
from glocal.adapt.records import Block, RunState, Site
from glocal.adapt.scale_dit_flux import Guided, double_block, single_block
from glocal.canvas import Canvas
from glocal.canvas.orders import raster
from glocal.canvas.window_first import inverse
from glocal.nn.lora import PartLora, part_linear
from glocal.ops import attend
from glocal.patterns import Blocks, Pattern
from glocal.patterns.guided import GuidedWindows
from glocal.patterns.guided_blocks import guided_blocks, guided_canvas

TUNED = (
    "x_embedder", "norm1.linear", "norm.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2",
    "proj_mlp", "proj_out",
)  # fmt: skip
TUNED_IMAGE = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.2")
"""Layers of a block of the built-in image model that have updates."""


@dataclass(frozen=True)
class ScaleDiTSettings:
    """window: rows and columns of a window in tokens (16 pixels each). local, phase, text_sees_low, guided: of the mask
    (`GuidedWindows`).

    window_first: blocks are made of tokens window by window, not of the raster. block: queries and keys of a block;
    every pair of a kept block is computed, as published. None: the token mask itself, as in training.
    scale_positions: low tokens lie at their place in the large image. ntk: factor of the rotary base while a small
    image is given. tuned_image: the updates of queries, keys and values act on image tokens too (as FLUX.1's weights
    were trained).
    """

    window: tuple[int, int] = (16, 16)
    local: Literal["sliding", "four"] = "sliding"
    phase: Literal["inference", "training"] = "inference"
    text_sees_low: bool = False
    guided: bool = True
    window_first: bool = True
    block: tuple[int, int] | None = (128, 64)
    scale_positions: bool = True
    ntk: float = 10.0
    tuned_image: bool = True

    @property
    def pattern(self) -> GuidedWindows:
        """The mask of tokens."""
        return GuidedWindows(
            self.window, self.local, self.phase, self.text_sees_low, self.guided, window_first=self.window_first
        )

    def relation(self, canvas: Canvas) -> Pattern:
        """What attention runs over: the mask of blocks at inference, else that of tokens."""
        if self.block is None or self.phase == "training":
            return self.pattern
        return _blocks(self.pattern, canvas, self.block)


@lru_cache(maxsize=16)
def _blocks(pattern: GuidedWindows, canvas: Canvas, block: tuple[int, int]) -> Blocks:
    order = None if pattern.window_first else raster(canvas)
    return guided_blocks(pattern, canvas, *block, order=order)


PRESETS: Mapping[str, Preset[ScaleDiTSettings]] = {
    "flux.1-dev": Preset(
        ScaleDiTSettings(), ("FluxTransformer2DModel",), "authors' repository, revision of arXiv 2510.16325v1"
    ),
    # The 256 tokens of a 64 x 64 px picture are seen by all others, as in the published training.
    "demo-image": Preset(
        ScaleDiTSettings(phase="training", window_first=False, block=None, ntk=1.0),
        ("ImageDiT",),
        "the published training, for the built-in model",
    ),
}


class ScaleDiT(Method):
    """The method in one model. `give` a small image to switch it on, `give(None)` to switch it off."""

    def __init__(self, model: nn.Module, settings: ScaleDiTSettings, lora: PartLora, *, backend: str = "auto") -> None:
        self.model: Any = model
        self.settings, self.lora, self.backend = settings, lora, backend
        self._low: tuple[Tensor, tuple[int, int]] | None = None
        self._now: Guided | None = None

    def give(self, latents: Tensor | None, size: tuple[int, int] | None = None) -> None:
        """latents: packed, clean, in raster order, [B or 1, rows * columns, C]. size: rows and columns in tokens."""
        if latents is None:
            self._low = None
            return
        if size is None or latents.dim() != 3 or latents.shape[1] != size[0] * size[1]:
            raise ValueError(
                f"scale_dit: latents of shape {tuple(latents.shape)} with size={size}; legal: [batch, rows * columns, "
                "channels] and (rows, columns)."
            )
        self._low = latents, size

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """None: whole blocks are replaced."""
        return ()

    def blocks(self, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        """All transformer blocks."""
        return tuple(b for b in blocks if b.role == "layer")

    def module(self, original: Callable[..., Any], site: Site | Block, state: RunState) -> Callable[..., Any]:
        """A block: as it was, or with the low tokens beside the others."""
        if not isinstance(site, Block):
            raise TypeError("ScaleDiT acts at whole blocks.")
        run = single_block if site.name.startswith("single_") else double_block
        arguments = signature(type(site.module).forward)

        def layer(*args: Any, **kwargs: Any) -> Any:
            if self._now is None:
                return original(*args, **kwargs)
            given = arguments.bind(site.module, *args, **kwargs).arguments
            if given.get("joint_attention_kwargs"):
                names = ", ".join(given["joint_attention_kwargs"])
                raise ValueError(f"scale_dit: joint_attention_kwargs with {names}; legal with a small image: none.")
            image, text = given["hidden_states"], given["encoder_hidden_states"]
            return run(site.module, site.name, image, text, given["temb"], self._now)

        return layer

    def forward(self, original: Callable[..., Any], state: RunState) -> Callable[..., Any]:
        """The model: image tokens in raster order through the blocks, the low tokens made anew for each forward."""
        arguments = signature(type(self.model).forward)

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._low is None:
                return original(*args, **kwargs)
            given = dict(arguments.bind(self.model, *args, **kwargs).arguments)
            del given["self"]
            if torch.is_grad_enabled() and getattr(self.model, "gradient_checkpointing", False):
                raise ValueError(
                    "scale_dit: gradient checkpointing loses the low tokens; disable_gradient_checkpointing()."
                )
            ids = given["img_ids"][0] if given["img_ids"].dim() == 3 else given["img_ids"]
            order, shape = _raster_of(ids)
            given["img_ids"], given["hidden_states"] = ids[order], given["hidden_states"][:, order]
            try:
                self._now = self._begin(given, shape)
                out = original(**given)
            finally:
                self._now = None
            back = inverse(order)
            if isinstance(out, tuple):
                return (out[0][:, back], *out[1:])
            out.sample = out.sample[:, back]
            return out

        return run

    def _begin(self, given: Mapping[str, Any], shape: tuple[int, int]) -> Guided:
        """Everything the blocks share; `given`: arguments of the forward, image tokens in raster order."""
        assert self._low is not None
        model, settings, (latents, size) = self.model, self.settings, self._low
        image, text = given["hidden_states"], given["encoder_hidden_states"]
        if latents.shape[0] not in (1, image.shape[0]):
            raise ValueError(
                f"scale_dit: {latents.shape[0]} small images for a batch of {image.shape[0]}; legal: 1 or as many."
            )
        latents = latents.to(image).expand(image.shape[0], -1, -1)
        low = part_linear(model.x_embedder, latents, self.lora.get("x_embedder"))
        more = [] if given.get("guidance") is None else [given["guidance"].to(low.dtype) * 1000]
        level = model.time_text_embed(
            torch.zeros_like(given["timestep"]).to(low.dtype), *more, given["pooled_projections"]
        )
        words = given["txt_ids"][0] if given["txt_ids"].dim() == 3 else given["txt_ids"]
        far = shape[0] // size[0] if settings.scale_positions else 1
        table = type(model.pos_embed)(model.pos_embed.theta * settings.ntk, model.pos_embed.axes_dim)
        ids = given["img_ids"]
        rotary = table(torch.cat((words.to(ids), ids, position_ids(size, ids) * far)))
        canvas = guided_canvas(text.shape[1], shape, size)
        relation = settings.relation(canvas)

        def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, relation, canvas=canvas, backend=self.backend).out

        return Guided(low, level, rotary, core, self.lora, settings.tuned_image)


def position_ids(size: tuple[int, int], like: Tensor) -> Tensor:
    """Position ids [rows * columns, 3] of a raster: 0, row, column."""
    row = torch.arange(size[0], device=like.device)[:, None].expand(size).flatten()
    column = torch.arange(size[1], device=like.device).expand(size).flatten()
    return torch.stack((torch.zeros_like(row), row, column), 1).to(like.dtype)


def _raster_of(ids: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Which token lies at each raster place of an image, and its rows and columns; ids [N, 3]."""
    place = ids[:, 1:3].round().long()
    rows, columns = (int(n) + 1 for n in place.amax(0))
    number = place[:, 0] * columns + place[:, 1]
    order = number.argsort()
    whole = number.numel() == rows * columns and torch.equal(
        number[order], torch.arange(rows * columns, device=ids.device)
    )
    if not whole or bool((ids[:, 0] != ids[0, 0]).any()):
        raise ValueError(
            f"scale_dit: img_ids of {ids.shape[0]} tokens fill no image of {rows} x {columns}; legal: each token of "
            "one image once, in any order, no reference image."
        )
    return order, (rows, columns)


def scale_dit(
    model: Any,
    preset: str | None = None,
    *,
    settings: ScaleDiTSettings | None = None,
    lora: str | Path | Mapping[str, Tensor] | PartLora | None = None,
    alpha: float | None = None,
    backend: str = "auto",
    **changed: Any,
) -> Handle:
    """Put Scale-DiT into a FLUX.1 pipeline or transformer, or the built-in image model.

    Nothing changes until `handle.method.give(latents, size)`; the built-in model's latents say their size.

    preset: of `PRESETS`; None takes the one of the class. settings: instead of a preset. changed: single fields of the
    settings, such as ``window=(8, 8)``. lora: the trained updates, a file, its tensors or a `PartLora`; None: none.
    alpha: of the updates, None: their rank.
    Raises ValueError for another model, an unknown preset or field, and an update of a layer that has none.
    """
    transformer = next(iter(parts(model).values())) if is_pipeline(model) else model
    names = {c.__name__ for c in type(transformer).__mro__}
    if not names & {"FluxTransformer2DModel", "ImageDiT"}:
        raise ValueError(
            f"scale_dit: {type(transformer).__name__} is not built; legal: FluxTransformer2DModel or its pipelines, "
            "or the built-in ImageDiT."
        )
    found = chosen("scale_dit", PRESETS, model, preset) if settings is None else settings
    legal = list(ScaleDiTSettings.__dataclass_fields__)
    for name in changed:
        if name not in legal:
            raise ValueError(f"scale_dit: {name}={changed[name]!r} is unknown; legal: {', '.join(legal)}.")
    if lora is None:
        updates = PartLora({})
    else:
        updates = lora if isinstance(lora, PartLora) else PartLora.read(lora_tensors(lora), alpha)
    _fits(transformer, updates)
    updates.to(next(transformer.parameters()).device)
    kind = ScaleDiT
    if "ImageDiT" in names:
        from glocal.adapt.scale_dit_image import ScaleDiTImage as kind
    return attach(model, kind(transformer, replace(found, **changed), updates, backend=backend))


def _fits(model: nn.Module, lora: PartLora) -> None:
    """ValueError for an update of a layer the method does not tune, or of another size."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and tunable(path)}
    for path, update in lora.items():
        base = layers.get(path)
        if base is None:
            raise ValueError(f"scale_dit: lora has an update of {path!r}; legal: {', '.join(TUNED)} of the blocks.")
        sizes = (update.b.shape[0], update.a.shape[1])
        if sizes != (base.out_features, base.in_features):
            raise ValueError(
                f"scale_dit: the update of {path!r} maps {sizes[1]} to {sizes[0]} channels; legal: {base.in_features} "
                f"to {base.out_features}."
            )


def tunable(path: str) -> bool:
    """Whether the method has an update for the linear layer at `path`: the image side of blocks, and the embedder."""
    if path.startswith("blocks."):  # of the built-in image model
        return path.split(".", 2)[2] in TUNED_IMAGE
    inside = path.split(".", 2)[2] if path.startswith(("transformer_blocks.", "single_transformer_blocks.")) else path
    return inside in TUNED and (inside != path or path == "x_embedder")
