"""Low-rank updates on some tokens only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from glocal.nn.lora import LowRank, PartLora, part_linear


def test_the_update_is_added_where_it_is_on(generator: torch.Generator) -> None:
    base = nn.Linear(6, 4)
    a, b = torch.randn(2, 6, generator=generator), torch.randn(4, 2, generator=generator)
    update, x = LowRank(a, b, alpha=1.0), torch.randn(3, 5, 6, generator=generator)
    on = torch.tensor([True, False, True, False, False])
    y = part_linear(base, x, update, on)
    merged = x @ (base.weight + b @ a / 2).T + base.bias
    torch.testing.assert_close(y[:, on], merged[:, on])
    assert torch.equal(y[:, ~on], base(x)[:, ~on])
    assert torch.equal(part_linear(base, x, update, False), base(x))
    torch.testing.assert_close(part_linear(base, x, update), merged)


def test_a_fresh_update_does_nothing_and_learns() -> None:
    base, x = nn.Linear(6, 4), torch.ones(1, 2, 6)
    update = LowRank.fresh(base, 3)
    y = part_linear(base, x, update, torch.tensor([True, False]))
    assert torch.equal(y, base(x))
    y.sum().backward()
    assert update.b.grad is not None
    assert bool((update.b.grad != 0).any())


def test_names_of_diffusers_come_back(generator: torch.Generator) -> None:
    a, b = torch.randn(2, 6, generator=generator), torch.randn(4, 2, generator=generator)
    given = {"transformer.x_embedder.lora_A.weight": a, "transformer.x_embedder.lora_B.weight": b}
    lora = PartLora.read(given)
    assert lora.get("proj_out") is None
    assert [path for path, _ in lora.items()] == ["x_embedder"]
    written = lora.write()
    assert written.keys() == given.keys()
    assert all(torch.equal(written[name], given[name]) for name in given)
    peft = PartLora.read({"x_embedder.lora_A.default.weight": a, "x_embedder.lora_B.default.weight": b}, alpha=4.0)
    assert torch.equal(peft.write()["transformer.x_embedder.lora_B.weight"], b * 2)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"'x.weight' is no LoRA weight; legal: PATH.lora_A.weight"):
        PartLora.read({"x.weight": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match="'x' has lora_A alone; both A and B are needed"):
        PartLora.read({"x.lora_A.weight": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match=r"a of shape \(2, 3\) and b of shape \(4, 5\); legal: \[rank, in\]"):
        LowRank(torch.zeros(2, 3), torch.zeros(4, 5))
