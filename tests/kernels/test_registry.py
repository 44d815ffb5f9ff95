"""The choice of a backend is a pure function of records: any device can be asked about anywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from glocal.kernels import registry
from glocal.kernels.capability import Sizes, refusals, version
from glocal.kernels.registry import Request

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
        ({"device": "cuda", "dtype": torch.bfloat16}, "flex"),
        ({"device": "cuda", "dtype": torch.bfloat16, "sparse": False}, "dense"),
        ({"device": "cuda", "dtype": torch.float64, "nq": 64, "nk": 64}, "reference"),
        ({"device": "cuda", "head_dim": 320, "nq": 64, "nk": 64}, "reference"),
        ({"device": "mps", "nq": 64, "nk": 64}, "reference"),
    ],
)
def test_auto(changes: dict, want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from glocal.kernels import flex

    monkeypatch.setattr(flex, "missing", lambda device: None)
    assert picked(replace(BASE, **changes)) == want


def test_what_a_machine_lacks_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from glocal.kernels import flex

    monkeypatch.setattr(flex, "missing", lambda device: "triton is not installed")
    small = replace(BASE, device="cuda", nq=64, nk=64)
    found = registry.pick(small, "auto", blocks=None, kept=0.3)
    assert found.name == "reference" and "not flex: triton is not installed" in found.why
    with pytest.raises(ValueError, match="backend='flex' cannot run this call: triton is not installed"):
        picked(small, "flex")


def test_an_unmeasured_backend_runs_when_named_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from glocal.kernels import flex, triton

    for module in (flex, triton):
        monkeypatch.setattr(module, "missing", lambda device: None)
    small = replace(BASE, device="cuda", nq=64, nk=64)
    found = registry.pick(small, "auto", blocks=(64, 64), kept=0.3)  # flex takes no blocks of 64
    assert found.name == "reference" and "not triton: not yet measured on a GPU" in found.why
    assert picked(small, "triton", (64, 64)) == "triton"
    with pytest.raises(ValueError, match=r"query block 48 \(legal: powers of two from 16 to 128\)"):
        picked(small, "triton", (48, 64))
    text = registry.explain(small, "auto", blocks=(64, 64), kept=0.3)
    assert "triton: could run too (not yet measured on a GPU, runs when named)" in text


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
        ValueError, match=r"backend='refrence' is unknown; legal: auto, dense, cpu, .*flex, triton, .*reference. Nea"
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
