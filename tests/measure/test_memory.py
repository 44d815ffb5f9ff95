"""Peak memory of a call counts what lives at the same time, not the sum of what was allocated."""

import pytest
import torch

from glocal.measure import peak_memory


def test_cpu_peak_counts_the_living():
    def work():
        a = torch.ones(1 << 18)  # 1 MiB
        b = a * 2
        del a
        c = b + 1
        return c.double()  # b, c and twice their size: 4 MiB

    peak = peak_memory(work, device="cpu")
    assert peak.extra == pytest.approx(4 * 2**20, rel=0.01)
    assert peak.method == "torch.profiler allocator events"


def test_unknown_device_is_refused():
    with pytest.raises(ValueError, match="device is 'meta'; peak_memory knows 'cpu' and 'cuda'"):
        peak_memory(lambda: None, device="meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak():
    peak = peak_memory(lambda: torch.ones(1 << 20, device="cuda") * 2, device="cuda")
    assert peak.extra == pytest.approx(8 * 2**20, rel=0.01)
