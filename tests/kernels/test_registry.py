"""The choice of a backend is a pure function of records: any device can be asked about anywhere."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch

from glocal.kernels import registry
from glocal.kernels.capability import Sizes, refusals, version
from glocal.kernels.registry import Request, Visits
from glocal.plan.devices.table import DeviceTable, Kind, Measurement, table_for

BASE = Request("cpu", torch.float32, 1, 8, 8, 4096, 4096, 64, 64)


def picked(request: Request, backend: str = "auto", blocks: tuple[int, int] | None = None) -> str:
    return registry.pick(request, backend, blocks=blocks, kept=0.3).name


@pytest.mark.parametrize(
    "changes, want",
    [
        ({}, "cpu"),
        ({"dtype": torch.float64}, "cpu"),
        ({"kv_heads": 1}, "cpu"),
        ({"sparse": False}, "dense"),
        ({"sparse": False, "bias": ("table",), "softcap": True}, "dense"),
        ({"dropout": True, "nq": 64, "nk": 64}, "reference"),
        ({"sparse": False, "dropout": True, "nq": 64, "nk": 64}, "reference"),
        ({"device": "cuda", "dtype": torch.bfloat16}, "triton"),
        ({"device": "cuda", "dtype": torch.bfloat16, "sparse": False}, "dense"),
        ({"device": "cuda", "dtype": torch.float64, "nq": 64, "nk": 64}, "reference"),
        ({"device": "cuda", "head_dim": 320, "nq": 64, "nk": 64}, "reference"),
        ({"device": "mps", "nq": 64, "nk": 64}, "reference"),
    ],
)
def test_auto(changes: dict, want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from glocal.kernels import flex, triton

    for module in (flex, triton):
        monkeypatch.setattr(module, "missing", lambda device: None)
    assert picked(replace(BASE, **changes)) == want


def test_what_a_machine_lacks_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from glocal.kernels import flex, triton

    for module in (flex, triton):
        monkeypatch.setattr(module, "missing", lambda device: "triton is not installed")
    small = replace(BASE, device="cuda", nq=64, nk=64)
    found = registry.pick(small, "auto", blocks=None, kept=0.3)
    assert found.name == "reference" and "not flex: triton is not installed" in found.why
    with pytest.raises(ValueError, match="backend='flex' cannot run this call: triton is not installed"):
        picked(small, "flex")


def test_what_runs_by_name_only_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from glocal.kernels import flex, triton

    for module in (flex, triton):
        monkeypatch.setattr(module, "missing", lambda device: None)
    monkeypatch.setattr(triton, "CAPABILITY", replace(triton.CAPABILITY, by_name_only="not yet measured on a GPU"))
    small = replace(BASE, device="cuda", nq=64, nk=64)
    found = registry.pick(small, "auto", blocks=(64, 64), kept=0.3)  # flex takes no blocks of 64
    assert found.name == "reference" and "not triton: not yet measured on a GPU" in found.why
    assert picked(small, "triton", (64, 64)) == "triton"
    with pytest.raises(ValueError, match=r"query block 40 \(legal: multiples of 16 from 16\)"):
        picked(small, "triton", (40, 64))
    text = registry.explain(small, "auto", blocks=(64, 64), kept=0.3)
    assert "triton: could run too (not yet measured on a GPU)" in text


def test_more_heads_than_a_grid_counts_are_refused() -> None:
    from glocal.kernels import flex

    many = replace(BASE, device="cuda", q_heads=40_000, kv_heads=40_000, batch=2)
    words = "80,000 heads of all samples (legal: up to 65,535)"
    assert words in refusals(flex.CAPABILITY, many, (128, 128), "2.11.0")
    assert words not in refusals(flex.CAPABILITY, replace(many, device="cpu"), (128, 128), "2.11.0")


def test_the_reference_is_no_fallback_for_large_inputs() -> None:
    large = replace(BASE, dropout=True, nq=131072, nk=131072)
    with pytest.raises(
        ValueError, match=r"backend='auto' finds no backend .*reference: 137,438,953,472 query-key pairs"
    ):
        picked(large)


def test_a_named_backend_runs_or_raises() -> None:
    assert picked(replace(BASE, nq=64, nk=64), "reference") == "reference"
    with pytest.raises(ValueError, match=r"backend='dense' cannot run this call: a pattern .* backends that can: cpu"):
        picked(BASE, "dense")
    with pytest.raises(ValueError, match=r"dtype float64 \(legal: float32, bfloat16, float16\)"):
        picked(replace(BASE, dtype=torch.float64), "flex")


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(
        ValueError,
        match=r"backend='refrence' is unknown; legal: auto, dense, cpu, windows, gluon, triton, flex, .*reference. Nea",
    ):
        picked(BASE, "refrence")


def test_blocks_of_a_plan_are_checked() -> None:
    small = replace(BASE, nq=256, nk=256, q_heads=1, kv_heads=1)
    with pytest.raises(ValueError, match=r"query block 24 \(legal: multiples of 128 from 128\)"):
        picked(small, "flex", (24, 128))
    found = registry.pick(small, "auto", blocks=(24, 7), kept=0.3)
    assert (found.name, found.blocks) == ("cpu", (24, 7))


def test_block_sizes_follow_what_they_visit() -> None:
    def visits(small: float) -> tuple[int, int] | None:
        shares = {(64, 64): small, (128, 128): 0.3}
        return registry.pick(BASE, "auto", blocks=None, kept=lambda size: shares[size]).blocks

    assert visits(0.15) == (64, 64) and visits(0.29) == (128, 128)
    tiny = replace(BASE, nq=20, nk=20)
    assert registry.pick(tiny, "auto", blocks=None, kept=lambda size: 1.0).blocks == (64, 64)


def test_old_torch_is_refused_in_words() -> None:
    capability = registry.backends()[1].capability
    assert refusals(capability, BASE, None, "2.9.1+cpu") == ["torch 2.9.1+cpu is older than 2.11"]
    assert version("2.13.0a0+git") == (2, 13)


def test_sizes_in_words() -> None:
    assert str(Sizes(16, 256, 16)) == "multiples of 16 from 16 to 256"
    assert str(Sizes(1, power=True)) == "powers of two from 1"
    assert Sizes(1, power=True).allows(8) and not Sizes(1, power=True).allows(12)


def test_explain_names_all() -> None:
    text = registry.explain(BASE, "auto", blocks=None, kept=lambda size: 0.25)
    assert text.startswith("runs: cpu (first that can on cpu), reads plan")
    assert "visits 25.00% of all pairs" in text
    for name in registry.names():
        assert f"  {name}: " in text
    assert registry.explain(BASE, "dense", blocks=None, kept=0.25).startswith("does not run: backend='dense'")


def row(kernel: str, kind: Kind, ms: float, tile: tuple[int, int] = (16, 8), **more: object) -> Measurement:
    """A measured call on a canvas of 128 x 128, 8 heads of 64."""
    window = () if kind == "dense" else (48, 48)
    stride = (1, 1) if kind == "masked" else ()
    tiles = () if kind == "dense" else tile
    given = {"direction": "forward", "dtype": "bfloat16", "heads": 8, "head_dim": 64, "canvas": (128, 128), **more}
    return Measurement(
        kernel=kernel, kind=kind, milliseconds=ms, window=window, stride=stride, q_tile=tiles, kv_tile=tiles, **given
    )  # type: ignore[arg-type]


def device(*rows: Measurement) -> DeviceTable:
    """A device nobody has."""
    return DeviceTable("mock", "Mock", "2026-01-01", "invented for a test", 100, 1e12, None, rows)


ROWS = (
    row("dense", "dense", 2.0),
    row("dense, masked", "dense", 3.0),
    row("triton", "full", 0.5),
    row("triton", "masked", 1.0),
    row("flex", "full", 0.7),
    row("flex", "masked", 0.9),
    row("triton", "full", 0.3, (8, 8)),
    row("triton", "masked", 1.6, (8, 8)),
)
SPARSE = replace(BASE, device="cuda", dtype=torch.bfloat16, nq=8192, nk=8192)


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Triton were installed."""
    from glocal.kernels import flex, triton

    for module in (flex, triton):
        monkeypatch.setattr(module, "missing", lambda device: None)


