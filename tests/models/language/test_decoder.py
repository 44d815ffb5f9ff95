"""The built-in decoder: causal, positions kept, sites reachable, weights there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from glocal.adapt import Method, SiteCall, attach, host_of
from glocal.adapt.records import Core
from glocal.advise import Sample
from glocal.advise.next_token import NextToken
from glocal.data import FACT, QUESTION, make_text
from glocal.models.language import Decoder, DecoderConfig, encode, load_decoder, save_decoder
from glocal.models.language.decoder import short_convolution
from glocal.models.language.weights import SHIPPED

SMALL = DecoderConfig(dim=32, layers=2, heads=4, kv_heads=2, hidden=48)


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(SMALL).eval()


def ids(length: int = 40) -> Tensor:
    return torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_no_token_sees_a_later_one(model: Decoder) -> None:
    one = ids()
    other = one.clone()
    other[:, 25:] = 0
    torch.testing.assert_close(model(one)[:, :25], model(other)[:, :25])


@torch.no_grad()
def test_positions_that_are_kept_are_those_of_all(model: Decoder) -> None:
    keep = torch.tensor([3, 17, 39])
    torch.testing.assert_close(model(ids(), keep), model(ids())[:, keep])


@torch.no_grad()
def test_sites_say_what_they_are_and_add_up(model: Decoder) -> None:
    calls: list[tuple[SiteCall, Tensor]] = []

    class Keep(Method):
        def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
            calls.append((call, inner(q, k, v, call)))
            return calls[-1][1]

    plain = model(ids())
    with attach(model, Keep()):
        assert torch.equal(model(ids()), plain)
    assert torch.equal(model(ids()), plain)
    call, out = calls[1]
    assert call.site.causal and call.site.kv_heads == 2 and call.state.phase == "prefill"
    assert call.contribution is not None
    wanted = model.get_submodule("blocks.1.attn.proj")(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(call.contribution(out).sum(1), wanted)
    assert [s.layer for s in host_of(model).sites(model)] == [0, 1]


def test_weights_there_and_back(model: Decoder, tmp_path: Path) -> None:
    save_decoder(model, tmp_path / "w.safetensors")
    again = load_decoder(tmp_path / "w.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(again(ids()), model(ids()), rtol=0.05, atol=0.01)
    assert again.config == SMALL
    with pytest.raises(FileNotFoundError, match="train them with bench/train_language.py"):
        load_decoder(tmp_path / "none")


def test_shapes_and_sizes_are_checked(model: Decoder) -> None:
    with pytest.raises(ValueError, match=r"ids has shape \(1, 4\) and dtype torch.int32"):
        model(torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="kv_heads=3: must divide heads=4"):
        DecoderConfig(kv_heads=3)
    with pytest.raises(ValueError, match="heads=5: dim=128 must split"):
        DecoderConfig(heads=5)
    with pytest.raises(ValueError, match="rotary_share=1.5: must lie in 0 <= rotary_share <= 1"):
        DecoderConfig(rotary_share=1.5)
    with pytest.raises(ValueError, match="taps=0: must be at least 1"):
        DecoderConfig(taps=0)
    assert bytes(encode("a é")).decode() == "a é"


def test_the_short_convolution_is_that_of_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    x, taps = torch.randn(2, 9, 6, generator=draw), torch.randn(6, 4, generator=draw)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    wanted = torch.nn.functional.conv1d(padded, taps[:, None], groups=6).transpose(1, 2)
    torch.testing.assert_close(short_convolution(x, taps), wanted)


@torch.no_grad()
def test_channels_that_do_not_turn_compare_alike_at_any_distance() -> None:
    """Without turning channels and with one tap, a token that is moved gets the same answer from the same past."""
    torch.manual_seed(0)
    still = Decoder(DecoderConfig(dim=32, layers=1, heads=4, kv_heads=2, hidden=48, rotary_share=0.0, taps=1)).eval()
    text = ids(20)
    moved = torch.cat([text[:, :1], text[:, 1:10].flip(1), text[:, 10:]], 1)
    torch.testing.assert_close(still(text)[:, 12:], still(moved)[:, 12:])
    turning = Decoder(DecoderConfig(dim=32, layers=1, heads=4, kv_heads=2, hidden=48, rotary_share=1.0, taps=1)).eval()
    assert not torch.allclose(turning(text)[:, 12:], turning(moved)[:, 12:])


def test_the_shipped_weights_are_small_and_know_the_language() -> None:
    assert SHIPPED.stat().st_size < 1.1 * 2**20
    trained = load_decoder()
    text = encode("The old clerk walked past the market at dusk. The captain ")
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(trained(torch.tensor([text]))[0, 5:-1], torch.tensor(text[6:]))
    assert float(loss) < 1.0


def test_the_shipped_weights_find_needles_at_five_depths_and_cannot_without_looking_back() -> None:
    trained, length = load_decoder(), 4096
    judge = NextToken(encode, tokens=length, window=256, fact=FACT, question=QUESTION)
    found, nearby = 0.0, 0.0
    for seed in (3, 4):
        sample = Sample(str(seed), seed, {"text": make_text(length, 500 + seed)})
        out, cut = judge.run(trained, sample), judge.ceiling(trained, sample)
        found += judge.distance(out, out)["retrieval"] / 2
        nearby += judge.distance(out, cut)["retrieval"] / 2
    assert found >= 0.9 and nearby <= 0.3
