"""BlockPlan, what every kernel consumes: token orders, lists of full and partial key blocks, a table of bit masks."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from glocal._kept import ordinary
from glocal.canvas import Layout
from glocal.plan.facts import copy_facts, copy_sound


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Key blocks of each query block, for U distinct lists.

    count: int32 [U, blocks]; index: int32 [U, blocks, most], the first `count` entries of a row count;
    mask: row of the mask table for each entry, int32 [U, blocks, most], or None where all entries are full.
    """

    count: Tensor
    index: Tensor
    mask: Tensor | None = None

    @staticmethod
    def from_dense(picked: Tensor, mask: Tensor | None = None) -> BlockLists:
        """From bool [U, blocks, other blocks] (and the mask row of each picked pair)."""
        count = picked.sum(-1, dtype=torch.int32)
        most = int(count.max()) if count.numel() else 0
        u, row, column = picked.nonzero(as_tuple=True)
        place = (picked.cumsum(-1) - 1)[u, row, column]
        index = torch.zeros(*picked.shape[:2], most, dtype=torch.int32, device=picked.device)
        index[u, row, place] = column.int()
        if mask is None:
            return BlockLists(count, index)
        rows = torch.zeros_like(index)
        rows[u, row, place] = mask[u, row, column].int()
        return BlockLists(count, index, rows)

    @staticmethod
    def from_entries(
        shape: tuple[int, int], u: Tensor, row: Tensor, column: Tensor, mask: Tensor | None = None
    ) -> BlockLists:
        """From entries in any order, for `shape` = (lists, blocks); repeats are kept."""
        slot = u * shape[1] + row
        order = slot.argsort(stable=True)
        count = torch.bincount(slot, minlength=shape[0] * shape[1])
        place = torch.arange(slot.numel(), device=slot.device) - (count.cumsum(0) - count)[slot[order]]
        most = int(count.max()) if count.numel() else 0
        lists = []
        for values in (column, mask):
            if values is None:
                continue
            table = torch.zeros(shape[0] * shape[1], most, dtype=torch.int32, device=slot.device)
            table[slot[order], place] = values[order].int()
            lists.append(table.reshape(*shape, most))
        return BlockLists(count.reshape(shape).int(), *lists)

    @property
    def live(self) -> Tensor:
        """Which entries are real, bool [U, blocks, most]."""
        return torch.arange(self.index.shape[-1], device=self.index.device) < self.count[..., None]

    def entries(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """All entries as flat int64 tensors: list, query block, key block, mask row."""
        u, row, place = self.live.nonzero(as_tuple=True)
        mask = None if self.mask is None else self.mask[u, row, place].long()
        return u, row, self.index[u, row, place].long(), mask


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """A compiled relation for one geometry.

    layout: the geometry it was built for; another number of tokens is refused.
    q_order, kv_order: int32 [batch|1, heads|1, blocks * block] token indices, -1 pads. Subsets and repeats are legal:
        a key listed m times counts m times.
    full, partial: key blocks wholly and partly visible; the lists are shared through `owner`.
    masks: int32 [M, q_block, ceil(kv_block / 32)], bit j % 32 of word j // 32 says whether key j is visible.
    owner: int32 [batch|1, heads|1], the list of each sample and head; heads is 1, Hkv or Hq.
    """

    layout: Layout
    q_block: int
    kv_block: int
    q_order: Tensor
    kv_order: Tensor
    full: BlockLists
    partial: BlockLists
    masks: Tensor
    owner: Tensor
    name: str = "plan"

    @property
    def q_blocks(self) -> int:
        """Query blocks."""
        return self.full.count.shape[1]

    @property
    def kv_blocks(self) -> int:
        """Key blocks."""
        return self.kv_order.shape[-1] // self.kv_block

    @property
    def samples(self) -> int:
        """Samples with lists or orders of their own."""
        return max(self.owner.shape[0], self.q_order.shape[0], self.kv_order.shape[0])

    @property
    def heads(self) -> int:
        """Heads with lists or orders of their own."""
        return max(self.owner.shape[1], self.q_order.shape[1], self.kv_order.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.q_order.device

    @cached_property
    def key(self) -> Hashable:
        """Content hash."""
        return self.fingerprint

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the geometry and every tensor."""
        digest = hashlib.sha256(repr((self.layout.key, self.q_block, self.kv_block)).encode())
        for tensor in self.tensors().values():
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that cross the operator boundary, by name."""
        assert self.partial.mask is not None
        return {
            "q_order": self.q_order,
            "kv_order": self.kv_order,
            "full_count": self.full.count,
            "full_index": self.full.index,
            "part_count": self.partial.count,
            "part_index": self.partial.index,
            "part_mask": self.partial.mask,
            "masks": self.masks,
            "owner": self.owner,
        }

    def to(self, device: torch.device | str) -> BlockPlan:
        """The same plan on another device."""

        def move(value: object) -> object:
            if isinstance(value, Tensor):
                return value.to(device)
            if isinstance(value, BlockLists):
                return BlockLists(*(move(getattr(value, f.name)) for f in fields(value)))  # type: ignore[arg-type]
            return value

        moved = replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})
        for name in ("q_order", "kv_order"):
            copy_facts(getattr(self, name), getattr(moved, name))
        copy_sound(self.full, moved.full)
        copy_sound(self.partial, moved.partial)
        return moved

    def check(self, nq: int, nk: int) -> None:
        """Raise ValueError if the plan was made for other numbers of tokens."""
        if (nq, nk) != (self.layout.nq, self.layout.nk):
            raise ValueError(
                f"BlockPlan {self.name!r} is for {self.layout.nq} queries and {self.layout.nk} keys "
                f"({self.layout.q!r}), but q has {nq} and k has {nk} tokens; build a plan for this canvas."
            )

    @cached_property
    @ordinary()
    def visited_pairs(self) -> float:
        """Query-key pairs a kernel touches, mean over samples and heads (padding included)."""
        blocks = (self.full.count.sum(-1) + self.partial.count.sum(-1)).double()  # [U]
        return float(blocks[self.owner.long()].mean()) * self.q_block * self.kv_block

    @cached_property
    @ordinary()
    def visits(self) -> tuple[float, float]:
        """Shares of all pairs that lie in full and in partial blocks, mean over samples and heads."""
        block = self.q_block * self.kv_block / max(1, self.layout.nq * self.layout.nk)
        counts = torch.stack([lists.count.sum(-1)[self.owner.long()] for lists in (self.full, self.partial)])
        full, partial = (counts.double().mean((-1, -2)) * block).tolist()
        return full, partial

    @cached_property
    @ordinary()
    def visible_pairs(self) -> float:
        """Query-key pairs that may see each other, mean over samples and heads (repeated keys count)."""
        if self.q_order.shape[:2] != (1, 1) or self.kv_order.shape[:2] != (1, 1):
            return float(self.dense_counts().double().sum((-1, -2)).mean())
        valid = [
            (order.reshape(-1, block) >= 0).sum(-1).double()
            for order, block in ((self.q_order, self.q_block), (self.kv_order, self.kv_block))
        ]
        keys = torch.where(self.full.live, valid[1][self.full.index.long()], 0).sum(-1)  # [U, query blocks]
        total = (keys * valid[0]).sum(-1)
        if self.masks.shape[0]:
            assert self.partial.mask is not None
            seen = unpack(self.masks, self.kv_block).sum((-1, -2)).double()
            total = total + torch.where(self.partial.live, seen[self.partial.mask.long()], 0).sum((-1, -2))
        return float(total[self.owner.long()].mean())

    @cached_property
    def kept(self) -> float:
        """Visible pairs as a share of all pairs."""
        pairs = self.layout.nq * self.layout.nk
        return self.visible_pairs / pairs if pairs else 0.0

    @cached_property
    def visited(self) -> float:
        """Visited pairs as a share of all pairs: what time follows."""
        pairs = self.layout.nq * self.layout.nk
        return self.visited_pairs / pairs if pairs else 0.0

    def flops(self, heads: int, head_dim: int, value_dim: int | None = None, *, backward: bool = False) -> float:
        """Multiply-adds counted twice, for one sample, of the visible pairs (backward: 2.5 times the forward)."""
        value_dim = head_dim if value_dim is None else value_dim
        forward = 2.0 * self.visible_pairs * heads * (head_dim + value_dim)
        return forward * (2.5 if backward else 1.0)

    def bytes(self) -> int:
        """Memory of the plan itself."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @cached_property
    def transposed(self) -> tuple[BlockLists, BlockLists]:
        """Full and partial lists the other way round: the query blocks of each key block (for backward)."""
        out = []
        for lists in (self.full, self.partial):
            u, row, column, mask = lists.entries()
            shape = (lists.count.shape[0], self.kv_blocks)
            out.append(BlockLists.from_entries(shape, u, column, row, mask))
        return out[0], out[1]

    def block_shares(self) -> Tensor:
        """Visible share of every block pair, mean over lists, float [query blocks, key blocks]; for pictures."""
        shares = torch.zeros(self.full.count.shape[0], self.q_blocks, self.kv_blocks, device=self.device)
        u, row, column, _ = self.full.entries()
        shares[u, row, column] = 1.0
        u, row, column, mask = self.partial.entries()
        assert mask is not None
        shares[u, row, column] = unpack(self.masks, self.kv_block).float().mean((-1, -2))[mask]
        return shares.mean(0)

    def dense_counts(self) -> Tensor:
        """How often each query sees each key, int32 [batch|1, heads|1, Nq, Nk]; for small cases and oracles."""
        b = max(self.owner.shape[0], self.q_order.shape[0], self.kv_order.shape[0])
        nq, nk = self.layout.nq, self.layout.nk
        shape = (self.full.count.shape[0], self.q_blocks, self.kv_blocks, self.q_block, self.kv_block)
        seen = torch.zeros(shape, dtype=torch.int32, device=self.device)
        u, row, column, _ = self.full.entries()
        seen.index_put_((u, row, column), torch.ones_like(seen[u, row, column]), accumulate=True)  # repeats add up
        u, row, column, mask = self.partial.entries()
        assert mask is not None
        seen.index_put_((u, row, column), unpack(self.masks, self.kv_block)[mask].int(), accumulate=True)
        seen = seen.movedim(3, 2).flatten(3).flatten(1, 2)  # [U, ordered queries, ordered keys]
        out = torch.zeros(b, self.heads, nq + 1, nk + 1, dtype=torch.int32, device=self.device)
        for i in range(b):
            for h in range(self.heads):
                rows = _pick(self.q_order, i, h)
                columns = _pick(self.kv_order, i, h)
                lists = seen[int(_pick(self.owner, i, h))]
                rows, columns = torch.where(rows < 0, nq, rows).long(), torch.where(columns < 0, nk, columns).long()
                flat = rows[:, None] * (nk + 1) + columns[None]
                out[i, h].view(-1).index_add_(0, flat.flatten(), lists.flatten())
        return out[:, :, :nq, :nk]

    def __repr__(self) -> str:
        return (
            f"BlockPlan({self.name}: {self.layout.nq} x {self.layout.nk} tokens, "
            f"blocks {self.q_block} x {self.kv_block}, "
            f"{self.full.count.shape[0]} list(s), {self.masks.shape[0]} mask(s), kept {self.kept:.4f}, "
            f"visited {self.visited:.4f})"
        )


def _pick(tensor: Tensor, sample: int, head: int) -> Tensor:
    return tensor[sample if tensor.shape[0] > 1 else 0, head if tensor.shape[1] > 1 else 0]


def pack(masks: Tensor) -> Tensor:
    """Bool [M, q, k] to bits, int32 [M, q, ceil(k / 32)]."""
    m, q, k = masks.shape
    words = -(-k // 32)
    bits = torch.nn.functional.pad(masks, (0, words * 32 - k)).reshape(m, q, words, 32).long()
    packed = (bits << torch.arange(32, device=masks.device)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def unpack(masks: Tensor, kv_block: int) -> Tensor:
    """Bits to bool [M, q, kv_block]."""
    bits = (masks[..., None] >> torch.arange(32, device=masks.device, dtype=torch.int32)) & 1
    return bits.flatten(-2)[..., :kv_block].bool()
