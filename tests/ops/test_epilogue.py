from __future__ import annotations

import pytest
import torch

from glocal.ops import Epilogue
from glocal.ops.epilogue import GroupEpilogue, rectify
from glocal.routing import Partition


def test_applies_factor_and_addend(generator: torch.Generator) -> None:
    out = torch.randn(2, 3, 6, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    scale = torch.rand(2, 3, 6, dtype=torch.float64, generator=generator).requires_grad_()
    add = torch.randn(2, 1, 6, 4, dtype=torch.float64, generator=generator).requires_grad_()
    torch.testing.assert_close(Epilogue(scale, add).apply(out), scale[..., None] * out + add)
    assert Epilogue().apply(out) is out
    assert torch.autograd.gradcheck(lambda s, a, o: Epilogue(s, a).apply(o), (scale, add, out))


def test_of_groups(generator: torch.Generator) -> None:
    part = Partition.clusters(torch.tensor([[0, 2, 1, 0, -1, 2]]), 3)
    scale = torch.rand(2, 3, 3, generator=generator)
    add = torch.randn(1, 3, 3, 4, generator=generator)
    grouped = Epilogue.of_groups(part, 6, scale, add)
    assert isinstance(grouped, GroupEpilogue)
    found = grouped.spread()
    assert found.row_scale is not None and found.add is not None
    for token, group in enumerate([0, 2, 1, 0, None, 2]):
        want = (torch.ones(2, 3), torch.zeros(1, 3, 4)) if group is None else (scale[:, :, group], add[:, :, group])
        torch.testing.assert_close(found.row_scale[:, :, token], want[0])
        torch.testing.assert_close(found.add[:, :, token], want[1])


def test_one_pass_equals_the_definition(generator: torch.Generator) -> None:
    part = Partition.clusters(torch.tensor([[0, 2, 1, 0, -1, 2]]), 3)
    scale, add = torch.rand(2, 3, 3, generator=generator), torch.randn(2, 3, 3, 4, generator=generator)
    out = torch.randn(2, 3, 6, 4, generator=generator)
    label = torch.tensor([0, 2, 1, 0, -1, 2], dtype=torch.int32)
    want = GroupEpilogue(part, 6, scale, add).apply(out)
    torch.testing.assert_close(rectify(out, label, scale, add), want)
    torch.library.opcheck(torch.ops.glocal.rectify.default, (out, label, scale, add))


def test_a_factor_alone_and_groups_that_differ_by_head(generator: torch.Generator) -> None:
    out, scale = torch.randn(1, 2, 6, 4, generator=generator), torch.rand(1, 2, 3, generator=generator)
    part = Partition.clusters(torch.tensor([[[0, 1, 2, 0, 1, 2], [2, 2, 1, 1, 0, 0]]]), 3)
    found = Epilogue.of_groups(part, 6, scale).apply(out)
    want = torch.stack([scale[0, 0, [0, 1, 2, 0, 1, 2]], scale[0, 1, [2, 2, 1, 1, 0, 0]]])[None, ..., None] * out
    torch.testing.assert_close(found, want)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"row_scale of shape \(1, 1, 5\) does not broadcast to \(1, 2, 6\)"):
        Epilogue(torch.ones(1, 1, 5)).apply(torch.ones(1, 2, 6, 3))
