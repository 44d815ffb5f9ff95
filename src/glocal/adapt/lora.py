"""LoRA weights that belong to a method: in the pipeline for as long as the method is, under names diffusers knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from glocal.adapt.attach import Handle, Method, attach

_NAME = "glocal"


def with_lora(pipe: Any, method: Method, lora: str | Path | Mapping[str, Tensor]) -> Handle:
    """Load `lora` into a pipeline, attach `method`; undoing the handle takes both out.

    lora: a safetensors file, or its tensors; adapters that were loaded before stay and come back as they were.
    Raises ValueError for a model without LoRA loading (give the pipeline) and for a file without LoRA weights.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(
            f"lora={_said(lora)}: {type(pipe).__name__} loads no LoRA weights; legal: a pipeline of diffusers, such as "
            "WanPipeline. Give the pipeline instead of its model."
        )
    tensors = lora_tensors(lora)
    before = pipe.get_active_adapters() if any(pipe.get_list_adapters().values()) else []
    pipe.load_lora_weights(dict(tensors), adapter_name=_NAME)
    if before:
        pipe.set_adapters([*before, _NAME])

    def unload() -> None:
        if before:
            pipe.delete_adapters(_NAME)
            pipe.set_adapters(before)
        else:
            pipe.unload_lora_weights()

    try:
        handle = attach(pipe, method)
    except BaseException:
        unload()
        raise
    handle.last(unload)
    return handle


def lora_tensors(lora: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under names that diffusers reads: of training with peft, of diffusers, or of the original models.

    Raises FileNotFoundError, or ValueError where no name speaks of LoRA.
    """
    if not isinstance(lora, Mapping):
        from safetensors.torch import load_file

        if not Path(lora).is_file():
            raise FileNotFoundError(2, "no such file", str(lora))
        lora = load_file(str(lora))
    found = {_renamed(name): tensor for name, tensor in lora.items()}
    if not any("lora" in name for name in found):
        some = ", ".join(list(found)[:3])
        raise ValueError(f"lora: no tensor is a LoRA weight; names begin with {some}; legal: ...lora_A.weight.")
    return found


def _renamed(name: str) -> str:
    for prefix in ("base_model.model.", "module."):
        name = name.removeprefix(prefix)
    name = name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")
    if name.startswith(("transformer.", "transformer_2.", "diffusion_model.", "unet.", "lora_unet_", "text_encoder")):
        return name
    original = any(part in name for part in (".self_attn.", ".cross_attn.", ".ffn."))
    return f"{'diffusion_model' if original else 'transformer'}.{name}"


def _said(lora: Any) -> str:
    return f"{len(lora)} tensors" if isinstance(lora, Mapping) else repr(str(lora))
