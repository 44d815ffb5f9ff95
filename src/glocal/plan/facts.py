"""What is known of a plan's tensors without reading them: kernels take shorter paths, and none waits for the device.

Whoever makes a tensor may declare facts about it. An undeclared order is looked at once, which waits for the device;
tensors whose contents change (plan slots, lists chosen on the device) are declared unknown and never looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from glocal.plan.blockplan import BlockLists

_ORDERS: WeakIdKeyDictionary = WeakIdKeyDictionary()
_SOUND: WeakIdKeyDictionary = WeakIdKeyDictionary()
_LASTING: WeakIdKeyDictionary = WeakIdKeyDictionary()
_TURNED: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class OrderFacts:
    """identity: slot i is token i and every token has a slot (pads may follow). distinct: no token has two slots.
    complete: every token has a slot. holes: empty slots may stand in full blocks, or unmasked in partial ones.
    fixed: the contents never change.
    """

    identity: bool = False
    distinct: bool = False
    complete: bool = False
    holes: bool = True
    fixed: bool = True


CHANGING = OrderFacts(fixed=False)
UNKNOWN = OrderFacts()


def declare_order(order: Tensor, facts: OrderFacts) -> Tensor:
    """Remember `facts` of an order; returns it."""
    _ORDERS[order] = (_mark(order), facts)
    return order


def copy_facts(order: Tensor, same: Tensor) -> None:
    """What is known of `order` holds of `same`, a copy of it."""
    known = _ORDERS.get(order)
    if known is not None and (known[1] == CHANGING or known[0] == _mark(order)):
        declare_order(same, known[1])


def capturing(t: Tensor) -> bool:
    """Whether a CUDA graph is being captured where `t` lies: then nothing can be read on the host, and what is made
    belongs to the graph alone.
    """
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def order_facts(order: Tensor, tokens: int) -> OrderFacts:
    """Facts of an order [b, h, room] over `tokens` tokens: declared, remembered, or looked at (one wait).

    While a CUDA graph is captured nothing can be looked at: what is not known then counts as unknown.
    """
    known = _ORDERS.get(order)
    if known is not None and (known[1] == CHANGING or known[0] == _mark(order)):
        return known[1]
    if capturing(order):
        return CHANGING
    facts = _look(order, tokens)
    declare_order(order, facts)
    return facts


def _look(order: Tensor, tokens: int) -> OrderFacts:
    room = order.shape[-1]
    live = order >= 0
    place = torch.arange(room, device=order.device)
    times = torch.zeros(*order.shape[:2], tokens + 1, dtype=torch.int32, device=order.device)
    times.scatter_add_(-1, torch.where(live, order, tokens).long(), torch.ones_like(order, dtype=torch.int32))
    times = times[..., :tokens]
    same = room >= tokens
    checks = [
        ((order == torch.where(place < tokens, place, -1)).all() if same else torch.zeros((), dtype=torch.bool)),
        (times <= 1).all(),
        (times >= 1).all(),
        (~live).any(),
    ]
    identity, distinct, complete, holes = torch.stack([c.to(order.device) for c in checks]).tolist()
    return OrderFacts(identity, distinct, complete, holes)


def declare_sound(*lists: BlockLists, changing: bool = False) -> None:
    """Remember that the numbers in these lists are legal: whoever made them saw to it.

    changing: what is written into them later is legal too.
    """
    for t in _of_lists(lists):
        _SOUND[t] = None if changing else _mark(t)


def declared_sound(*tensors: Tensor) -> bool:
    """Whether `declare_sound` was told of all these tensors of lists, and they did not change since."""
    return all(t in _SOUND and _SOUND[t] in (None, _mark(t)) for t in tensors)


def copy_sound(lists: BlockLists, same: BlockLists) -> None:
    """What was declared of `lists` holds of `same`, a copy."""
    if declared_sound(*_of_lists((lists,))):
        declare_sound(same)
    if lists.index in _LASTING:
        declare_lasting(same.index)


def _of_lists(lists: tuple[BlockLists, ...]) -> list[Tensor]:
    return [t for group in lists for t in (group.count, group.index, group.mask) if t is not None]


def declare_lasting(lists: Tensor) -> None:
    """Remember that these lists serve many calls, so that a look at them, which waits for the device, pays."""
    _LASTING[lists] = None


def worth_a_look(lists: Tensor) -> bool:
    """Whether lists last, or are looked at anyway because nobody vouches for them."""
    return lists in _LASTING or lists not in _SOUND


def declare_turned(lists: Tensor, by_key: tuple[Tensor, Tensor]) -> None:
    """Remember the lists by key block, count [U, key blocks] and index [U, key blocks, query blocks], of `lists`."""
    _TURNED[lists] = (_mark(lists), by_key)


def declared_turned(lists: Tensor) -> tuple[Tensor, Tensor] | None:
    """What `declare_turned` was told, unless the lists changed since."""
    known = _TURNED.get(lists)
    return None if known is None or known[0] != _mark(lists) else known[1]


def _mark(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), 0 if t.is_inference() else t._version
