from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glocal.nn.mixer import begin, list_mixers, mixer, register_mixer

OWN = """
import torch

class Own(torch.nn.Module):
    def __init__(self, dim, heads, power=1):
        super().__init__()
        self.power = power

    def begin(self, x):
        return x.mean()

    def forward(self, x, stage=None):
        return x * stage ** self.power
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize("name", list_mixers())
@pytest.mark.parametrize("size", [(14, 14), (9, 13)])
def test_every_name_builds_a_mixer(name: str, size: tuple[int, int]) -> None:
    x = torch.randn(2, *size, 32, generator=torch.Generator().manual_seed(0))
    mixers = torch.nn.ModuleList(mixer(name, 32, 4, block=block) for block in (0, 1)).eval()
    stage = begin(mixers, x)
    for each in mixers:
        x = each(x, stage)
    assert x.shape == (2, *size, 32) and bool(x.isfinite().all())


@pytest.mark.parametrize("name", [n for n in list_mixers() if n != "pvt"])  # which attends over sequences too
def test_maps_of_another_shape_are_told_how_they_go_in(name: str) -> None:
    layer = mixer(name, 32, 4).eval()
    for shape, hint in (
        ((2, 32, 8, 12), r"must be \[batch, 2 map axes, 32\]; channels come last: x.permute\(0, 2, 3, 1\)"),
        ((2, 96, 32), r"a sequence becomes a map by x.unflatten\(1, map axes\)"),
        ((2, 8, 12, 31), r"x of shape \(2, 8, 12, 31\) must be \[batch, 2 map axes, 32\]\."),
    ):
        with pytest.raises(ValueError, match=f"{type(layer).__name__}: .*{hint}"):
            layer(torch.zeros(shape))


def test_anybodys_file(file: Path) -> None:
    own = mixer(f"{file}:Own", 8, 2, power=2)
    x = torch.full((1, 2, 2, 8), 3.0)
    assert torch.equal(own(x, begin([torch.nn.Identity(), own], x)), x * 9)
    assert begin([torch.nn.Identity()], x) is None


def test_refuses_in_words(file: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown name 'dinta'; closest: 'dinat'.*or give a file as 'file.py:Class'"):
        mixer("dinta", 8, 2)
    with pytest.raises(ValueError, match=r"'dinat' does not take 'colour'; it takes window, dilation"):
        mixer("dinat", 8, 2, colour=1)
    with pytest.raises(ValueError, match=r"own.py has no class 'Onw'; closest: 'Own'"):
        mixer(f"{file}:Onw", 8, 2)
    with pytest.raises(ValueError, match="names no class; write 'file.py:Class'"):
        mixer(str(file), 8, 2)
    with pytest.raises(FileNotFoundError, match="no such file for a mixer"):
        mixer("absent.py:Own", 8, 2)


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match=r"'dinat' is already glocal.nn.dinat.DilatedNeighborhoodAttention"):
        register_mixer("dinat")(torch.nn.Linear)
