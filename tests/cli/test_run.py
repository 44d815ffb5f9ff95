"""glocal run: a recipe in a model, with counts by site, files whole or not at all, and words for bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from glocal import adapt, cli
from glocal.advise.methods import MethodSpec
from glocal.advise.recipe import Fallback, Recipe, Rule
from glocal.canvas import Canvas
from glocal.models.generation.video_dit import VideoDiT, VideoDiTConfig

runner = CliRunner()
LOCAL = MethodSpec("windows", {"size": [{"fraction": 0.5}] * 3}, block=(16, 16))


def run(*words: str) -> tuple[int, str, str]:
    done = runner.invoke(cli.app, ["run", *words])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Layer 0: head 0 in windows; the other layers stay dense."""
    rules = (Rule("local", ((0, 0),), heads=(0,)),)
    path = tmp_path / "recipe.json"
    Recipe("candidate", {"local": LOCAL}, rules, fallback=Fallback(min_tokens=0)).save(path)
    return path


@pytest.fixture(autouse=True)
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the shipped weights: 2 layers, 2 heads, clips of 2 frames of 8 x 8 px."""
    import glocal.models.generation as generation

    def load(device: str = "cpu") -> VideoDiT:
        torch.manual_seed(0)
        fields = (("shape", ("disc", "square")),)
        model = VideoDiT(VideoDiTConfig(dim=24, layers=2, heads=2, hidden=16, patch=2, fields=fields)).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model

    real = generation.draw_noise
    monkeypatch.setattr(generation, "load_demo", load)
    monkeypatch.setattr(generation, "draw_noise", lambda seed, channels: real(seed, 1, 2, 8, 8, channels))


def test_demo_with_stats_and_files(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("demo", "--recipe", str(recipe), "--steps", "3", "-c", "shape=disc", "--compare", "-o", str(out))
    code, text, err = run(*words, "--json")
    assert (code, err) == (0, "")
    record = json.loads(text)
    first, second = record["sites"]
    assert (first["site"], first["calls"], first["sparse"]) == ("blocks.0.attn", 3, 3)
    assert first["dense"] == {"by the recipe": 3}
    assert first["kept"] == pytest.approx(1 / 8)
    assert sum(first["kernels"].values()) == 3
    assert (second["sparse"], second["dense"]) == (0, {"by the recipe": 6})
    assert record["dense"]["relative_l2"] > 0
    assert {p.name for p in out.iterdir()} == {"clip.safetensors", "frames.png", "run.json"}
    clips = load_file(out / "clip.safetensors")
    assert clips["sparse"].shape == clips["dense"].shape == (2, 3, 8, 8)
    assert (out / "frames.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "run.json").read_text()) == record


def test_the_terminal_names_sites_and_reasons(recipe: Path) -> None:
    code, out, err = run("demo", "--recipe", str(recipe), "--steps", "2", "--guidance", "2", "--quiet")
    assert (code, err) == (0, "")
    assert "blocks.0.attn      2  2 of 4" in out  # nothing asked for: one call a step, whatever the guidance
    assert "2 by the recipe" in out
    assert "dense " not in out.split("site")[0]


def test_same_seed_same_clip_and_the_model_is_left_as_it_was(recipe: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        out = str(tmp_path / name)
        assert run("demo", "--recipe", str(recipe), "--seed", "5", "--compare", "-o", out, "--quiet")[0] == 0
    a, b = (load_file(tmp_path / name / "clip.safetensors") for name in ("a", "b"))
    assert torch.equal(a["sparse"], b["sparse"])
    assert torch.equal(a["dense"], b["dense"])
    assert not torch.equal(a["dense"], a["sparse"])


def test_an_unproven_canvas_runs_dense_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    workload = {"canvases": [{"shape": [16, 16, 16]}]}
    rules = (Rule("local", ((0, 9),)),)
    Recipe("candidate", {"local": LOCAL}, rules, workload=workload, fallback=Fallback(min_tokens=0)).save(path)
    record = json.loads(run("demo", "--recipe", str(path), "--steps", "1", "--compare", "--json")[1])
    assert record["sites"][0]["dense"] == {"canvas not proven": 2}
    assert record["dense"]["relative_l2"] == 0.0


class Toy(nn.Module):
    """A private model with one attention on a canvas of 4 x 4 tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return adapt.site("only", x, x, x, canvas=Canvas((4, 4)))


