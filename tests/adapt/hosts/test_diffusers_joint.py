"""What joint blocks show: the stream in front of them, and what each head's output adds to its media tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glocal.adapt import SiteCall, attach
from glocal.adapt.records import Core

from . import test_diffusers_cogvideox, test_diffusers_flux, test_diffusers_hunyuan_video
from .exam import AtCore, run

# Named by their modules, so that their own examinations are not collected here again.
HUNYUAN = test_diffusers_hunyuan_video.TestHunyuanVideo
FLUX, COGVIDEOX = test_diffusers_flux.TestFlux, test_diffusers_cogvideox.TestCogVideoX
CASES = [
    (HUNYUAN, "transformer_blocks.0", slice(0, 72)),
    (HUNYUAN, "single_transformer_blocks.0", slice(0, 72)),
    (FLUX, "transformer_blocks.0", slice(-24, None)),
    (FLUX, "single_transformer_blocks.0", slice(-24, None)),
    (COGVIDEOX, "transformer_blocks.0", slice(-24, None)),
]


class AtOne(AtCore):
    """At one block: what it was given and gave, times a factor."""

    def __init__(self, block: str, factor: float) -> None:
        super().__init__(factor)
        self.block, self.shown = block, []

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        out = inner(q, k, v, call)
        if call.site.name.rpartition(".")[0] != self.block:
            return out
        self.shown.append((call, out))
        return out * self.factor


@pytest.mark.parametrize(("exam", "block", "media"), CASES, ids=lambda c: getattr(c, "__name__", str(c)))
def test_heads_add_up_to_what_the_block_adds(exam: Callable[[], Any], block: str, media: slice) -> None:
    case = exam()
    torch.manual_seed(0)
    model: nn.Module = case.build().eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    given = case.inputs(torch.Generator().manual_seed(1))
    entered: list[Tensor] = []
    behind: list[Tensor] = []
    owner = model.get_submodule(block)
    owner.register_forward_pre_hook(
        lambda _, args, named: entered.append((*args, *named.values())[0]), with_kwargs=True
    )
    if hasattr(owner, "norm2"):  # behind the attention, in front of the feed-forward
        owner.get_submodule("norm2").register_forward_pre_hook(lambda _, a: behind.append(a[0]))
    else:
        places = {"hidden": 0 if exam is HUNYUAN else 1}
        owner.register_forward_hook(lambda _, a, out: behind.append(out[places["hidden"]]))
    with torch.no_grad():
        for factor in (1.0, 0.0):
            method = AtOne(block, factor)
            with attach(model, method):
                run(model, given)
            if factor:
                call, out = method.shown[0]
                assert call.contribution is not None and call.residual is not None
                added = call.contribution(out).sum(1)[:, media]
                stream = call.residual[:, media]
    assert torch.equal(stream, entered[0][:, -stream.shape[1] :])
    torch.testing.assert_close(added, (behind[0] - behind[1])[:, -added.shape[1] :], rtol=1e-4, atol=1e-5)
