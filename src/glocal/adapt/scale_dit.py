"""Scale-DiT (arXiv 2510.16325): large images from FLUX.1 and FLUX.2 under the guidance of a small one.

``handle = scale_dit(pipe, lora="weights.safetensors")``; ``handle.method.give(latents, (64, 64))`` gives the small
image, and from then on every forward runs [text, image, low] with local attention. Without it the model is untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glocal.adapt import scale_dit_flux, scale_dit_flux2, scale_dit_image_blocks
from glocal.adapt.attach import Handle, Method, attach
from glocal.adapt.lora import lora_tensors
from glocal.adapt.pipelines import is_pipeline, parts
from glocal.adapt.presets import Preset, changed_in, chosen
from glocal.adapt.records import Block, RunState, Site
from glocal.adapt.scale_dit_flux import Guided
from glocal.adapt.sparse import Ran
from glocal.canvas import Canvas
from glocal.canvas.orders import raster
from glocal.canvas.window_first import inverse
from glocal.nn.lora import PartLora
from glocal.ops import attend
from glocal.patterns import Blocks, Pattern
from glocal.patterns.guided import GuidedWindows
from glocal.patterns.guided_blocks import guided_blocks, guided_canvas

_FAMILIES = {
    "FluxTransformer2DModel": scale_dit_flux,
    "Flux2Transformer2DModel": scale_dit_flux2,
    "ImageDiT": scale_dit_image_blocks,
}


@dataclass(frozen=True)
class ScaleDiTSettings:
    """window: rows and columns of a window in tokens (16 pixels each). local, phase, text_sees_low, guided: of the mask
    (`GuidedWindows`).

    window_first: blocks are made of tokens window by window, not of the raster. block: queries and keys of a block;
    every pair of a kept block is computed, as published. None: the token mask itself, as in training.
    scale_positions: low tokens lie at their place in the large image. ntk: factor of the rotary base while a small
    image is given. tuned_image: the updates of queries, keys and values act on image tokens too (as FLUX.1's weights
    were trained; FLUX.2's act on low tokens alone). cache_low: low tokens run in the first forward alone, and what
    others read of them is kept until another small image is given. At inference they see only each other, so that is
    exact unless a block holds image tokens beside them. FLUX.2 has it.
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
    cache_low: bool = False

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
    "flux.2-klein-9b": Preset(
        ScaleDiTSettings(ntk=1.0, tuned_image=False),
        ("Flux2Transformer2DModel",),
        "authors' repository, second generation",
    ),
    # The 256 tokens of a 64 x 64 px picture are seen by all others, as in the published training.
    "demo-image": Preset(
        ScaleDiTSettings(phase="training", window_first=False, block=None, ntk=1.0),
        ("ImageDiT",),
        "the published training, for the built-in model",
    ),
}


