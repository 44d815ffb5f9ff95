"""Norms, and what stands beside them, in one pass over memory each: `fused_norms(model)`, `handle.undo()`.

Blocks of Wan, HunyuanVideo, CogVideoX and Flux norm queries and keys and rotate them, in a dozen passes. Here their
processors see norms that rotate as well (`glocal.ops.finish_rows`) and no rotary table; all else they do stays theirs.
Both steps are computed in float32 and rounded once, where the model rounds in between (the layer norm of CogVideoX
stays apart). Blocks of Wan join their branches, norm, scale and shift in as many more passes; theirs are replaced
(`fused_wan`). It goes with dense attention and with every method that acts at `core`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from glocal.adapt.attach import Handle, Method, attach
from glocal.adapt.fused_wan import wan_block
from glocal.adapt.pipelines import is_pipeline, parts
from glocal.adapt.records import Block, RunState, Site
from glocal.ops import Finish, finish_rows

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Family:
    """processor: the class whose code is known. rotary: its argument with the table, (cos, sin) of pairs side by side.

    text_turns: whether the table has rows for the words, which then stand in front; else words do not turn.
    text_first: words that do not turn stand in front. heads_first: norms meet [B, H, N, D].
    norm: class of the norms; one that is no RMSNorm stays apart.
    """

    processor: str
    rotary: str
    text_turns: bool = False
    text_first: bool = False
    heads_first: bool = False
    norm: str = "RMSNorm"


_FAMILIES: Mapping[str, _Family] = {
    "WanTransformer3DModel": _Family("WanAttnProcessor", "rotary_emb"),
    "HunyuanVideoTransformer3DModel": _Family("HunyuanVideoAttnProcessor2_0", "image_rotary_emb"),
    "CogVideoXTransformer3DModel": _Family(
        "CogVideoXAttnProcessor2_0", "image_rotary_emb", text_first=True, heads_first=True, norm="LayerNorm"
    ),
    "FluxTransformer2DModel": _Family("FluxAttnProcessor", "image_rotary_emb", text_turns=True),
}


class FusedNorms(Method):
    """The method. models: by component name, as the sites name them."""

    def __init__(self, models: Mapping[str, Any]) -> None:
        for model in models.values():
            if type(model).__name__ not in _FAMILIES:
                raise ValueError(f"fused_norms: {type(model).__name__}; legal: {', '.join(_FAMILIES)}.")
        self.models = dict(models)

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """Self and joint attention."""
        return tuple(s for s in sites if s.kind != "cross")

    def module(self, original: Callable[..., Any], site: Site | Block, state: RunState) -> Callable[..., Any]:
        """In place of an attention module: its processor, shown other norms."""
        model = self._model(site)
        family, module = _FAMILIES[type(model).__name__], model.get_submodule(site.name)
        for name in ("norm_q", "norm_k"):
            _check(site.name, name, getattr(module, name), family.norm)
        arguments = signature(_known(site.name, module, family))

        def run(*args: Any, **kwargs: Any) -> Any:
            _known(site.name, module, family)  # another one may have been set since
            given = dict(arguments.bind(None, module, *args, **kwargs).arguments)
            rotary = given.get(family.rotary)
            if rotary is None:
                return original(*args, **kwargs)
            text = given.get("encoder_hidden_states")
            apart = text is not None and getattr(module, "add_q_proj", None) is not None
            words = 0 if text is None else text.shape[1]
            tables = _tables(rotary, words, apart, family)
            del given["self"]
            return module.processor(**given | {"attn": _Shown(module, family, *tables), family.rotary: None})

        return run

    def layer(self, original: Callable[..., Any], site: Site, state: RunState) -> Callable[..., Any]:
        """In place of a block: that of Wan in fewer passes, others as they were."""
        model = self._model(site)
        if type(model).__name__ != "WanTransformer3DModel":
            return original
        return wan_block(model.get_submodule(site.name.rpartition(".")[0]), site.name)

    def _model(self, site: Site | Block) -> Any:
        return self.models[site.component if len(self.models) > 1 else next(iter(self.models))]


def _known(site: str, module: Any, family: _Family) -> Callable[..., Any]:
    """The code of its processor, below what stands in for it where a method acts at `core`."""
    found = [c for c in type(module.processor).__mro__ if c.__name__ == family.processor]
    if not found:
        name = type(module.processor).__name__
        raise ValueError(f"fused_norms: site {site!r} has a {name}; legal: {family.processor}.")
    return found[-1].__call__


def _check(site: str, name: str, norm: Any, kind: str) -> None:
    legal = type(norm).__name__ == kind
    if legal and kind == "RMSNorm":
        legal = norm.weight is not None and norm.eps is not None and getattr(norm, "bias", None) is None
    if not legal:
        raise ValueError(f"fused_norms: {name} of site {site!r} is {norm!r}; legal: {kind} with weight and eps.")


class _Shown:
    """An attention module whose norms rotate too. media, words: tables of either stream, None where it does not turn;
    one stream of both is of `media`.
    """

    def __init__(self, module: nn.Module, family: _Family, media: Rotary, words: Rotary | None) -> None:
        self._module = module
        self.norm_q, self.norm_k = (_finisher(module, name, media, family) for name in ("norm_q", "norm_k"))
        if words is not None:
            self.norm_added_q = _finisher(module, "norm_added_q", words, family)
            self.norm_added_k = _finisher(module, "norm_added_k", words, family)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _finisher(module: Any, name: str, rotary: Rotary, family: _Family) -> Callable[[Tensor], Tensor]:
    norm, heads = getattr(module, name), module.heads
    step = Finish(norm.weight, norm.eps, *rotary) if family.norm == "RMSNorm" else Finish(None, 0.0, *rotary)

    def finish(x: Tensor) -> Tensor:
        if family.heads_first:
            return finish_rows([norm(x)], [step])[0]
        rows = x if x.dim() == 4 else x.unflatten(2, (heads, -1))  # [B, N, H, D]
        return finish_rows([rows.transpose(1, 2)], [step])[0].transpose(1, 2).reshape(x.shape)

    return finish


def _tables(rotary: Rotary, words: int, apart: bool, family: _Family) -> tuple[Rotary, Rotary | None]:
    """cos and sin [1, 1, N, D / 2] for the rows that the norms of media meet, and for those of words with norms apart.

    rotary: tables [N, D] or [1, N, 1, D], each value twice. words: how many are given beside the media.
    """
    cos, sin = (t.reshape(1, 1, -1, t.shape[-1]) for t in rotary)
    cos, sin = cos[..., 0::2].contiguous(), sin[..., 1::2].contiguous()  # the kernel reads whole rows of them
    if family.text_turns:
        return (
            ((cos[:, :, words:], sin[:, :, words:]), (cos[:, :, :words], sin[:, :, :words]))
            if apart
            else ((cos, sin), None)
        )
    if apart or not words:
        return (cos, sin), None
    around = (0, 0, words, 0) if family.text_first else (0, 0, 0, words)
    return (pad(cos, around, value=1.0), pad(sin, around)), None


def fused_norms(model: Any) -> Handle:
    """Norm and rotate queries and keys in one pass, in a pipeline or model of Wan, HunyuanVideo, CogVideoX or Flux; in
    Wan also the norms of blocks, with their scales, shifts and gates.

    Raises ValueError for another model, and for attention modules or blocks with other norms or processors.
    """
    return attach(model, FusedNorms(dict(parts(model)) if is_pipeline(model) else {"": model}))
