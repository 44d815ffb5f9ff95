"""Launches of Triton kernels: a known kind of call goes straight to its compiled kernel, others through Triton."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


class Compiled:
    """As much of a compiled kernel as a launch asks for."""

    function, packed_metadata = 7, (1, 2)

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []

    def run(self, *given: Any) -> None:
        self.runs.append(given)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A kernel that keeps its compiled forms in `made`, on a device that is not there."""
    from triton.runtime.jit import JITFunction

    from glocal.kernels import _launch

    class Kernel(JITFunction):
        def __init__(self) -> None:
            names = (("x", None), ("n", None), ("scale", None), ("KEEP", None), ("WIDE", 4))
            self.params = [SimpleNamespace(name=name, default=default) for name, default in names]  # type: ignore[assignment]
            self.made: list[Compiled] = []

        def __getitem__(self, grid: Any) -> Any:
            def start(*arguments: Any, **constants: Any) -> Compiled:
                self.made.append(Compiled())
                return self.made[-1]

            return start

        def __hash__(self) -> int:
            return id(self)

    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 11)
    monkeypatch.setattr(_launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(_launch, "_ABLE", True)
    monkeypatch.setattr(_launch, "_KNOWN", {})
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    return Kernel()


def test_the_same_kind_goes_straight_to_the_compiled_kernel(kernel: Any) -> None:
    from glocal.kernels._launch import start

    x, y = torch.zeros(8), torch.ones(8)
    start(kernel, (3,), x, 5, 0.5, KEEP=True, num_warps=4)
    start(kernel, (9, 2), y, 5, 0.25, KEEP=True, num_warps=4)
    (made,) = kernel.made
    ((*head, third, n, scale, keep, wide),) = made.runs
    assert head == [9, 2, 1, 11, 7, (1, 2), None, None, None]
    assert third is y and (n, scale, keep, wide) == (5, 0.25, True, 4)  # defaults behind constants, num_warps nowhere


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"x": torch.zeros(8, dtype=torch.bfloat16)}, False),
        ({"x": torch.zeros(9)[1:]}, False),  # 4 bytes further: loads of 16 bytes do not fit
        ({"x": torch.zeros(12)[4:]}, True),
        ({"n": 6}, False),
        ({"n": None}, False),
        ({"scale": 7.0}, True),
        ({"scale": (torch.zeros(2), 3)}, False),
        ({"KEEP": False}, False),
        ({"num_warps": 8}, False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_kinds_are_asked_of_triton(kernel: Any, change: dict[str, Any], same: bool) -> None:
    from glocal.kernels._launch import start

    def call(x: Any, n: Any, scale: Any, **constants: Any) -> None:
        start(kernel, (1,), x, n, scale, **constants)

    usual: dict[str, Any] = {"x": torch.zeros(8), "n": 5, "scale": 0.5, "KEEP": True, "num_warps": 4}
    call(**usual)
    call(**{**usual, **change})
    assert len(kernel.made) == (1 if same else 2)


def test_tensors_on_the_cpu_and_profilers_take_tritons_way(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from glocal.kernels import _launch

    x = torch.zeros(8)
    hooks = SimpleNamespace(runtime=SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[print])))
    with monkeypatch.context() as watched:
        watched.setattr(_launch, "knobs", hooks)
        for _ in range(2):
            _launch.start(kernel, (1,), x, 5, 0.5, KEEP=True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: False))
    for _ in range(2):
        _launch.start(kernel, (1,), x, 5, 0.5, KEEP=True)
    assert len(kernel.made) == 4 and not any(made.runs for made in kernel.made)
