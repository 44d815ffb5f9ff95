"""Timers: records, order statistics, interleaving."""

import math
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from glocal.measure import compare_paired, summarize, time_call, timers
from glocal.measure.timers import median_ranks


def test_summarize_percentiles():
    timing = summarize([5.0, 1.0, 3.0, 2.0, 4.0])
    assert timing.median == 3.0
    assert timing.low == pytest.approx(1.2) and timing.high == pytest.approx(4.8)
    assert timing.samples == (5.0, 1.0, 3.0, 2.0, 4.0) and timing.unit == "s"
    with pytest.raises(ValueError, match="samples is empty"):
        summarize([])


def test_time_call_counts_calls_and_measures_sleep():
    calls = []

    def work():
        calls.append(1)
        time.sleep(0.002)

    timing = time_call(work, device="cpu", warmup=2, repeats=3)
    assert len(calls) == 5 and len(timing.samples) == 3
    assert timing.low >= 0.0019


def test_median_ranks_are_the_binomial_ones():
    assert median_ranks(4, 0.90) == (0, 1 - 2 / 16)
    assert median_ranks(5, 0.90) == (0, 1 - 2 / 32)
    assert median_ranks(8, 0.90) == (1, pytest.approx(1 - 2 * 9 / 256))
    place, reached = median_ranks(2000, 0.90)
    assert reached >= 0.90 and place == pytest.approx(1000 - 1.645 * math.sqrt(500), abs=3)


def test_paired_ratios_follow_the_slower_baseline():
    timing = compare_paired(
        {"slow": lambda: time.sleep(0.004), "fast": lambda: time.sleep(0.001)},
        rounds=6,
        device="cpu",
        generator=torch.Generator().manual_seed(0),
        warmup=0,
    )
    ratio = timing.ratios["fast"]
    assert timing.baseline == "slow" and set(timing.ratios) == {"fast"}
    assert len(ratio.rounds) == 6 and ratio.low <= ratio.median <= ratio.high
    assert 1.5 < ratio.median < 6 and ratio.level == pytest.approx(1 - 2 / 64)


def test_order_alternates_without_a_generator_and_is_drawn_with_one():
    seen: list[str] = []
    contenders = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    compare_paired(contenders, rounds=2, device="cpu", warmup=0)
    assert "".join(seen) == "abccba"
    seen.clear()
    compare_paired(contenders, rounds=8, device="cpu", generator=torch.Generator().manual_seed(1), warmup=0)
    rounds = ["".join(seen[i : i + 3]) for i in range(0, 24, 3)]
    assert len(set(rounds)) > 2 and all(sorted(r) == ["a", "b", "c"] for r in rounds)


def test_bad_arguments_are_refused_in_words():
    with pytest.raises(ValueError, match="repeats must be >= 1 and warmup >= 0, got repeats=0, warmup=3"):
        time_call(lambda: None, device="cpu", repeats=0)
    with pytest.raises(ValueError, match="flush=True needs a cuda device, got 'cpu'"):
        time_call(lambda: None, device="cpu", flush=True)
    with pytest.raises(ValueError, match="timers know 'cpu' and 'cuda'"):
        time_call(lambda: None, device="meta")
    with pytest.raises(ValueError, match="baseline 'x' is no contender; legal: a, b"):
        compare_paired({"a": lambda: None, "b": lambda: None}, 2, "cpu", baseline="x")
    with pytest.raises(ValueError, match=r"contenders holds 1 name\(s\)"):
        compare_paired({"a": lambda: None}, 2, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_events_time_a_matmul():
    x = torch.randn(2048, 2048, device="cuda")
    timing = time_call(lambda: x @ x, device="cuda", repeats=5, flush=True)
    assert 0 < timing.low <= timing.median <= timing.high < 1.0


def test_the_same_rounds_against_another_baseline() -> None:
    found = compare_paired({"a": lambda: sum(range(2000)), "b": lambda: sum(range(20))}, 5, "cpu")
    other = found.against("b")
    assert other.times == found.times
    assert list(other.ratios) == ["a"]
    assert other.ratios["a"].rounds == pytest.approx([1 / r for r in found.ratios["b"].rounds])
    with pytest.raises(ValueError, match="baseline 'c' is no contender; legal: a, b"):
        found.against("c")


class Device:
    """A host and a device with clocks of their own, in place of torch.cuda: 1,000 cycles a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.ready = 0.0
        device = self

        class Event:
            """When the device comes to it."""

            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = max(device.ready, device.host)

            def synchronize(self) -> None:
                device.host = max(device.host, self.at)

            def elapsed_time(self, other) -> float:
                return 1000 * (other.at - self.at)

        cuda = SimpleNamespace(
            Event=Event,
            device=lambda which: nullcontext(),
            synchronize=self.wait,
            _sleep=lambda cycles: self.launch(0.0, cycles / 1000),
        )
        monkeypatch.setattr(timers, "torch", SimpleNamespace(cuda=cuda, device=torch.device, randperm=torch.randperm))
        monkeypatch.setattr(timers, "time", SimpleNamespace(perf_counter=lambda: self.host))

    def launch(self, host: float, busy: float) -> None:
        """The host spends `host` seconds until the device has `busy` seconds to do."""
        self.host += host
        self.ready = max(self.ready, self.host) + busy

    def wait(self) -> None:
        """The host waits."""
        self.host = max(self.host, self.ready)


def test_time_of_the_host_is_hidden_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    found = compare_paired(
        {"quick": lambda: device.launch(0.005, 0.001), "slow": lambda: device.launch(0.001, 0.004)}, 5, "cuda"
    )
    assert found.times["quick"].median == pytest.approx(0.001) and found.times["quick"].host == pytest.approx(0.005)
    assert found.times["slow"].median == pytest.approx(0.004) and found.times["slow"].host == pytest.approx(0.001)
    assert found.ratios["slow"].median == pytest.approx(0.25)


def test_a_host_that_gets_slower_is_held_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    device, calls = Device(monkeypatch), []

    def run() -> None:
        calls.append(1)
        device.launch(0.004 if len(calls) > 3 else 0.001, 0.002)

    assert time_call(run, device="cuda", repeats=5).samples == pytest.approx([0.002] * 5)


def test_a_call_that_waits_for_the_device_is_timed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)

    def run() -> None:
        for _ in range(2):
            device.launch(0.001, 0.002)
            device.wait()

    found = time_call(run, device="cuda", repeats=4)
    assert found.median == pytest.approx(0.006) and found.host == pytest.approx(0.006)


def test_times_of_the_host_alone_have_none_beside() -> None:
    assert time_call(lambda: None, device="cpu", repeats=2).host is None
