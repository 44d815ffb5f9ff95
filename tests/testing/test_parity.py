from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from glocal import systems
from glocal.testing import Adapter, Case, Run, adapter, check
from glocal.testing.parity import COLUMNS, CaseResult, check_case, table

CASE = Case(Path("x"), "gna", "x", tensors={"in.q": torch.ones(2), "out.a": torch.ones(2), "mid.b": torch.ones(2)})


def run_with(results: dict[str, torch.Tensor], **more) -> CaseResult:
    return check_case(CASE, Adapter("gna", lambda case, where: results, **more), Run())


def test_all_compared_passes() -> None:
    done = run_with({"out.a": torch.ones(2), "mid.b": torch.ones(2) + 1e-6})
    assert done.passed and {c.name for c in done.compared} == {"out.a", "mid.b"}
    assert done.max_error == pytest.approx(1e-6, rel=0.1) and done.tolerance == 1e-4


def test_a_wrong_tensor_fails_and_is_named() -> None:
    done = run_with({"out.a": torch.ones(2), "mid.b": torch.zeros(2)})
    assert not done.passed and done.why == "mid.b: largest error 1 of 1" and done.max_error == 1.0


def test_a_forgotten_tensor_fails() -> None:
    done = run_with({"out.a": torch.ones(2)})
    assert not done.passed and done.why == "mid.b neither compared nor listed as left out"


def test_a_tensor_left_out_has_a_reason() -> None:
    done = run_with({"out.a": torch.ones(2)}, left_out=lambda case: {"mid.b": "order undefined"})
    assert done.passed and done.not_compared == {"mid.b": "order undefined"}


def test_comparing_nothing_fails() -> None:
    done = run_with({}, left_out=lambda case: {"mid.b": "why", "out.a": "why"})
    assert not done.passed and done.why == "nothing was compared"


def test_a_tensor_the_case_does_not_have_fails() -> None:
    done = run_with({"out.a": torch.ones(2), "mid.b": torch.ones(2), "out.c": torch.ones(1)})
    assert not done.passed and "the adapter returns out.c, which the case does not have" in done.why


def test_a_skip_is_not_a_pass() -> None:
    done = run_with({}, skip=lambda case: "not built yet")
    assert not done.passed and done.verdict == "skipped: not built yet"


def test_unknown_systems_get_the_closest_names(tmp_path: Path) -> None:
    (tmp_path / "dinatt").mkdir()
    path = tmp_path / "dinatt" / "a.safetensors"
    save_file({"in.x": torch.ones(1)}, str(path), metadata={"meta": "{}"})
    with pytest.raises(ValueError, match="no system is called 'dinatt'; closest: dinat"):
        check(path)


def test_a_known_system_without_an_adapter_is_skipped(tmp_path: Path) -> None:
    assert adapter("aila") is None
    (tmp_path / "aila").mkdir()
    (tmp_path / "aila" / "a.json").write_text("{}")
    assert check(tmp_path / "aila" / "a.json").skipped == "no adapter: aila is not built yet"


def test_a_case_that_cannot_run_fails_in_words() -> None:
    def broken(case: Case, where: Run) -> dict[str, torch.Tensor]:
        raise RuntimeError("no memory")

    done = check_case(CASE, Adapter("gna", broken), Run())
    assert not done.passed and done.verdict == "FAILED: RuntimeError: no memory"


def test_a_backend_that_cannot_run_a_case_is_a_skip_with_its_reason() -> None:
    def refuses(case: Case, where: Run) -> dict[str, torch.Tensor]:
        raise ValueError(
            f"backend={where.backend!r} cannot run this call: head size 6. For it, backends that can: cpu."
        )

    done = check_case(CASE, Adapter("gna", refuses), Run(backend="flex"))
    assert done.skipped == "backend='flex' cannot run this call: head size 6"
    assert not check_case(CASE, Adapter("gna", refuses), Run()).skipped  # "auto" must find one that can


def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no attention backend is called 'referense'; closest: reference; legal: auto"
    ):
        check(tmp_path / "a.json", backend="referense")


def test_an_unusable_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device='nowhere' cannot be used here"):
        check(tmp_path / "a.json", device="nowhere")


def test_the_table_is_what_the_systems_read(tmp_path: Path) -> None:
    rows = [
        run_with({"out.a": torch.ones(2), "mid.b": torch.ones(2)}),
        run_with({}, skip=lambda case: "not built, yet"),
    ]
    path = tmp_path / "parity.csv"
    path.write_text(table(rows))
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    ran, skipped = systems.evidence(path)
    assert (ran.system, ran.case, ran.passed, ran.skipped) == ("gna", "x", True, "")
    assert (skipped.passed, skipped.skipped) == (False, "not built, yet")
