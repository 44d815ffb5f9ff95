"""ResNet (arXiv 1512.03385) under torchvision's key names: `conv1`, `bn1`, `layer1` ... `layer4`, no classifier.

The stride of a bottleneck lies on its 3 x 3 convolution, as in torchvision's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

ResNetName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


@dataclass(frozen=True)
class ResNetShape:
    """depths: residuals of each layer. bottleneck: three convolutions a residual, four times the channels."""

    depths: tuple[int, int, int, int]
    bottleneck: bool


SHAPES: dict[ResNetName, ResNetShape] = {
    "resnet18": ResNetShape((2, 2, 2, 2), False),
    "resnet34": ResNetShape((3, 4, 6, 3), False),
    "resnet50": ResNetShape((3, 4, 6, 3), True),
    "resnet101": ResNetShape((3, 4, 23, 3), True),
    "resnet152": ResNetShape((3, 8, 36, 3), True),
}


class Residual(nn.Module):
    """relu(x + bn(conv(...relu(bn(conv(x)))))); keys `conv{i}`, `bn{i}`, `downsample.0`, `downsample.1`.

    dim, out: channels. width: those inside. stride: of the first 3 x 3 convolution and of the shortcut. bottleneck:
    1 x 1, 3 x 3, 1 x 1 convolutions instead of two of 3 x 3. The shortcut is a 1 x 1 convolution where shapes differ.
    """

    def __init__(self, dim: int, width: int, out: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        if bottleneck:
            plan = ((dim, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1))
        else:
            plan = ((dim, width, 3, stride), (width, out, 3, 1))
        self.count = len(plan)
        for i, (a, b, kernel, step) in enumerate(plan, 1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(b))
        self.relu = nn.ReLU()
        self.downsample: nn.Sequential | None = None
        if stride != 1 or dim != out:
            self.downsample = nn.Sequential(nn.Conv2d(dim, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, dim, H, W] -> [B, out, ceil(H / stride), ceil(W / stride)]."""
        short = x if self.downsample is None else self.downsample(x)
        for i in range(1, self.count + 1):
            x = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(x))
            if i < self.count:
                x = self.relu(x)
        return self.relu(x + short)


class ResNet(nn.Module):
    """The trunk: `forward` gives the maps of the four layers.

    name: one of `SHAPES`. channels, strides: of the four maps.
    """

    strides = (4, 8, 16, 32)

    def __init__(self, name: ResNetName = "resnet50", in_chans: int = 3) -> None:
        super().__init__()
        if name not in SHAPES:
            raise ValueError(f"ResNet: name={name!r}; legal: {', '.join(get_args(ResNetName))}.")
        shape = SHAPES[name]
        times = 4 if shape.bottleneck else 1
        self.channels = tuple(times * 64 * 2**i for i in range(4))
        self.conv1 = nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        dim = 64
        for i, (depth, out) in enumerate(zip(shape.depths, self.channels, strict=True)):
            residuals = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                residuals.append(Residual(dim, 64 * 2**i, out, stride, shape.bottleneck))
                dim = out
            self.add_module(f"layer{i + 1}", nn.Sequential(*residuals))
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def stem(self) -> tuple[nn.Module, ...]:
        """What comes before the first layer, in order."""
        return (self.conv1, self.bn1, self.relu, self.maxpool)

    def layers(self) -> tuple[nn.Module, ...]:
        """The four layers, in order."""
        return tuple(self.get_submodule(f"layer{i}") for i in range(1, 5))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """image: [B, in_chans, H, W] -> four maps [B, channels[i], ceil(H / strides[i]), ceil(W / strides[i])]."""
        x, maps = image, []
        for part in self.stem():
            x = part(x)
        for layer in self.layers():
            x = layer(x)
            maps.append(x)
        return tuple(maps)
