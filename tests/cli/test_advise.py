"""glocal advise on the command line: captured calls, bad usage, and the four outputs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from glocal.advise import MethodSpec, Recipe, Rule
from glocal.advise.capture import CallInfo, CapturedCall, save_capture
from glocal.advise.recipe import Fallback
from glocal.cli import app

RUNNER = CliRunner()


@pytest.fixture
def captured(tmp_path: Path, generator: torch.Generator) -> Path:
    """Two layers of one call each on a 4 x 8 x 8 canvas; attention is local, as queries and keys are alike nearby."""
    place = torch.cartesian_prod(*(torch.linspace(0, 1, n) for n in (4, 8, 8)))  # [N, 3]
    waves = torch.cat([(place @ torch.randn(3, 8, generator=generator) * 8).sin() for _ in range(2)], -1)
    calls = []
    for layer in range(2):
        q, k, v = (waves.expand(1, 2, -1, -1).contiguous() * s for s in (3.0, 3.0, 1.0))
        calls.append(CapturedCall(CallInfo(f"blocks.{layer}", (4, 8, 8), layer=layer), q, k, v))
    path = tmp_path / "calls.safetensors"
    save_capture(path, calls)
    return path


def test_captured_calls_give_operator_figures_only(captured: Path, tmp_path: Path) -> None:
    out = tmp_path / "advice"
    done = RUNNER.invoke(app, ["advise", str(captured), "-o", str(out), "--max", "relative_l2=10", "--json"])
    assert done.exit_code in (0, 1), done.output
    recipe = Recipe.load(out / "recipe.json")
    assert recipe.status in ("candidate", "dense")
    page = (out / "report.html").read_text()
    assert "nothing here is end to end" in page and "speed-up, operator" in page
    assert json.loads(done.stdout)["status"] == recipe.status


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["advise", "nothing"], "package.module:factory"),
        (["advise", "no_such_module:load"], "no_such_module"),
        (["advise", "missing.safetensors"], "does not exist"),
        (["advise", "demo", "--max", "drift"], "expected METRIC=V"),
        (["advise", "demo", "--effort", "heroic"], "quick"),
        (["advise", "demo", "--workload", "missing.jsonl"], "does not exist"),
        (["advise", "demo", "--workload", "/"], "workload '/' is a folder; legal: a file"),
        (["validate", "/", "demo"], "recipe '/' is a folder; legal: a file"),
        (["advise", "demo", "--budget", "soon"], "such as 6h, 30m or 90s"),
        (["advise", "calls.safetensors", "--dry-run"], "Leave it out"),
        (
            ["advise", "calls.safetensors", "--keep-dense", "*"],
            "--keep-dense: captured calls are judged each by itself",
        ),
        (["advise", "calls.safetensors", "--max", "kl=1"], "--max kl: captured calls are judged each by itself"),
        (["advise", "demo", "--max", "lpips=1"], "frames has no measure 'lpips'; legal: drift, relative_l2, flicker_"),
        (["advise", "demo", "--dry-run", "--max", "psnr=1"], "'psnr' is better when higher"),
        (["advise", "demo", "--keep-dense", "layers.*"], "'layers.*' fits no attention site; there are blocks.0"),
    ],
)
def test_bad_usage_says_what_is_legal(words: list[str], text: str, tmp_path: Path) -> None:
    out = tmp_path / "advice"
    done = RUNNER.invoke(app, [*words, "-o", str(out)])
    assert done.exit_code == 2
    assert text in done.output
    assert not out.exists()


FACTORY = """
import torch
from glocal.models.generation import VideoDiT, VideoDiTConfig

