"""Tensors are the same ones, unchanged - wherever they lie."""

from __future__ import annotations

import torch

from glocal.kernels._seen import Seen


def test_same_objects_unchanged() -> None:
    a, b = torch.arange(3), torch.arange(4)
    seen = Seen.of([a, b])
    assert seen.still([a, b])
    assert not seen.still([a, b.clone()]) and not seen.still([b, a])
    b[0] = 7
    assert not seen.still([a, b])


def test_a_freed_tensor_is_forgotten_though_its_address_is_used_again() -> None:
    a = torch.arange(3)
    seen, address = Seen.of([a]), a.data_ptr()
    view = torch.from_numpy(a.numpy())  # the memory lives on under another tensor
    del a
    assert view.data_ptr() == address and not seen.still([view])


def test_inference_tensors_count_no_writes() -> None:
    with torch.inference_mode():
        a = torch.arange(3)
    assert Seen.of([a]).still([a])
