"""Faster Neighborhood Attention (arXiv 2403.04690): stride 1, relative bias with gradients, window slots of logits."""

from __future__ import annotations

from torch import Tensor

from glocal.ops import Capture, Relative, Score
from glocal.patterns import Neighborhood
from glocal.testing.adapter import Adapter, Run
from glocal.testing.adapters import gna
from glocal.testing.adapters._maps import attend_map, extra_layout, leaves, outputs_and_gradients, sequences, tuples
from glocal.testing.case import Case


def run(case: Case, where: Run) -> dict[str, Tensor]:
    """Our results of one case; the fused cases have the form of those of GNA."""
    if "stride" in case.config:
        return gna.operator(case, where)
    rule = tuples(case.config, "token_layout", "kernel_size", "dilation", "is_causal")
    pattern = Neighborhood(rule["kernel_size"], 1, rule["dilation"], rule["is_causal"])
    layout = extra_layout(rule["token_layout"], case.config["additional_kv"])
    inputs = leaves(case, ("query", "key", "value", "additional_keys", "additional_values", "rpb"))
    bias = (Relative(inputs["rpb"], rule["dilation"]),) if "rpb" in inputs else ()
    score = Score(scale=case.config["scale"], bias=bias)
    outputs = attend_map(inputs, pattern, layout, score, where, first=True)
    found = outputs_and_gradients(outputs, {"output": case["in.grad_output"]}, inputs)
    q, k, _ = sequences({name: t.detach() for name, t in inputs.items()}, len(rule["token_layout"]), first=True)
    slots = Capture(q, k, pattern=pattern, canvas=layout, score=score, differentiable=False).window("logits")
    return found | {"mid.attn_logits": slots.reshape(case["mid.attn_logits"].shape)}


ADAPTER = Adapter("fna", run)
