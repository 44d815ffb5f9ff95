"""PAROAttention: orders, plan files, calibration, and the method in tiny hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.adapt import paro
from glocal.adapt.paro import blocks_of
from glocal.adapt.paro_calibration import ParoSpec, calibrate, calibrate_each, keep_blocks, order_facts, order_scores
from glocal.adapt.paro_plan import ORDERS, ParoPlan, pack_bits, read_published, sequence, unpack_bits
from glocal.canvas import Canvas, Layout
from glocal.kernels.quant import Quant
from glocal.models.generation.video_dit import VideoDiT
from glocal.ops.capture import Capture

from .hosts.exam import run
from .test_pipelines import generate, wan
from .test_sparse_methods import COGVIDEOX, FLUX, HUNYUAN, WAN, made


def whole(orders: Tensor, blocks: int, block: int = 8) -> ParoPlan:
    """Every block is read."""
    ones = torch.ones(1, *orders.shape, blocks, blocks, dtype=torch.bool)
    return ParoPlan(orders, pack_bits(ones), blocks, 1, block)


def test_bits(generator: torch.Generator) -> None:
    mask = torch.rand(3, 5, 19, generator=generator) < 0.5
    assert torch.equal(unpack_bits(pack_bits(mask), 19), mask)
    assert pack_bits(mask).shape == (3, 5, 3)


def test_orders_are_each_others_inverse_but_for_two() -> None:
    axes, none, media = (2, 3, 4), torch.zeros(0, dtype=torch.long), torch.arange(24)
    for number, order in enumerate(ORDERS[3]):
        turned = tuple(axes[a] for a in order)
        back = [ORDERS[3].index(tuple(order.index(a) for a in range(3)))]
        there = sequence(axes, none, media, number)
        again = sequence(turned, none, media, back[0])
        assert torch.equal(there[again], media)
        assert back[0] == {2: 5, 5: 2}.get(number, number)
    with pytest.raises(ValueError, match=r"order 2 of a grid \(4, 6\); legal: .*, 0 and 1 for two"):
        sequence((4, 6), none, media, 2)


@pytest.mark.parametrize("exam", [WAN, HUNYUAN, COGVIDEOX, FLUX])
def test_every_block_read_in_any_order_is_dense(exam: Any, generator: torch.Generator) -> None:
    model, given = made(exam, generator)
    plain = run(model, given)
    tokens = {WAN: 72, HUNYUAN: 77, COGVIDEOX: 77, FLUX: 29}[exam]
    legal = 2 if exam is FLUX else 6
    layers = {WAN: 2, HUNYUAN: 3, COGVIDEOX: 2, FLUX: 4}[exam]
    orders = torch.arange(2 * layers).reshape(layers, 2) % legal
    with torch.no_grad(), paro(model, whole(orders, -(-tokens // 8))) as handle:
        torch.testing.assert_close(run(model, given), plain, rtol=0, atol=1e-5)
        assert handle.method.kept == pytest.approx(1.0)  # type: ignore[attr-defined]
    assert torch.equal(run(model, given), plain)


def test_a_mask_speaks_of_the_order_of_its_head(generator: torch.Generator) -> None:
    """A block mask over an order is a scattered token mask in raster order."""
    layout = Layout.of(Canvas((2, 3, 4), before=4))
    part = blocks_of(layout.q, (2, 3, 4), torch.tensor([0, 5]), 4)
    assert part.members.shape == (1, 2, 7, 4)
    assert torch.equal(part.members[0, :, 0], torch.arange(4).expand(2, 4).int())  # words first
    second = part.members[0, 1].flatten()[4:] - 4
    assert torch.equal(second.long(), torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1).flatten())


def local_head(axis: int, shape: tuple[int, int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """q, k [1, 1, N, D] whose attention decays with distance on the other axes: it stays on lines along `axis`."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in shape), indexing="ij"), -1).reshape(-1, 3)
    away = [a for a in range(3) if a != axis]
    waves = torch.randn(len(away), 64, generator=generator)
    angle = grid[:, away] @ waves
    features = torch.cat([angle.cos(), angle.sin()], -1)[None, None]
    return features * 3.0, features


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_calibration_reads_lines_along_their_axis(axis: int, generator: torch.Generator) -> None:
    shape = (8, 8, 8)
    q, k = local_head(axis, shape, generator)
    layout = Layout.of(Canvas(shape))
    facts = []
    for order in range(6):
        part = blocks_of(layout.q, shape, torch.tensor([order]), 8)
        stats = Capture(q, k, canvas=layout).blocks(part, part, 1e-3)
        facts.append(torch.stack(order_facts(stats, 0.9)))
    sparse, quant = torch.stack(facts, -1)
    best = int(order_scores(sparse, quant).argmin())
    assert ORDERS[3][best][-1] == axis  # the axis of the lines runs fastest


