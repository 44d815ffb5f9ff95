"""A tiny video model, how it is judged, and samples that differ pairwise."""

from __future__ import annotations

import pytest
import torch

from glocal.advise import Frames, Workload
from glocal.models.generation import SampleSpec, VideoDiT, VideoDiTConfig

FIELDS = (("shape", ("disc", "square")), ("colour", ("red", "green", "blue", "white", "black", "grey")))


@pytest.fixture(scope="module")
def model() -> VideoDiT:
    """Two layers, two heads; zero-initialised parameters get values, so that attention reaches the output."""
    torch.manual_seed(0)
    config = VideoDiTConfig(dim=48, layers=2, heads=2, hidden=64, fields=FIELDS)
    made = VideoDiT(config).eval()
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return made


@pytest.fixture(scope="session")
def objective() -> Frames:
    """Four steps on a canvas of 4 x 8 x 8 tokens."""
    return Frames(SampleSpec(steps=4), frames=4, height=32, width=32)


@pytest.fixture(scope="session")
def workload() -> Workload:
    """Twelve samples whose arguments and seeds differ pairwise."""
    made = [{"shape": shape, "colour": colour} for shape in FIELDS[0][1] for colour in FIELDS[1][1]]
    return Workload.from_calls(made, range(len(made)))
