"""Radial Attention (arXiv 2506.19852): the published block masks, their frame tables, and attention over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout
from glocal.ops import attend
from glocal.patterns import Dense, RadialBlocks
from glocal.testing.adapter import Adapter, Run
from glocal.testing.case import Case


def run(case: Case, where: Run) -> dict[str, Tensor]:
    """Our results of one case."""
    if "in.query" in case:
        return attention(case, where)
    if "out.window_width0" in case:
        return tables(case)
    found: dict[str, Tensor] = {}
    for i, config in enumerate(case.config):
        layout = _layout(config)
        whole = layout.nq // config["block_size"]  # the published builder leaves the ragged last block out
        mask = _pattern(config).block_mask(layout)[0, :whole, :whole]
        found |= {f"out.block_mask{i}": mask, f"out.density{i}": mask.double().mean()}
    return found


def _pattern(config: Mapping[str, Any]) -> RadialBlocks:
    """The published rule to the letter: with frames that are not whole blocks a block may not see itself."""
    return RadialBlocks(config["block_size"], config["decay_factor"], config["model_type"], own_block=False)


def _layout(config: Mapping[str, Any]) -> Layout:
    shape = (config["num_frame"], config["token_per_frame"])
    return Layout.of(Canvas(shape, after=config.get("text_tokens", 0)))


def tables(case: Case) -> dict[str, Tensor]:
    """Band width and thinning of every pair of frames."""
    found: dict[str, Tensor] = {}
    for i, config in enumerate(case.config):
        pattern, frames, tokens = _pattern(config), range(config["num_frame"]), config["token_per_frame"]
        width = [[pattern.width(abs(a - b), tokens) for b in frames] for a in frames]
        keeps = [[pattern.keeps(abs(a - b), tokens) for b in frames] for a in frames]
        found[f"out.window_width{i}"] = torch.tensor(width, dtype=torch.float64)
        found[f"out.keep_frame_pair{i}"] = torch.tensor(keeps)
    return found


def attention(case: Case, where: Run) -> dict[str, Tensor]:
    """Attention over the block mask, or in a dense step over all. Padded text keys are hidden; padded text queries see
    all valid keys.
    """
    config, layout = case.config, _layout(case.config)
    q, k, v = (case[f"in.{name}"].transpose(1, 2) for name in ("query", "key", "value"))  # [B, heads, N, D]
    if config["text_tokens"]:
        queries = torch.zeros(q.shape[0], layout.nq, dtype=torch.int32)
        keys = queries.clone()
        keys[:, config["num_frame"] * config["token_per_frame"] + config["valid_text_tokens"] :] = -1
        layout = Layout(layout.q, layout.kv, documents=(queries, keys))
    pattern = Dense() if config.get("sparsity_type") == "dense" else _pattern(config)
    done = attend(q, k, v, pattern, canvas=layout, backend=where.backend)
    return {"out.output": done.out.transpose(1, 2)}


def expected(case: Case) -> dict[str, Tensor]:
    """The published results, and the density that goes with each block mask."""
    if "out.block_mask0" not in case:
        return case.results()
    densities = enumerate(config["density"] for config in case.config)
    return case.results() | {f"out.density{i}": torch.tensor(d, dtype=torch.float64) for i, d in densities}


ADAPTER = Adapter("radial", run, expected=expected, attends=lambda case: "in.query" in case)
