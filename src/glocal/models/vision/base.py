"""What every vision backbone here has in common: levels, features, head, checkpointing.

A backbone is a list of levels. `maps(image)` gives the map of each, channels last; the rest follows from it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glocal.nn.blocks import LayerNorm, to_nchw
from glocal.nn.blocks.relative import Resize

TableLayout = Literal["heads_first", "flat"]  # [heads, 2h-1, 2w-1], or Swin's [(2h-1)(2w-1), heads]


class VisionBackbone(nn.Module, ABC):
    """Base of the vision models.

    A subclass builds its parts, sets `channels`, `strides` (one entry a level), `num_classes`, and gives `maps`,
    `pool` and `head`.

    features_only: `forward` returns the maps of the levels as [B, C, H, W]; the model then has no head, and where the
        published dense-prediction class has one, a LayerNorm `norm{i}` on each level.
    """

    ignored: ClassVar[tuple[str, ...]] = ()  # endings of checkpoint keys that hold no weights (indices, masks)
    classifier: ClassVar[str] = "head"  # the layer whose size follows the number of classes
    behind: ClassVar[tuple[str, ...]] = ()  # further starts of checkpoint keys that a features model has no use for
    tables: ClassVar[Mapping[str, TableLayout]] = {}  # endings of relative tables, and how they lie
    table_resize: ClassVar[Resize] = "bicubic"  # how the authors interpolate them
    undecayed: ClassVar[tuple[str, ...]] = ()  # endings of parameters that weight decay leaves alone

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    head: nn.Module
    norm: nn.Module

    def __init__(self, num_classes: int, in_chans: int, features_only: bool) -> None:
        super().__init__()
        name = type(self).__name__
        if num_classes < 0:
            raise ValueError(f"{name}: num_classes={num_classes} must be at least 0 (0 is no classifier).")
        if in_chans < 1:
            raise ValueError(f"{name}: in_chans={in_chans} must be at least 1.")
        self.num_classes, self.in_chans, self.features_only = num_classes, in_chans, features_only
        self.checkpointing = False

    @abstractmethod
    def maps(self, image: Tensor) -> list[Tensor]:
        """image: [B, in_chans, H, W] -> the map of each level before its downsampler, [B, h, w, channels[i]]."""

    @abstractmethod
    def pool(self, last: Tensor) -> Tensor:
        """last: the last of `maps` -> [B, C], what the classifier reads."""

    def features(self, image: Tensor) -> list[Tensor]:
        """The levels as [B, channels[i], h, w], normalised where the model has level norms."""
        self._check(image)
        maps = []
        for i, level in enumerate(self.maps(laid_out(image))):
            norm = getattr(self, f"norm{i}", None)
            maps.append(to_nchw(level if norm is None else norm(level)))
        return maps

    def forward(self, image: Tensor) -> Any:
        """image: [B, in_chans, H, W] -> logits [B, num_classes] (pooled features for 0 classes), or the features."""
        if self.features_only:
            return self.features(image)
        self._check(image)
        return self.head(self.pool(self.maps(laid_out(image))[-1]))

    def set_checkpointing(self, on: bool = True) -> None:
        """Recompute blocks in backward instead of keeping their activations (also timm's `set_grad_checkpointing`)."""
        self.checkpointing = on

    set_grad_checkpointing = set_checkpointing

    def run(self, block: nn.Module, *args: Any) -> Any:
        """Call a block, with gradient checkpointing where it is on."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay beyond one-dimensional ones, as the authors trained."""
        return (
            {name for name, _ in self.named_parameters() if name.endswith(self.undecayed)} if self.undecayed else set()
        )

    @classmethod
    def convert(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of another published layout (timm, transformers) to the authors'; others pass unchanged."""
        return dict(state)

    def pyramid(self, dims: Sequence[int], **per_level: tuple[Any, ...]) -> None:
        """Set `channels` to `dims` and `strides` to 4, 8, 16, ...; values of `per_level` need one entry a level."""
        for name, values in per_level.items():
            per_stage(name, values, len(dims), type(self).__name__)
        self.channels, self.strides = tuple(dims), tuple(4 * 2**i for i in range(len(dims)))

    def add_end(self, norm: str = "norm") -> None:
        """LayerNorm `norm` and the classifier; with `features_only` LayerNorms `norm0`, `norm1`, ... of the levels, as
        in published dense-prediction classes.
        """
        if self.features_only:
            for i, channels in enumerate(self.channels):
                self.add_module(f"norm{i}", LayerNorm(channels))
        else:
            self.add_module(norm, LayerNorm(self.channels[-1]))
            self.head = self.make_head(self.channels[-1])

    def make_head(self, dim: int) -> nn.Module:
        """The linear classifier, or the identity for 0 classes."""
        return nn.Linear(dim, self.num_classes) if self.num_classes > 0 else nn.Identity()

    def _check(self, image: Tensor) -> None:
        if not image.is_floating_point():
            raise TypeError(
                f"{type(self).__name__}: image is {image.dtype}; legal: floating point, such as image.float() / 255 "
                "less the mean, over the deviation."
            )
        if image.dim() != 4 or image.shape[1] != self.in_chans:
            raise ValueError(
                f"{type(self).__name__}: image of shape {tuple(image.shape)} must be [batch, {self.in_chans}, H, W]"
                + (f"; in_chans={image.shape[1]} would fit it." if image.dim() == 4 else ".")
            )
        if min(image.shape[2:]) < 1:
            raise ValueError(f"{type(self).__name__}: image of shape {tuple(image.shape)} has no pixels.")


def laid_out(image: Tensor) -> Tensor:
    """The image with its channels side by side on a GPU, where convolutions then hand on maps that need no copies."""
    return image.contiguous(memory_format=torch.channels_last) if image.is_cuda else image


Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]


def renamed(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """The tensors under names that each rule (pattern, replacement) in turn was applied to."""
    out = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        out[name] = value
    return out


def doubled(dim: int, levels: int) -> tuple[int, ...]:
    """Channels of so many levels, `dim` in the first and twice as many in every next one."""
    return tuple(dim * 2**i for i in range(levels))


def per_stage(name: str, values: tuple[Any, ...], stages: int, model: str) -> tuple[Any, ...]:
    """`values` as a tuple, checked to have one entry a stage."""
    values = tuple(values)
    if len(values) != stages:
        raise ValueError(f"{model}: {name}={values} has {len(values)} entries; it needs {stages}, one a stage.")
    return values
