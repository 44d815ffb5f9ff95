from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from glocal.testing.case import load


def test_reads_roles_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "gna" / "one.safetensors"
    path.parent.mkdir()
    tensors = {"in.x": torch.ones(2), "out.y": torch.zeros(3), "grad.x": torch.ones(2), "state.a.b": torch.ones(1)}
    save_file(tensors, str(path), metadata={"meta": '{"source": "s", "config": {"k": 3}, "note": "n"}'})
    case = load(path)
    assert (case.system, case.name, case.source, case.config, case.note) == ("gna", "one", "s", {"k": 3}, "n")
    assert set(case.results()) == {"out.y", "grad.x"}
    assert set(case.group("state")) == {"a.b"}
    with pytest.raises(ValueError, match=r"case 'one' has no tensor 'in.z'; it has grad.x, in.x, out.y, state.a.b"):
        case["in.z"]


def test_reads_json_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "small.keys.json").write_text('{"params": 3}')
    case = load(tmp_path / "small.keys.json")
    assert (case.name, case.record, case.results()) == ("small.keys", {"params": 3}, {})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "a golden case is a .safetensors or a .json file, not '.txt'"),
        ("a.json", b"{", "is not JSON"),
        ("a.safetensors", b"nonsense", "is not a safetensors file"),
    ],
)
def test_refuses_in_words(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load(tmp_path / name)


def test_refuses_tensors_without_a_role(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, str(tmp_path / "a.safetensors"), metadata={"meta": "{}"})
    with pytest.raises(ValueError, match=r"tensors x have no role; legal prefixes: in, state, out, mid, grad"):
        load(tmp_path / "a.safetensors")
    save_file({"in.x": torch.ones(1)}, str(tmp_path / "b.safetensors"))
    with pytest.raises(ValueError, match="has no metadata entry 'meta'"):
        load(tmp_path / "b.safetensors")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "none.safetensors")
