"""The kernels over maps against torch's own operators, gradients included; without CUDA Triton's interpreter runs them.

`test_maps.py` starts this file in a process of its own, because the interpreter must be chosen before anything imports
Triton. On a machine with CUDA: ``pytest tests/kernels/maps_cases.py`` runs the compiled kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.kernels import maps
from glocal.nn.blocks import SameConv2d, conv
from glocal.nn.blocks.mbconv import MBConv
from glocal.ops import Ratio, Subtract, Unnormalised, depthwise_conv, dynamic_conv, layer_norm, linear_attention
from glocal.ops.channel import gram
from glocal.ops.norm import stored_norm
from glocal.ops.stream import joined
from glocal.testing._common import draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no CUDA device, TRITON_INTERPRET is not 1")


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels run on the CPU under the interpreter, whose loop bounds numpy 2.4 must be helped with."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    usual = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        usual(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    monkeypatch.setattr(maps, "usable", lambda *tensors: True)
    monkeypatch.setattr("glocal.nn.blocks.layout.usable", lambda *tensors: True)


def plain(call: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The call without the kernels."""
    with monkeypatch.context() as patch:
        patch.setattr(maps, "usable", lambda *tensors: False)
        patch.setattr("glocal.nn.blocks.layout.usable", lambda *tensors: False)
        patch.setattr("glocal.nn.blocks.mbconv.usable", lambda *tensors: False)
        return call()


