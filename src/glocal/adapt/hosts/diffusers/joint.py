"""What blocks of joint attention show of their residual stream: the stream of all tokens, and ``gate * W_O out``.

Media and text have gates and output weights of their own in double blocks. Those of the media are told, for every row:
text queries stay dense, so nothing is asked of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from glocal.adapt.host import CoreFactory, Undo
from glocal.adapt.hosts.diffusers.base import DiffusersHost
from glocal.adapt.records import RunState, Site, SiteCall

_STREAMS: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()  # of running blocks [B, N, C]
_GATES: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()  # [B, C]


@dataclass(frozen=True)
class Gated:
    """Where a block has its gate and its output weight. norm: its child whose result holds the gate at `place`.
    weight(block) [C, at least heads * head_dim]: attention comes first in it.
    """

    norm: str
    place: int
    weight: Callable[[Any], Tensor]


class JointHost(DiffusersHost):
    """Base of the families that attend over media and text together."""

    text_first = True

    def gated(self, block: Any) -> Gated | None:
        """Of a block; double ones have a `norm1`. None where the block does not show it."""
        if hasattr(block, "norm1"):
            return Gated("norm1", 1, lambda block: block.attn.to_out[0].weight)
        return Gated("norm", 1, lambda block: block.proj_out.weight)

    def wrap_core(self, model: Any, site: Site, state: RunState, core: CoreFactory) -> Undo:
        """As every host; while a block runs, its input and its gate are kept for the record."""
        block = model.get_submodule(site.name.rpartition(".")[0])
        gated = self.gated(block)
        if gated is None:
            return super().wrap_core(model, site, state, core)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module in _STREAMS:
                return  # another handle has it
            named = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs
            parts = [named["hidden_states"], named["encoder_hidden_states"]]
            _STREAMS[module] = torch.cat(parts[::-1] if self.text_first else parts, 1)

        def normed(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            _GATES[block] = out[gated.place].reshape(out[gated.place].shape[0], -1)

        def after(module: nn.Module, *_: Any) -> None:
            _STREAMS.pop(module, None)
            _GATES.pop(module, None)

        undo = super().wrap_core(model, site, state, core)
        hooks = (
            block.register_forward_pre_hook(before, with_kwargs=True),
            block.get_submodule(gated.norm).register_forward_hook(normed),
            block.register_forward_hook(after, always_call=True),
        )

        def back() -> None:
            for hook in hooks:
                hook.remove()
            undo()

        return back

    def record(self, model: Any, call: SiteCall) -> SiteCall:
        """The stream and what heads add to it, where the weights are at hand."""
        block = model.get_submodule(call.site.name.rpartition(".")[0])
        stream, gate = _STREAMS.get(block), _GATES.get(block)
        gated = self.gated(block)
        if gated is None or stream is None or gate is None or stream.shape[1] != call.layout.nq:
            return call
        weight = gated.weight(block)
        if weight.is_meta or gate.shape[-1] != weight.shape[0]:  # moved out of memory, or a gate for each token
            return replace(call, residual=stream)
        size = call.site.heads * call.site.head_dim
        weight = weight[:, :size].unflatten(1, (call.site.heads, call.site.head_dim))  # [C, H, D]

        def contribution(out: Tensor) -> Tensor:
            return torch.einsum("bhmd,chd->bhmc", out, weight.to(out.dtype)) * gate[:, None, None].to(out.dtype)

        return replace(call, residual=stream, contribution=contribution)
