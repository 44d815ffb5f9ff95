"""MODEL of the verbs that generate: the built-in model, or what a factory of the user's returns."""

from __future__ import annotations

import importlib
from typing import Any


def load_model(name: str, device: str = "cpu") -> Any:
    """`demo`, or ``package.module:factory`` called without arguments. Raises ValueError in the words of the user."""
    if name == "demo":
        from glocal.models.generation import load_demo

        return load_demo(device)
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ValueError(f"MODEL {name!r}; legal: demo, or package.module:factory (a function without arguments)")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"MODEL {name!r}: {error}; it must be importable from the current folder or path") from error
    if not callable(factory):
        raise ValueError(f"MODEL {name!r} is a {type(factory).__name__}; legal: a function that returns the model")
    return factory()