def agree(run: Callable[..., Tensor], inputs: Sequence[Tensor], monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    """Outputs and gradients of `run` with and without the kernels."""
    found = []
    for fused in (True, False):
        leaves = [t.to(DEVICE).requires_grad_() for t in inputs]
        y = run(*leaves) if fused else plain(lambda leaves=leaves: run(*leaves), monkeypatch)
        grads = torch.autograd.grad(y, leaves, draw(y.shape, 99, torch.float32).to(y))
        found.append([y.detach(), *grads])
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert float((ours - theirs).abs().max()) <= limit * max(float(theirs.abs().max()), 1e-3)


def some(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of a normal distribution."""
    return draw(shape, seed, torch.float32)


@pytest.mark.parametrize("shape", [(2, 5, 7, 24), (3, 96), (1, 130), (70, 64)])
def test_layer_norm(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    c = shape[-1]
    inputs = [some(*shape) * 3 + 2, some(c, seed=1), some(c, seed=2)]
    agree(lambda x, w, b: layer_norm(x, w, b, 1e-6), inputs, monkeypatch, 2e-5)


def test_layer_norm_of_a_view_and_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = some(2, 40, 6).to(DEVICE).transpose(1, 2), some(40, seed=1).to(DEVICE), some(40, seed=2).to(DEVICE)
    assert (layer_norm(x, w, b) - F.layer_norm(x, (40,), w, b)).abs().max() < 1e-5


@pytest.mark.parametrize("residual", [False, True])
def test_types_under_autocast(residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's own operators: norms in float32, convolutions in half precision, sums in the wider type."""
    x, w = some(2, 6, 5, 24).to(DEVICE).requires_grad_(), some(24, 1, 3, 3, seed=1).to(DEVICE).requires_grad_()
    b = some(24, seed=2).to(DEVICE).requires_grad_()
    half = x.to(torch.bfloat16)
    usual = [F.layer_norm(half.float(), (24,), b, b), F.conv2d(x.permute(0, 3, 1, 2), w, b, 1, 1, groups=24)]
    usual[1] = usual[1].permute(0, 2, 3, 1) + (x if residual else 0)
    if INTERPRETED:
        monkeypatch.setattr(maps, "autocasts", lambda t: t.dtype == now)
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        now = torch.bfloat16
        normed = layer_norm(half, b, b)
        now = torch.float32
        mixed = depthwise_conv(x, w, b, padding=(1, 1, 1, 1), residual=residual)
    assert normed.dtype == torch.float32 and mixed.dtype == (torch.float32 if residual else torch.bfloat16)
    for ours, theirs, limit in ((normed, usual[0], 2e-5), (mixed.float(), usual[1], 2e-2)):
        grads = [torch.autograd.grad(y, (x, b), draw(y.shape, 9, torch.float32).to(y)) for y in (ours, theirs)]
        for a, c in zip((ours, *grads[0]), (theirs, *grads[1]), strict=True):
            assert a.dtype == torch.float32 and float((a - c).abs().max()) <= limit * float(c.abs().max())


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_depthwise(kernel: int, residual: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [some(2, 6, 5, 24), some(24, 1, kernel, kernel, seed=1), *([some(24, seed=2)] if bias else [])]
    side = kernel // 2

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return depthwise_conv(x, weight, bias, padding=(side, side, side, side), residual=residual)

    agree(run, inputs, monkeypatch, 2e-5)


@pytest.mark.parametrize("size", [(6, 6), (7, 10), (9, 5)])
def test_depthwise_of_stride_two_as_tensorflow_pads(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SameConv2d(72, 72, 3, 2, groups=72).to(DEVICE)
    agree(lambda x, w, b: _with(layer, x, w, b), [some(1, *size, 72), *_weights(layer)], monkeypatch, 2e-5)


def _weights(layer: torch.nn.Conv2d) -> list[Tensor]:
    assert layer.bias is not None
    return [some(*layer.weight.shape, seed=1), some(*layer.bias.shape, seed=2)]


def _with(layer: torch.nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    del layer._parameters["weight"], layer._parameters["bias"]
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
    try:
        return conv(layer, x)
    finally:
        del layer.weight, layer.bias
        layer.weight, layer.bias = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())


def _stats(c: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, variance, weight, bias = (some(c, seed=i).to(DEVICE) for i in range(4))
    return mean, variance.square() + 0.1, weight, bias


@pytest.mark.parametrize("act", ["none", "gelu", "gelu_tanh"])
@torch.no_grad()
def test_stored_norms_and_activations(act: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, stats = some(2, 6, 5, 40).to(DEVICE), _stats(40)
    kernel, padding = some(40, 1, 3, 3, seed=5).to(DEVICE), (0, 1, 0, 1)
    for call in (
        lambda: stored_norm(x, stats, 1e-3, act),
        lambda: depthwise_conv(x, kernel, stride=2, padding=padding, norm=(stats, 1e-3), act=act),
        lambda: depthwise_conv(x, kernel, padding=(1, 1, 1, 1), residual=True, act=act),
    ):
        assert (call() - plain(call, monkeypatch)).abs().max() < 1e-5


@torch.no_grad()
def test_an_inverted_residual_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = MBConv(16, 24, 2).to(DEVICE)
    for norm in (block.pre_norm, block.norm1, block.norm2):
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    x = some(2, 7, 6, 16).to(DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr("glocal.nn.blocks.mbconv.usable", lambda *tensors: True)
        found = block.eval()(x)
    assert (found - plain(lambda: block(x), monkeypatch)).abs().max() < 1e-5


@pytest.mark.parametrize("tokens", [1, 70])
def test_channel_attention(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = some(2, tokens, 3 * 24)

    def run(t: Tensor) -> Tensor:
        q, k, v = t.chunk(3, -1)
        return gram(q, k, v, 3, scale=0.3)

    agree(run, [wide], monkeypatch, 2e-5)


@pytest.mark.parametrize("normaliser", [Ratio(0.5), Subtract(), Unnormalised(0.1)])
def test_linear_attention(normaliser: Ratio | Subtract | Unnormalised, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(t: Tensor) -> Tensor:
        q, k, v = t.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return linear_attention(q.relu(), k.relu(), v, normaliser)

    agree(run, [some(2, 67, 48)], monkeypatch, 2e-5)


@pytest.mark.parametrize("normaliser", [Ratio(0.5), Subtract(), Unnormalised(0.1)])
def test_linear_attention_beside_a_local_part(
    normaliser: Ratio | Subtract | Unnormalised, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(t: Tensor, local: Tensor) -> Tensor:
        q, k, v = t.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        plus = local[:, 3:].unflatten(-1, (2, 8)).transpose(1, 2)
        return linear_attention(q.relu(), k.relu(), v, normaliser, plus)

    agree(run, [some(2, 67, 48), some(2, 70, 16, seed=1)], monkeypatch, 2e-5)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 5)])
@pytest.mark.parametrize("size", [(9, 13), (2, 3)])
def test_dynamic_convolution(size: tuple[int, int], kernel: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    wide = some(2, 1 + size[0] * size[1], 3 * 24)  # values where a projection left them, behind a class token

    def run(t: Tensor, kernels: Tensor) -> Tensor:
        return dynamic_conv(t.chunk(3, -1)[2][:, 1:].unflatten(1, size), kernels)

    agree(run, [wide, some(2, 24, *kernel, seed=1)], monkeypatch, 2e-5)


def test_dynamic_convolution_of_wide_maps_and_channels_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [some(2, 96, 3, 4), some(2, 96, 3, 3, seed=1)]
    agree(lambda x, w: dynamic_conv(x.permute(0, 2, 3, 1), w), inputs, monkeypatch, 2e-5)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(("channels", "dtype"), [(40, torch.float32), (640, torch.bfloat16)])
def test_a_stream_joined_and_normed(
    tokens: int, channels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """Gate, scale and shift of each sample or token, as slices of one table; every part left out once."""
    x, branch = (torch.randn(2, 7, channels, generator=generator).to(DEVICE, dtype) for _ in "xb")
    table = torch.randn(2, tokens, 3 * channels, generator=generator).to(DEVICE)
    gate, scale, shift = table.chunk(3, -1)
    norm = torch.randn(2, channels, generator=generator).to(DEVICE).unbind(0)
    calls: list[dict[str, Any]] = [
        {"branch": branch, "gate": gate, "norm": norm, "change": (scale, shift)},
        {"branch": branch, "norm": norm},
        {"branch": branch, "gate": gate, "eps": None},
        {"change": (scale, shift)},
    ]
    for call in calls:
        with torch.no_grad():
            found = joined(x, **call)
            want = plain(lambda call=call: joined(x, **call), monkeypatch)  # type: ignore[arg-type, return-value]
        for mine, theirs in zip(found, want, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                limit = 1e-5 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(mine, theirs, rtol=limit, atol=limit)
