"""Steps of the backward kernel of Hopper: every visible pair of partial blocks is in one, and codes say where."""

from __future__ import annotations

import pytest
import torch

from glocal.canvas import Canvas
from glocal.kernels.call import Call, PlanTensors
from glocal.patterns import Neighborhood, PerHead
from glocal.plan import PlanSpec, plan
from glocal.plan.blockplan import unpack

pytest.importorskip("triton.experimental.gluon")


@pytest.mark.parametrize("tile", [64, 128])
def test_steps_hold_what_partial_blocks_show(tile: int) -> None:
    from glocal.kernels.gluon.steps import steps

    made = plan(PerHead((Neighborhood((9, 13)), Neighborhood((21, 5)))), Canvas((40, 48)), PlanSpec(128, 128))
    p = PlanTensors(**made.tensors())
    found = steps(p, (128, 128), tile, 64)
    assert steps(p, (128, 128), tile, 64) is found
    assert found.mask is not None
    lists, rows, _ = p.part_index.shape
    seen, columns = unpack(p.masks, 128), p.kv_order.shape[-1] // 128
    want = torch.zeros(lists, columns, rows * 128, 128, dtype=torch.bool)  # [U, key blocks, queries, keys]
    u_s, row_s, column_s, mask_s = made.partial.entries()
    assert mask_s is not None
    for u, row, column, mask in zip(*(t.tolist() for t in (u_s, row_s, column_s, mask_s)), strict=True):
        want[u, column, row * 128 : row * 128 + 128] = seen[mask]
    got = torch.zeros_like(want)
    subs = 128 // tile
    for e in range(lists * columns):
        for i in range(int(found.begin[e]), int(found.begin[e] + found.count[e])):
            place, code = int(found.index[i]), int(found.mask[i])
            shown = seen[code // 16 // subs, code // 16 % subs * tile :][:tile]  # [tile, 128]
            halves = shown[:, :64], shown[:, 64:]
            assert code % 16 == sum(int(h.any()) << k | int(h.all()) << k + 2 for k, h in enumerate(halves))
            assert shown.any()
            got[e // columns, e % columns, place * tile : place * tile + tile] = shown
    assert bool((got == want).all())


def test_no_partial_blocks() -> None:
    from glocal.kernels.gluon.steps import steps

    made = plan(Neighborhood((256,)), Canvas((256,)), PlanSpec(128, 128))
    found = steps(PlanTensors(**made.tensors()), (128, 128), 64, 64)
    assert int(found.count.sum()) == 0 and found.count.shape == (2,)


def test_what_backward_reads_of_a_plan_is_kept_for_each_kind_of_call_until_the_plan_changes() -> None:
    from glocal.kernels.triton.work import prepare

    made = plan(Neighborhood((9, 13)), Canvas((24, 32)), PlanSpec(64, 64))
    call = Call("gluon", 0.3, q_block=64, kv_block=64, plan=PlanTensors(**made.tensors()))
    one, two = torch.zeros(1, 2, 768, 64), torch.zeros(2, 2, 768, 64)
    assert call.plan is not None
    asked: list[str] = []

    def noted(t: torch.Tensor) -> object:
        return prepare(t, t, t, call).noted("lists", lambda: (asked.append("again"), object())[1])

    first, other = noted(one), noted(two)
    assert first is not other and noted(one) is first and noted(two) is other and len(asked) == 2
    call.plan.part_count.add_(0)  # counts as a change
    assert noted(one) is not first and len(asked) == 3
