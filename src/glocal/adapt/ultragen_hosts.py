"""What UltraGen (arXiv 2510.18775) needs to know of a model: both ends of its attention, its noise level, its grid.

`register` teaches it another model: one whose blocks attend to a grid of tokens, with text elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from glocal.models.generation.video_dit import rotate
from glocal.nn.blocks.rotary import Rotary
from glocal.nn.lora import LowRank
from glocal.nn.ultragen import Projections

Call = tuple[Tensor, tuple[int, int, int] | None, Rotary | None]
"""Of an attention module: its tokens [B, N, C], their grid (frames, rows, columns) if the call says it, positions."""


class UltraHost(Protocol):
    """One family of models. Sites are those of its host adapter."""

    def level(self, model: Any, given: Mapping[str, Any]) -> Tensor:
        """Noise level [B] or [B, N] of a forward from its arguments by name; 1000 is pure noise."""
        ...

    def axes(self, model: Any, given: Mapping[str, Any]) -> tuple[int, int, int]:
        """Frames, rows and columns of its tokens."""
        ...

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """What the forward of an attention module is given."""
        ...

    def ends(self, attention: Any) -> Projections:
        """The projections of an attention module."""
        ...

    def sizes(self, attention: Any) -> tuple[int, int]:
        """Channels of its stream, and of its queries."""
        ...

    def feed_forward(self, model: Any, site: str) -> tuple[str, dict[str, nn.Linear]]:
        """Of the block of a site: the path under which updates are kept, and the layers by name ("in", "out")."""
        ...


@dataclass(frozen=True)
class _WanEnds:
    attention: Any

    def qkv(self, x: Tensor, rotary: Rotary | None, updates: Mapping[str, LowRank]) -> tuple[Tensor, Tensor, Tensor]:
        """Norms run over all heads; neighbouring channels turn together."""
        a = self.attention
        layers = a.to_qkv(x).chunk(3, -1) if a.fused_projections else (a.to_q(x), a.to_k(x), a.to_v(x))
        q, k, v = _updated(layers, x, updates)
        q, k, v = (t.unflatten(-1, (a.heads, -1)) for t in (a.norm_q(q), a.norm_k(k), v))
        if rotary is not None:
            q, k = (_turned(t, rotary) for t in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def out(self, x: Tensor) -> Tensor:
        """Heads side by side, then the layer (and dropout)."""
        a = self.attention
        return a.to_out[1](a.to_out[0](x.transpose(1, 2).flatten(2)))


class WanParts:
    """diffusers' WanTransformer3DModel, and the built-in image model, which has its names."""

    def level(self, model: Any, given: Mapping[str, Any]) -> Tensor:
        """timestep [B], or [B, N] where tokens have levels of their own."""
        return torch.as_tensor(given["timestep"])

    def axes(self, model: Any, given: Mapping[str, Any]) -> tuple[int, int, int]:
        """hidden_states [B, C, F, H, W] in patches."""
        frames, rows, columns = (
            n // p for n, p in zip(given["hidden_states"].shape[2:], model.config.patch_size, strict=True)
        )
        return frames, rows, columns

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """hidden_states, and rotary_emb as ([1, N, 1, D], the same)."""
        named = dict(zip(("hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb"), args)) | dict(
            kwargs
        )
        if named.get("attention_mask") is not None:
            raise ValueError("ultragen: an attention mask arrives, which windows cannot take; legal: None.")
        table = named.get("rotary_emb")
        return named["hidden_states"], None, None if table is None else (table[0][0, :, 0], table[1][0, :, 0])

    def ends(self, attention: Any) -> Projections:
        """See `_WanEnds`."""
        return _WanEnds(attention)

    def sizes(self, attention: Any) -> tuple[int, int]:
        """Both are heads x head size in Wan."""
        return attention.to_out[0].out_features, attention.inner_dim

    def feed_forward(self, model: Any, site: str) -> tuple[str, dict[str, nn.Linear]]:
        """`blocks.N.ffn`."""
        path = f"{site.rpartition('.')[0]}.ffn"
        net = model.get_submodule(path).net
        return path, {"in": net[0].proj, "out": net[2]}


@dataclass(frozen=True)
class _VideoEnds:
    attention: Any

    def qkv(self, x: Tensor, rotary: Rotary | None, updates: Mapping[str, LowRank]) -> tuple[Tensor, Tensor, Tensor]:
        """Norms run over each head; channel i turns with i + D / 2."""
        a = self.attention
        layers = _updated(a.qkv(x).chunk(3, -1), x, updates)
        q, k, v = (t.unflatten(-1, (a.heads, a.head_dim)).transpose(1, 2) for t in layers)
        q, k = a.q_norm(q), a.k_norm(k)
        if rotary is not None:
            table = torch.stack(rotary)
            q, k = rotate(q, table), rotate(k, table)
        return q.to(v.dtype), k.to(v.dtype), v

    def out(self, x: Tensor) -> Tensor:
        """Heads side by side, then the layer."""
        return self.attention.proj(x.transpose(1, 2).flatten(2))


class VideoParts:
    """The built-in video model."""

    def level(self, model: Any, given: Mapping[str, Any]) -> Tensor:
        """sigma [B] in [0, 1]."""
        return given["sigma"] * 1000

    def axes(self, model: Any, given: Mapping[str, Any]) -> tuple[int, int, int]:
        """x [B, T, C, H, W] in patches."""
        return model.canvas(given["x"])

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """x, rotary [2, N, D / 2], site with its canvas."""
        named = dict(zip(("x", "rotary", "site"), args)) | dict(kwargs)
        cos, sin = named["rotary"].unbind(0)
        return named["x"], named["site"].canvas, (cos, sin)

    def ends(self, attention: Any) -> Projections:
        """See `_VideoEnds`."""
        return _VideoEnds(attention)

    def sizes(self, attention: Any) -> tuple[int, int]:
        """Both are the width of the model."""
        return attention.proj.out_features, attention.proj.in_features

    def feed_forward(self, model: Any, site: str) -> tuple[str, dict[str, nn.Linear]]:
        """`up` and `down` of the block."""
        path = site.rpartition(".")[0]
        block = model.get_submodule(path)
        return f"{path}.ffn", {"in": block.up, "out": block.down}


_HOSTS: dict[str, UltraHost] = {"WanTransformer3DModel": WanParts(), "VideoDiT": VideoParts(), "ImageDiT": WanParts()}


def register(model_class: str, host: UltraHost) -> None:
    """Teach UltraGen a model by the name of its class, or of a base class; it needs a host adapter too."""
    _HOSTS[model_class] = host


def host_of(model: Any) -> UltraHost:
    """What is known of a model; ValueError lists what is known at all."""
    for c in type(model).__mro__:
        if c.__name__ in _HOSTS:
            return _HOSTS[c.__name__]
    raise ValueError(
        f"ultragen: {type(model).__name__} is no model it knows; legal: {', '.join(_HOSTS)}, or a pipeline of them. "
        "Teach it another with glocal.adapt.ultragen_hosts.register."
    )


def _updated(layers: tuple[Tensor, ...], x: Tensor, updates: Mapping[str, LowRank]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (y + updates[n](x) if n in updates else y for n, y in zip("qkv", layers, strict=True))
    return q, k, v


def _turned(x: Tensor, rotary: Rotary) -> Tensor:
    """x [B, N, H, D] with channel pairs (0, 1), (2, 3), ... turned by tables [N, D] that repeat each angle twice."""
    cos, sin = rotary[0][:, None, 0::2], rotary[1][:, None, 1::2]
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2).type_as(x)
