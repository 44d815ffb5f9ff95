from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from glocal.models import Variant, create_model, list_models, register_model, variant
from glocal.models.flops import count_macs


def test_names_are_listed_by_pattern_and_system() -> None:
    assert list_models("nat_*") == [n for n in list_models() if n.startswith("nat_")]
    assert "dinat_tiny" in list_models(system="dinat") and list_models("nothing*") == []
    with pytest.raises(ValueError, match="list_models: system='dinta' is unknown; legal: .*; nearest: dinat"):
        list_models(system="dinta")


def test_unknown_names_get_the_closest() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'dinat_tinny'; closest: dinat_tiny"):
        create_model("dinat_tinny")
    with pytest.raises(ValueError, match=r"unknown model '@'; list_models\(\) has them all"):
        variant("@")


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="'nat_mini' is taken by 'dinat'"):
        register_model(torch.nn.Identity, [Variant("nat_mini", "dinat", {})])


def test_classes_channels_and_changes() -> None:
    model: Any = create_model("nat_mini", num_classes=7, in_chans=1, depths=(1, 1, 1, 1))
    assert model.head.out_features == 7 and model.patch_embed.proj[0].in_channels == 1
    told = r"'nat_mini' does not take 'colour'; it takes .*num_classes.*; nearest: .*Published weights are read by"
    with pytest.raises(TypeError, match=told):
        create_model("nat_mini", colour="red")
    with pytest.raises(TypeError, match=r"NAT: image is torch.uint8; legal: floating point"):
        model(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))


def test_multiply_adds_leave_the_model_as_it_is() -> None:
    model = create_model("nat_mini", depths=(1, 1, 1, 1)).train()
    before = dict(model.named_parameters())
    small, large = count_macs(model, 64), count_macs(model, (64, 128))
    assert model.training and all(p is before[n] and p.device.type == "cpu" for n, p in model.named_parameters())
    assert small < large < 2.2 * small and count_macs(model, 64, batch=2) == 2 * small


def test_stated_multiply_adds_equal_counted_ones() -> None:
    """A window as large as the map is dense attention, which torch's counter knows."""
    from torch.utils.flop_counter import FlopCounterMode

    from glocal.nn.dinat import DilatedNeighborhoodAttention

    layer = DilatedNeighborhoodAttention(8, 2, window=5)
    layer.spec = replace(layer.spec, backend="reference")  # visits all pairs
    x = torch.zeros(2, 5, 5, 8)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert layer.macs(x) == counter.get_total_flops() // 2
