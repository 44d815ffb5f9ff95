from __future__ import annotations

import importlib.util

import pytest
import torch

from glocal.models import create_model, list_models
from glocal.models.checkpoints import fill
from glocal.models.timm_bridge import register_with_timm

HAVE = importlib.util.find_spec("timm") is not None
needs_timm = pytest.mark.skipif(not HAVE, reason="timm is not installed")


@pytest.mark.skipif(HAVE, reason="timm is installed")
def test_says_what_is_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match="register_with_timm needs timm: pip install timm"):
        register_with_timm()


@needs_timm
def test_variants_are_built_by_timm() -> None:
    import timm  # type: ignore[import-not-found]

    assert register_with_timm() == register_with_timm() == [f"glocal_{name}" for name in list_models()]
    model = timm.create_model("glocal_davit_tiny", num_classes=3, depths=(1, 1, 1, 1))
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(ValueError, match="pretrained=True has no file to download"):
        timm.create_model("glocal_davit_tiny", pretrained=True)


@needs_timm
@pytest.mark.parametrize(("ours", "theirs"), [("davit_tiny", "davit_tiny"), ("davit_base_florence2", "davit_base_fl")])
def test_davit_equals_timms(ours: str, theirs: str) -> None:
    import timm  # type: ignore[import-not-found]

    classes = 7 if ours == "davit_tiny" else 0
    reference, model = (
        timm.create_model(theirs, num_classes=classes).eval(),
        create_model(ours, num_classes=classes).eval(),
    )
    fill(model, reference.state_dict())
    image = torch.randn(1, 3, 70, 101, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = reference(image)
        assert float((model(image) - wanted).abs().max() / wanted.abs().max()) < 1e-4