class ScaleDiT(Method):
    """The method in one model. `give` a small image to switch it on, `give(None)` to switch it off.

    ran: calls with a small image, and what they kept.
    """

    def __init__(self, model: nn.Module, settings: ScaleDiTSettings, lora: PartLora, *, backend: str = "auto") -> None:
        self.model: Any = model
        self.settings, self.lora, self.backend = settings, lora, backend
        self._low: tuple[Tensor, tuple[int, int]] | None = None
        self._now: Guided | None = None
        self._kept: scale_dit_flux2.Kept = {}
        self.ran = Ran(self.model.config.num_attention_heads)

    @property
    def family(self) -> Any:
        """The module that knows the blocks of the model."""
        return _family(self.model)

    def give(self, latents: Tensor | None, size: tuple[int, int] | None = None) -> None:
        """latents: packed, clean, in raster order, [B or 1, rows * columns, C]. size: rows and columns in tokens."""
        self._kept = {}
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
        run: Callable[..., Any] = self.family.block_of(site.name)
        arguments = signature(type(site.module).forward)

        def layer(*args: Any, **kwargs: Any) -> Any:
            if self._now is None:
                return original(*args, **kwargs)
            given = arguments.bind(site.module, *args, **kwargs).arguments
            if given.get("joint_attention_kwargs"):
                names = ", ".join(given["joint_attention_kwargs"])
                raise ValueError(f"scale_dit: joint_attention_kwargs with {names}; legal with a small image: none.")
            return run(site.module, site.name, given, self._now)

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
            if given.get("kv_cache_mode") is not None:
                raise ValueError(
                    f"scale_dit: kv_cache_mode={given['kv_cache_mode']!r} keeps a reference image; legal with a small "
                    "image: None."
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
        words = given["txt_ids"][0] if given["txt_ids"].dim() == 3 else given["txt_ids"]
        far = shape[0] // size[0] if settings.scale_positions else 1
        table = type(model.pos_embed)(model.pos_embed.theta * settings.ntk, model.pos_embed.axes_dim)
        ids = given["img_ids"]
        rotary = table(torch.cat((words.to(ids), ids, self.family.position_ids(size, ids) * far)))
        canvas = guided_canvas(text.shape[1], shape, size)
        relation = settings.relation(canvas)

        def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            done = attend(q, k, v, relation, canvas=canvas, backend=self.backend)
            self.ran.calls += 1
            if done.plan is not None:
                self.ran.add(done.plan, done.picked.name, True)
            return done.out

        if self.family is scale_dit_flux:
            return scale_dit_flux.begin(model, given, latents, rotary, core, self.lora, image=settings.tuned_image)
        kept = self._kept if settings.cache_low and not torch.is_grad_enabled() else None
        if kept and next(iter(kept.values()))[0].shape[0] != image.shape[0]:
            kept.clear()
        return scale_dit_flux2.begin(model, given, latents, rotary, core, self.lora, kept=kept)


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
    """Put Scale-DiT into a FLUX.1 or FLUX.2 pipeline or transformer, or the built-in image model.

    Nothing changes until `handle.method.give(latents, size)`. preset: of `PRESETS`; None takes the one of the class.
    settings: instead of a preset. changed: single fields of the settings, such as ``window=(8, 8)``. lora: the trained
    updates, a file, its tensors or a `PartLora`; None: none.
    alpha: of the updates, None: their rank.
    Raises ValueError for another model, an unknown preset or field, and an update of a layer that has none.
    """
    transformer = next(iter(parts(model).values())) if is_pipeline(model) else model
    _family(transformer)
    found = chosen("scale_dit", PRESETS, model, preset) if settings is None else settings
    found = changed_in("scale_dit", found, changed)
    if lora is None:
        updates = PartLora({})
    else:
        updates = lora if isinstance(lora, PartLora) else PartLora.read(lora_tensors(lora), alpha)
    _sensible(transformer, found)
    _fits(transformer, updates)
    updates.to(next(transformer.parameters()).device)
    kind = ScaleDiT
    if _family(transformer) is scale_dit_image_blocks:
        kind = import_module("glocal.adapt.scale_dit_image").ScaleDiTImage
    return attach(model, kind(transformer, found, updates, backend=backend))


def _family(transformer: Any) -> Any:
    """The module that knows the blocks of a model's generation; ValueError for another model."""
    for c in type(transformer).__mro__:
        if c.__name__ in _FAMILIES:
            return _FAMILIES[c.__name__]
    raise ValueError(
        f"scale_dit: {type(transformer).__name__} is not built; legal: {', '.join(_FAMILIES)} or their pipelines."
    )


def _sensible(transformer: Any, settings: ScaleDiTSettings) -> None:
    """ValueError for settings that the model's generation does not have."""
    second = _family(transformer) is scale_dit_flux2
    if settings.tuned_image and second:
        raise ValueError(
            "scale_dit: tuned_image=True in FLUX.2, whose updates act on low tokens alone; legal: tuned_image=False."
        )
    if settings.cache_low and not second:
        raise ValueError(
            f"scale_dit: cache_low=True in {type(transformer).__name__}; legal: FLUX.2, or cache_low=False."
        )
    if settings.cache_low and settings.phase != "inference":
        raise ValueError(
            f"scale_dit: cache_low=True with phase={settings.phase!r}, in which low tokens read the words; legal: "
            "phase='inference'."
        )


def _fits(model: nn.Module, lora: PartLora) -> None:
    """ValueError for an update of a layer the method does not tune, or of another size."""
    family = _family(model)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and family.tunable(path)}
    for path, update in lora.items():
        base = layers.get(path)
        if base is None:
            raise ValueError(
                f"scale_dit: lora has an update of {path!r}; legal: {', '.join(family.TUNED)} of the blocks."
            )
        sizes = (update.b.shape[0], update.a.shape[1])
        if sizes != (base.out_features, base.in_features):
            raise ValueError(
                f"scale_dit: the update of {path!r} maps {sizes[1]} to {sizes[0]} channels; legal: {base.in_features} "
                f"to {base.out_features}."
            )
