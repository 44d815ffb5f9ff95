"""Updates without waits: the same as AdamW by hand, in low precision with masters, and from a saved state on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from glocal.train.graphed import Updates

DATA = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).to(dtype)


def loss_of(model: nn.Linear):
    def loss() -> Tensor:
        return (model(DATA.to(model.weight.dtype)).float() - 1).square().mean()

    return loss


def test_it_is_adamw() -> None:
    mine, other = layer(), layer()
    updates = Updates(list(mine.parameters()), 1e-2, decay=0.1)
    groups = [{"params": [other.weight], "weight_decay": 0.1}, {"params": [other.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99))
    for _ in range(5):
        updates.update(loss_of(mine))
        optimizer.zero_grad()
        loss_of(other)().backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(mine.weight, other.weight)
    torch.testing.assert_close(mine.bias, other.bias)
    loss, norm = updates.read(5)
    assert 0 < loss < 10 and norm > 0 and updates.read(1) == (0.0, 0.0)


def test_masters_keep_what_low_precision_loses() -> None:
    model = layer(torch.bfloat16)
    updates = Updates(list(model.parameters()), 1e-5)
    before = [m.clone() for m in updates.masters]
    for _ in range(3):
        updates.update(loss_of(model))
    assert all(m.dtype == torch.float32 and not torch.equal(m, b) for m, b in zip(updates.masters, before, strict=True))
    assert all(torch.equal(p, m.bfloat16()) for p, m in zip(model.parameters(), updates.masters, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_with_the_same_bits(dtype: torch.dtype) -> None:
    model = layer(dtype)
    updates = Updates(list(model.parameters()), 1e-2)
    for _ in range(3):
        updates.update(loss_of(model))
        updates.young()
    kept = copy.deepcopy(updates.state())
    for _ in range(3):
        updates.update(loss_of(model))
    other = layer(dtype)
    again = Updates(list(other.parameters()), 1e-2)
    again.load(kept)
    for _ in range(3):
        again.update(loss_of(other))
    assert torch.equal(other.weight, model.weight)
    assert all(torch.equal(a, b) for a, b in zip(again.means, updates.means, strict=True))


def test_the_rate_is_changed_on_the_way() -> None:
    model = layer()
    updates = Updates(list(model.parameters()), 1e-2, decay=0.0)
    updates.rate(0.0)
    before = model.weight.detach().clone()
    updates.update(loss_of(model))
    assert torch.equal(model.weight, before)


@pytest.mark.gpu
def test_a_graph_is_the_same_as_launches() -> None:
    weights = []
    for graphed in (False, True):
        model = layer().cuda()
        data = DATA.cuda()
        updates = Updates(list(model.parameters()), 1e-2)

        def loss(model: nn.Linear = model, data: Tensor = data) -> Tensor:
            return (model(data) - 1).square().mean()

        step = updates.graphed(loss) if graphed else (lambda updates=updates, loss=loss: updates.update(loss))
        for n in range(6):
            updates.rate(1e-2 / (n + 1))
            step()
        weights.append(model.weight.detach().clone())
    torch.testing.assert_close(*weights)