class Pipe:
    """What a factory may return."""

    def __init__(self) -> None:
        self.model = Toy()
        adapt.discover(self.model, torch.zeros(1, 2, 16, 8))

    def generate(self, seed: int, steps: int, **condition: str) -> Tensor:
        assert condition == {"mood": "calm"}
        x = torch.randn(1, 2, 16, 8, generator=torch.Generator().manual_seed(seed))
        for _ in range(steps):
            x = self.model(x)
        return x


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import sys

    module = SimpleNamespace(pipe=Pipe, plain=lambda: nn.Identity(), number=3)
    monkeypatch.setitem(sys.modules, "toys", module)
    yield


def test_a_model_of_ones_own(toys: None, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    half = MethodSpec("windows", {"size": [{"fraction": 0.5}] * 2}, block=(4, 4))
    Recipe("candidate", {"w": half}, (Rule("w", ((0, 0),)),), fallback=Fallback(min_tokens=0)).save(path)
    words = ("toys:pipe", "--recipe", str(path), "--steps", "2", "-c", "mood=calm", "--compare")
    out = tmp_path / "out"
    code, text, _ = run(*words, "-o", str(out), "--json")
    assert code == 0
    record = json.loads(text)
    assert record["sites"][0]["methods"] == {"w": 4}
    assert record["sites"][0]["kept"] == pytest.approx(0.25)
    assert record["dense"]["relative_l2"] > 0
    assert {p.name for p in out.iterdir()} == {"clip.safetensors", "run.json"}  # no pictures: no contact sheet


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("demo", "--recipe", "none.json"), "recipe 'none.json' does not exist"),
        (("demo", "--recipe", "/"), "recipe '/' is a folder; legal: a file"),
        (
            ("demos",),
            "MODEL 'demos' is unknown; legal: demo, demo-image, demo-image-unet, demo-language, package",
        ),
        (("nowhere:make",), "MODEL 'nowhere:make': No module named 'nowhere'"),
        (("toys:nothing",), "MODEL 'toys:nothing': "),
        (("toys:number",), "MODEL 'toys:number' is a int; legal: a function"),
        (("toys:plain",), "MODEL 'toys:plain' is a Identity without generate()"),
        (("demo", "-c", "shape"), "--condition 'shape': expected K=V"),
        (
            ("demo", "-c", "shape=disk"),
            "--condition shape=disk: value='disk' is unknown; legal: disc, square; nearest: disc",
        ),
        (("demo", "-c", "shap=disc"), "--condition shap=disc: field='shap' is unknown; legal: shape; nearest: shape"),
        (("demo", "--device", "tpu"), "--device 'tpu' is not here"),
    ],
)
def test_bad_input(words: tuple[str, ...], message: str, recipe: Path, toys: None) -> None:
    given = () if "--recipe" in words else ("--recipe", str(recipe))
    code, out, err = run(*words, *given, "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")


