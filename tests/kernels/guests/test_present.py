"""What a guest needs is read from package metadata, and said with the command that mends it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError

import pytest

from glocal.kernels.guests import present


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Packages that seem to be installed."""
    found: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    present._installed.cache_clear()
    monkeypatch.setattr(present, "version", version)
    yield found
    present._installed.cache_clear()


def test_missing_old_and_new_packages(installed: dict[str, str]) -> None:
    needs = (("flash-attn-4", "4.0.0b36"), ("other", "1.2"))
    want = "flash-attn-4 is not installed (pip install --pre 'flash-attn-4>=4.0.0b36')"
    assert present.lacking(needs, (9,), "cpu") == want
    installed.update({"flash-attn-4": "4.0.0b9", "other": "1.10.1"})
    present._installed.cache_clear()
    assert present.lacking(needs, (9,), "cpu") == (
        "flash-attn-4 4.0.0b9 is older than 4.0.0b36 (pip install --pre 'flash-attn-4>=4.0.0b36')"
    )
    for good in ("4.0.0b36", "4.0.0b37", "4.0.0rc1", "4.0.0", "4.1.0b1", "4.0.0+cu13"):
        installed["flash-attn-4"] = good
        present._installed.cache_clear()
        assert present.lacking(needs, (9,), "cpu") is None, good


def test_the_card_must_have_kernels(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(present.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(present.torch.cuda, "get_device_capability", lambda: (8, 6))
    assert present.lacking((), (9, 10), "cuda") == "compute capability 8.6 (legal: 9.x, 10.x)"
    assert present.lacking((), (8,), "cuda") is None


def test_asking_for_guests_imports_none() -> None:
    code = (
        "import sys, glocal; from glocal.kernels import registry; [b.missing('cpu') for b in registry.backends()];"
        "bad = {'flash_attn', 'cudnn', 'cutlass', 'quack'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
