"""Workloads from files, calls, texts and captures; splits that share nothing; hashes that mean something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from glocal.advise.capture import CallInfo, CapturedCall, captured_calls, load_call, save_capture
from glocal.advise.split import apart, groups, matching
from glocal.advise.workload import Sample, Split, Workload, demo_workload

FIELDS = (("colour", ("red", "blue")), ("shape", ("disc", "ring", "cross")))


def lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def test_json_lines(tmp_path: Path) -> None:
    file = lines(tmp_path / "w.jsonl", {"id": "a", "seed": 3, "colour": "red"}, "", {"id": "b", "seed": 4})
    found = Workload.from_jsonl(file, ["colour"])
    assert found.samples == (Sample("a", 3, {"colour": "red"}), Sample("b", 4, {}))


def test_a_mark_at_the_beginning_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    file = lines(tmp_path / "w.jsonl", {"id": "a", "seed": 3})
    file.write_text(file.read_text(), encoding="utf-8-sig")  # as editors on Windows write
    assert Workload.from_jsonl(file).samples == (Sample("a", 3, {}),)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("{", r"w.jsonl, line 2: not JSON"),
        ("[1]", r"line 2: is list; legal: a record with id, seed and call arguments"),
        ({"seed": 1}, r"line 2: field 'id' is missing"),
        ({"id": "x", "sed": 1}, r"line 2: field 'seed' is missing; nearest field here: 'sed'"),
        ({"id": "", "seed": 1}, r"line 2: id=''; legal: a text that is not empty"),
        ({"id": "x", "seed": -1}, r"line 2: seed=-1; legal: whole numbers from 0"),
        ({"id": "x", "seed": True}, r"line 2: seed=True"),
        (
            {"id": "x", "seed": 1, "color": "red"},
            r"line 2: field 'color' is unknown; legal: id, seed, colour, frames; nearest: 'colour'",
        ),
        ({"id": "a", "seed": 1}, r"line 2: id 'a' appears twice"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, row: object, text: str) -> None:
    file = lines(tmp_path / "w.jsonl", {"id": "a", "seed": 0}, row)
    with pytest.raises(ValueError, match=text):
        Workload.from_jsonl(file, ["colour", "frames"])


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Workload.from_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="has no samples"):
        Workload.from_jsonl(lines(tmp_path / "empty.jsonl"))


def check(split: Split) -> None:
    parts = [split.probe, split.weights, split.validate]
    for name in ("key", "seed"):
        values = [{getattr(s, name) for s in part.samples} for part in parts]
        assert not (values[0] & values[1] or values[0] & values[2] or values[1] & values[2])


def test_splits_share_neither_arguments_nor_seeds() -> None:
    grid = [({"colour": str(i)}, j) for i in range(12) for j in range(12)]
    split = Workload.from_calls([a for a, _ in grid], [s for _, s in grid]).split()
    check(split)
    assert [len(p) for p in (split.probe, split.weights, split.validate)] == [2, 2, 8]
    assert len({s.key for s in split.validate.samples}) == 8
    record = split.records()["validate"]
    assert (record["n"], record["sha256"]) == (8, split.validate.hash())
    assert record["samples"] == [s.record() for s in split.validate.samples]


def test_samples_that_hang_together_stay_together() -> None:
    calls = [{"prompt": i // 2} for i in range(12)]  # six prompts, two seeds each
    split = Workload.from_calls(calls, list(range(12))).split(probe=2, weights=2, validate=6)
    check(split)


def test_splits_do_not_depend_on_the_order_of_lines() -> None:
    samples = demo_workload(12, fields=(*FIELDS, ("pan", ("left", "right", "up")))).samples
    assert Workload(samples).split() == Workload(samples[::-1]).split()


def test_too_small_to_split() -> None:
    same_seed = Workload.from_calls([{"p": i} for i in range(20)], [7] * 20)
    with pytest.raises(
        ValueError,
        match=r"too small to split: probe=2, weights=2 and validate=8 need 12 samples .* it has 20 samples, "
        r"20 different arguments, 1 different seeds. Give every sample arguments and a seed of its own",
    ):
        same_seed.split()
    with pytest.raises(ValueError, match="probe=0; legal: at least 1"):
        same_seed.split(probe=0)


def test_matching_is_largest() -> None:
    # The first choice of each would take 0, 0, 1: paths have to be exchanged.
    assert len(matching([("a", 0), ("b", 0), ("b", 1), ("c", 1), ("c", 2)])) == 3
    assert sorted(map(len, groups([("a", 0), ("b", 0), ("b", 1), ("c", 2)]))) == [1, 3]
    assert apart([("a", 0), ("a", 1)], [1, 1]) is None


def test_hashes_follow_content(tmp_path: Path) -> None:
    one = Workload.from_calls([{"p": 1}, {"p": 2}], [0, 1])
    assert one.hash() == Workload((one.samples[1], one.samples[0])).hash()
    assert one.hash() != Workload.from_calls([{"p": 1}, {"p": 2}], [0, 2]).hash()
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_text("same")
    keys = {Sample("x", 0, {"file": f}).key for f in files}
    assert len(keys) == 1
    x = torch.arange(4.0)
    assert Sample("x", 0, {"t": x}).key == Sample("y", 1, {"t": x.clone()}).key != Sample("y", 1, {"t": x + 1}).key
    with pytest.raises(ValueError, match="sample 'x': an argument is of type object"):
        _ = Sample("x", 0, {"o": object()}).key


def test_calls_and_seeds_go_in_pairs() -> None:
    with pytest.raises(ValueError, match="calls has 2 entries and seeds 1"):
        Workload.from_calls([{}, {}], [1])
    with pytest.raises(ValueError, match="id 'a' appears twice"):
        Workload((Sample("a", 0, {}), Sample("a", 1, {})))
    with pytest.raises(ValueError, match="no samples"):
        Workload(())


def test_texts(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    found = Workload.from_texts(sorted(tmp_path.glob("*.txt")), [16, 32])
    assert len(found) == 6 and found.samples[0].args["tokens"] == 16
    assert found.samples[0].seed == found.samples[1].seed != found.samples[2].seed
    check(found.split(probe=1, weights=1, validate=1))
    (tmp_path / "none").touch()
    with pytest.raises(ValueError, match="is empty"):
        Workload.from_texts([tmp_path / "none"], [1])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Workload.from_texts([tmp_path / "absent"], [1])
    with pytest.raises(ValueError, match="lengths holds 0; legal: at least 1 token"):
        Workload.from_texts([tmp_path / "0.txt"], [0])


def test_demo() -> None:
    found = demo_workload(6, fields=FIELDS, first_seed=5)
    assert len({s.key for s in found.samples}) == 6
    assert [s.seed for s in found.samples] == [5, 6, 7, 8, 9, 10]
    assert found == demo_workload(6, fields=FIELDS, first_seed=5)
    with pytest.raises(ValueError, match="n=7; legal: 1 to 6, the number of conditions"):
        demo_workload(7, fields=FIELDS)


def call(name: str = "s0.l1", canvas: tuple[int, ...] = (2, 3), **more: object) -> CapturedCall:
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    return CapturedCall(CallInfo(name, canvas, **more), q, k, k[..., :5])  # type: ignore[arg-type]


def test_captures_come_back(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    made = [call("b", step=3, total=8, sigma=0.5, branch="cond", seed=4, layer=2, scale=0.1), call("a")]
    save_capture(path, made)
    assert [c.name for c in captured_calls(path)] == ["a", "b"]
    back = load_call(path, "b")
    assert back.info == made[0].info and torch.equal(back.v, made[0].v)
    found = Workload.from_tensors(path)
    assert [s.args["call"] for s in found.samples] == ["a", "b"] and found.samples[1].seed == 4
    with pytest.raises(ValueError, match="has no call 'bb'; nearest: 'b'"):
        load_call(path, "bb")
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_captures_without_records(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "c.safetensors"
    save_file({f"x.{p}": torch.zeros(1, 2, 6, 4) for p in "qkv"}, path)
    with pytest.raises(ValueError, match=r"call 'x' does not say its canvas; give canvas="):
        Workload.from_tensors(path)
    (sample,) = Workload.from_tensors(path, (2, 3)).samples
    assert sample.args["canvas"].size == 6
    with pytest.raises(ValueError, match=r"has 6 queries and 6 keys; its canvas Canvas\(grid=2x4\) has 8 tokens"):
        Workload.from_tensors(path, (2, 4))


def test_broken_captures(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "c.safetensors"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        captured_calls(path)
    path.write_text("no tensors")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        captured_calls(path)
    tensors = {f"x.{p}": torch.zeros(1, 2, 6, 4) for p in "qkv"}
    save_file(tensors, path, metadata={"x": '{"layr": 1}'})
    with pytest.raises(ValueError, match=r"call 'x' has unknown field 'layr'; legal: .*nearest: 'layer'"):
        captured_calls(path)
    save_file(tensors, path, metadata={"format": "other/2"})
    with pytest.raises(ValueError, match="has format 'other/2'; this version reads 'glocal.capture/1'"):
        captured_calls(path)
    save_file({"x.q": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"call 'x' has tensors \['q'\]; legal: q, k, v"):
        captured_calls(path)
    bad = call()
    with pytest.raises(ValueError, match="query heads be a multiple of key heads"):
        save_capture(path, [CapturedCall(bad.info, bad.q[:, :3], bad.k, bad.v)])
    with pytest.raises(ValueError, match="is empty, repeated or reserved"):
        save_capture(path, [call("format")])
    with pytest.raises(ValueError, match="no calls to write"):
        save_capture(path, [])
