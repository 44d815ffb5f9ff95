from __future__ import annotations

import pytest
import torch

from glocal.ops.linear import (
    FEATURES,
    Normaliser,
    Ratio,
    Subtract,
    Unnormalised,
    features,
    linear_attention,
    told_apart,
)
from glocal.ops.linear import linear_weights as weights

NORMALISERS: dict[str, Normaliser] = {
    "ratio": Ratio(),
    "ratio with a floor": Ratio(3.0, 0.5),
    "ratio by head": Ratio(3.0, torch.tensor([0.3, 0.7], dtype=torch.float64)),
    "subtract": Subtract(),
    "subtract with a count": Subtract(0.7, 40),
    "none": Unnormalised(0.1),
}


@pytest.mark.parametrize("name", NORMALISERS)
def test_equals_its_matrix(name: str, generator: torch.Generator) -> None:
    shape = (2, 2, 11, 4)
    q, k, v = (torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    ours, wanted = linear_attention(q, k, v, NORMALISERS[name]), weights(q, k, NORMALISERS[name]) @ v
    assert torch.allclose(ours, wanted, atol=1e-12)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(wanted, (q, k, v), grad),
                    strict=True):  # fmt: skip
        assert torch.allclose(a, b, atol=1e-11)


def test_rows_sum_to_one(generator: torch.Generator) -> None:
    q, k = (torch.randn(1, 2, 9, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    found = weights(q, k, Subtract())
    assert torch.allclose(found.sum(-1), torch.ones(1, 2, 9, dtype=torch.float64)) and bool((found < 0).any())
    assert torch.allclose(weights(q.relu(), k.relu() + 0.1, Ratio()).sum(-1).max(), torch.tensor(1.0).double())


def test_subtraction_tells_queries_of_other_length_apart(generator: torch.Generator) -> None:
    q, k = (torch.rand(1, 1, 6, 4, generator=generator) for _ in range(2))
    assert torch.allclose(weights(q, k, Ratio()), weights(2 * q, k, Ratio()), atol=1e-6)
    assert not torch.allclose(weights(q, k, Subtract()), weights(2 * q, k, Subtract()), atol=1e-3)
    assert bool((told_apart(q, k, Ratio()) < 1e-5).all()) and told_apart(q, k, Subtract()).shape == (1, 1, 6)
    gap = weights(3 * q, k, Subtract()) - weights(q, k, Subtract())
    expected = gap.norm(dim=-1) / weights(q, k, Subtract()).norm(dim=-1)
    assert torch.allclose(told_apart(q, k, Subtract(), 3.0), expected) and bool((expected > 1e-3).all())


def test_sums_are_float32(generator: torch.Generator) -> None:
    q, k, v = (torch.rand(1, 1, 8192, 16, generator=generator) for _ in range(3))
    exact = linear_attention(q.double(), k.double(), v.double(), Ratio())
    low = linear_attention(q.half(), k.half(), v.half(), Ratio())  # the sums are beyond the range of float16
    assert low.dtype == torch.float16 and torch.allclose(low.double(), exact, atol=2e-3)


@pytest.mark.parametrize("name", FEATURES)
def test_features_are_elementwise(name: str, generator: torch.Generator) -> None:
    x = torch.randn(7, generator=generator)
    assert torch.equal(features(name, x)[2:3], features(name, x[2:3]))


def test_refuses_in_words() -> None:
    x = torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match="feature='softmax'; legal: 'identity', 'relu'"):
        features("softmax", x)
    with pytest.raises(ValueError, match="q and k need one head size"):
        linear_attention(x, x[..., :3], x, Ratio())
    with pytest.raises(ValueError, match=r"k of shape \(1, 1, 5, 4\) must be \[..., 2 heads, tokens, size\]"):
        linear_attention(x, x[:, :1], x, Ratio())
    with pytest.raises(ValueError, match=r"plus of shape \(1, 2, 5, 3\) must be \(1, 2, 5, 4\), as the result"):
        linear_attention(x, x, x, Ratio(), x[..., :3])
