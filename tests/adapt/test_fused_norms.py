"""Norm and rotation in one pass: outputs as the untouched model's, with and without methods at `core` beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glocal.adapt import attach, fused_norms
from glocal.adapt.rectified_spaattn import RectifiedSpaAttn, SpaSettings

from .hosts.exam import AtCore, Inputs, kept, run
from .hosts.sizes import COGVIDEOX, FLUX, HUNYUAN_VIDEO, MOCHI, WAN

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'glocal[diffusers]'")


def wan(g: torch.Generator) -> tuple[nn.Module, Inputs]:
    return diffusers.WanTransformer3DModel(**WAN), {
        "hidden_states": torch.randn(2, 4, 3, 8, 12, generator=g),
        "timestep": torch.full((2,), 900.0),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=g),
    }


def wan_levels(g: torch.Generator) -> tuple[nn.Module, Inputs]:
    """Each token has a noise level of its own, and nothing norms the queries of cross attention."""
    model, given = diffusers.WanTransformer3DModel(**WAN, cross_attn_norm=False), wan(g)[1]
    return model, given | {"timestep": torch.randint(0, 900, (2, 72), generator=g).float()}


def hunyuan_video(g: torch.Generator) -> tuple[nn.Module, Inputs]:
    return diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN_VIDEO), {
        "hidden_states": torch.randn(1, 4, 3, 4, 6, generator=g),
        "timestep": torch.full((1,), 900.0),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=g),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
        "pooled_projections": torch.randn(1, 8, generator=g),
        "guidance": torch.full((1,), 6000.0),
    }


def cogvideox(g: torch.Generator) -> tuple[nn.Module, Inputs]:
    angles = torch.rand(72, 8, generator=g).repeat_interleave(2, 1)
    return diffusers.CogVideoXTransformer3DModel(**COGVIDEOX, use_rotary_positional_embeddings=True), {
        "hidden_states": torch.randn(2, 3, 4, 8, 12, generator=g),
        "timestep": torch.full((2,), 900),
        "encoder_hidden_states": torch.randn(2, 5, 8, generator=g),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def flux(g: torch.Generator) -> tuple[nn.Module, Inputs]:
    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(6.0), indexing="ij"), -1)
    return diffusers.FluxTransformer2DModel(**FLUX), {
        "hidden_states": torch.randn(2, 24, 16, generator=g),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=g),
        "pooled_projections": torch.randn(2, 24, generator=g),
        "timestep": torch.full((2,), 0.75),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.full((2,), 3.5),
    }


Made = Callable[[torch.Generator], tuple[nn.Module, Inputs]]


def drawn(make: Made, g: torch.Generator) -> tuple[nn.Module, Inputs]:
    """Every parameter drawn, weights of norms among them, so that each part counts."""
    torch.manual_seed(0)
    model, given = make(g)
    for name, parameter in model.named_parameters():
        if "norm_" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.eval().requires_grad_(False), given


@pytest.mark.parametrize("make", [wan, wan_levels, hunyuan_video, cogvideox, flux])
def test_outputs_are_those_of_the_model(make: Made, generator: torch.Generator) -> None:
    model, given = drawn(make, generator)
    plain, before = run(model, given), kept(model)
    norms: list[str] = []
    hooks = [
        m.register_forward_hook(lambda *_, name=n: norms.append(name))
        for n, m in model.named_modules()
        if n.endswith(("norm_q", "norm_k")) and "attn2" not in n and "refiner" not in n
    ]
    assert hooks
    with fused_norms(model):
        found = run(model, given)
        assert not norms or make is cogvideox  # the pass took their place
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=2e-5)
    assert not torch.equal(found * 0, found)
    assert kept(model) == before
    torch.testing.assert_close(run(model, given), plain, rtol=0, atol=0)


@pytest.mark.parametrize("make", [wan, hunyuan_video, cogvideox, flux])
@pytest.mark.parametrize("first", [True, False])
def test_it_stands_before_methods_at_core(make: Made, first: bool, generator: torch.Generator) -> None:
    """Queries and keys reach a core normed and rotated, whoever was attached first, along a curve too."""
    model, given = drawn(make, generator)
    watched = AtCore()
    with attach(model, watched):
        run(model, given)
    fused = AtCore()
    settings = SpaSettings(drop=0.5, mass=0.0, block=8)
    with attach(model, RectifiedSpaAttn(settings)):
        sparse = run(model, given)
    with fused_norms(model) if first else attach(model, fused), attach(model, fused) if first else fused_norms(model):
        run(model, given)
    with fused_norms(model), attach(model, RectifiedSpaAttn(settings)):
        torch.testing.assert_close(run(model, given), sparse, atol=2e-5, rtol=2e-5)
    for mine, theirs in zip(fused.queries + fused.keys, watched.queries + watched.keys, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


def test_gradients_and_compile(generator: torch.Generator) -> None:
    model, given = drawn(wan, generator)
    x = given["hidden_states"].requires_grad_()

    def slope() -> Tensor:
        return torch.autograd.grad(model(**given, return_dict=False)[0].square().sum(), x)[0]

    plain, out = slope(), run(model, given)
    with fused_norms(model):
        torch.testing.assert_close(slope(), plain, atol=1e-3, rtol=1e-3)
        compiled: Any = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(run(compiled, given), out, atol=2e-5, rtol=2e-5)


def test_refusals(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="fused_norms: MochiTransformer3DModel; legal: WanTransformer3DModel"):
        fused_norms(diffusers.MochiTransformer3DModel(**MOCHI))
    model, _ = drawn(wan, generator)
    model.get_submodule("blocks.0.attn1").processor = nn.Identity()
    with pytest.raises(ValueError, match=r"blocks.0.attn1' has a Identity; legal: WanAttnProcessor"):
        fused_norms(model)
    model, _ = drawn(flux, generator)
    attention: Any = model.get_submodule("transformer_blocks.0.attn")
    attention.norm_k = nn.LayerNorm(16)
    with pytest.raises(ValueError, match=r"norm_k of site 'transformer_blocks.0.attn' is LayerNorm"):
        fused_norms(model)
