"""Every registered variant against its published figures, and every manifest against our keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glocal import systems
from glocal.models import create_model, list_models, variant
from glocal.models.flops import count_macs
from glocal.testing import adapters, check

BACKBONES = ("biformer", "davit", "dinat", "duoformer", "gc_vit", "hilo", "inline", "l2vit", "maxvit", "sg_former",
             "stvit")  # fmt: skip


@pytest.mark.parametrize("name", list_models())
def test_parameters_and_multiply_adds(name: str) -> None:
    found = variant(name)
    assert found.system in ("", *(row.slug for row in systems.systems()))
    with torch.device("meta"):
        model = create_model(name)
    if found.params is not None:
        assert sum(p.numel() for p in model.parameters()) == found.params
    if found.gflops is not None:
        assert count_macs(model, found.size) / 1e9 == pytest.approx(found.gflops, rel=0.02)


@pytest.mark.parametrize("system", [s for s in BACKBONES if s in adapters()])
def test_manifests_load_strictly(system: str, golden: Callable[[str], Path]) -> None:
    for file in sorted(golden(system).glob("*.keys.json")):
        found = check(file)
        assert found.passed, f"{file.name}: {found.why or found.skipped}"
