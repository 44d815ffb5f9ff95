"""The router and the routed attention of BiFormer (arXiv 2303.08810) against its published numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from glocal.canvas import Canvas
from glocal.ops import Score, attention
from glocal.routing import BlockMean, Keep, Partition, RouteSpec, route


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", ["bra_legacy_exact", "bra_legacy_autopad"])
def test_published_routing(case: str, backend: str, golden: Callable[[str], Path]) -> None:
    path = golden(f"biformer/{case}.safetensors")
    data = load_file(path)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["meta"])["config"]
    x, regions, heads = data["in.x"], config["n_win"], config["num_heads"]
    _, height, width, dim = x.shape
    x = F.pad(x, (0, 0, 0, -width % regions, 0, -height % regions))  # padding is projected too, as published
    grid = tuple(x.shape[1:3])
    qkv = F.linear(x, data["state.qkv.qkv.weight"], data["state.qkv.qkv.bias"]).flatten(1, 2)
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))  # [B, heads, N, head size]
    part = Partition.regions(Canvas(grid), regions)
    spec = RouteSpec(part, part, Keep(top=config["topk"]), BlockMean("sum", scale=dim**-0.5))
    found = route(q, k, Canvas(grid), spec)
    assert torch.equal(found.index[:, 0].long(), data["mid.routing_index"])
    assert found.scores is not None
    torch.testing.assert_close(found.scores[:, 0].softmax(-1), data["mid.routing_weight"], atol=1e-5, rtol=1e-4)

    out = attention(q, k, v, found, score=Score(scale=dim**-0.5), backend=backend)
    out = out.transpose(1, 2).flatten(2).unflatten(1, grid)
    maps = v.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, grid)
    kernel = data["state.lepe.weight"]
    local = F.conv2d(maps, kernel, data["state.lepe.bias"], padding=kernel.shape[-1] // 2, groups=dim)
    y = F.linear(out + local.permute(0, 2, 3, 1), data["state.wo.weight"], data["state.wo.bias"])
    y = y[:, :height, :width]
    assert (y - data["out.y"]).abs().max() <= 1e-4 * data["out.y"].abs().max()
