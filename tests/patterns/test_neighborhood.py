import json

import pytest
import torch
from safetensors import safe_open

from glocal.canvas import Canvas, Layout
from glocal.patterns import Neighborhood

MASKS = [
    "na1d_blocked_ragged",
    "na1d_even_dilated_causal",
    "na1d_even_stride_even",
    "na1d_odd_stride",
    "na2d_additional_kv",
    "na2d_even_dilated_axis_causal",
    "na2d_full_equals_dense",
    "na2d_gqa",
    "na2d_odd_stride",
    "na2d_tiled_permuted_dilated",
    "na2d_window_attention_limit",
    "na3d_axis_causal",
    "na3d_dilated",
]


def axis_rule(q, k, length, window, stride=1, dilation=1, causal=False, border="shift"):
    """One axis, token by token: list the keys of the query's dilation group, then cut the window out of it."""
    group = list(range(q % dilation, length, dilation))
    if k not in group:
        return False
    here, there = group.index(q), group.index(k)
    leader = here - here % stride + (stride - 1 if causal else stride // 2)
    leader = min(leader, len(group) - 1)
    if causal:
        return max(leader - window + 1, 0) <= there <= here
    start = leader - window // 2
    end = start + window
    if border == "shift":
        start, end = (0, window) if start < 0 else (start, end)
        start, end = (len(group) - window, len(group)) if end > len(group) else (start, end)
    return start <= there < end


CASES = [
    ((9,), {"window": 4}),
    ((11,), {"window": 3, "dilation": 3}),
    ((11,), {"window": 5, "stride": 3}),
    ((11,), {"window": 5, "stride": 2, "causal": True}),
    ((11,), {"window": 6, "border": "clip"}),
    ((6, 7), {"window": 3, "stride": 2}),
    ((7, 9), {"window": 2, "dilation": 3, "border": "clip"}),
    ((4, 5, 6), {"window": 3}),
]


@pytest.mark.parametrize(("shape", "options"), CASES)
def test_definition_and_closed_form(agrees, shape, options):
    def rule(q, k):
        return all(axis_rule(a, b, n, **options) for a, b, n in zip(q, k, shape, strict=True))

    seen = agrees(Neighborhood(**options), shape, rule)
    if options.get("stride", 1) == 1:
        assert bool(seen.diagonal().all())


def test_axes_differ(agrees):
    pattern = Neighborhood((2, 3, 4), stride=(1, 2, 4), causal=(True, False, False))
    agrees(
        pattern,
        (3, 5, 6),
        lambda q, k: (
            axis_rule(q[0], k[0], 3, 2, causal=True)
            and axis_rule(q[1], k[1], 5, 3, stride=2)
            and axis_rule(q[2], k[2], 6, 4, stride=4)
        ),
    )


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_generalized_neighborhood_attention(golden, name):
    with safe_open(golden(f"gna/{name}.safetensors"), "pt") as case:
        want = case.get_tensor("mid.mask").bool()
        config = json.loads(case.metadata()["meta"])["config"]
    pattern = Neighborhood(config["kernel_size"], config["stride"], config["dilation"], config["is_causal"])
    assert torch.equal(pattern.mask(Layout.of(Canvas(config["token_layout"])))[0], want)


def test_oversize_full_sees_the_whole_axis(agrees):
    agrees(Neighborhood((9, 3), oversize="full"), (4, 5), lambda q, k: axis_rule(q[1], k[1], 5, 3))


def test_errors():
    with pytest.raises(
        ValueError, match=r"window=9 with dilation=1 does not fit axis 0 of length 4.*largest window there: 4"
    ):
        Neighborhood(9).check(Layout.of(Canvas((4,))))
    with pytest.raises(
        ValueError, match="stride=4 on axis 0 must lie between 1 and the window 3; nearest legal stride: 3"
    ):
        Neighborhood(3, stride=4)
    with pytest.raises(TypeError, match=r"window=\(3.5, 3\) must be whole numbers"):
        Neighborhood((3.5, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="border='wrap'; legal: 'shift', 'clip'"):
        Neighborhood(3, border="wrap")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"different lengths \[2, 3\]"):
        Neighborhood((3, 3), dilation=(1, 1, 1))
