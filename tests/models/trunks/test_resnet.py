from __future__ import annotations

import pytest
import torch

from glocal.models.trunks.resnet import ResNet, ResNetName


@pytest.mark.parametrize(
    ("name", "params", "last"),
    [("resnet18", 11_176_512, 512), ("resnet34", 21_284_672, 512), ("resnet50", 23_508_032, 2048),
     ("resnet101", 42_500_160, 2048), ("resnet152", 58_143_808, 2048)],
)  # fmt: skip
def test_published_sizes(name: ResNetName, params: int, last: int) -> None:
    with torch.device("meta"):
        trunk = ResNet(name)
        maps = trunk(torch.empty(1, 3, 97, 131))
    assert sum(p.numel() for p in trunk.parameters()) == params
    assert trunk.channels[-1] == last
    assert [tuple(m.shape[2:]) for m in maps] == [(25, 33), (13, 17), (7, 9), (4, 5)]


def test_key_names_are_torchvisions() -> None:
    with torch.device("meta"):
        names = set(ResNet("resnet50").state_dict())
    wanted = {"conv1.weight", "bn1.running_var", "layer1.0.conv3.weight", "layer2.0.downsample.1.bias",
              "layer4.2.bn3.weight"}  # fmt: skip
    assert wanted <= names and "layer1.1.downsample.0.weight" not in names


def test_equals_torchvision() -> None:
    models = pytest.importorskip("torchvision.models")
    ours, theirs = ResNet("resnet18").eval(), models.resnet18().eval()
    ours.load_state_dict({n: t for n, t in theirs.state_dict().items() if not n.startswith("fc.")}, strict=True)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
    for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        x = layer(x)
    assert torch.equal(ours(image)[-1], x)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="name='resnet42'; legal: resnet18, resnet34, resnet50, resnet101, resnet152"):
        ResNet("resnet42")  # type: ignore[arg-type]
