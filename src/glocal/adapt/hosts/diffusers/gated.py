"""What blocks show of their residual stream: the stream of all tokens, and ``gate * W_O out``, what attention adds.

Where media and text have gates and output weights of their own, those of the media are told for every row: text queries
stay dense, so nothing is asked of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from glocal.adapt.host import CoreFactory, Undo
from glocal.adapt.hosts.diffusers.base import DiffusersHost
from glocal.adapt.records import RunState, Site, SiteCall

Seen = Mapping[str, Any]

_SEEN: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()  # of running blocks


@dataclass(frozen=True)
class Gated:
    """Where a block has its gate and its output weight.

    gate(block, seen) [B, C] or [B, 1, C]; with another second length it differs by token, and nothing is said of what
    heads add. weight(block) [C, at least heads * head_dim]: attention comes first in it. names: of the first arguments
    of the block, which are seen while it runs; norm: its child whose result is seen as "norm".
    """

    gate: Callable[[Any, Seen], Tensor]
    weight: Callable[[Any], Tensor]
    names: tuple[str, ...] = ("hidden_states", "encoder_hidden_states")
    norm: str | None = None


def normed(norm: str, place: int, weight: Callable[[Any], Tensor]) -> Gated:
    """A block whose norm hands on the gate, at `place` of its result."""
    return Gated(lambda block, seen: seen["norm"][place], weight, norm=norm)


class GatedHost(DiffusersHost):
    """Base of the families whose blocks add a gated attention to one stream."""

    text_first = True

    def gated(self, block: Any, site: Site) -> Gated | None:
        """Of a site's block; None where it does not show it."""
        return None

    def entered(self, seen: Seen, call: SiteCall) -> Tensor:
        """The stream [B, N, C] in front of the block, in the order of the call's tokens."""
        media = seen["hidden_states"]
        if call.site.kind != "joint" or seen.get("encoder_hidden_states") is None:
            return media
        parts = [seen["encoder_hidden_states"], media]
        return torch.cat(parts if self.text_first else parts[::-1], 1)

    def wrap_core(self, model: Any, site: Site, state: RunState, core: CoreFactory) -> Undo:
        """As every host; while a block runs, its arguments and what its norm says are kept for the record."""
        block = model.get_submodule(site.name.rpartition(".")[0])
        gated = self.gated(block, site)
        if gated is None:
            return super().wrap_core(model, site, state, core)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _SEEN[module] = dict(zip(gated.names, args, strict=False)) | kwargs

        def said(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            _SEEN[block]["norm"] = out

        undo = super().wrap_core(model, site, state, core)
        hooks = [
            block.register_forward_pre_hook(before, with_kwargs=True),
            block.register_forward_hook(lambda module, *_: _forget(module), always_call=True),
        ]
        if gated.norm is not None:
            hooks.append(block.get_submodule(gated.norm).register_forward_hook(said))

        def back() -> None:
            for hook in hooks:
                hook.remove()
            undo()

        return back

    def record(self, model: Any, call: SiteCall) -> SiteCall:
        """The stream and what heads add to it, where the weights are at hand."""
        block = model.get_submodule(call.site.name.rpartition(".")[0])
        gated, seen = self.gated(block, call.site), _SEEN.get(block)
        if gated is None or seen is None:
            return call
        stream = self.entered(seen, call)
        if stream.shape[1] != call.layout.nq:
            return call
        if gated.norm is not None and "norm" not in seen:  # a graph compiled before the hook was there
            return replace(call, residual=stream)
        gate, weight = gated.gate(block, seen), gated.weight(block)
        if call.row is not None:
            gate = gate[call.row : call.row + 1]
        # A gate for each token, or of another width; a weight moved out of memory until its turn comes.
        if gate.shape[1:-1].numel() != 1 or weight.is_meta or gate.shape[-1] != weight.shape[0]:
            return replace(call, residual=stream)
        gate = gate.reshape(gate.shape[0], 1, 1, -1)
        size = call.site.heads * call.site.head_dim
        weight = weight[:, :size].unflatten(1, (call.site.heads, call.site.head_dim))  # [C, H, D]

        def contribution(out: Tensor) -> Tensor:
            return torch.einsum("bhmd,chd->bhmc", out, weight.to(out.dtype)) * gate.to(out.dtype)

        return replace(call, residual=stream, contribution=contribution)


def _forget(block: nn.Module) -> None:
    _SEEN.pop(block, None)


class JointHost(GatedHost):
    """Base of the families that attend over media and text together, in double and single blocks."""

    def gated(self, block: Any, site: Site) -> Gated | None:
        """Double blocks have a `norm1`."""
        if hasattr(block, "norm1"):
            return normed("norm1", 1, lambda block: block.attn.to_out[0].weight)
        return normed("norm", 1, lambda block: block.proj_out.weight)
