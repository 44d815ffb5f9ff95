"""The frame of the command line, and the verbs list, show and env."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from types import ModuleType

import pytest
from typer.testing import CliRunner

from glocal import cli
from glocal._errors import CheckFailed, GlocalError

runner = CliRunner()


def run(*words: str) -> tuple[int, str, str]:
    done = runner.invoke(cli.app, list(words))
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The verb `env` with a command that raises what the test puts into `error`."""
    module = importlib.import_module("glocal.cli.env")

    def command() -> None:
        raise module.error  # type: ignore[attr-defined]

    monkeypatch.setattr(module, "command", command)
    monkeypatch.setattr(module, "error", ValueError("window=9: the canvas has 5"), raising=False)
    return module


def test_help_lists_the_verbs_with_one_line_each() -> None:
    code, out, _ = run("--help")
    assert code == 0
    for verb in cli.verbs():
        assert f"\n  {verb} " in out


@pytest.mark.parametrize("verb", cli.verbs())
def test_every_verb_explains_itself(verb: str) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert out.startswith("Usage: ")
    assert verb in out.splitlines()[0]


def test_version() -> None:
    assert run("--version") == (0, "glocal 0.1.0\n", "")


def test_unknown_verb_names_the_closest() -> None:
    code, out, err = run("lisst")
    assert (code, out) == (2, "")
    assert err == "error: glocal has no verb 'lisst'; closest: list\n"


def test_python_m_glocal_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "glocal", "show", "gan"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no system is called 'gan'; closest: gna")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("window=9: the canvas has 5"), 2, "error: window=9: the canvas has 5\n"),
        (KeyError("no key 'q'"), 2, "error: no key 'q'\n"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), 2, "error: No such file or directory: a.json\n"),
        (GlocalError("give a folder"), 2, "error: give a folder\n"),
        (CheckFailed("1 of 3 cases failed"), 1, "failed: 1 of 3 cases failed\n"),
    ],
)
def test_an_error_is_one_message_and_an_exit_code(
    faulty: ModuleType, error: Exception, code: int, message: str
) -> None:
    faulty.error = error  # type: ignore[attr-defined]
    assert run("env") == (code, "", message)


def test_debug_raises(faulty: ModuleType) -> None:
    done = runner.invoke(cli.app, ["--debug", "env"])
    assert isinstance(done.exception, ValueError)


def test_list_is_a_plain_table_without_a_terminal() -> None:
    code, out, _ = run("list")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["system", "kind", "local", "global", "merge", "host", "status"]
    assert len(lines) == 53
    assert lines[-1] == "51 of 51 systems"


def test_list_filters() -> None:
    code, out, _ = run("list", "--kind", "backbone", "--local", "neighborhood", "--json")
    assert code == 0
    assert [row["slug"] for row in json.loads(out)] == ["dinat"]
    assert {row["status"]["state"] for row in json.loads(run("list", "--status", "planned", "--json")[1])} <= {
        "planned"
    }


def test_list_refuses_a_kind_that_is_none() -> None:
    code, out, err = run("list", "--global", "mean")
    assert (code, out) == (2, "")
    assert err.startswith("error: --global='mean' is unknown; legal: dense, dilated, ")


def test_show() -> None:
    code, out, _ = run("show", "radial")
    assert code == 0
    assert "https://arxiv.org/abs/2506.19852 (NeurIPS 2025)" in out
    row = json.loads(run("show", "radial", "--json")[1])
    assert (row["slug"], row["global"], row["url"]) == ("radial", ["dilated"], "https://arxiv.org/abs/2506.19852")


def test_env_names_versions_and_devices() -> None:
    import torch

    found = json.loads(run("env", "--json")[1])
    assert found["packages"]["torch"] == torch.__version__
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["cores"] >= 1
    assert "python" in run("env")[1]
