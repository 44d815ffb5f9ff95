"""Host adapter of the decoders of transformers: Llama, Mistral, Qwen and Gemma.

Tokens lie in one row of text. A forward over a prompt is a prefill; queries are then the last Nq of Nk tokens, so a
prompt in chunks, or behind a cached prefix, has `q_start`. Padding, left or right, is said by the attention mask the
model was given. One new token with a cache is a decode step. Layers with a sliding window are sites too, and say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from glocal.adapt.host import CoreFactory, Point, Undo, wrap_forward
from glocal.adapt.hosts.transformers.intercept import NativeCall, slot_of
from glocal.adapt.records import Core, RunState, Site, SiteCall
from glocal.canvas import Canvas, Layout

CACHES = ("cache", "past_key_values")


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward. valid [B, Nk]: tokens that are no padding, None where all are. plain: nothing but padding and causal
    order hides tokens.
    """

    valid: Tensor | None
    plain: bool


_FORWARDS: WeakKeyDictionary[Any, Forward] = WeakKeyDictionary()
_STREAMS: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()  # layer -> what came in


class DecoderHost:
    """Sites are the `self_attn` of every layer, named by their path."""

    points: frozenset[Point] = frozenset({"core", "module", "layer", "forward"})

    def sites(self, model: Any) -> Sequence[Site]:
        """One causal attention a layer, in order."""
        found = [(name, m) for name, m in model.named_modules() if name.split(".")[-1] == "self_attn"]
        return [_site(name, module) for name, module in found]

    def watch(self, model: Any, state: RunState) -> Undo:
        """Every forward over several tokens is a run of one step; new tokens one by one are decode steps of it."""

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs.get("input_ids")
            given = kwargs["inputs_embeds"] if given is None else given
            rows, tokens = given.shape[:2]
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
            cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
            past = 0 if cache is None else int(cache.get_seq_length())
            if tokens == 1 and past:
                state.step, state.phase = state.step + 1, "decode"
            else:
                state.begin()
                state.step, state.phase = 0, "prefill"
            state.rows = tuple((row, "both") for row in range(rows))
            valid = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
            padded = valid is not None and not bool(valid.all())
            forward = Forward(valid if padded else None, mask is None or valid is not None)
            _FORWARDS[module] = forward
            state.forward = forward

        hook = model.register_forward_pre_hook(before, with_kwargs=True)

        def undo() -> None:
            hook.remove()
            _FORWARDS.pop(model, None)

        return undo

    def wrap_core(self, model: Any, site: Site, state: RunState, core: CoreFactory) -> Undo:
        """Put a core on top of what stands in the slot of the site; what its layer is given is kept for the record."""
        module = model.get_submodule(site.name)
        layer = model.get_submodule(site.name.rpartition(".")[0])

        def describe(q: Tensor, k: Tensor, native: NativeCall) -> SiteCall:
            layout, opaque = _layout(_FORWARDS.get(model), q, k, site)
            call = SiteCall(site, layout, RunState(), native=replace(native, opaque=opaque))
            return _record(layer, module, call)

        slot = slot_of(module, describe)
        below = slot.core
        made: Core = core(below)

        def placed(q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> Tensor:
            return made(q, k, v, replace(call, site=site, state=state))

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _STREAMS[layer] = args[0] if args else kwargs["hidden_states"]

        def after(*_: Any) -> None:
            _STREAMS.pop(layer, None)

        slot.core = placed
        slot.enter(module)
        hooks = (
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after, always_call=True),
        )

        def undo() -> None:
            for hook in hooks:
                hook.remove()
            slot.core = below
            slot.leave(module)

        return undo

    wrap = staticmethod(wrap_forward)


def _site(name: str, module: Any) -> Site:
    config = module.config
    window = getattr(module, "sliding_window", None)
    if window is None and getattr(config, "layer_types", None):
        sliding = config.layer_types[module.layer_idx] == "sliding_attention"
        window = config.sliding_window if sliding else None
    elif window is None and getattr(config, "layer_types", None) is None:
        window = getattr(config, "sliding_window", None)
    return Site(
        name,
        module.layer_idx,
        config.num_attention_heads,
        module.head_dim,
        component="text_model",
        kv_heads=config.num_key_value_heads,
        causal=True,
        scale=float(module.scaling),
        softcap=getattr(config, "attn_logit_softcapping", None),
        sliding_window=window,
        rotary="1-axis",
    )


def _layout(forward: Forward | None, q: Tensor, k: Tensor, site: Site) -> tuple[Layout, bool]:
    """Where the tokens of a call lie, and whether something hides tokens that no layout says."""
    nq, nk = q.shape[2], k.shape[2]
    canvas = Canvas((nk,))
    documents, opaque = None, forward is None or not forward.plain
    if forward is not None and forward.valid is not None:
        if forward.valid.shape[1] == nk:
            documents = torch.where(forward.valid.to(q.device), 0, -1).int()  # [B, Nk]
        else:  # a cache with room for more, or one that forgets
            opaque = True
    return Layout(canvas, canvas, documents=documents, q_start=max(nk - nq, 0)), opaque


def _record(layer: Any, module: Any, call: SiteCall) -> SiteCall:
    """The stream in front of the layer, and what heads add to it; not where the output is normalised first (Gemma)."""
    stream = _STREAMS.get(layer)
    if stream is None or stream.shape[1] != call.layout.nq:
        return call
    if hasattr(layer, "pre_feedforward_layernorm"):
        return replace(call, residual=stream)
    weight = module.o_proj.weight
    if weight.is_meta:  # offloaded: only its own forward has it
        return replace(call, residual=stream)
    weight = weight.unflatten(1, (call.site.heads, call.site.head_dim))  # [C, H, D]

    def contribution(out: Tensor) -> Tensor:
        return torch.einsum("bhmd,chd->bhmc", out, weight.to(out))

    return replace(call, residual=stream, contribution=contribution)


ADAPTER = DecoderHost()
