"""glocal env: versions, devices and backends of this machine; --measure times them into a device table."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glocal.cli._common import Json, Quiet, print_fields, print_json, print_table, progress

if TYPE_CHECKING:
    from glocal.plan.devices.table import DeviceTable

PACKAGES = ("glocal", "torch", "triton", "safetensors", "diffusers", "transformers", "accelerate", "datasets")


@dataclass(frozen=True)
class Gpu:
    """One CUDA device. memory: bytes."""

    name: str
    capability: str
    memory: int


@dataclass(frozen=True)
class KernelBackend:
    """One attention backend. missing: what this machine lacks, by device; None where it runs."""

    name: str
    note: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    head_dims: str
    block_sizes: str | None
    bias: tuple[str, ...]
    backward: bool
    lse_grad: bool
    deterministic: bool
    missing: dict[str, str | None]

    @property
    def where(self) -> str:
        """Devices it runs on here, else why on none."""
        runs = [device for device, lacking in self.missing.items() if lacking is None]
        return ", ".join(runs) if runs else "no: " + "; ".join(dict.fromkeys(filter(None, self.missing.values())))


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
    backends: tuple[KernelBackend, ...]


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
        backends=_backends(),
    )


def command(
    measure: Annotated[bool, typer.Option("--measure", help="Time the backends into a device table.")] = False,
    device: Annotated[str | None, typer.Option(help="Of --measure: cpu or cuda (default: cpu).")] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Of --measure: the file (default: where `simulate --device NAME` finds it)."),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Show what this machine can run; --measure times it."""
    if measure:
        _measure("cpu" if device is None else device, out, quiet, json)
        return
    for option, value in (("--device", device), ("-o", None if out is None else str(out))):
        if value is not None:
            raise ValueError(f"{option} {value!r} says nothing without --measure; add it, or leave {option} out")
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
    print()
    print_table(
        ("backend", "runs here", "devices", "dtypes", "head size", "blocks", "biases", "gradients", "how"),
        [
            (
                b.name,
                b.where,
                b.devices,
                b.dtypes,
                b.head_dims,
                b.block_sizes,
                b.bias,
                ("out and LSE" if b.lse_grad else "out") if b.backward else "none",
                b.note,
            )
            for b in found.backends
        ],
    )


def _measure(device: str, out: Path | None, quiet: bool, json: bool) -> None:
    from glocal.bench.calibrate import measure_device, save_table
    from glocal.cli._machine import torch_device

    if out is not None and out.is_dir():
        raise ValueError(f"-o {str(out)!r} is a folder; give a file, such as {out / 'device.json'}")
    bar = progress(quiet or json)
    try:
        table = measure_device(torch_device(device), progress=bar)
    finally:
        bar.close()
    path = save_table(table, out)
    if json:
        print_json({"path": path, "table": table})
        return
    _print_measured(table)
    print(f"\nwritten: {path}")
    print(f"use it: glocal simulate ... --device {table.name if out is None else path}")


def _print_measured(table: DeviceTable) -> None:
    launch = "not measured" if table.launch_seconds is None else f"{1e6 * table.launch_seconds:.4g} us"
    print_fields({"device": table.title, "source": table.source, "launch": launch})
    print_fields({"copies": f"{table.copy_bytes_per_second / 1e9:.4g} GB/s ({table.copy_note})"})
    print()
    print_table(
        ("kernel", "blocks", "direction", "canvas", "heads", "ms"),
        [
            (m.kernel, m.kind, m.direction, "x".join(map(str, m.canvas)), f"{m.heads} of {m.head_dim}", m.milliseconds)
            for m in table.measurements
        ],
    )


def _backends() -> tuple[KernelBackend, ...]:
    from glocal.kernels import registry

    found = []
    for backend in registry.backends():
        can = backend.capability
        found.append(
            KernelBackend(
                name=backend.name,
                note=can.note,
                devices=can.devices,
                dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in can.dtypes),
                head_dims=str(can.head_dims),
                block_sizes=str(can.block_sizes) if can.needs == "plan" else None,
                bias=can.bias,
                backward=can.backward,
                lse_grad=can.lse_grad,
                deterministic=can.deterministic,
                missing={device: _lacking(device, backend.missing) for device in can.devices},
            )
        )
    return tuple(found)


def _lacking(device: str, missing: Callable[[str], str | None]) -> str | None:
    import torch

    here = device == "cpu" or (device in ("cuda", "mps", "xpu") and getattr(torch, device).is_available())
    return missing(device) if here else f"no {device} device"


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
