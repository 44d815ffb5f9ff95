"""glocal env: versions, devices and backends of this machine."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from glocal.cli._common import Json, print_fields, print_json

PACKAGES = ("glocal", "torch", "triton", "safetensors", "diffusers", "transformers", "accelerate", "datasets")


@dataclass(frozen=True)
class Gpu:
    """One CUDA device. memory: bytes."""

    name: str
    capability: str
    memory: int


@dataclass(frozen=True)
class Environment:
    """What a measurement must carry to be understood later. A package that is not installed is None."""

    python: str
    system: str
    packages: dict[str, str | None]
    cpu: str
    cpu_features: str
    cores: int
    threads: int
    gpus: tuple[Gpu, ...]
    torch_cuda: str | None


def environment() -> Environment:
    """Look at this machine. Versions come from the installed metadata, so nothing but torch is imported."""
    import torch

    return Environment(
        python=platform.python_version(),
        system=platform.platform(),
        packages={name: _version(name) for name in PACKAGES},
        cpu=_cpu_name(),
        cpu_features=torch.backends.cpu.get_cpu_capability(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        gpus=tuple(_gpu(index) for index in range(torch.cuda.device_count())),
        torch_cuda=torch.version.cuda,
    )


def command(json: Json = False) -> None:
    """Show what this machine can run: versions, devices, backends."""
    found = environment()
    if json:
        print_json(found)
        return
    print_fields({"python": found.python, "system": found.system})
    print_fields({name: "not installed" if v is None else v for name, v in found.packages.items()})
    print_fields({"cpu": f"{found.cpu}, {found.cores} cores, {found.threads} threads, {found.cpu_features}"})
    for index, gpu in enumerate(found.gpus):
        print_fields({f"gpu {index}": f"{gpu.name}, sm {gpu.capability}, {gpu.memory / 2**30:.1f} GiB"})
    if not found.gpus:
        print_fields({"gpu": "none" if found.torch_cuda is None else "none visible"})


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, f"{properties.major}.{properties.minor}", properties.total_memory)


def _cores() -> int:
    """Cores this process may use, which a container may have cut."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
