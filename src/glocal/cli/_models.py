"""MODEL of the verbs: a built-in model, a folder or hub id of diffusers or transformers, or what a factory returns."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glocal._errors import nearest

BUILT_IN = ("demo", "demo-image", "demo-image-unet", "demo-language")
LEGAL = f"{', '.join(BUILT_IN)}, package.module:factory, or a folder or hub id of diffusers or transformers"
STEPS = 6  # of a run of the built-in models, unless told otherwise


@dataclass(frozen=True)
class Subject:
    """A model that advice is asked for, and how it runs. model: what methods are attached to."""

    model: Any
    objective: Any


def load_model(name: str, device: str = "cpu") -> Any:
    """The model alone, for verbs that generate. Raises ValueError in the words of the user."""
    if name == "demo":
        from glocal.models.generation import load_demo

        return load_demo(device)
    if name == "demo-language":
        from glocal.models.language import load_decoder

        return load_decoder(device=device)
    if name in ("demo-image", "demo-image-unet"):
        from glocal.models.generation import load_painter

        return load_painter("unet" if name.endswith("unet") else "dit", device)
    if ":" in name:
        return _made(name)
    folder = Path(name)
    if (folder / "model_index.json").is_file():
        return _diffusers(name)
    if (folder / "config.json").is_file():
        return _transformers(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not folder.exists():
        return _from_hub(name)
    if folder.is_dir():
        raise ValueError(
            f"MODEL {name!r} is a folder without model_index.json (diffusers) and config.json (transformers)"
        )
    raise ValueError(f"MODEL {name!r} is unknown; legal: {LEGAL}; nearest: {nearest(name, BUILT_IN)}")


def load_subject(name: str, device: str = "cpu", *, steps: int = STEPS) -> Subject:
    """The model and its objective. steps: of the built-in video model. A factory may return (model, objective)."""
    from glocal.adapt.pipelines import is_pipeline
    from glocal.advise.objective import Frames
    from glocal.models.generation import SampleSpec, VideoDiT
    from glocal.models.language import Decoder

    made = load_model(name, device)
    if isinstance(made, tuple) and len(made) == 2:
        return Subject(*made)
    if isinstance(made, VideoDiT):
        return Subject(made, Frames(SampleSpec(steps=steps)))
    if isinstance(made, Decoder):
        from glocal.advise.next_token import NextToken
        from glocal.data import FACT, QUESTION
        from glocal.models.language import encode

        return Subject(made, NextToken(encode, window=256, fact=FACT, question=QUESTION))
    if is_pipeline(made):
        from glocal.advise.pipeline import Pipeline

        return Subject(made, Pipeline(made))
    tokenizer = getattr(made, "glocal_tokenizer", None)
    if tokenizer is not None:
        from glocal.advise.next_token import NextToken

        return Subject(made, NextToken(_Encode(tokenizer), _begin(tokenizer)))
    raise ValueError(
        f"MODEL {name!r} is a {type(made).__name__}: it is not known how to run it; legal: a pipeline of diffusers, a "
        "folder of transformers, or a factory that returns (model, objective), see glocal.advise.Objective"
    )


class _Encode:
    """A tokenizer without marks for begin and end."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _begin(tokenizer: Any) -> tuple[int, ...]:
    begin = getattr(tokenizer, "bos_token_id", None)
    return () if begin is None else (int(begin),)


def _made(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"MODEL {name!r}; legal: package.module:factory (a function without arguments)")
    if "" not in sys.path and os.getcwd() not in sys.path:  # an installed script does not look beside the user
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"MODEL {name!r}: {error}; it must be importable from the current folder or path") from error
    if not callable(factory):
        raise ValueError(f"MODEL {name!r} is a {type(factory).__name__}; legal: a function that returns the model")
    return factory()


def _diffusers(name: str) -> Any:
    pipe = _needed("diffusers", name).DiffusionPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _transformers(name: str) -> Any:
    library = _needed("transformers", name)
    found = json.loads((Path(name) / "config.json").read_text()) if Path(name).is_dir() else {}
    architectures = found.get("architectures") or ["CausalLM"]
    if not any(str(a).endswith("CausalLM") for a in architectures):
        raise ValueError(f"MODEL {name!r} holds {architectures}; legal: a ...ForCausalLM, or a factory for others")
    model = library.AutoModelForCausalLM.from_pretrained(name).eval()
    model.glocal_tokenizer = library.AutoTokenizer.from_pretrained(name)
    return model


def _from_hub(name: str) -> Any:
    """A hub id: a pipeline if it says so, else a language model."""
    hub = _needed("huggingface_hub", name)
    try:
        wanted: Callable[[str], Any] = _diffusers if hub.file_exists(name, "model_index.json") else _transformers
    except Exception as error:  # of the network or of the hub, in the classes of whichever client it has
        raise ValueError(
            f"MODEL {name!r} is no folder here, and the hub could not be asked for it: {error}; without a network, "
            "give the folder of a model"
        ) from error
    return wanted(name)


def _needed(library: str, name: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ValueError(f"MODEL {name!r} needs {library}: pip install 'glocal[diffusers,transformers]'") from error
