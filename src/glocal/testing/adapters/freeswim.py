"""FreeSwim (arXiv 2511.14712): inward windows, both branches of a tiny Wan, and steps that reuse what is cached.

Rows that the authors compute twice (the full branch where it equals the window) are run once here and shown twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from glocal.adapt.freeswim import FreeSwim, FreeSwimSettings, freeswim
from glocal.canvas import Canvas, Layout
from glocal.testing.adapter import Adapter, Run
from glocal.testing.case import Case


def run(case: Case, where: Run) -> dict[str, Tensor]:
    """Our results of one case."""
    if "out.mask0" in case:
        return masks(case)
    return dual(case, where) if "in.latents" in case else cached(case, where)


def masks(case: Case) -> dict[str, Tensor]:
    """Who sees whom, and the share of pairs."""
    found: dict[str, Tensor] = {}
    for i, config in enumerate(case.config):
        layout = Layout.of(Canvas((config["num_frames"], config["height"], config["width"])))
        mask = FreeSwimSettings(_reach(config)).pattern(config["num_frames"]).mask(layout)[0]
        found |= {f"out.mask{i}": mask.to(torch.uint8), f"out.density{i}": mask.double().mean()}
    return found


def _reach(config: Mapping[str, Any]) -> tuple[int, int]:
    return config["d_h"], config["d_w"]


def _model(case: Case, where: Run) -> Any:
    from diffusers import WanTransformer3DModel  # type: ignore[attr-defined]

    model: Any = WanTransformer3DModel(**case.config["transformer"]).eval()
    model.load_state_dict(case.group("state"))
    return model.to(where.device)


def dual(case: Case, where: Run) -> dict[str, Tensor]:
    """One forward of both branches; what the attentions of the blocks give on the way."""
    model, found = _model(case, where), {}
    hooks = []
    for i, block in enumerate(model.blocks):
        for name in ("attn1", "attn2"):

            def after(_: Any, __: Any, out: Tensor, name: str = f"mid.block{i}_{name}") -> None:
                found[name] = out

            hooks.append(getattr(block, name).register_forward_hook(after))
    settings = FreeSwimSettings(_reach(case.config))
    with torch.no_grad(), freeswim(model, settings=settings, backend=where.backend) as handle:
        given = (case["in.latents"], case["in.timestep"], case["in.text"])
        found["out.window_branch"] = model(*given, return_dict=False)[0]
        assert isinstance(handle.method, FreeSwim) and handle.method.full_branch is not None
        found["out.full_branch"] = handle.method.full_branch
    for hook in hooks:
        hook.remove()
    return {name: t for name, t in found.items() if name in case}


def cached(case: Case, where: Run) -> dict[str, Tensor]:
    """Steps with and without guidance, and what is cached at the end."""
    model, steps, found = _model(case, where), case.config["steps"], {}
    settings = FreeSwimSettings(_reach(case.config), cache_steps=_period(steps))
    with torch.no_grad(), freeswim(model, settings=settings, backend=where.backend) as handle:
        method, store = handle.method, handle.state.store
        assert isinstance(method, FreeSwim)
        for step in range(len(steps)):
            for branch, text in (("cond", "in.text"), ("uncond", "in.negative_text")):
                if text not in case:
                    continue
                given = (case[f"in.latents{step}"], case[f"in.timestep{step}"], case[text])
                mine = model(*given, return_dict=False)[0]
                full = mine if method.full_branch is None else method.full_branch
                found[f"out.{branch}{step}"] = torch.cat([mine, full])
        for (site, _), kept in store.items():
            if site:
                found[f"mid.cache_block{site.split('.')[1]}"] = kept.transpose(1, 2)  # [1, N, heads, head_dim]
    return {name: t for name, t in found.items() if name in case}


def _period(steps: Sequence[str]) -> int:
    """How far apart refreshed steps lie."""
    again = [i for i, what in enumerate(steps) if what == "refresh" and i]
    return again[0] if again else len(steps)


def expected(case: Case) -> dict[str, Tensor]:
    """The published results, and the density that goes with each mask."""
    if "out.mask0" not in case:
        return case.results()
    densities = enumerate(config["density"] for config in case.config)
    return case.results() | {f"out.density{i}": torch.tensor(d, dtype=torch.float64) for i, d in densities}


def skip(case: Case) -> str | None:
    """The cases with a model need diffusers."""
    if "out.mask0" in case or find_spec("diffusers") is not None:
        return None
    return "diffusers is not installed: pip install 'glocal[diffusers]'"


ADAPTER = Adapter("freeswim", run, skip=skip, expected=expected, attends=lambda case: "out.mask0" not in case)
