"""Optimisers of the built-in model: Muon for the matrices inside the trunk, AdamW for everything else.

Muon orthogonalises the momentum of a matrix (https://kellerjordan.github.io/posts/muon); its step is scaled so that it
takes the learning rate of AdamW (arXiv 2502.16982). Embeddings, first and last layers and vectors stay with AdamW.
"""

from __future__ import annotations

import torch
from torch import nn


def build_optimizers(
    model: nn.Module, trunk: str = "blocks.", trunk_lr: float = 4e-3, lr: float = 2e-3, decay: float = 0.01
) -> list[torch.optim.Optimizer]:
    """Muon at `trunk_lr` over matrices of linear layers whose name starts with `trunk`, AdamW at `lr` over the rest."""
    matrices = {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith(trunk)
    }
    if not matrices:
        raise ValueError(f"trunk={trunk!r}: no linear layer of {type(model).__name__} has a name starting so")
    inside = [value for name, value in model.named_parameters() if name in matrices]
    outside = [value for name, value in model.named_parameters() if name not in matrices]
    return [
        torch.optim.Muon(inside, lr=trunk_lr, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outside, lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]
