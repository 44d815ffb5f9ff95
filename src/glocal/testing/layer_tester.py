"""The examination every layer passes, ours and anybody's: ``layer(x) -> x``, channels last.

    class TestMine(LayerTester):
        shapes = ((2, 7, 9, 16), (1, 3, 3, 16))
        def make(self):
            return Mine(16, heads=2)

Put it in a file that pytest collects. Take odd, non-square shapes and the smallest legal one last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.testing._common import Bad, close, draw, refused, strided


class LayerTester:
    """Base of layer tests; subclasses give `make` and `shapes`, and `bad` if something is to be refused.

    shapes: input shapes [B, *map, C], the smallest last. gradcheck: compare gradients with finite differences on it.
    """

    shapes: tuple[tuple[int, ...], ...] = ()
    gradcheck = True

    def make(self) -> nn.Module:
        """A fresh layer; its parameters are drawn by the tester."""
        raise TypeError(f"{type(self).__name__} must define make().")

    def bad(self) -> Sequence[Bad]:
        """Calls that must raise a ValueError, each with words of its message."""
        return []

    def layer(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A layer in evaluation mode with the same parameters every time."""
        layer = self.make()
        for seed, parameter in enumerate(layer.parameters()):
            size = 1.3 / max(parameter[0].numel(), 1) ** 0.5 if parameter.dim() > 1 else 0.3
            parameter.data = draw(parameter.shape, 100 + seed).mul(size).to(parameter)
        return layer.to(dtype).eval()

    def test_forward_keeps_the_shape(self) -> None:
        layer = self.layer()
        for shape in self.shapes:
            y = layer(draw(shape, 0, torch.float32))
            assert y.shape == shape and bool(y.isfinite().all()), shape
            assert y.std() > 0, shape

    def test_evaluation_repeats_itself(self) -> None:
        layer = self.layer()
        x = draw(self.shapes[0], 0, torch.float32)
        assert torch.equal(layer(x), layer(x))

    def test_samples_do_not_mix(self) -> None:
        layer = self.layer()
        for shape in self.shapes:
            x = draw((2, *shape[1:]), 0, torch.float32)
            both = layer(x)
            close(layer(x[1:]), both[1:], 1e-5, f"{shape}: the second sample alone")
            x[0] = torch.nan
            close(layer(x)[1:], both[1:], 1e-5, f"{shape}: with NaN in the first sample")

    def test_empty_batch(self) -> None:
        shape = (0, *self.shapes[0][1:])
        assert self.layer()(draw(shape, 0, torch.float32)).shape == shape

    def test_strides_do_not_matter(self) -> None:
        layer = self.layer()
        for shape in self.shapes:
            x = draw(shape, 0, torch.float32)
            close(layer(strided(x)), layer(x), 1e-5, str(shape))

    def test_every_parameter_learns(self) -> None:
        layer = self.layer()
        x = draw(self.shapes[0], 0, torch.float32).requires_grad_()
        y = layer(x)
        y.backward(draw(y.shape, 1, torch.float32))
        for name, t in {"x": x, **dict(layer.named_parameters())}.items():
            assert t.grad is not None and bool(t.grad.isfinite().all()) and bool((t.grad != 0).any()), name

    def test_gradients_equal_finite_differences(self) -> None:
        if not self.gradcheck:
            return
        layer = self.layer(torch.float64)
        names = [name for name, _ in layer.named_parameters()]

        def call(x: Tensor, *values: Tensor) -> Tensor:
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

        values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
        assert torch.autograd.gradcheck(call, (draw(self.shapes[-1], 0).requires_grad_(), *values), fast_mode=True)

    def test_bfloat16(self) -> None:
        x = draw(self.shapes[0], 0, torch.bfloat16)
        exact = self.layer(torch.float64)(x.double())
        y = self.layer(torch.bfloat16)(x)
        assert y.dtype == torch.bfloat16
        close(y.double(), exact, 0.05, "bfloat16")

    def test_compiles_in_one_graph(self) -> None:
        layer = self.layer()
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = draw(self.shapes[0], 0, torch.float32)
        a, b = (x.clone().requires_grad_() for _ in range(2))
        eager, other = layer(a), compiled(b)
        close(other, eager, 1e-5, "compiled")
        for y in (eager, other):
            y.backward(draw(y.shape, 1, torch.float32))
        assert a.grad is not None and b.grad is not None
        close(b.grad, a.grad, 1e-5, "compiled gradient")

    def test_state_saves_and_loads(self) -> None:
        layer, fresh = self.layer(), self.make().eval()
        fresh.load_state_dict(layer.state_dict(), strict=True)
        x = draw(self.shapes[0], 0, torch.float32)
        assert torch.equal(fresh(x), layer(x))

    def test_refuses_in_words(self) -> None:
        refused(self.bad())
