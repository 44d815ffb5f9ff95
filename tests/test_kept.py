"""What is kept between calls: ordinary tensors, and whether those it was made from are the same ones, unchanged."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from glocal import Canvas, Layout, Neighborhood, attention, per_head
from glocal._kept import Seen, ordinary
from glocal.ops import Relative, Score
from glocal.patterns import Axial, Grid, Pattern, RadialBlocks, TileWindows, Windows
from glocal.plan.build import PlanSpec, clear_cache, plan


@ordinary()
def three() -> Tensor:
    return torch.arange(3)


def test_ordinary_tensors_whatever_surrounds() -> None:
    with torch.inference_mode():
        assert not three().is_inference()
    with torch.device("meta"):
        assert three().device.type == "cpu"
    with FakeTensorMode():
        assert type(three()) is Tensor
    inside: list[Tensor] = []
    torch.func.grad(lambda x: (inside.append(three()), x.sum())[1])(torch.ones(3))
    torch.func.vmap(lambda x: (inside.append(three()), x)[1])(torch.ones(3))
    assert [t.tolist() for t in inside] == [[0, 1, 2]] * 2  # data is there


PATTERNS: list[Pattern] = [
    Neighborhood((1, 3, 3)),
    Windows((1, 2, 4)),
    Grid((1, 3, 2)),
    ~Axial(1),
    TileWindows((1, 2, 2), (1, 3, 3)),
    RadialBlocks(4),
    per_head([Neighborhood((1, 3, 3)), Axial(1)]),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_default_device_is_not_mistaken_for_the_place_of_the_tokens(
    pattern: Pattern, backend: str, generator: torch.Generator
) -> None:
    canvas = Canvas((2, 6, 8))
    q, k, v = torch.randn(3, 1, 2, canvas.size, 8, generator=generator)
    score = Score(bias=(Relative(torch.randn(2, 3, 11, 15, generator=generator)),))

    def run() -> Tensor:
        return attention(q, k, v, pattern, canvas=canvas, score=score, backend=backend)

    clear_cache()
    with torch.device("meta"):
        found = run()
    torch.testing.assert_close(found, run())


def test_dropout_is_drawn_where_its_generator_lies(generator: torch.Generator) -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 8, generator=generator)

    def run() -> Tensor:
        return attention(q, k, v, score=Score(dropout=0.5, generator=torch.Generator().manual_seed(1)))

    with torch.device("meta"):
        found = run()
    assert torch.equal(found, run())


def test_a_plan_can_be_stored_and_given_to_other_processes(generator: torch.Generator) -> None:
    canvas = Canvas((6, 8))
    made = plan(Neighborhood((3, 3)), Layout.of(canvas), PlanSpec(16, 16))
    q, k, v = torch.randn(3, 1, 2, 48, 8, generator=generator)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    assert torch.equal(attention(q, k, v, torch.load(file, weights_only=False)), attention(q, k, v, made))


def test_exported_before_anything_ran(generator: torch.Generator) -> None:
    class Local(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return attention(x, x, x, Neighborhood((3, 3)), canvas=canvas)

    canvas = Canvas((6, 9))
    x = torch.randn(1, 2, 54, 8, generator=generator)
    clear_cache()
    exported = torch.export.export(Local(), (x,)).module()
    torch.testing.assert_close(exported(x), Local()(x))


def test_same_objects_unchanged() -> None:
    a, b = torch.arange(3), torch.arange(4)
    seen = Seen.of([a, b])
    assert seen.still([a, b])
    assert not seen.still([a, b.clone()]) and not seen.still([b, a])
    b[0] = 7
    assert not seen.still([a, b])


def test_a_freed_tensor_is_forgotten_though_its_address_is_used_again() -> None:
    a = torch.arange(3)
    seen, address = Seen.of([a]), a.data_ptr()
    view = torch.from_numpy(a.numpy())  # the memory lives on under another tensor
    del a
    assert view.data_ptr() == address and not seen.still([view])


def test_inference_tensors_count_no_writes() -> None:
    with torch.inference_mode():
        a = torch.arange(3)
    assert Seen.of([a]).still([a])