def load():
    torch.manual_seed(0)
    fields = (("shape", ("disc", "square")),)
    made = VideoDiT(VideoDiTConfig(dim=48, layers=2, heads=2, hidden=64, fields=fields)).eval()
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return made
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """MODEL and --workload of a tiny model with samples of its own."""
    (tmp_path / "tiny_model_of_a_user.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = []
    for number, (shape, height, width) in enumerate(itertools.product(("disc", "square"), (24, 32), (24, 32))):
        sample = {"id": f"t{number}", "seed": number, "shape": shape, "frames": 4, "height": height, "width": width}
        lines.append(json.dumps(sample))
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    return ["tiny_model_of_a_user:load", "--workload", str(tmp_path / "samples.jsonl")]


def test_dry_run_prints_the_stages_and_writes_nothing(tiny: list[str], tmp_path: Path) -> None:
    words = ["advise", *tiny, "-o", str(tmp_path / "out"), "--effort", "quick", "--steps", "2", "--dry-run"]
    done = RUNNER.invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    stages = json.loads(done.stdout)["stages"]
    assert [s["name"] for s in stages][-1] == "validation" and all(s["seconds"] > 0 for s in stages)
    over = RUNNER.invoke(app, [*words, "--quiet", "--budget", "0.001s"])
    assert over.exit_code == 2 and "The forecast is" in over.output and "time" in over.output
    assert not (tmp_path / "out").exists()


def test_validate_proves_a_recipe_again(tiny: list[str], tmp_path: Path) -> None:
    window = {"tile": [2, 3, 3], "window": [{"fraction": 0.5}] * 3}
    half = MethodSpec("tile_windows", window, {"tile": [2, 3, 3]}, (18, 18))
    recipe = Recipe("candidate", {"half": half}, (Rule("half", ((0, 1),)),), fallback=Fallback(min_tokens=16))
    recipe.save(tmp_path / "recipe.json")
    words = ["validate", str(tmp_path / "recipe.json"), *tiny, "--steps", "2", "--pairs", "2", "-o"]
    done = RUNNER.invoke(app, [*words, str(tmp_path / "out"), "--max", "drift=1e-9", "--json"])
    assert done.exit_code == 1, done.output
    assert json.loads(done.stdout)["status"] == "dense"
    assert not Recipe.load(tmp_path / "out" / "recipe.json").rules
    page = (tmp_path / "out" / "report.html").read_text()
    assert "glocal validate" in page and "--pairs 2" in page
    assert len((tmp_path / "out" / "evidence.jsonl").read_text().splitlines()) >= 2 + 2
    broken = RUNNER.invoke(app, ["validate", str(tmp_path / "none.json"), *tiny, "-o", str(tmp_path / "other")])
    assert broken.exit_code == 2 and "does not exist" in broken.output
    assert not (tmp_path / "other").exists()


TOY = """
import torch
from glocal.advise import Frames
from glocal.models.generation import SampleSpec, VideoDiT, VideoDiTConfig

def load():
    torch.manual_seed(0)
    fields = (("shape", ("disc", "square")), ("colour", ("red", "green", "blue")))
    model = VideoDiT(VideoDiTConfig(dim=48, layers=2, heads=2, hidden=64, fields=fields)).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model, Frames(SampleSpec(steps=4), frames=4, height=64, width=64)
"""


def test_resume_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run resumed gives the same recipe; an unfinished one is not written over, another one is named."""
    from glocal.advise import Effort, effort

    (tmp_path / "toy_video.py").write_text(TOY)
    pairs = itertools.product(("disc", "square"), ("red", "green", "blue"))
    lines = [json.dumps({"id": f"s{n}", "seed": n, "shape": s, "colour": c}) for n, (s, c) in enumerate(pairs)]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    tiny = Effort("tiny", 2, 4, 1, (0.9,), pairs=2, rounds=1, steps_a_bucket=1, published=0, show=True, rungs=1)
    monkeypatch.setitem(effort.EFFORTS, "quick", tiny)
    out = tmp_path / "out"
    words = ["advise", "toy_video:load", "--workload", str(tmp_path / "samples.jsonl"), "--effort", "quick"]
    words += ["-o", str(out), "--max", "drift=100", "--quiet"]
    first = RUNNER.invoke(app, words)
    assert first.exit_code in (0, 1), first.output
    recipe = Recipe.load(out / "recipe.json")
    assert {p.name for p in out.iterdir()} == {"recipe.json", "report.html", "evidence.jsonl", "state"}
    again = RUNNER.invoke(app, [*words, "--resume"])
    assert again.exit_code == first.exit_code and Recipe.load(out / "recipe.json").id == recipe.id
    (out / "state" / "finished").unlink()
    refused = RUNNER.invoke(app, words)
    assert refused.exit_code == 2 and "holds an unfinished run; go on with --resume" in refused.output
    other = RUNNER.invoke(app, [*words, "--resume", "--sensitivity", "gradient"])
    assert other.exit_code == 2 and "belongs to a run with sensitivity='forward'" in other.output
    assert Recipe.load(out / "recipe.json").id == recipe.id
    nothing = RUNNER.invoke(app, [*words, "-o", str(tmp_path / "new"), "--resume"])
    assert nothing.exit_code == 2 and "holds no state of a run" in nothing.output and not (tmp_path / "new").exists()


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a short job on a tiny model; what hangs on the clock is settled, and every recipe is accepted."""
    from glocal.advise import Effort, effort

    from ..advise.fresh import settle

    (tmp_path / "toy_video_again.py").write_text(TOY)
    pairs = itertools.product(("disc", "square"), ("red", "green"))
    lines = [json.dumps({"id": f"s{n}", "seed": n, "shape": s, "colour": c}) for n, (s, c) in enumerate(pairs)]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    tiny = Effort("tiny", 2, 4, 1, (0.9,), pairs=2, rounds=1, steps_a_bucket=1, published=0, rungs=1)
    monkeypatch.setitem(effort.EFFORTS, "quick", tiny)
    settle(monkeypatch.setattr)
    words = ["advise", "toy_video_again:load", "--workload", str(tmp_path / "samples.jsonl"), "--effort", "quick"]
    return [*words, "-o", str(tmp_path / "out"), "--max", "drift=100", "--json"]


def test_a_recipe_that_misses_nothing_is_exit_code_0(toy: list[str], tmp_path: Path) -> None:
    done = RUNNER.invoke(app, [*toy, "--methods", "tile_windows"])
    assert done.exit_code == 0, done.output
    recipe = Recipe.load(tmp_path / "out" / "recipe.json")
    assert recipe.status == json.loads(done.stdout)["status"] == "candidate" and recipe.rules
    assert {"forecast", "measured"} == set(recipe.evidence["attention_time"])


def test_a_refusal_is_exit_code_1_and_the_page_says_it_first(
    toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glocal.advise import run

    why = "Every candidate is slower than the best dense kernel here (cpu)."
    monkeypatch.setattr(run, "_refusal", lambda *args: why)
    done = RUNNER.invoke(app, toy)
    assert done.exit_code == 1, done.output
    recipe = Recipe.load(tmp_path / "out" / "recipe.json")
    assert recipe.status == "dense" and not recipe.rules
    page = (tmp_path / "out" / "report.html").read_text()
    assert why in page[page.index("<body") :][:4000]
