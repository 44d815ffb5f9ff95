"""Scale-DiT (arXiv 2510.16325): window-first orders, masks of inference, and FLUX.1 with a small image beside it.

The published table of blocks is computed here from runs, the published mask of tokens from its definition. The models
run the training mask; their sequence [text, image, low] may come window by window.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from glocal.adapt.scale_dit import ScaleDiT, ScaleDiTSettings, scale_dit
from glocal.canvas import Layout
from glocal.canvas.window_first import Inside, inverse, window_first
from glocal.patterns.guided import GuidedWindows
from glocal.patterns.guided_blocks import guided_blocks, guided_canvas, guided_order
from glocal.testing.adapter import Adapter, Run
from glocal.testing.case import Case

_INSIDE: dict[str, Inside] = {"window": "raster", "hierarchical": "quarters", "hilbert": "hilbert"}


def run(case: Case, where: Run) -> dict[str, Tensor]:
    """Our results of one case."""
    if "in.hidden_states" in case:
        return model(case, where)
    return orders(case) if "out.perm0" in case else masks(case)


def orders(case: Case) -> dict[str, Tensor]:
    """Every order of a case, and where each token went."""
    found = {}
    for number, one in enumerate(case.config):
        order = window_first((one["H"], one["W"]), (one["Wh"], one["Ww"]), _INSIDE[one["kind"]])
        found |= {f"out.perm{number}": order, f"out.inverse{number}": inverse(order)}
    return {name: t for name, t in found.items() if name in case}


def masks(case: Case) -> dict[str, Tensor]:
    """Blocks and tokens of images in pixels; 16 to a token."""
    found = {}
    for number, one in enumerate(case.config):
        image, low = (tuple(n // 16 for n in one[name]) for name in ("image_size", "low_res"))
        canvas, pattern = guided_canvas(one["text"], image, low), GuidedWindows(low_window=(4, 4))
        blocks = guided_blocks(pattern, canvas, *one["block"], full_only=True)
        assert isinstance(blocks.kept, Tensor)
        found[f"out.block_mask{number}"] = blocks.kept[0].to(torch.uint8)
        name = f"out.token_mask_packed{number}"
        if name in case:
            order = guided_order(pattern, canvas).gather
            found[name] = _packed(pattern.mask(Layout.of(canvas))[0][order][:, order])
    return {name: t for name, t in found.items() if name in case}


def _packed(mask: Tensor) -> Tensor:
    """Eight keys to a byte, the first in the highest bit."""
    bits = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bits * (1 << torch.arange(7, -1, -1))).sum(-1).to(torch.uint8)


def model(case: Case, where: Run) -> dict[str, Tensor]:
    """A tiny FLUX.1 with its updates, with the small image and without."""
    from diffusers import FluxTransformer2DModel

    config = case.config["model_config"]
    state = case.group("state")
    with torch.device(where.device):
        flux: Any = FluxTransformer2DModel(**case.config["transformer"]).eval()
    flux.load_state_dict({n.replace(".base_layer.", "."): t for n, t in state.items() if ".lora_" not in n})
    updates = {name: t for name, t in state.items() if ".lora_" in name}
    settings = settings_of(config)
    given = {n: case[f"in.{n}"] for n in ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")}
    given |= {
        "img_ids": case["in.img_ids"],
        "txt_ids": case["in.img_ids"].new_zeros(case["in.encoder_hidden_states"].shape[1], 3),
    }
    if "in.guidance" in case:
        given["guidance"] = case["in.guidance"]
    if "in.txt_ids" in case:
        given["txt_ids"] = case["in.txt_ids"]
    places = case["in.low_res_img_ids"]
    size = int(places[:, 1].max()) + 1, int(places[:, 2].max()) + 1
    order = (places[:, 1] * size[1] + places[:, 2]).argsort()
    alpha = case.config["lora"]["lora_alpha"]
    found = {}
    with (
        torch.no_grad(),
        scale_dit(flux, settings=settings, lora=updates, alpha=alpha, backend=where.backend) as handle,
    ):
        found["out.sample_without_low_res"] = flux(**given).sample
        assert isinstance(handle.method, ScaleDiT)
        handle.method.give(case["in.low_res_guidance"][:, order], size)
        found["out.sample"] = flux(**given).sample
    if "mid.attention_mask" in case:
        found["mid.attention_mask"] = _mask(case, settings, size).to(torch.uint8)
    return {name: t for name, t in found.items() if name in case}


def settings_of(config: dict[str, Any]) -> ScaleDiTSettings:
    """The published switches in our words: training with a mask of tokens."""
    patch = config.get("patch_size", 16)
    return ScaleDiTSettings(
        window=(config["window_size"][0] // patch, config["window_size"][1] // patch),
        local="sliding" if config.get("use_sliding_window", False) else "four",
        phase="training",
        text_sees_low=config.get("text_attend_scale", "all") == "all",
        guided=config.get("hi_res_attend_scale", "all") == "all",
        window_first=config.get("permute_window_first", False),
        block=None,
        scale_positions=config.get("scale_PE", False),
        ntk=config.get("ntk_factor", 1.0) * config.get("theta", 10000.0) / 10000.0,
    )


def _mask(case: Case, settings: ScaleDiTSettings, size: tuple[int, int]) -> Tensor:
    """The mask of tokens in the sequence the image tokens arrive in."""
    text, ids = case["in.encoder_hidden_states"].shape[1], case["in.img_ids"].long()
    rows, columns = (int(n) + 1 for n in ids[:, 1:].amax(0))
    canvas = guided_canvas(text, (rows, columns), size)
    image = text + ids[:, 1] * columns + ids[:, 2]
    whole = torch.arange(canvas.size, device=ids.device)
    whole[text : text + image.numel()] = image
    mask = settings.pattern.mask(Layout.of(canvas), ids.device)[0]
    return mask[whole][:, whole]


def _skip(case: Case) -> str | None:
    if "in.hidden_states" in case and find_spec("diffusers") is None:
        return "diffusers is not installed"
    return None


ADAPTER = Adapter("scale_dit", run, skip=_skip, attends=lambda case: "in.hidden_states" in case)
