"""UltraGen's attention by its invariants: no numbers of the authors exist."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from glocal.canvas import Canvas, Layout
from glocal.models.generation.video_dit import rotary_table, rotate
from glocal.nn.blocks.rotary import Rotary
from glocal.nn.lora import LowRank
from glocal.nn.ultragen import CompressedBranch, HierarchicalAttention, TimeGate, UltraGenSettings
from glocal.patterns.windows import Windows

DIM, HEADS = 12, 2
AXES = (2, 9, 7)
LEVEL = torch.tensor([700.0, 20.0])
FULL = UltraGenSettings(windows=1, cross_window="fixed", hierarchical=False, global_stride=1, rank=3)


class Plain(nn.Module):
    """Both ends of a multi-head attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4))

    def qkv(self, x: Tensor, rotary: Rotary | None, updates: Mapping[str, LowRank]) -> tuple[Tensor, Tensor, Tensor]:
        made: list[Tensor] = []
        for name, layer in zip("qkv", self.layers, strict=False):
            y = layer(x) + (updates[name](x) if name in updates else 0)
            y = y.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            made.append(y if rotary is None or name == "v" else rotate(y, torch.stack(rotary)))
        return made[0], made[1], made[2]

    def out(self, x: Tensor) -> Tensor:
        return self.layers[3](x.transpose(1, 2).flatten(2))

    def dense(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        return self.out(scaled_dot_product_attention(*self.qkv(x, rotary, {})))


def table(axes: tuple[int, int, int] = AXES) -> Rotary:
    cos, sin = rotary_table(axes, DIM // HEADS, 100.0, None, torch.device("cpu")).unbind(0)
    return cos, sin


@pytest.fixture
def host() -> Plain:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Plain()


@pytest.fixture
def x(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 126, DIM, generator=generator)


def layer(settings: UltraGenSettings, number: int = 0) -> HierarchicalAttention:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return HierarchicalAttention(DIM, DIM, number, settings)


def shaken(settings: UltraGenSettings, number: int = 0) -> HierarchicalAttention:
    """No parameter is zero or special."""
    made = layer(settings, number)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.3)
    return made


def open_gate(module: HierarchicalAttention, name: str, high: bool) -> None:
    nn.init.constant_(module.get_submodule(f"gate_{name}").mlp[2].bias, 40.0 if high else -40.0)  # type: ignore[index, union-attr]


def test_one_window_is_full_attention(host: Plain, x: Tensor) -> None:
    found = layer(replace(FULL, global_branch=False))(x, AXES, LEVEL, host, table())
    torch.testing.assert_close(found, host.dense(x, table()), rtol=0, atol=1e-6)


def test_a_global_branch_of_stride_one_with_fresh_updates_is_full_attention(host: Plain, x: Tensor) -> None:
    module = layer(replace(FULL, windows=3, cross_window="alternating"), 1)
    open_gate(module, "global", True)
    torch.testing.assert_close(module(x, AXES, LEVEL, host, table()), host.dense(x, table()), rtol=0, atol=1e-6)
    open_gate(module, "global", False)
    assert not torch.allclose(module(x, AXES, LEVEL, host, table()), host.dense(x, table()), atol=1e-3)


def test_the_fine_windows_are_attention_under_a_mask(host: Plain, x: Tensor) -> None:
    settings = UltraGenSettings(windows=2, hierarchical=False, global_branch=False)
    for number, count in ((0, 2), (1, 3), (2, 2)):
        mask = Windows(count=(1, count, count)).mask(Layout.of(Canvas(AXES)))[0]
        wanted = host.out(scaled_dot_product_attention(*host.qkv(x, table(), {}), mask))
        torch.testing.assert_close(layer(settings, number)(x, AXES, LEVEL, host, table()), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("number", [0, 1])
def test_it_equals_a_plain_computation(number: int, host: Plain, x: Tensor) -> None:
    """All of it by the formulas of the paper, padded by hand, positions of cells at their centres."""
    settings = UltraGenSettings(windows=4, global_stride=4, coarse_stride=2, rank=3)
    module = shaken(settings, number)
    z: Tensor = x.unflatten(1, AXES)  # [B, T, H, W, D]
    ends: dict[str, Tensor] = {}
    for name, k in (("global_", 4), ("hier", 2)):
        part: Any = module.get_submodule(name)
        height, width = -(-9 // k), -(-7 // k)
        padded = F.pad(z, (0, 0, 0, width * k - 7, 0, height * k - 9))
        blocks = padded.unflatten(3, (width, k)).unflatten(2, (height, k))  # [B, T, h, k, w, k, D]
        cells = torch.einsum("bthiwjd,dij->bthwd", blocks, part.down.weight[:, 0]).flatten(1, 3)
        side = (3 - 3 // 4) // 2
        places = (torch.arange(2.0), k * torch.arange(height) + (k - 1) / 2, k * torch.arange(width) + (k - 1) / 2)
        grids = torch.meshgrid(*places, indexing="ij")
        counts = (3 - 2 * side, side, side)
        angles = torch.cat(
            [g.flatten()[:, None] * 100.0 ** -(torch.arange(c) / c) for g, c in zip(grids, counts, strict=True)], 1
        )
        q, k_, v = host.qkv(cells, (angles.cos(), angles.sin()), part.updates)
        mask = None
        if name == "hier":
            count = 2 + number
            mask = Windows(count=(1, count, count)).mask(Layout.of(Canvas((2, height, width))))[0]
        out = host.out(scaled_dot_product_attention(q, k_, v, mask)).unflatten(1, (2, height, width))
        large = F.interpolate(out.flatten(0, 1).movedim(-1, 1), scale_factor=k, mode="bilinear")[..., :9, :7]
        large = part.up(large.unflatten(0, (2, 2)).transpose(1, 2))
        ends[name] = large.movedim(1, -1).flatten(1, 3)
    count = 4 + number
    mask = Windows(count=(1, count, count)).mask(Layout.of(Canvas(AXES)))[0]
    local = host.out(scaled_dot_product_attention(*host.qkv(x, table(), {}), mask))
    for name in ("hier", "global_"):
        gate: Any = module.get_submodule(f"gate_{name.rstrip('_')}")
        speed = 10000.0 ** -(torch.arange(128) / 128)
        waves = torch.cat([(LEVEL[:, None] * speed).cos(), (LEVEL[:, None] * speed).sin()], 1)
        alpha = gate.mlp(waves).sigmoid()[:, None]
        local = (1 - alpha) * local + alpha * ends[name]
    torch.testing.assert_close(module(x, AXES, LEVEL, host, table()), local, rtol=0, atol=2e-5)


@pytest.mark.parametrize("level", ["fine", "coarse"])
@pytest.mark.parametrize("axes", [(2, 68, 120), (2, 135, 240), (1, 17, 33), (1, 32, 64)])
def test_borders_of_even_layers_lie_inside_windows_of_odd_ones(axes: tuple[int, int, int], level: Any) -> None:
    even, odd = (UltraGenSettings().pattern(axes, number, level).axes(axes) for number in (0, 1))
    for axis in (1, 2):
        before, after = torch.arange(axes[axis] - 1), torch.arange(1, axes[axis])
        border = ~even[axis].sees(before, after, axes[axis])
        assert bool(border.any()) and bool(odd[axis].sees(before, after, axes[axis])[border].all())


def test_pairs_follow_the_published_cost() -> None:
    axes, settings = (21, 64, 128), UltraGenSettings()
    share = sum(settings.pairs(axes, 0).values()) / (21 * 64 * 128) ** 2
    assert share == pytest.approx(5 / (4 * 4**2) + 1 / 4**4, rel=1e-2)
    assert 1 / share == pytest.approx(4 * 4**4 / (5 * 4**2 + 4), rel=1e-2)
    assert sum(settings.pairs(axes, 1).values()) < sum(settings.pairs(axes, 0).values())
    assert set(replace(settings, hierarchical=False, global_branch=False).pairs(axes, 0)) == {"fine"}


@pytest.mark.parametrize(
    "changed",
    [
        {"global_branch": False},
        {"hierarchical": False},
        {"cross_window": "fixed"},
        {"cross_window": "shift"},
        {"rank": None},
        {"windows": 2},
        {"global_stride": 2},
        {"coarse_stride": 1},
    ],
)
def test_every_ablation_changes_the_output_and_learns(changed: dict[str, Any], host: Plain, x: Tensor) -> None:
    settings = replace(UltraGenSettings(rank=3), **changed)
    module = shaken(settings, 1)
    found = module(x, AXES, LEVEL, host, table())
    assert not torch.allclose(found, shaken(UltraGenSettings(rank=3), 1)(x, AXES, LEVEL, host, table()), atol=1e-4)
    found.square().mean().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters())


def test_fresh_parts_pool_evenly_and_restore_what_is_constant(x: Tensor) -> None:
    for conv in ("dense", "depthwise"):
        part = CompressedBranch(DIM, DIM, 2, UltraGenSettings(conv=conv))  # type: ignore[arg-type]
        cells = part.compress(x[:, : 2 * 4 * 6], (2, 4, 6))
        torch.testing.assert_close(
            cells.unflatten(1, (2, 2, 3)), x[:, :48].unflatten(1, (2, 2, 2, 3, 2)).mean((3, 5)), rtol=0, atol=1e-6
        )
        flat = torch.full_like(x, 2.5)
        torch.testing.assert_close(part.restore(flat[:, : 2 * 5 * 4], AXES), flat, rtol=0, atol=1e-6)
    assert torch.equal(TimeGate(DIM)(LEVEL), torch.full((2, 1, DIM), 0.5))


@pytest.mark.parametrize("conv", ["dense", "depthwise"])
@pytest.mark.parametrize("axes", [(3, 5, 4), (1, 3, 7)])
def test_the_way_back_is_bilinear_and_a_convolution_over_time_and_plane(
    conv: Any, axes: tuple[int, int, int], generator: torch.Generator
) -> None:
    part = CompressedBranch(DIM, DIM, 2, UltraGenSettings(conv=conv))
    nn.init.normal_(part.up.weight, generator=generator)
    nn.init.normal_(part.up.bias, generator=generator)  # type: ignore[arg-type]
    frames, height, width = axes
    cells = (-(-height // 2), -(-width // 2))
    x = torch.randn(2, frames * cells[0] * cells[1], DIM, generator=generator)
    maps = x.unflatten(1, (frames, *cells)).movedim(-1, 1)  # [B, C, T, h, w]
    large = F.interpolate(maps.transpose(1, 2).flatten(0, 1), scale_factor=2, mode="bilinear")[..., :height, :width]
    wanted = part.up(large.unflatten(0, (2, frames)).transpose(1, 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(part.restore(x, axes), wanted, rtol=0, atol=2e-5)


def test_a_gate_reads_the_level_of_each_token(host: Plain, x: Tensor) -> None:
    module = shaken(UltraGenSettings(rank=3))
    same = module(x, AXES, LEVEL, host, table())
    torch.testing.assert_close(module(x, AXES, LEVEL[:, None].expand(2, 126), host, table()), same, rtol=0, atol=1e-6)
    assert not torch.allclose(module(x, AXES, LEVEL.flip(0), host, table()), same, atol=1e-3)


@pytest.mark.parametrize("axes", [(1, 1, 1), (1, 1, 5), (3, 2, 2), (1, 3, 1), (2, 17, 5)])
def test_every_grid_runs(axes: tuple[int, int, int], host: Plain, generator: torch.Generator) -> None:
    x = torch.randn(1, axes[0] * axes[1] * axes[2], DIM, generator=generator)
    for number in (0, 1):
        found = shaken(UltraGenSettings(rank=3), number)(x, axes, LEVEL[:1], host, table(axes))
        assert found.shape == x.shape and bool(found.isfinite().all())


def test_bfloat16_and_positions_in_x(host: Plain, x: Tensor) -> None:
    module = shaken(UltraGenSettings(rank=3))
    wanted = module(x, AXES, LEVEL, host)
    found = module.bfloat16()(x.bfloat16(), AXES, LEVEL, host.bfloat16())
    assert found.dtype == torch.bfloat16
    assert bool((found.float() - wanted).abs().max() < 0.03 * wanted.abs().max())


def test_it_compiles_as_one_graph(host: Plain, x: Tensor) -> None:
    module, rotary = shaken(UltraGenSettings(rank=3)), table()
    wanted = module(x, AXES, LEVEL, host, rotary)
    compiled = torch.compile(lambda x, t: module(x, AXES, t, host, rotary), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, LEVEL), wanted, rtol=0, atol=1e-6)


def test_refusals(host: Plain, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"126 tokens do not fill \(frames, rows, columns\) = \(2, 9, 8\)"):
        layer(UltraGenSettings())(x, (2, 9, 8), LEVEL, host)
    with pytest.raises(ValueError, match="windows=0 must be a whole number of at least 1"):
        UltraGenSettings(windows=0)
    with pytest.raises(ValueError, match="cross_window='swin'; legal: 'alternating', 'fixed', 'shift'"):
        UltraGenSettings(cross_window="swin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ffn_lora=True with rank=None has no size; legal: rank=64"):
        UltraGenSettings(rank=None, ffn_lora=True)


@pytest.mark.gpu
def test_cuda_equals_the_cpu(host: Plain, x: Tensor) -> None:
    for conv in ("dense", "depthwise"):
        module, rotary = shaken(UltraGenSettings(rank=3, conv=conv), 1), table()  # type: ignore[arg-type]
        wanted = module(x, AXES, LEVEL, host, rotary)
        there: Rotary = (rotary[0].cuda(), rotary[1].cuda())
        found = module.cuda()(x.cuda(), AXES, LEVEL.cuda(), host.cuda(), there)
        torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=1e-4)
        half = module.bfloat16()(x.cuda().bfloat16(), AXES, LEVEL.cuda(), host.bfloat16(), there)
        assert bool((half.float().cpu() - wanted).abs().max() < 0.05 * wanted.abs().max())
        host = host.float().cpu()
