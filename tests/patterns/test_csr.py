import json

import pytest
import torch
from safetensors import safe_open

from glocal.canvas import Canvas, Layout
from glocal.patterns import StridedShards, kernel_rows, row_lists


@pytest.mark.parametrize("number", range(3))
def test_published_kernel_layouts(golden, number):
    with safe_open(golden("s2_attention/kernel_layouts.safetensors"), "pt") as case:
        config = json.loads(case.metadata()["meta"])["config"][number]
        crow, col = case.get_tensor(f"out.crow{number}"), case.get_tensor(f"out.col{number}")
    pattern = StridedShards(config["block_size"], config["local_blocks"], config["vert_stride"], config["num_heads"])
    mask = pattern.shards.block_mask(Layout.of(Canvas((config["seqlen"],))))
    lists = kernel_rows(mask, config["block_size"], config["block_m"], config["block_n"])
    assert torch.equal(lists.crow, crow)
    if lists.lead is None:
        assert torch.equal(lists.col, col)
    else:
        assert torch.equal(torch.stack([lists.col, lists.lead], -1), col)


def test_row_lists_give_the_mask_back(generator):
    mask = torch.rand(3, 5, 7, generator=generator) < 0.4
    lists = row_lists(mask)
    back = torch.zeros_like(mask)
    for head in range(3):
        for row in range(5):
            back[head, row, lists.col[head, lists.crow[head, row] : lists.crow[head, row + 1]].long()] = True
    assert torch.equal(back, mask)


def test_merged_rows_refuse_what_a_leading_count_cannot_say():
    """A kernel that merges rows of any pattern would silently fill holes; here that is an error."""
    mask = torch.eye(4).bool()
    mask[:, 0] = torch.tensor([True, False, True, True])  # row 1 does not see block 0, row 2 does
    with pytest.raises(ValueError, match="merges 4 rows whose patterns are no prefixes of each other; use block_m=16"):
        kernel_rows(mask[None], 16, 64, 16)


def test_errors():
    mask = torch.ones(1, 4, 4).tril().bool()
    with pytest.raises(ValueError, match="block_m=48 must divide block=32 or be a multiple"):
        kernel_rows(mask, 32, 48, 32)
    with pytest.raises(ValueError, match="block_n=64 must divide block=32"):
        kernel_rows(mask, 32, 32, 64)
