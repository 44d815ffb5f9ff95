"""The examination every pattern passes, ours and anybody's.

    class TestMine(PatternTester):
        def examples(self):
            return [Example(Mine(3), Canvas((5, 7)), oracle=...)]

Put it in a file that pytest collects. Take odd, non-square canvases of one, two and three axes, and a tiny one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout
from glocal.ops import Attended, attend
from glocal.patterns import Pattern
from glocal.plan.build import PlanSpec, plan
from glocal.testing import oracle
from glocal.testing._common import Bad, close, draw, refused, strided
from glocal.testing.tolerance import low_precision


@dataclass(frozen=True, eq=False)
class Example:
    """A pattern on a canvas. oracle: who sees whom by other code, bool [heads|1, Nq, Nk] or [Nq, Nk]."""

    pattern: Pattern
    canvas: Canvas | Layout
    oracle: Tensor | None = None

    @property
    def layout(self) -> Layout:
        """The canvas as a layout."""
        return Layout.of(self.canvas)

    def tensors(self, dtype: torch.dtype = torch.float64, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v with two heads a key head, head sizes 8 and 6."""
        heads, layout = self.pattern.heads or 2, self.layout
        groups = 1 if self.pattern.heads is not None else 2
        shapes = ((heads * groups, layout.nq, 8), (heads, layout.nk, 8), (heads, layout.nk, 6))
        q, k, v = (draw((batch, *shape), seed, dtype) for seed, shape in enumerate(shapes))
        return q, k, v


