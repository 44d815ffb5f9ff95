from __future__ import annotations

import pytest
import torch

from glocal.ops import Epilogue
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
    found = Epilogue.of_groups(part, 6, scale, add)
    assert found.row_scale is not None and found.add is not None
    for token, group in enumerate([0, 2, 1, 0, None, 2]):
        want = (torch.ones(2, 3), torch.zeros(1, 3, 4)) if group is None else (scale[:, :, group], add[:, :, group])
        torch.testing.assert_close(found.row_scale[:, :, token], want[0])
        torch.testing.assert_close(found.add[:, :, token], want[1])


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"row_scale of shape \(1, 1, 5\) does not broadcast to \(1, 2, 6\)"):
        Epilogue(torch.ones(1, 1, 5)).apply(torch.ones(1, 2, 6, 3))
