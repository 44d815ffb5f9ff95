"""Rectified SpaAttn (arXiv 2511.19835): curve, neighbours, shares, selection, and the rectified output.

Missing tokens of a last block count as zeros, as published (`tail="block"`). Keys and values of padded words are zeroed
there and attended by padded words alone, whose output is thus zero; here they see nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.adapt.rectified_spaattn import kept_blocks
from glocal.canvas import Canvas, Layout, Part
from glocal.canvas.curves import gilbert
from glocal.canvas.touching import touching_blocks
from glocal.ops import attend
from glocal.ops.rectify import rectification, spread
from glocal.routing import Keep, Partition
from glocal.routing.selection import from_mask
from glocal.routing.shares import Pooled, helpful, pooled, shares
from glocal.testing.adapter import Adapter, Run
from glocal.testing.case import Case


def run(case: Case, where: Run) -> dict[str, Tensor]:
    """Our results of one case."""
    if "out.not_gapr" in case:
        q, k = (_blocks(case[f"in.{name}_blocks"]) for name in "qk")
        return {"out.not_gapr": ~helpful(q, k)}
    return curve(case) if "in.q" not in case else core(case, where)


def _blocks(x: Tensor) -> Pooled:
    """x [B, H, groups, tokens, D], cut into blocks already."""
    mean = x.mean(-2)
    counts = torch.full((x.shape[2],), x.shape[3], device=x.device)
    return Pooled(mean, (x - mean[..., None, :]).abs().mean(-2), counts)


def curve(case: Case) -> dict[str, Tensor]:
    """The curve with width, height, time as its axes from major to minor, and with the longest axis first."""
    shape = (case.config["t"], case.config["h"], case.config["w"])
    path = gilbert(shape)
    found = {
        "out.hilbert_to_linear": path,
        "out.linear_to_hilbert": _inverse(path),
        "out.linear_to_hilbert_auto_axis": _inverse(_longest_first(shape)),
        "out.block_neighbor": touching_blocks(path, shape, case.config["block_size"]),
    }
    return {name: t for name, t in found.items() if name in case}


def _inverse(path: Tensor) -> Tensor:
    back = torch.empty_like(path)
    back[path] = torch.arange(path.numel())
    return back


def _longest_first(shape: tuple[int, int, int]) -> Tensor:
    """The curve whose major axis is the longest one; of equal ones width goes before height before time."""
    depth, height, width = shape
    if width >= height and width >= depth:
        return gilbert(shape)
    axes = (0, 2, 1) if height >= width and height >= depth else (1, 2, 0)  # slowest axis of the curve first
    places = torch.arange(depth * height * width).reshape(shape).permute(*axes).flatten()
    return places[gilbert(tuple(shape[a] for a in axes))]


def core(case: Case, where: Run) -> dict[str, Tensor]:
    """Selection and output for one call."""
    config = case.config
    q, k, v = (case[f"in.{name}"] for name in "qkv")
    block, words = config["block_size"], config.get("text_length", config.get("text_len", 0))
    media = q.shape[2] - words
    valid = config.get("valid_text", words)
    part = Partition.blocks(media, block).to(q.device)
    mine, theirs = pooled(q[:, :, :media], part, "block"), pooled(k[:, :, :media], part, "block")
    share = shares(mine, theirs, k[:, :, media : media + valid] if words else None)
    keep = Keep(mass=config["p_remain_rates"], crossing="in", at_least=config["top_k"], forced="union")
    forced = torch.zeros(part.groups, part.groups, dtype=torch.bool, device=q.device)
    if "in.block_neighbor" in case:
        forced |= case["in.block_neighbor"]
    first = config.get("first_frame_blocks", 0)
    forced[:first, :first] = True
    kept = kept_blocks(keep, share, forced)
    good = helpful(mine, theirs)

    canvas = Canvas([p for p in (Part("video", media), Part("text", words)) if p.tokens])
    runs = torch.arange(q.shape[2]).split([media, words])
    pieces = [torch.nn.functional.pad(t, (0, -t.numel() % block), value=-1) for t in runs]
    whole = Partition(torch.cat(pieces).reshape(1, 1, -1, block).int().to(q.device), "blocks, words")
    rest = whole.groups - part.groups
    mask = torch.nn.functional.pad(kept, (0, rest, 0, rest), value=True)
    lengths = {"text": torch.tensor([valid], dtype=torch.int32)} if words else {}
    layout = Layout(canvas, canvas, lengths=lengths)
    chosen = from_mask(layout, whole, whole, mask)
    plain = attend(q, k, v, chosen, canvas=layout, backend=where.backend).out
    factor, addend = rectification(share, kept, good, pooled(v[:, :, :media], part, "block").mean)
    out = spread(whole, q.shape[2], factor, addend, v.dtype).apply(plain)
    live = torch.arange(rest, device=q.device) < -(-valid // block)
    probs = share.blocks if not words else torch.cat([share.blocks, share.words[..., None]], -1)
    padded = torch.nn.functional.pad(plain[:, :, :media], (0, 0, 0, part.groups * block - media))
    found = {
        "out.o": out.transpose(1, 2).flatten(2),
        "mid.block_mask": torch.cat([kept, live.expand(*kept.shape[:3], rest)], -1),
        "mid.gapr_not_used_mask": ~good,
        "mid.probs": probs,
        "mid.sparse_out_before_rectify": padded,
    }
    return {name: t for name, t in found.items() if name in case}


def expected(case: Case) -> dict[str, Tensor]:
    """The published results; rows of missing tokens of a last block are none of the method's."""
    found = dict(case.results())
    name = "mid.sparse_out_before_rectify"
    if name in found and "in.q" in case:
        words = case.config.get("text_length", case.config.get("text_len", 0))
        found[name] = found[name].clone()
        found[name][:, :, case["in.q"].shape[2] - words :] = 0
    return found


ADAPTER = Adapter("rectified_spaattn", run, expected=expected, attends=lambda case: "in.q" in case)