class PatternTester:
    """Base of pattern tests; subclasses give `examples`, and `bad` if something is to be refused.

    backends: what to run; float64 runs on "reference" alone. blocks: (query, key) block sizes to plan with.
    """

    backends: tuple[str, ...] = ("reference", "auto")
    blocks: tuple[tuple[int, int], ...] = ((16, 16), (8, 32), (5, 7))

    def examples(self) -> Sequence[Example]:
        """Patterns on canvases."""
        raise TypeError(f"{type(self).__name__} must define examples().")

    def bad(self) -> Sequence[Bad]:
        """Calls that must raise a ValueError, each with words of its message."""
        return []

    def test_definition_equals_the_oracle(self) -> None:
        for e in self.examples():
            if e.oracle is not None:
                assert torch.equal(e.pattern.mask(e.layout), e.oracle.expand(e.pattern.heads or 1, -1, -1)), e

    def test_closed_form_equals_the_definition(self) -> None:
        for e in self.examples():
            layout = e.layout
            for part in layout.kv.grids:
                if part.name not in {p.name for p in layout.q.grids}:
                    continue
                index = layout.kv.indices(part.name)
                k = layout.kv.coords(index)
                q = layout.q.coords(layout.q.indices(part.name))
                for head in [None] if e.pattern.heads is None else range(e.pattern.heads):
                    terms = e.pattern.terms(part.axes, head)
                    if terms is None:
                        continue
                    seen = torch.zeros(q.index.numel(), index.numel(), dtype=torch.bool)
                    for term in terms:
                        sides = zip(term, q.axes, k.axes, part.axes, strict=True)
                        seen |= torch.stack([r.sees(a[:, None], b[None], n) for r, a, b, n in sides]).all(0)
                    said = e.pattern.within(q.unsqueeze(1), k.unsqueeze(0), part.axes, layout, head)
                    assert torch.equal(seen, said.expand_as(seen)), (e, head)

    def test_plan_equals_the_definition(self) -> None:
        for e in self.examples():
            mask = e.pattern.mask(e.layout)
            for q_block, kv_block in self.blocks:
                counts = plan(e.pattern, e.layout, PlanSpec(q_block, kv_block)).dense_counts()
                assert torch.equal(counts[0] > 0, mask.expand_as(counts[0])), (e, q_block, kv_block)

    def test_forward_and_gradient(self) -> None:
        for e in self.examples():
            for backend in self.backends:
                dtype, tolerance = (torch.float64, 1e-10) if backend == "reference" else (torch.float32, 1e-4)
                q, k, v = (t.requires_grad_() for t in e.tensors(dtype))
                exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
                done = attend(q, k, v, e.pattern, canvas=e.canvas, backend=backend)
                want = self._exact(e, *exact)
                close(done.out, want.out, tolerance, f"{e}: out")
                close(done.lse, want.lse, tolerance, f"{e}: lse")
                ours, theirs = _pull(done, (q, k, v)), _pull(want, exact)
                for name, a, b in zip("qkv", ours, theirs, strict=True):
                    close(a, b, tolerance, f"{e}: gradient of {name}")

    def test_strides_do_not_matter(self) -> None:
        for e in self.examples():
            q, k, v = e.tensors(torch.float32)
            plain = attend(q, k, v, e.pattern, canvas=e.canvas).out
            close(attend(*map(strided, (q, k, v)), e.pattern, canvas=e.canvas).out, plain, 1e-6, str(e))  # type: ignore[arg-type]

    def test_empty_batch(self) -> None:
        for e in self.examples():
            done = attend(*e.tensors(torch.float32, batch=0), e.pattern, canvas=e.canvas)
            assert done.out.shape[0] == 0

    def test_nan_in_keys_that_nobody_sees(self) -> None:
        for e in self.examples():
            layout = Layout(e.layout.q, e.layout.kv, e.layout.policy, q_tokens=min(1, e.layout.nq))
            blind = ~e.pattern.mask(layout).any(0).any(0)  # [Nk]
            q, k, v = e.tensors(torch.float32)
            q = q[:, :, : layout.nq]
            plain = attend(q, k, v, e.pattern, canvas=layout)
            k, v = (t.masked_fill(blind[:, None], torch.nan) for t in (k, v))
            done = attend(q, k, v, e.pattern, canvas=layout)
            close(done.out, plain.out, 1e-6, f"{e}: out")
            close(done.lse, plain.lse, 1e-6, f"{e}: lse")

    def test_bfloat16(self) -> None:
        for e in self.examples():
            q, k, v = e.tensors(torch.bfloat16)
            ours = attend(q, k, v, e.pattern, canvas=e.canvas).out
            groups = q.shape[1] // k.shape[1]
            seen = e.pattern.mask(e.layout)
            logits = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
            weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
            plain = weights @ v.repeat_interleave(groups, 1)
            found = low_precision(ours, plain, self._exact(e, q, k, v).out)
            assert found.passed, (e, found)

    def test_compiles_in_one_graph(self) -> None:
        e = self.examples()[0]
        q, k, v = e.tensors(torch.float32)
        e.pattern.check(e.layout)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, pattern, canvas=canvas).out

        pattern, canvas = e.pattern, e.canvas
        eager = call(q, k, v)  # fills what a canvas remembers
        torch._dynamo.reset()
        close(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), eager, 1e-6, str(e))

    def test_key_is_hashable_and_stable(self) -> None:
        for a, b in zip(self.examples(), self.examples(), strict=True):
            assert hash(a.pattern.key) == hash(a.pattern.key), a
            assert a.pattern.key == b.pattern.key, a

    def test_refuses_in_words(self) -> None:
        refused(self.bad())

    def _exact(self, e: Example, q: Tensor, k: Tensor, v: Tensor) -> oracle.Attended:
        return oracle.dense_attention(q, k, v, e.pattern.mask(e.layout))


def _pull(done: Attended | oracle.Attended, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of inputs through out and the finite entries of lse, for fixed incoming gradients."""
    finite = done.lse.isfinite()
    toward = (draw(done.out.shape, 7, done.out.dtype), draw(done.lse.shape, 8, done.lse.dtype))
    total = (done.out * toward[0]).sum() + torch.where(finite, done.lse, 0.0).mul(toward[1]).sum()
    return torch.autograd.grad(total, list(inputs))
