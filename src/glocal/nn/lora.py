"""Low-rank updates on some tokens of a sequence only: y = W x + m[token] s B A x (LoRA, arXiv 2106.09685).

Scale-DiT (arXiv 2510.16325) tunes what low-resolution tokens go through and leaves the others as they were, so the
update is a call beside the linear layer, not a layer of its own: the model is never changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class LowRank(nn.Module):
    """s B A x. a: [rank, in]; b: [out, rank]; alpha: s = alpha / rank, None: s = 1."""

    def __init__(self, a: Tensor, b: Tensor, alpha: float | None = None) -> None:
        super().__init__()
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"LowRank: a of shape {tuple(a.shape)} and b of shape {tuple(b.shape)}; legal: [rank, in], [out, rank]."
            )
        self.a, self.b = nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone())
        self.scale = 1.0 if alpha is None else alpha / a.shape[0]

    @staticmethod
    def fresh(base: nn.Linear, rank: int, alpha: float | None = None) -> LowRank:
        """An update of `base` that is zero so far: A is normal with deviation 1 / rank, B is zero."""
        where = base.weight
        a = torch.randn(rank, base.in_features, device=where.device, dtype=where.dtype) / rank
        return LowRank(a, where.new_zeros(base.out_features, rank), alpha)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return linear(linear(x, self.a.to(x)), self.b.to(x)) * self.scale


def part_linear(base: nn.Module, x: Tensor, update: LowRank | None, on: bool | Tensor = True) -> Tensor:
    """base(x), and the update where it is on. x [..., N, in]; on: for all tokens, or bool or weights [N]."""
    y = base(x)
    if update is None or on is False:
        return y
    more = update(x)
    return y + (more if on is True else more * torch.as_tensor(on, device=x.device)[:, None].to(x.dtype))


class PartLora(nn.Module):
    """The updates of a model by the path of their linear layers."""

    def __init__(self, updates: Mapping[str, LowRank]) -> None:
        super().__init__()
        self._paths = {path: number for number, path in enumerate(updates)}
        self.updates = nn.ModuleList(updates.values())

    @staticmethod
    def read(tensors: Mapping[str, Tensor], alpha: float | None = None) -> PartLora:
        """From weights called ``[transformer.]PATH.lora_A.weight`` and ``...lora_B.weight``.

        Raises ValueError for a name that is no such weight, and for an A without its B.
        """
        halves: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            path, _, half = name.removeprefix("transformer.").rpartition(".lora_")
            half = half.replace(".default.", ".")
            if half not in ("A.weight", "B.weight"):
                raise ValueError(
                    f"PartLora: {name!r} is no LoRA weight; legal: PATH.lora_A.weight, PATH.lora_B.weight."
                )
            halves.setdefault(path, {})[half[0]] = tensor
        for path, pair in halves.items():
            if len(pair) < 2:
                raise ValueError(f"PartLora: {path!r} has lora_{next(iter(pair))} alone; both A and B are needed.")
        return PartLora({path: LowRank(pair["A"], pair["B"], alpha) for path, pair in halves.items()})

    def write(self) -> dict[str, Tensor]:
        """The weights under the names that diffusers loads and saves; s is in B."""
        found: dict[str, Tensor] = {}
        for path, update in self.items():
            found[f"transformer.{path}.lora_A.weight"] = update.a.detach()
            found[f"transformer.{path}.lora_B.weight"] = update.b.detach() * update.scale
        return found

    def get(self, path: str) -> LowRank | None:
        """The update of one layer, None if it has none."""
        number = self._paths.get(path)
        return None if number is None else self.updates[number]  # type: ignore[return-value]

    def items(self) -> Iterator[tuple[str, LowRank]]:
        """Paths and updates."""
        for path, number in self._paths.items():
            yield path, self.updates[number]  # type: ignore[misc]
