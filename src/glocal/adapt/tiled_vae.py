"""A VAE of diffusers while it works on large pictures: tile by tile, and in float32 where it would overflow."""

from __future__ import annotations

from typing import Any

import torch


class TiledVae:
    """``with TiledVae(vae): vae.decode(...)``; afterwards it is as it was. `exact`: float32 for one that asks for it.

    Its configuration asks for it (`force_upcast`, SDXL's), and it is in float16.
    """

    def __init__(self, vae: Any, *, tiled: bool = True, exact: bool = False) -> None:
        self.vae, self.tiled, self.before = vae, tiled, getattr(vae, "use_tiling", None)
        asks = exact and getattr(vae.config, "force_upcast", False)
        self.dtype = vae.dtype if asks and vae.dtype == torch.float16 else None

    def __enter__(self) -> Any:
        if self.before is not None and self.tiled:
            self.vae.use_tiling = True
        if self.dtype is not None:
            self.vae.float()
        return self.vae

    def __exit__(self, *_: Any) -> None:
        if self.before is not None:
            self.vae.use_tiling = self.before
        if self.dtype is not None:
            self.vae.to(self.dtype)
