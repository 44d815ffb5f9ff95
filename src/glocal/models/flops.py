"""Multiply-adds of a model, counted without running it: shapes alone, on the meta device.

Convolutions and matrix products, those of scaled_dot_product_attention included, are counted by torch's counter. Layers
that call `glocal.ops.attention` say themselves what a call costs (`macs`), because it depends on the pattern, not on
the shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, size: int | tuple[int, int] = 224, batch: int = 1) -> int:
    """Multiply-adds of one forward pass in evaluation mode.

    size: px, one side or (height, width) of the image; its channels are those the model takes. The model is copied to
    the meta device and stays as it is.
    """
    height, width = (size, size) if isinstance(size, int) else size
    twin = deepcopy(model).to("meta").eval()
    image = torch.empty(batch, getattr(model, "in_chans", 3), height, width, device="meta")
    counter, extra = FlopCounterMode(display=False), [0]
    with ExitStack() as stack:
        for layer in twin.modules():
            if callable(getattr(layer, "macs", None)):
                stack.enter_context(_stated(layer, extra))
        with torch.no_grad(), counter:
            twin(image)
    return counter.get_total_flops() // 2 + extra[0]


@contextmanager
def _stated(layer: Any, total: list[int]) -> Iterator[None]:
    """`layer` adds what it says it costs to `total`, and returns its input: mixers keep the shape."""

    def forward(x: Tensor, stage: object = None) -> Tensor:
        total[0] += layer.macs(x)
        return x

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
