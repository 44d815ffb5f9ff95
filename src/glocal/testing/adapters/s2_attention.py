"""S2-Attention (arXiv 2407.17678): strided shards by head, their kernel layouts, and attention over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glocal.canvas import Canvas, Layout
from glocal.ops import Score, attend
from glocal.patterns import Blocks, Causal, Pattern, StridedShards, cache_efficient, kernel_rows, row_lists
from glocal.testing.adapter import Adapter, Run
from glocal.testing.adapters._maps import leaves, outputs_and_gradients
from glocal.testing.case import Case


def run(case: Case, where: Run) -> dict[str, Tensor]:
    """Our results of one case."""
    if "out.block_mask0" in case:
        return patterns(case)
    if "in.query" not in case:
        return layouts(case)
    config = case.config
    inputs = leaves(case, ("query", "key", "value"))
    swap = config["seq_dim"] == 1  # [B, S, H, D]
    q, k, v = (t.transpose(1, 2) if swap else t for t in inputs.values())  # [B, H, S, D]
    pattern, canvas = _pattern(case, k.shape[1]), Canvas((q.shape[2],))
    done = attend(q, k, v, pattern, canvas=canvas, score=Score(config["sm_scale"]), backend=where.backend)
    outputs = {"output": done.out.transpose(1, 2) if swap else done.out}
    grads = {"output": case["in.grad_output"]}
    if config["return_lse"]:
        outputs["logsumexp"], grads["logsumexp"] = done.lse, case["in.grad_logsumexp"]
    return outputs_and_gradients(outputs, grads, inputs)


def _pattern(case: Case, kv_heads: int) -> Pattern:
    block, causal = case.config["block_size"], case.config["causal"]
    if "in.sparse_pattern" in case:
        blocks = case["in.sparse_pattern"].bool().cpu()
    elif _shards(case.config).heads in (None, kv_heads):
        return _shards(case.config)
    else:  # keys come repeated for the query heads, but the pattern is made for fewer key heads
        blocks = _blocks(case.config)
    return Blocks(blocks, block, block) & Causal() if causal else Blocks(blocks, block, block)


def _shards(config: Mapping[str, Any]) -> StridedShards:
    local = config["local_blocks"]
    return StridedShards(
        block_size=config["block_size"],
        local_blocks=tuple(local) if isinstance(local, list) else local,
        vert_stride=config["vert_stride"],
        heads_q=config["num_heads"],
        num_kv_heads=config.get("num_kv_heads"),
        num_dense_heads=config.get("num_dense_heads", 0),
        homo_head=config.get("homo_head", False),
        head_sliding_offset=config.get("head_sliding_offset", 0),
        causal=config.get("causal", True),
        position=config.get("vert_position_type"),
    )


def _blocks(config: Mapping[str, Any]) -> Tensor:
    """Block mask [heads|1, query blocks, key blocks] of the rows and columns that a chunk holds, one for each head."""
    pattern, size = _shards(config), config["block_size"]
    rows, columns = _sides(config)
    whole = pattern.shards.block_mask(Layout.of(Canvas((max(rows.stop, columns.stop),))))
    mask = whole[:, rows.start // size : -(-rows.stop // size), columns.start // size : -(-columns.stop // size)]
    return mask if mask.shape[0] == 1 else mask.repeat_interleave(config["num_heads"] // mask.shape[0], 0)


def _sides(config: Mapping[str, Any]) -> tuple[range, range]:
    q_start, kv_start = config.get("q_start_position", 0), config.get("kv_start_position", 0)
    rows = range(q_start, q_start + config["seqlen"])
    return rows, range(kv_start, kv_start + config.get("kv_seqlen", config["seqlen"]))


def patterns(case: Case) -> dict[str, Tensor]:
    """Block masks, their row lists, and token masks."""
    found: dict[str, Tensor] = {}
    for i, config in enumerate(case.config):
        mask = _blocks(config)
        lists = row_lists(mask)
        found |= {f"out.block_mask{i}": mask, f"out.crow{i}": lists.crow, f"out.col{i}": lists.col}
        rows, columns = _sides(config)
        found[f"out.cache_efficient{i}"] = torch.tensor(cache_efficient(mask, rows.start // config["block_size"]))
        if f"out.token_mask{i}" in case:
            side = Canvas((max(rows.stop, columns.stop),))
            layout = Layout(
                side, side, q_start=rows.start, kv_start=columns.start, q_tokens=len(rows), kv_tokens=len(columns)
            )
            found[f"out.token_mask{i}"] = _shards(config).mask(layout)
    return found


def layouts(case: Case) -> dict[str, Tensor]:
    """Row lists of kernels that merge or split the blocks of a pattern."""
    found: dict[str, Tensor] = {}
    for i, config in enumerate(case.config):
        lists = kernel_rows(_blocks(config), config["block_size"], config["block_m"], config["block_n"])
        col = lists.col if lists.lead is None else torch.stack((lists.col, lists.lead), -1)
        found |= {f"out.crow{i}": lists.crow, f"out.col{i}": col}
    return found


def expected(case: Case) -> dict[str, Tensor]:
    """The published results, and whether each pattern lets a key-value cache drop what it stopped using."""
    if "out.block_mask0" not in case:
        return case.results()
    flags = enumerate(bool(config["kv_cache_efficient"]) for config in case.config)
    return case.results() | {f"out.cache_efficient{i}": torch.tensor(flag) for i, flag in flags}


ADAPTER = Adapter("s2_attention", run, expected=expected, attends=lambda case: "in.query" in case)