def test_blocks_are_kept_by_mass(generator: torch.Generator) -> None:
    mass = torch.rand(2, 6, 6, generator=generator)
    kept = keep_blocks(mass, 0.25, 1)
    assert bool(kept[:, :1].all()) and bool(kept[:, :, :1].all())
    assert bool(kept.gather(-1, mass.argmax(-1, keepdim=True)).all())
    best = mass.flatten(1).topk(9).indices
    assert bool(kept.flatten(1).gather(1, best).all())
    assert bool(keep_blocks(mass, 1.0, 0).all())


def test_a_plan_from_a_run_of_a_pipeline(tmp_path: Path) -> None:
    pipe, tokens = wan(), 2 * 1 * 1  # frames, rows, columns of patches
    plain = generate(pipe)
    spec = ParoSpec(density=0.4, block=1)
    plan = calibrate(pipe, lambda: generate(pipe), spec)
    assert torch.equal(generate(pipe), plain)
    assert plan.orders.shape == (2, 2) and plan.blocks == tokens and plan.times == 4
    assert plan.bits.shape[0] == 3  # two steps of their own, one mask for the second half
    assert [plan.time(s, 4) for s in range(4)] == [0, 1, 2, 2]
    assert [plan.time(s, 8) for s in range(8)] == [0, 0, 1, 1, 2, 2, 2, 2]
    plan.save(tmp_path / "plan.safetensors")
    with paro(pipe, tmp_path / "plan.safetensors") as handle:
        generate(pipe)
        # every block of words is kept and the best of every row, so a small plan keeps more than asked for
        assert handle.method.kept == pytest.approx(plan.density)  # type: ignore[attr-defined]
    again = ParoPlan.load(tmp_path / "plan.safetensors")
    assert torch.equal(again.bits, plan.bits) and torch.equal(again.orders, plan.orders) and again.times == 4
    assert torch.equal(generate(pipe), plain)


def test_plans_of_several_densities_from_the_same_runs(model: VideoDiT, clip: Tensor) -> None:
    def go() -> None:
        with torch.no_grad():
            model(clip, torch.tensor([0.5]))

    specs = [ParoSpec(density=d, block=4) for d in (0.3, 0.6)]
    for plan, spec in zip(calibrate_each(model, go, specs), specs, strict=True):
        alone = calibrate(model, go, spec)
        assert torch.equal(plan.bits, alone.bits) and torch.equal(plan.orders, alone.orders)
    with pytest.raises(ValueError, match="differ in more than density; go one by one"):
        calibrate_each(model, go, [specs[0], ParoSpec(density=0.3, block=8)])
    with pytest.raises(ValueError, match="specs is empty"):
        calibrate_each(model, go, [])


def test_calibration_of_the_built_in_model(model: VideoDiT, clip: Tensor) -> None:
    def go() -> None:
        with torch.no_grad():
            model(clip, torch.tensor([0.5]))

    plan = calibrate(model, go, ParoSpec(density=0.5, block=4))
    assert plan.orders.shape == (2, 2) and plan.blocks == 6 and plan.bits.shape[0] == 1
    assert 0.5 <= plan.density < 1
    with torch.no_grad(), paro(model, plan) as handle:
        model(clip, torch.tensor([0.5]))
        assert handle.method.kept == pytest.approx(plan.density)  # type: ignore[attr-defined]


