"""Cases that the published ones do not show, against plain definitions written from the papers and their code: ragged
frames, dense steps, words that are all or hardly valid, logits whose small shares underflow, orders of uneven grids.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from glocal.testing import Case, Run, adapter
from glocal.testing.parity import check_case

BACKENDS = ("reference", "cpu")


def agrees(slug: str, config: Any, tensors: dict[str, Tensor], backend: str = "auto") -> None:
    found = adapter(slug)
    assert found is not None
    case = Case(Path("none"), slug, "plain", config=config, tensors=tensors)
    done = check_case(case, found, Run(backend=backend))
    assert done.passed, done.verdict


def attended(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    return scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=seen)


def tokens_of(blocks: Tensor, block: int) -> Tensor:
    return blocks.repeat_interleave(block, -2).repeat_interleave(block, -1)


def radial_blocks(frames: int, tokens: int, block: int, decay: float, model: str, text: int) -> Tensor:
    """Every pair of frames as a mask of tokens at its place, cut in blocks, judged column by column."""
    count, side = (frames * tokens + text) // block, -(-tokens // block)
    kept = torch.zeros(count, count, dtype=torch.bool)
    distance = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs()
    for i, j in product(range(frames), repeat=2):
        gap, share = abs(i - j), 2.0 ** (tokens.bit_length() - abs(i - j).bit_length())
        if model == "wan" and j == 0:
            pair = torch.ones(tokens, tokens)
        else:
            thinned = share < 128 and gap % int(128 / share) != 0
            width = tokens if gap <= 1 else max(share * decay, block)
            pair = ((distance <= width) & (not thinned)).float()
        (row, top), (column, left) = divmod(i * tokens, block), divmod(j * tokens, block)
        placed = torch.zeros(top + side * block, left + side * block)
        placed[top : top + tokens, left : left + tokens] = pair
        filled = placed[: side * block, : side * block].reshape(side, block, side, block).sum(1) / block
        dense = (filled > 1 / 3).sum(-1) / ((filled > 0).sum(-1) + 1e-9) > 0.6
        here = kept[row : row + side, column : column + side]
        here |= dense[: here.shape[0], : here.shape[1]]
    kept[frames * tokens // block :] = True
    kept[:, frames * tokens // block :] = True
    return kept


@pytest.mark.parametrize("model", ["wan", "hunyuan"])
@pytest.mark.parametrize(
    ("frames", "tokens", "block", "text"), [(8, 94, 32, 0), (5, 190, 64, 77), (13, 46, 16, 32), (1, 33, 16, 0)]
)
def test_radial_blocks_of_frames_that_are_no_whole_blocks(
    frames: int, tokens: int, block: int, text: int, model: str
) -> None:
    mask = radial_blocks(frames, tokens, block, 0.5, model, text)
    assert frames == 1 or not bool(mask.diagonal().all())  # the published rule leaves blocks out that hold themselves
    config = {
        "num_frame": frames, "token_per_frame": tokens, "block_size": block, "decay_factor": 0.5,
        "model_type": model, "text_tokens": text, "density": float(mask.double().mean()),
    }  # fmt: skip
    agrees("radial", [config], {"out.block_mask0": mask.to(torch.uint8)})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "model", "text", "valid"),
    [("radial", "hunyuan", 64, 1), ("radial", "hunyuan", 64, 64), ("dense", "hunyuan", 64, 33), ("dense", "wan", 0, 0)],
)
def test_radial_attention(kind: str, model: str, text: int, valid: int, backend: str) -> None:
    frames, tokens, block, media = 7, 64, 32, 448
    q, k, v = torch.randn(3, 1, 3, media + text, 16, generator=torch.Generator().manual_seed(0))
    blocks = radial_blocks(frames, tokens, block, 0.2, model, text)
    seen = tokens_of(torch.ones_like(blocks) if kind == "dense" else blocks, block)
    seen[:, media + valid :] = False
    config = {
        "num_frame": frames, "token_per_frame": tokens, "block_size": block, "decay_factor": 0.2,
        "model_type": model, "text_tokens": text, "valid_text_tokens": valid, "sparsity_type": kind,
    }  # fmt: skip
    given = {f"in.{n}": t.transpose(1, 2) for n, t in {"query": q, "key": k, "value": v}.items()}
    agrees("radial", config, given | {"out.output": attended(q, k, v, seen).transpose(1, 2).float()}, backend)


def rectified(q: Tensor, k: Tensor, v: Tensor, config: dict[str, Any], near: Tensor) -> dict[str, Tensor]:
    """The published steps, in float64."""
    block, words = config["block_size"], config.get("text_len", 0)
    media, valid = q.shape[2] - words, config.get("valid_text", words)
    groups = -(-media // block)
    q, k, v = q.double(), k.double().clone(), v.double().clone()
    for t in (k, v):
        t[:, :, media + valid :] = 0
    parts = [pad(t[:, :, :media], (0, 0, 0, groups * block - media)).unflatten(2, (groups, block)) for t in (q, k, v)]
    (mean_q, mean_k, mean_v), (far_q, far_k, _) = (
        [t.mean(3) for t in parts],
        [(t - t.mean(3, keepdim=True)).abs().mean(3) for t in parts],
    )
    keys = torch.cat([mean_k, k[:, :, media : media + valid]], 2)
    share = (mean_q @ keys.mT * q.shape[-1] ** -0.5).softmax(-1)
    if words:
        visual, text = share[..., :groups], share[..., groups:].sum(-1, keepdim=True)
        total = visual.sum(-1, keepdim=True) * block + text
        share = torch.cat([visual * block, text], -1) / total
    best = share.sort(-1, descending=True)
    need = (best.values.cumsum(-1) <= config["p_remain_rates"]).sum(-1, keepdim=True) + 1
    won = torch.arange(share.shape[-1]) < need.clamp(min=config["top_k"])
    kept = torch.zeros_like(won).scatter(-1, best.indices, won)[..., :groups] | near
    first = config.get("first_frame_blocks", 0)
    kept[:, :, :first, :first] = True
    error = (far_q @ mean_k.mT).abs() + (mean_q @ far_k.mT).abs()
    useless = (mean_q @ mean_k.mT).abs() <= error
    gone = share[..., :groups] * ~(kept | useless)
    seen = torch.zeros(*q.shape[:2], media, q.shape[2], dtype=torch.bool)
    seen[..., :media] = tokens_of(kept, block)[..., :media, :media]
    seen[..., media : media + valid] = True
    factor, addend = (t.repeat_interleave(block, 2)[:, :, :media] for t in (1 - gone.sum(-1), gone @ mean_v))
    out = [attended(q[:, :, :media], k, v, seen) * factor[..., None] + addend]
    text = slice(media, media + valid)
    out += [attended(q[:, :, text], k[:, :, : media + valid], v[:, :, : media + valid])]
    whole = pad(torch.cat(out, 2), (0, 0, 0, words - valid))
    return {"out.o": whole.transpose(1, 2).flatten(2).float(), "mid.gapr_not_used_mask": useless}


@pytest.mark.parametrize("loud", [1.0, 20.0])
@pytest.mark.parametrize(
    ("media", "changed"),
    [
        (6 * 32, {"text_len": 64, "valid_text": 1, "top_k": 1, "p_remain_rates": 0.0}),
        (6 * 32, {"text_len": 64, "valid_text": 64, "top_k": 3, "p_remain_rates": 0.9}),
        (5 * 32 + 1, {"first_frame_blocks": 3, "top_k": 0, "p_remain_rates": 0.5}),
        (4 * 32, {"first_frame_blocks": 0, "top_k": 9, "p_remain_rates": 1.0}),
    ],
)
def test_rectified_spaattn(media: int, changed: dict[str, Any], loud: float) -> None:
    """Loud queries and keys give shares that float32 takes for zero; neighbours are kept all the same."""
    generator = torch.Generator().manual_seed(1)
    config = {"block_size": 32} | changed
    groups = -(-media // 32)
    q, k, v = torch.randn(3, 1, 3, media + config.get("text_len", 0), 16, generator=generator)
    slow = torch.randn(3, 1, 3, groups, 16, generator=generator).repeat_interleave(32, 3)[..., :media, :]
    for t, s in zip((q, k, v), slow, strict=True):
        t[:, :, :media] = 0.3 * t[:, :, :media] + s
    q, k = q * loud, k * loud
    near = torch.rand(groups, groups, generator=generator) < 0.2
    near = near | near.T | torch.eye(groups, dtype=torch.bool)
    given = {"in.q": q, "in.k": k, "in.v": v, "in.block_neighbor": near}
    agrees("rectified_spaattn", config, given | rectified(q, k, v, config, near))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "words"), [((2, 3, 7), 0), ((5, 1, 6), 70), ((3, 4, 5), 1)])
def test_paro_orders_of_grids_that_are_no_whole_blocks(shape: tuple[int, int, int], words: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    order, block = torch.tensor([5, 2, 0, 4]), 16
    media = torch.arange(shape[0] * shape[1] * shape[2]).reshape(shape)
    axes = ((0, 1, 2), (0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 1, 0), (2, 0, 1))
    places = [torch.cat([torch.arange(words), words + media.permute(a).flatten()]) for a in axes]
    size = words + media.numel()
    blocks = torch.rand(4, -(-size // block), -(-size // block), generator=generator) < 0.4
    blocks[:, -1], blocks[..., -1] = True, True
    q, k, v = torch.randn(3, 2, 4, size, 8, generator=generator)
    out = torch.empty_like(q)
    for head, number in enumerate(order.tolist()):
        at, seen = places[number], tokens_of(blocks[head], block)[:size, :size]
        out[:, head, at] = attended(q[:, head, at], k[:, head, at], v[:, head, at], seen).float()
    config = {"F": shape[0], "H": shape[1], "W": shape[2], "n_text_tokens": words, "block": block}
    given = {"in.q": q, "in.k": k, "in.v": v, "in.block_mask": blocks, "in.order_index": order}
    agrees("paro", config, given | {"out.o": out}, backend)
    agrees("paro", config, {"out.token_ids": torch.stack(places).int()})