def test_a_broken_recipe_names_its_field(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text('{"schema": "other/2"}')
    code, out, err = run("demo", "--recipe", str(path), "-o", str(tmp_path / "out"))
    assert (code, out) == (2, "")
    assert "schema='other/2'; this version reads 'glocal.recipe/1'" in err
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.json"]


def test_a_method_in_place_of_a_recipe(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("demo", "--method", "gna", "--set", "window=[1,2,2]", "--set", "dense_layers=1", "--steps", "2")
    code, text, err = run(*words, "--compare", "-o", str(out), "--json")
    assert (code, err) == (0, "")
    record = json.loads(text)
    assert record["method"] == {"system": "gna", "settings": {"window": [1, 2, 2], "dense_layers": 1}}
    first, second = record["sites"]
    assert (first["sparse"], first["dense"]) == (0, {"layer": 4})
    assert (second["sparse"], second["methods"], second["kept"]) == (4, {"gna": 4}, pytest.approx(1 / 8))
    assert record["dense"]["relative_l2"] > 0
    assert load_file(out / "clip.safetensors")["sparse"].shape == (2, 3, 8, 8)
    code, text, err = run(*words, "--quiet")
    assert (code, err) == (0, "") and "gna(window=[1, 2, 2], dense_layers=1)" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "give one of --recipe FILE"),
        (("--method", "gna", "--recipe", "x.json"), "give one of --recipe FILE"),
        (("--recipe", "x.json", "--set", "a=1"), "--set a=1: goes with --method"),
        (("--method", "gna", "--set", "window"), "expected K=V, such as decay=0.2"),
        (("--method", "gma", "--set", "window=[1,2,2]"), "nearest: gna"),
        (("--method", "radial", "--set", "decay"), "--set 'decay': expected K=V, such as decay=0.2 or window=3,3,3"),
        (("--method", "gna", "--set", "window=3,3"), "gna: window=(3, 3) has 2 entries"),
        (("--method", "radial", "--set", "decai=1"), "radial: decai is unknown"),
    ],
)
def test_bad_methods_are_named(words: tuple[str, ...], says: str) -> None:
    code, _, err = run("demo", *words)
    assert code == 2 and says in " ".join(err.split())


def test_a_picture_from_a_caption(tmp_path: Path) -> None:
    words = ("demo-image", "--method", "tile_windows", "--set", "tile=[1,4,4]", "--set", "window=[1,1,1]", "--quiet")
    words += ("-c", "caption=a red disc", "-c", "size=32", "--steps", "2")
    code, _, _ = run(*words, "-o", str(tmp_path / "out"))
    assert code == 0 and (tmp_path / "out" / "frames.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = run(*words, "-c", "captoin=a ring")
    assert code == 2 and "field='captoin' is unknown; legal: caption, size; nearest: caption" in err
    code, _, err = run(*words, "-c", "caption=a red dics")
    assert code == 2 and "word 'dics' is unknown" in err and "nearest: 'disc'" in err


def test_paro_from_the_command_line(tmp_path: Path) -> None:
    from glocal.adapt.paro_calibration import ParoSpec, calibrate
    from glocal.models import generation

    demo = generation.load_demo()
    clip = generation.draw_noise(0, channels=demo.config.channels)
    path = tmp_path / "plan.safetensors"
    with torch.no_grad():
        calibrate(demo, lambda: demo(clip, torch.ones(1)), ParoSpec(density=0.4, block=4)).save(path)
    code, out, err = run("demo", "--method", "paro", "--set", f"plan={path}", "--steps", "2", "--json")
    record = json.loads(out)
    assert code == 0, err
    assert record["method"] == {"system": "paro", "settings": {"plan": str(path)}}
    assert all(site["sparse"] and site["kept"] < 1 for site in record["sites"])


def test_systems_for_other_models_say_so() -> None:
    code, _, err = run("demo", "--method", "freeswim", "--set", "preset=wan2.1-1.3b")
    assert code == 2 and "the model has attention of kind self; legal: self and cross attention" in " ".join(
        err.split()
    )
    code, _, err = run("demo", "--method", "hidiffusion", "--set", "preset=sdxl")
    assert code == 2 and "hidiffusion: the model has no stages; legal: a UNet" in " ".join(err.split())
    code, _, err = run("demo", "--method", "teacache", "--set", "preset=flux")
    assert code == 2 and "VideoBlock modulates outside its norm; legal: 'time'" in " ".join(err.split())


def test_skipped_forwards_are_counted() -> None:
    words = ("demo", "--method", "teacache", "--set", "signal=time", "--set", "threshold=9", "--steps", "5", "--quiet")
    code, out, err = run(*words, "--set", "polynomial=1,0", "--guidance", "2", "-c", "shape=disc")
    assert (code, err) == (0, "")
    assert "polynomial=[1, 0]" in out and "site" not in out  # no table of attentions: none was touched
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("forwards")] == ["4", "6"]
    code, out, _ = run(*words, "--set", "polynomial=1,0", "--set", "last_step=false", "--json")
    assert code == 0 and json.loads(out)["forwards"] == {"computed": 1, "skipped": 4}
