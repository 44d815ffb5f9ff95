from __future__ import annotations

import zlib

import torch

from glocal.testing.fill import fill_crc32, fill_sorted, hashed


def test_sorted_rule_counts_names_it_does_not_fill() -> None:
    manifest = {"b.weight": (2, 3), "a.num_batches_tracked": (), "c.index": (4,), "d.bias": (3,), "e.weight": (3,)}
    filled = fill_sorted(manifest, 5, integers=["c.index"])
    assert set(filled) == {"b.weight", "d.bias", "e.weight"}

    def z(place: int, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(5 * 100003 + place))

    torch.testing.assert_close(filled["b.weight"], z(1, 2, 3) * 1.3 / 3**0.5)
    torch.testing.assert_close(filled["d.bias"], 0.2 * z(3, 3))
    torch.testing.assert_close(filled["e.weight"], 1 + 0.25 * z(4, 3))


def test_sorted_rule_has_the_extras_a_system_names() -> None:
    manifest = {"gamma": (2,), "pos_embed": (1, 2), "x.relative_position_bias_table": (3, 2), "n.running_var": (2,)}
    plain, rich = fill_sorted(manifest, 1), fill_sorted(manifest, 1, extras=("tables", "gammas", "embeddings"))
    assert torch.equal(plain["n.running_var"], rich["n.running_var"]) and bool((plain["n.running_var"] >= 0.5).all())
    torch.testing.assert_close(rich["gamma"], 0.6 + 0.2 * plain["gamma"] / 0.3)
    torch.testing.assert_close(rich["pos_embed"], 0.5 * plain["pos_embed"] * 2**0.5 / 1.3)
    assert "gamma" not in fill_sorted(manifest, 1, keep=lambda name: name == "gamma")


def test_hash_is_the_written_one() -> None:
    def by_hand(name: str, i: int) -> float:
        m = 0xFFFFFFFF
        z = (i + (zlib.crc32(name.encode()) * 0x9E3779B9 & m)) & m
        z ^= z >> 16
        z = z * 0x85EBCA6B & m
        z ^= z >> 13
        z = z * 0xC2B2AE35 & m
        return (z ^ z >> 16) / 2**32

    want = torch.tensor([by_hand("a.weight", i) for i in range(6)], dtype=torch.float64)
    assert torch.equal(hashed("a.weight", (2, 3)).flatten(), want)


def test_hash_rule_by_kind() -> None:
    manifest = {
        "a.weight": (4, 3),
        "a.bias": (4,),
        "n.weight": (4,),
        "n.running_mean": (4,),
        "n.num_batches_tracked": (),
    }
    filled = fill_crc32(manifest, gain=2.0)
    u = hashed("a.weight", (4, 3))
    torch.testing.assert_close(filled["a.weight"], ((2 * u - 1) * 2.0).float())
    torch.testing.assert_close(filled["a.bias"], (0.2 * (2 * hashed("a.bias", (4,)) - 1)).float())
    torch.testing.assert_close(filled["n.weight"], (0.5 + hashed("n.weight", (4,))).float())
    assert filled["n.num_batches_tracked"].dtype == torch.int64