@pytest.mark.parametrize(
    "full, partial, want",
    [
        (0.1, 0.0, ("triton", (64, 64))),  # full blocks only: the smaller blocks were faster
        (0.0, 0.1, ("flex", (128, 128))),  # masks are cheapest there
        (0.0, 1.5, ("dense", None)),  # sparse would be slower than dense with a mask
    ],
)
def test_the_table_decides(full: float, partial: float, want: tuple, able: None) -> None:
    found = registry.pick(SPARSE, "auto", blocks=None, kept=lambda size: Visits(full, partial), table=device(*ROWS))
    assert (found.name, found.blocks) == want, found.why
    assert found.why.startswith("fastest by the table of mock; estimated: ")
    assert found.needs == ("counts" if want[0] == "dense" else "plan")


def test_a_mask_is_written_out_for_small_inputs_only(able: None) -> None:
    large = replace(SPARSE, nq=1 << 17, nk=1 << 17)
    found = registry.pick(large, "auto", blocks=None, kept=Visits(0.0, 1.5), table=device(*ROWS))
    assert found.name == "flex"


def test_what_was_not_measured_follows_the_order(able: None) -> None:
    for request in (replace(SPARSE, dtype=torch.float32), replace(SPARSE, grad=True)):
        found = registry.pick(request, "auto", blocks=None, kept=Visits(0.1), table=device(*ROWS))
        assert found.name == "triton" and found.why.startswith("first that can on cuda")
    named = registry.pick(SPARSE, "flex", blocks=None, kept=Visits(0.1), table=device(*ROWS))
    assert named.name == "flex" and named.why == "asked for by name"


