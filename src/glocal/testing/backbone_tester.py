"""The examination every vision backbone passes, at sizes its method allows.

    class TestMine(BackboneTester):
        def make(self, **keywords):
            return Mine(dim=16, depths=(1, 1), **keywords)

Put it in a file that pytest collects; keep the model tiny.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from glocal.models.vision.base import VisionBackbone
from glocal.testing._common import Bad, close, draw, refused


class BackboneTester:
    """Base of backbone tests; subclasses give `make`, and `bad` if something is to be refused.

    sizes: image sizes (height, width), an odd and non-square one first. common: sizes that people have, tried with one
    image. compiles: in one graph, and exports.
    unused: endings of parameters without a gradient, each known and stated by the model. dtype, tolerance: of models
    and images where one result is computed in two ways.
    """

    sizes: tuple[tuple[int, int], ...] = ((45, 70), (64, 64))
    common: tuple[tuple[int, int], ...] = ((224, 224), (384, 384), (512, 683), (97, 131))
    compiles = True
    unused: tuple[str, ...] = ()
    dtype = torch.float32
    tolerance = 1e-4

    def make(self, **keywords: Any) -> VisionBackbone:
        """A tiny model; keywords are num_classes, in_chans and features_only."""
        raise TypeError(f"{type(self).__name__} must define make().")

    def bad(self) -> Sequence[Bad]:
        """Calls that must raise a ValueError, each with words of its message."""
        return []

    def pair(self) -> tuple[VisionBackbone, Tensor]:
        """A model and images of `dtype`."""
        return self.model().to(self.dtype), self.image(self.sizes[0]).to(self.dtype)

    def model(self, **keywords: Any) -> VisionBackbone:
        """A model in evaluation mode with the same parameters every time."""
        model = self.make(**{"num_classes": 5, **keywords})
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            size = 1.3 / max(parameter[0].numel(), 1) ** 0.5 if parameter.dim() > 1 else 0.2
            start = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.data = start + draw(parameter.shape, 100 + seed).mul(size).to(parameter)
        return model.eval()

    def image(self, size: tuple[int, int], batch: int = 2, seed: int = 0) -> Tensor:
        """A batch of images of three channels."""
        return draw((batch, 3, *size), seed, torch.float32)

    def side(self, length: int, stride: int) -> int:
        """Tokens that a level of `stride` has along `length` px."""
        return ceil(length / stride)

    def test_forward(self) -> None:
        model = self.model()
        for size in self.sizes:
            y = model(self.image(size))
            assert y.shape == (2, 5) and bool(y.isfinite().all()) and y.std() > 0, size

    def test_common_sizes(self) -> None:
        model = self.model(features_only=True)
        for size in self.common:
            with torch.no_grad():
                maps = model(self.image(size, batch=1))
            for y, channels, stride in zip(maps, model.channels, model.strides, strict=True):
                assert y.shape == (1, channels, *(self.side(length, stride) for length in size)), (size, stride)
                assert bool(y.isfinite().all()) and y.std() > 0, size

    def test_features(self) -> None:
        model = self.model(features_only=True)
        for size in self.sizes:
            maps = model(self.image(size))
            assert len(maps) == len(model.channels) == len(model.strides)
            for y, channels, stride in zip(maps, model.channels, model.strides, strict=True):
                assert y.shape == (2, channels, *(self.side(length, stride) for length in size)), (size, stride)

    def test_classes_and_channels(self) -> None:
        assert self.model(num_classes=0)(self.image(self.sizes[0])).dim() == 2
        image = draw((1, 1, *self.sizes[0]), 0, torch.float32)
        assert self.model(in_chans=1)(image).shape == (1, 5)

    def test_batches_of_none_and_one(self) -> None:
        model, images = self.pair()
        assert model(images[:0]).shape == (0, 5)
        close(model(images[1:]), model(images)[1:], self.tolerance, "the second sample alone")

    def test_memory_format_does_not_matter(self) -> None:
        model, images = self.pair()
        close(model(images.to(memory_format=torch.channels_last)), model(images), self.tolerance, "channels_last")

    def test_every_parameter_learns(self) -> None:
        model = self.model()
        images = self.image(self.sizes[0]).requires_grad_()
        model(images).square().sum().backward()
        for name, t in {"image": images, **dict(model.named_parameters())}.items():
            if not name.endswith(self.unused or ("\0",)):
                assert t.grad is not None and bool(t.grad.isfinite().all()) and bool((t.grad != 0).any()), name

    def test_trains(self) -> None:
        model = self.model().train()
        y = model(self.image(self.sizes[0]))
        y.sum().backward()
        assert bool(y.isfinite().all())

    def test_checkpointing_changes_nothing(self) -> None:
        grads = []
        for on in (False, True):
            model = self._without_chance().to(self.dtype)
            model.set_checkpointing(on)
            model(self.image(self.sizes[0]).to(self.dtype)).square().sum().backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        close(grads[1], grads[0], self.tolerance, "gradients with checkpointing")

    def test_bfloat16(self) -> None:
        images = self.image(self.sizes[0])
        exact, y = self.model()(images), self.model().bfloat16()(images.bfloat16())
        assert y.dtype == torch.bfloat16
        close(y.float(), exact, 0.2, "bfloat16")

    def test_compiles_in_one_graph(self) -> None:
        if not self.compiles:
            return
        torch._dynamo.reset()
        model, images = self.pair()
        close(
            torch.compile(model, fullgraph=True, backend="aot_eager")(images), model(images), self.tolerance, "compiled"
        )

    def test_exports(self) -> None:
        if not self.compiles:
            return
        model, images = self.pair()
        close(torch.export.export(model, (images,)).module()(images), model(images), self.tolerance, "exported")

    def test_state_saves_and_loads(self) -> None:
        model, fresh = self.model(), self.make(num_classes=5).eval()
        fresh.load_state_dict(model.state_dict(), strict=True)
        images = self.image(self.sizes[0])
        assert torch.equal(fresh(images), model(images))

    def test_no_weight_decay_names_parameters(self) -> None:
        model = self.model()
        assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}

    def test_refuses_in_words(self) -> None:
        model = self.model()
        rank = (lambda: model(torch.zeros(3, 64, 64)), "must be [batch, 3, H, W]")
        channels = (lambda: model(torch.zeros(1, 4, 64, 64)), "in_chans=4 would fit it")
        classes = (lambda: self.make(num_classes=-1), "num_classes=-1 must be at least 0")
        refused([rank, channels, classes, *self.bad()])

    def _without_chance(self) -> VisionBackbone:
        """The model in training, its random parts switched off."""
        model = self.model().train()
        for layer in model.modules():
            if isinstance(layer, torch.nn.Dropout | torch.nn.modules.batchnorm._BatchNorm):
                layer.eval()
            if hasattr(layer, "rate"):
                layer.eval()
        return model