def test_published_files(tmp_path: Path, generator: torch.Generator) -> None:
    kept = torch.rand(2, 3, 2, 4, 4, generator=generator) < 0.5
    permute = {"permute": torch.randint(6, (3, 2), generator=generator), "empty": torch.zeros(3, 2, dtype=torch.bool)}
    torch.save(permute, tmp_path / "permute_plan.pth")
    torch.save({"sparse": kept, "dense_rate": kept.double().mean((-1, -2))}, tmp_path / "sparse_plan.pth")
    plan = read_published(tmp_path / "permute_plan.pth", tmp_path / "sparse_plan.pth", tokens=6 * 64 - 10)
    assert plan.blocks == 6 and plan.times == 2 and torch.equal(plan.orders, permute["permute"])
    mask = plan.mask(1, 2)
    assert bool(mask[:, :2].all()) and bool(mask[..., :2].all()) and bool(mask[:, -1].all())
    assert torch.equal(mask[:, 2:-1, 2:-1], kept[1, 2][:, :-1, :-1])
    with pytest.raises(ValueError, match="masks of 4 x 4 blocks do not fit 128 tokens, which are 2 blocks of 64"):
        read_published(permute, {"sparse": kept}, tokens=128)


def test_empty_heads(generator: torch.Generator) -> None:
    model, given = made(WAN, generator)
    plan = whole(torch.zeros(2, 2, dtype=torch.long), 9)
    plan = ParoPlan(plan.orders, plan.bits, 9, 1, 8, torch.tensor([[True, False], [False, False]]))
    plain = run(model, given)
    with torch.no_grad():
        with paro(model, plan):
            torch.testing.assert_close(run(model, given), plain, rtol=0, atol=1e-5)
        with paro(model, plan, empty="drop"):
            assert not torch.allclose(run(model, given), plain, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="empty='skip'; legal: 'run', 'drop'"):
        paro(model, plan, empty="skip")  # type: ignore[arg-type]


def test_plans_of_another_model_or_size_are_refused(generator: torch.Generator) -> None:
    model, given = made(WAN, generator)
    with paro(model, whole(torch.zeros(2, 2, dtype=torch.long), 5)):
        with pytest.raises(
            ValueError, match="72 tokens are 9 blocks of 8, but the plan has 5; a plan serves the resol"
        ):
            run(model, given)
    with paro(model, whole(torch.zeros(1, 2, dtype=torch.long), 9)):
        with pytest.raises(ValueError, match="layer 1 with 2 heads, but the plan has 1 layers of 2 heads"):
            run(model, given)
    many = ParoPlan(torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2, 2, 9, 2, dtype=torch.uint8), 9, 2, 8)
    with paro(model, many), pytest.raises(ValueError, match="2 shares of a run need its number of steps"):
        run(model, given)
    with pytest.raises(ValueError, match=r"bits of shape \(1, 2\) must be \[masks, 2, 2, 9, 2\] for 9 blocks"):
        ParoPlan(torch.zeros(2, 2), torch.zeros(1, 2, dtype=torch.uint8), 9, 1)
    with pytest.raises(FileNotFoundError):
        paro(model, "no such plan.safetensors")


def test_queries_and_keys_in_eight_bits(generator: torch.Generator) -> None:
    model, given = made(WAN, generator)
    plan = whole(torch.tensor([[0, 3], [5, 2]]), 3, 32)
    plain, quant = run(model, given), Quant("int8", group=(32, 32))
    with torch.no_grad(), paro(model, plan, quant=quant) as handle:
        rounded = run(model, given)
        assert handle.method.kept == pytest.approx(1.0)  # type: ignore[attr-defined]
    assert not torch.equal(rounded, plain)
    assert float((rounded - plain).norm() / plain.norm()) < 2e-2
    assert torch.equal(run(model, given), plain)
