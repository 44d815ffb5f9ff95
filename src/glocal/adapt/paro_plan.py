"""What PAROAttention (arXiv 2506.16054) decides offline: an axis order for every head and static block masks for every
step, layer and head, with their files.

Axis orders by number: 0 FHW, 1 FWH, 2 HWF, 3 HFW, 4 WHF, 5 WFH, the slowest axis first; images have 0 HW, 1 WH.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from glocal.canvas.curves import axes as axis_order

ORDERS: Mapping[int, tuple[tuple[int, ...], ...]] = {
    2: ((0, 1), (1, 0)),
    3: ((0, 1, 2), (0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 1, 0), (2, 0, 1)),
}
FORMAT = "glocal.paro/1"


@dataclass(frozen=True, eq=False)
class ParoPlan:
    """orders: axis order of every head, int [layers, heads]. bits: which key blocks every query block reads, packed
    along keys, uint8 [masks, layers, heads, blocks, ceil(blocks / 8)]. blocks: their number. block: tokens of one.

    times: into how many even shares a run is cut; share t has mask t, and the last mask serves all shares from its own
    on (the paper's second half). empty: heads that calibration found to give nothing, bool [layers, heads]; they run as
    others do unless asked otherwise. levels: noise levels of the steps of calibration, one for each share; they say
    which share a call belongs to where the number of steps is unknown.
    """

    orders: Tensor
    bits: Tensor
    blocks: int
    times: int
    block: int = 64
    empty: Tensor | None = None
    levels: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        want = (*self.orders.shape, self.blocks, -(-self.blocks // 8))
        if self.bits.dim() != 5 or tuple(self.bits.shape[1:]) != want:
            raise ValueError(
                f"ParoPlan: bits of shape {tuple(self.bits.shape)} must be [masks, {', '.join(map(str, want))}] for "
                f"{self.blocks} blocks."
            )

    def time(self, step: int, total: int | None, level: float | None = None) -> int:
        """Which entry serves `step` of a run of `total` steps, or noise level `level` of any run. ValueError where that
        is needed and unknown.
        """
        if self.bits.shape[0] == 1:
            return 0
        if total is None and level is not None and self.levels is not None:
            gaps = [abs(level - known) for known in self.levels]
            return min(gaps.index(min(gaps)), self.bits.shape[0] - 1)
        if total is None:
            raise ValueError(
                f"ParoPlan: masks for {self.times} shares of a run need its number of steps, which only a pipeline "
                "says; attach to the pipeline, or set handle.state.total before each run."
            )
        return min(int(step / total * self.times), self.bits.shape[0] - 1)

    def mask(self, time: int, layer: int) -> Tensor:
        """Bool [heads, blocks, blocks]."""
        return unpack_bits(self.bits[time, layer], self.blocks)

    @property
    def density(self) -> float:
        """Share of blocks kept, mean over heads, layers and steps."""
        ones = torch.tensor([bin(n).count("1") for n in range(256)], dtype=torch.double)
        each = ones[self.bits.long()].sum((-1, -2)).mean((1, 2)) / self.blocks**2  # [masks]
        last = max(self.times - each.numel(), 0)
        return float(torch.cat([each, each[-1:].expand(last)]).mean())

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save_file

        tensors = {"orders": self.orders.contiguous(), "bits": self.bits.contiguous()}
        if self.empty is not None:
            tensors["empty"] = self.empty.contiguous()
        about = {"format": FORMAT, "blocks": self.blocks, "block": self.block, "times": self.times}
        about |= {} if self.levels is None else {"levels": self.levels}
        save_file(tensors, str(path), metadata={"paro": json.dumps(about)})

    @staticmethod
    def load(path: str | Path) -> ParoPlan:
        """The inverse of `save`; FileNotFoundError, or ValueError for another file."""
        from safetensors import safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(2, "no such file", str(path))
        with safe_open(str(path), "pt") as file:
            words = file.metadata()
            about = json.loads(words["paro"]) if words is not None and "paro" in words else {}
            if about.get("format") != FORMAT:
                raise ValueError(f"ParoPlan: {str(path)!r} is no plan; its format must be {FORMAT!r}.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        levels = tuple(about["levels"]) if "levels" in about else None
        sizes = (about["blocks"], about["times"], about["block"])
        return ParoPlan(tensors["orders"], tensors["bits"], *sizes, tensors.get("empty"), levels)


def read_published(
    permute: str | Path | Mapping[str, Any], sparse: str | Path | Mapping[str, Any], tokens: int
) -> ParoPlan:
    """A plan in the files of the authors' kernels: ``permute_plan.pth`` and ``sparse_plan.pth``.

    permute: {"permute": int [layers, heads], "empty": bool [layers, heads]}; sparse: {"sparse": bool [times, layers,
    heads, blocks, blocks]}. tokens: of the whole sequence, words included. Where that is more blocks than the masks
    have, rows and columns of ones stand in front of them, as in the authors' code (their blocks then begin a few tokens
    away from those the masks were made on); the last row and column are ones.
    """
    orders, masks = (torch.load(p, weights_only=True) if isinstance(p, (str, Path)) else p for p in (permute, sparse))
    kept = masks["sparse"].bool()
    blocks = -(-tokens // 64)
    front = blocks - kept.shape[-1]
    if front < 0 or kept.shape[-1] != kept.shape[-2]:
        raise ValueError(
            f"read_published: masks of {kept.shape[-2]} x {kept.shape[-1]} blocks do not fit {tokens} tokens, "
            f"which are {blocks} blocks of 64."
        )
    bits = torch.zeros(*kept.shape[:3], blocks, -(-blocks // 8), dtype=torch.uint8)
    for time in range(kept.shape[0]):  # one step at a time: whole masks take gigabytes
        here = pad(kept[time], (front, 0, front, 0), value=True)
        here[..., -1, :] = True
        here[..., -1] = True
        bits[time] = pack_bits(here)
    empty = orders.get("empty")
    empty = None if empty is None else empty.bool()
    return ParoPlan(orders["permute"].long(), bits, blocks, kept.shape[0], 64, empty)


def sequence(axes: tuple[int, ...], words: Tensor, media: Tensor, order: int) -> Tensor:
    """Token at every place: the words, then the media tokens with their axes in the given order, int64 [N].

    words, media: token numbers of the parts, the media's in raster order of `axes`.
    """
    legal = ORDERS.get(len(axes))
    if legal is None or not 0 <= order < len(legal):
        raise ValueError(
            f"paro: order {order} of a grid {axes}; legal: 0 to 5 for three axes (FHW, FWH, HWF, HFW, WHF, WFH), 0 and "
            "1 for two."
        )
    return torch.cat([words, media[axis_order(axes, legal[order])]])


def pack_bits(mask: Tensor) -> Tensor:
    """Bool [..., n] to uint8 [..., ceil(n / 8)], the first entry in the lowest bit."""
    eight = pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (eight.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """The inverse of `pack_bits` for n = count."""
    mask = bits[..., None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
    return mask.flatten(-2)[..., :count].bool()
