"""What gated blocks show: the stream in front of them, and what each head's output adds to its media tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glocal.adapt import SiteCall, attach
from glocal.adapt.records import Core
from glocal.advise.probe import in_units

from . import (
    test_diffusers_cogvideox,
    test_diffusers_cosmos,
    test_diffusers_flux,
    test_diffusers_flux2,
    test_diffusers_hunyuan_video,
    test_diffusers_ltx,
    test_diffusers_mochi,
    test_diffusers_pixart,
    test_diffusers_sd3,
)
from .exam import AtCore, run

# Named by their modules, so that their own examinations are not collected here again.
HUNYUAN = test_diffusers_hunyuan_video.TestHunyuanVideo
FLUX, FLUX2 = test_diffusers_flux.TestFlux, test_diffusers_flux2.TestFlux2
COGVIDEOX, MOCHI = test_diffusers_cogvideox.TestCogVideoX, test_diffusers_mochi.TestMochi
LTX, COSMOS = test_diffusers_ltx.TestLTX, test_diffusers_cosmos.TestCosmos
PIXART, SD3 = test_diffusers_pixart.TestPixArt, test_diffusers_sd3.TestSD3


class SD35(SD3):
    """With a second attention over the image."""

    def build(self) -> nn.Module:
        return test_diffusers_sd3.diffusers.SD3Transformer2DModel(**test_diffusers_sd3.SD3, dual_attention_layers=(0,))


LAST, FIRST = slice(-24, None), slice(0, 72)
# exam, site, places of media, the child that the stream enters behind the attention (None: it leaves the block)
CASES = [
    (HUNYUAN, "transformer_blocks.0.attn", FIRST, "norm2"),
    (HUNYUAN, "single_transformer_blocks.0.attn", FIRST, None),
    (FLUX, "transformer_blocks.0.attn", LAST, "norm2"),
    (FLUX, "single_transformer_blocks.0.attn", LAST, None),
    (FLUX2, "transformer_blocks.0.attn", LAST, "norm2"),
    (FLUX2, "single_transformer_blocks.1.attn", LAST, None),
    (COGVIDEOX, "transformer_blocks.0.attn1", LAST, "norm2"),
    (SD3, "transformer_blocks.0.attn", slice(0, 24), "norm2"),
    (SD3, "transformer_blocks.1.attn", slice(0, 24), "norm2"),
    (SD35, "transformer_blocks.0.attn", slice(0, 24), "norm2"),
    (SD35, "transformer_blocks.0.attn2", slice(0, 24), "norm2"),
    (LTX, "transformer_blocks.0.attn1", FIRST, "attn2"),
    (COSMOS, "transformer_blocks.0.attn1", FIRST, "norm2"),
    (PIXART, "transformer_blocks.0.attn1", slice(0, 24), "attn2"),
    (MOCHI, "transformer_blocks.0.attn1", FIRST, "norm3"),
]


class AtOne(AtCore):
    """At one site: what it was given and gave, times a factor."""

    def __init__(self, site: str, factor: float) -> None:
        super().__init__(factor)
        self.site, self.shown = site, []

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        out = inner(q, k, v, call)
        if call.site.name != self.site:
            return out
        self.shown.append((call, out))
        return out * self.factor


def built(exam: Callable[[], Any]) -> tuple[nn.Module, Any]:
    """A model with no weight zero, and what a forward is given."""
    torch.manual_seed(0)
    model: nn.Module = exam().build().eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model, exam().inputs(torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("exam", "site", "media", "child"), CASES, ids=lambda c: getattr(c, "__name__", str(c)))
def test_heads_add_up_to_what_the_block_adds(
    exam: Callable[[], Any], site: str, media: slice, child: str | None
) -> None:
    model, given = built(exam)
    entered: list[Tensor] = []
    behind: list[Tensor] = []
    owner = model.get_submodule(site.rpartition(".")[0])
    if exam is MOCHI:  # its norm takes the bias in
        nn.init.zeros_(owner.get_parameter("attn1.to_out.0.bias"))
    owner.register_forward_pre_hook(
        lambda _, args, named: entered.append((*args, *named.values())[0]), with_kwargs=True
    )
    if child is not None:
        owner.get_submodule(child).register_forward_pre_hook(lambda _, a: behind.append(a[0]))
    else:
        place = 1 if exam is FLUX else 0

        def left(_: nn.Module, args: Any, out: Any) -> None:
            behind.append(out[place] if isinstance(out, tuple) else out)

        owner.register_forward_hook(left)
    with torch.no_grad():
        for factor in (1.0, 0.0):
            method = AtOne(site, factor)
            with attach(model, method):
                run(model, given)
            if factor:
                call, out = method.shown[0]
                assert call.contribution is not None and call.residual is not None
                added = call.contribution(out).sum(1)[:, media]
                if call.factor is not None:
                    added = added * call.factor(out)[:, media, None]
                stream = call.residual[:, media]
    assert (exam is MOCHI) == (call.factor is not None)
    assert torch.equal(stream, entered[0][:, -stream.shape[1] :])
    torch.testing.assert_close(added, (behind[0] - behind[1])[:, -added.shape[1] :], rtol=1e-4, atol=1e-5)


def test_a_norm_behind_the_heads_is_counted_by_the_stream() -> None:
    model, given = built(MOCHI)
    given["timestep"] = given["timestep"].expand(2)
    two = {n: torch.cat([given[n], given[n] + 1]) for n in ("hidden_states", "encoder_hidden_states")}
    given |= two | {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)}
    method = AtOne("transformer_blocks.0.attn1", 1.0)
    with torch.no_grad(), attach(model, method):
        run(model, given)
    assert [(call.row, call.layout.nq) for call, _ in method.shown] == [(0, 75), (1, 77)]
    for call, out in method.shown:
        assert call.residual is not None and call.residual.shape[:2] == (1, call.layout.nq)
        assert call.contribution is not None and call.factor is not None
        added = call.contribution(out).sum(1) * call.factor(out)[..., None]
        seen = in_units(call, out)
        assert seen.residual is not None
        wanted = added.norm(dim=-1) / call.residual.norm(dim=-1)
        torch.testing.assert_close(call.contribution(out).sum(1).norm(dim=-1) / seen.residual.norm(dim=-1), wanted)
    assert not torch.equal(method.shown[0][0].residual[:, :72], method.shown[1][0].residual[:, :72])


def test_gates_of_single_tokens_are_not_said() -> None:
    model, given = built(LTX)
    given["timestep"] = torch.linspace(100, 900, 72)[None, :, None].expand(1, 72, 1)
    method = AtOne("transformer_blocks.0.attn1", 1.0)
    with torch.no_grad(), attach(model, method):
        run(model, given)
    call, _ = method.shown[0]
    assert call.contribution is None and call.residual is not None