def test_float16_is_as_fast_as_bfloat16(able: None) -> None:
    half = replace(SPARSE, dtype=torch.float16)
    found, want = (
        registry.pick(r, "auto", blocks=None, kept=Visits(0.0, 0.1), table=device(*ROWS)) for r in (half, SPARSE)
    )
    assert found == want and found.name == "flex"


def test_a_table_that_does_not_know_the_usual_backend_decides_nothing(able: None) -> None:
    table = device(row("flex", "full", 0.1))
    assert registry.pick(SPARSE, "auto", blocks=None, kept=Visits(0.1), table=table).name == "triton"


def test_small_windows_go_to_their_own_kernels(able: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from glocal.kernels import windows

    monkeypatch.setattr(windows, "missing", lambda device: None)
    few = replace(SPARSE, head_dim=32, value_dim=32, keys=128)
    for table in (device(*ROWS), None):
        found = registry.pick(few, "auto", blocks=None, kept=Visits(0.1), table=table)
        assert (found.name, found.needs) == ("windows", "windows"), found.why
        assert registry.pick(few, "auto", blocks=(64, 64), kept=Visits(0.1), table=table).name == "triton"
    most = replace(few, keys=5000)
    assert registry.pick(most, "auto", blocks=None, kept=Visits(0.1), table=device(*ROWS)).name == "triton"
    short = replace(few, nq=200, nk=200)  # a tile sees more than half of all keys
    assert registry.pick(short, "auto", blocks=None, kept=Visits(0.1), table=device(*ROWS)).name != "windows"
    wide = replace(few, head_dim=128, value_dim=128, keys=480)  # keys and values of a tile must fit a processor
    assert registry.pick(wide, "auto", blocks=None, kept=Visits(0.1), table=device(*ROWS)).name != "windows"
    half = replace(wide, keys=240)
    assert registry.pick(half, "auto", blocks=None, kept=Visits(0.1), table=device(*ROWS)).name == "windows"
    tells = registry.explain(few, "auto", blocks=None, kept=Visits(0.1), table=device(*ROWS))
    assert "runs: windows (small windows: a tile of queries sees at most 128 of 8192 keys)" in tells


def test_gradients_count_both_passes(able: None) -> None:
    back = (row("triton", "full", 9.0, direction="backward"), row("flex", "full", 2.0, direction="backward"))
    table = device(*ROWS, *back)
    assert registry.pick(replace(SPARSE, grad=True), "auto", blocks=(128, 128), kept=0.1, table=table).name == "flex"
    assert registry.pick(SPARSE, "auto", blocks=(128, 128), kept=0.1, table=table).name == "triton"


def test_partial_blocks_of_a_given_size_that_was_not_measured(able: None) -> None:
    """A plan of 64-blocks with a ragged end goes by its full blocks; where sizes can be chosen, only measured ones."""
    rows = [r for r in ROWS if not (r.kind == "masked" and r.block == (64, 64))]
    table = device(*rows, row("flex", "full", 0.2, (8, 8)), row("triton", "full", 0.3, (8, 8)))
    ragged = Visits(0.1, 0.001)
    found = registry.pick(SPARSE, "auto", blocks=(64, 64), kept=ragged, table=table)
    full = registry.pick(SPARSE, "auto", blocks=(64, 64), kept=Visits(0.101), table=table)
    assert found.why.startswith("fastest by the table") and found.name == full.name
    assert float(found.why.split("triton ")[1].split()[0]) > float(full.why.split("triton ")[1].split()[0])
    free = registry.pick(SPARSE, "auto", blocks=None, kept=lambda size: ragged, table=table)
    assert free.blocks == (128, 128)


def test_plans_of_small_blocks_take_the_fast_kernel_of_a_known_card(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Lists of 64-blocks over 75,600 tokens, the last block ragged, as PAROAttention has them in Wan."""
    from glocal.kernels import gluon, triton

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in (gluon, triton):
        monkeypatch.setattr(module, "missing", lambda device: None)
    request = Request("cuda", torch.bfloat16, 1, 40, 40, 75600, 75600, 128, 128)
    table = table_for("NVIDIA H100 80GB HBM3")
    found = registry.pick(request, "auto", blocks=(64, 64), kept=Visits(0.3, 0.0015), table=table)
    assert found.name == "gluon", found.why


def test_a_guest_runs_where_it_was_measured_to_be_fastest(able: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from glocal.kernels.guests import fa4_dense

    monkeypatch.setattr(fa4_dense, "missing", lambda device: None)
    dense = replace(SPARSE, sparse=False)
    assert registry.pick(dense, "auto", blocks=None, kept=1.0, table=device(*ROWS)).name == "dense"
    table = device(*ROWS, row("fa4", "dense", 1.8))
    found = registry.pick(dense, "auto", blocks=None, kept=1.0, table=table)
    assert found.name == "fa4_dense" and found.why.index("fa4_dense") < found.why.index("dense 0.5 ms")
    assert "estimated: fa4_dense 0.45 ms" in registry.explain(dense, "auto", blocks=None, kept=1.0, table=table)


@pytest.mark.parametrize("guest", [True, False], ids=["guest", "no guest"])
@pytest.mark.parametrize("grad", [True, False], ids=["both passes", "forward"])
def test_dense_attention_takes_the_fastest_kernel_there_is(
    guest: bool, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glocal.kernels.guests import fa4_dense

    monkeypatch.setattr(fa4_dense, "missing", lambda device: None if guest else "not installed")
    table = table_for("NVIDIA H100 80GB HBM3")
    assert table is not None
    passes = ("forward", "backward") if grad else ("forward",)
    rows = [m for m in table.measurements if m.kind == "dense"]
    for n, heads, d in {(prod(m.canvas), m.heads, m.head_dim) for m in rows}:
        times = {name: [m.milliseconds for m in rows if m.kernel == name and prod(m.canvas) == n
                        and m.head_dim == d and m.direction in passes]
                 for name in (("dense", "fa4_dense") if guest else ("dense",))}  # fmt: skip
        assert all(len(ms) == len(passes) for ms in times.values())
        asked = Request("cuda", torch.bfloat16, 1, heads, heads, n, n, d, d, grad=grad, sparse=False)
        found = registry.pick(asked, "auto", blocks=None, kept=1.0, table=table)
        assert found.name == min(times, key=lambda name: sum(times[name])), found.why


def test_shipped_tables_are_found_by_the_name_a_card_gives_itself(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = table_for("NVIDIA H100 80GB HBM3")
    assert found is not None and found.name == "h100" and {"triton", "gluon"} <= {m.kernel for m in found.measurements}
    assert table_for("NVIDIA H200") is found and table_for("Some Other Card") is None
    mine = replace(device(*ROWS), title="Some Other Card", name="some-other-card")
    (tmp_path / "glocal" / "devices").mkdir(parents=True)
    (tmp_path / "glocal" / "devices" / "some-other-card.json").write_text(mine.to_json())
    again = table_for("Some Other Card")
    assert again is not None and again.measurements == mine.measurements
