"""glocal simulate: the published example, JSON, searches, forecasts, and what bad input is told."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from glocal import cli
from glocal.plan.tiles import legal_tiles

runner = CliRunner()
HUNYUAN = ("--canvas", "30x48x80", "--window", "18x24x24", "--q-tile", "4x8x8", "--kv-tile", "2x8x8")


def run(*words: str) -> tuple[int, str, str]:
    done = runner.invoke(cli.app, ["simulate", *words])
    return done.exit_code, done.stdout, done.stderr


def record(*words: str) -> dict:
    code, out, err = run(*words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_the_example_of_the_paper() -> None:
    code, out, _ = run("neighborhood", *HUNYUAN, "--stride", "16x8x8", "--share", "0.607")
    lines = {line[:22].strip(): line[22:].strip() for line in out.splitlines()}
    assert code == 0
    assert lines["op speed-up"].startswith("11.11x")
    assert lines["bound by FLOPs"] == "11.11x"
    assert lines["perfectly block sparse"] == "yes"
    assert lines["end to end"].startswith("2.23x")
    assert lines["dense unpadded"].startswith("10.42x")


def test_json_holds_the_same_figures() -> None:
    found = record("neighbourhood", *HUNYUAN, "--stride", "1x1x8", "--share", "0.607")
    assert found["pattern"] == "neighborhood"
    assert found["worst_visits"] == 165 and found["dense_visits"] == 900
    assert found["end_to_end"] == pytest.approx(1.983, abs=5e-4)
    assert found["perfectly_block_sparse"] is False


def test_one_number_counts_for_all_axes_and_full_is_an_axis() -> None:
    found = record("neighborhood", "--canvas", "6x12x16", "--window", "fullx4x4", "--stride", "2", "--q-tile", "2")
    assert (found["window"], found["stride"], found["q_tile"]) == ([6, 4, 4], [2, 2, 2], [2, 2, 2])
    assert found["kv_tile"] == found["q_tile"]


@pytest.mark.parametrize(
    ("words", "stride", "dilation", "kept"),
    [
        (("window", "--window", "4x3"), [4, 3], [1, 1], 12 / 96),
        (("tile", "--window", "6x6"), [2, 2], [1, 1], 36 / 96),
        (("tile", "--window", "6x6", "--stride", "3"), [3, 3], [1, 1], 36 / 96),
        (("grid", "--window", "4x3"), [1, 1], [2, 4], 12 / 96),
        (("dense",), [1, 1], [1, 1], 1.0),
        (("causal",), [1, 1], [1, 1], (36 * 78) / 96**2),
        (("neighborhood", "--window", "3", "--dilation", "2x1", "--causal", "0"), [1, 1], [2, 1], (18 * 36) / 96**2),
    ],
)
def test_pattern_names_are_window_rules(
    words: tuple[str, ...], stride: list[int], dilation: list[int], kept: float
) -> None:
    found = record(*words, "--canvas", "8x12", "--q-tile", "2x2")
    assert (found["stride"], found["dilation"]) == (stride, dilation)
    assert found["kept"] == pytest.approx(kept)


def test_searches_list_what_is_worth_using() -> None:
    found = record("neighborhood", *HUNYUAN, "--search", "strides")
    assert found["strides"]["considered"] == 18 * 24 * 24
    assert found["strides"]["perfect"]["stride"] == [16, 8, 8]
    assert [row["stride"] for row in found["strides"]["front"]][-1] == [16, 8, 8]
    tiles = record("neighborhood", *HUNYUAN, "--search", "tiles", "--tokens", "128")["tiles"]
    assert len(tiles["best"]) == 10 and tiles["considered"] == len(legal_tiles(128, 3, (30, 48, 80))) ** 2
    code, out, _ = run("neighborhood", *HUNYUAN, "--search", "strides", "--share", "0.6")
    assert code == 0 and "finest perfectly block sparse stride: 16x8x8" in out


def test_tiles_are_chosen_when_none_are_given() -> None:
    code, out, _ = run("neighborhood", "--canvas", "32x32", "--window", "8x8", "--tokens", "64")
    assert code == 0 and "(fastest of all tiles of 64 tokens)" in out
    code, out, _ = run("neighborhood", "--canvas", "32x32", "--window", "8x8", "--tokens", "64", "--search", "tiles")
    assert code == 0 and "fastest tiles, of 25 pairs" in out


def test_raster_and_forecast_stand_beside() -> None:
    words = ("neighborhood", "--canvas", "64x64", "--window", "24", "--q-tile", "16x8", "--raster")
    found = record(*words, "--device", "h200", "--heads", "16", "--head-dim", "64")
    assert found["raster"]["q_block"] == 128 and found["raster"]["op_speedup"] > 1
    assert found["forecast"]["kernel"] == "natten" and found["forecast"]["speedup"] > 0
    code, out, _ = run(*words, "--device", "h200", "--heads", "16", "--head-dim", "64", "--direction", "backward")
    assert code == 0 and "raster order" in out and "forecast on h200" in out and "NVIDIA H200, 2026-11-22" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("neigborhod",), "pattern 'neigborhod' is unknown; legal: neighborhood, window, tile, grid, causal, dense; "
                          "nearest: neighborhood"),
        (("neighborhood",), "pattern 'neighborhood' needs --window, one number per axis of the canvas, such as 12x3"),
        (("neighborhood", "--window", "25x3"), "window=25 is larger than axis 0 of the canvas 24x6 (24 tokens); "
                                               "legal: 1 to 24; nearest: 24"),
        (("neighborhood", "--window", "5x3", "--dilation", "6x1"), "dilation=6 does not fit: window=5 then spans 30"),
        (("neighborhood", "--window", "5x3", "--stride", "6x1"), "stride=6 is larger than window=5 on axis 0; "
                                                                 "legal: 1 to 5; nearest: 5"),
        (("neighborhood", "--window", "5x3x3"), "--window '5x3x3' has 3 axes, the canvas 24x6 has 2; legal: 2 numbers; "
                                                "nearest: 3x3"),
        (("neighborhood", "--window", "5x3", "--q-tile", "4x4x4"), "--q-tile '4x4x4' has 3 axes"),
        (("neighborhood", "--window", "5by3"), "--window '5by3': expected positive integers joined by x"),
        (("neighborhood", "--window", "5x3", "--kv-tile", "4x4"), "--kv-tile '4x4' without --q-tile"),
        (("neighborhood", "--window", "5x3", "--causal", "2"), "--causal '2'; legal: 'all', or axis numbers 0 to 1"),
        (("neighborhood", "--window", "5x3", "--q-tile", "4x4", "--share", "60"), "share=60.0 is not a fraction"),
        (("neighborhood", "--window", "5x3", "--search", "windows"), "--search='windows' is unknown"),
        (("neighborhood", "--window", "5x3", "--tokens", "big"), "--tokens 'big'; legal: positive integers"),
        (("neighborhood", "--window", "5x3", "--direction", "up"), "--direction='up' is unknown"),
        (("neighborhood", "--window", "5x3", "--q-tile", "4x4", "--device", "h200"), "--device 'h200' needs --heads"),
        (("window", "--window", "4x3", "--stride", "2"), "--stride '2' says nothing to pattern 'window'"),
        (("tile", "--window", "4x3"), "pattern 'tile' needs --q-tile (or --stride)"),
        (("grid", "--window", "5x3"), "--window '5x3': 5 does not divide axis 0 of the canvas (24 tokens), as a grid "
                                      "must; nearest: 4"),
    ],
)  # fmt: skip
def test_bad_input_is_told_back_with_the_nearest_fix(words: tuple[str, ...], message: str) -> None:
    code, out, err = run(*words, "--canvas", "24x6")
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--tiling", "statik"), "tiling='statik' is unknown; legal: static, dynamic; nearest: static"),
        (("--schedule", "worse"), "schedule='worse' is unknown; legal: worst, mean; nearest: worst"),
        (("--heads", "8"), "--heads says nothing without --device; add it, or leave it out"),
        (("--head-dim", "64"), "--head-dim says nothing without --device; add it, or leave it out"),
    ],
)
def test_options_that_would_say_nothing_are_refused(words: tuple[str, str], told: str) -> None:
    code, out, err = run("neighborhood", *HUNYUAN[:4], *words)  # without --q-tile: all tiles are searched
    assert (code, out) == (2, "") and told in err
