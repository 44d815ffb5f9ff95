"""Devices as the verbs take them, and the facts that stand beside a measurement."""

from __future__ import annotations


def torch_device(text: str) -> str:
    """`text` if torch has such a device here; ValueError says which there are."""
    import torch

    legal = ["cpu"]
    if torch.cuda.is_available():
        legal += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if text not in legal:
        cuda = text.startswith("cuda") and torch.version.cuda is None
        hint = "; this build of torch has no CUDA, see https://pytorch.org" if cuda else ""
        raise ValueError(f"--device {text!r} is not here; legal: {', '.join(legal)}{hint}")
    return text


def facts(device: str) -> dict[str, str]:
    """Device, threads and versions."""
    import torch

    from glocal.cli.env import environment

    found = environment()
    name = f"{found.cpu}, {found.threads} of {found.cores} cores, {found.cpu_features}"
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    return {"device": name, "software": f"torch {torch.__version__}, python {found.python}, glocal {_glocal()}"}


def _glocal() -> str:
    import glocal

    return glocal.__version__
