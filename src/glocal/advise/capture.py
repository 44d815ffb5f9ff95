"""Captured attention calls in a safetensors file: for operator figures of models that are not here.

Tensors are named ``<call>.q``, ``<call>.k``, ``<call>.v``, shapes [B, H, N, D], [B, Hkv, N, D], [B, Hkv, N, Dv]. The
metadata of the file hold ``format`` = "glocal.capture/1" and ``<call>`` = JSON of `CallInfo`; docs/advise-capture.md
shows an example.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glocal._errors import check_file
from glocal.canvas import Canvas

FORMAT = "glocal.capture/1"


@dataclass(frozen=True)
class CallInfo:
    """What is known of one captured call.

    name: of the call in the file. site: of the attention ("" if unknown). layer, step, total: its layer, the step of
    the run and the number of steps. sigma: noise level. branch: both, cond or uncond. seed: of the sample. scale: of
    the logits, None for D ** -0.5. shape, before, after: the canvas, a grid with that many other tokens around it.
    """

    name: str
    shape: tuple[int, ...] = ()
    before: int = 0
    after: int = 0
    site: str = ""
    layer: int = 0
    step: int = 0
    total: int | None = None
    sigma: float | None = None
    branch: str = "both"
    seed: int = 0
    scale: float | None = None

    @property
    def canvas(self) -> Canvas:
        """Where its tokens lie."""
        return Canvas(self.shape, before=self.before, after=self.after)


@dataclass(frozen=True, eq=False)
class CapturedCall:
    """A call with its tensors."""

    info: CallInfo
    q: Tensor
    k: Tensor
    v: Tensor


def save_capture(path: str | Path, calls: Sequence[CapturedCall]) -> None:
    """Write calls to a file, whole or not at all. Raises ValueError for repeated names and shapes that do not fit."""
    target = Path(path)
    tensors: dict[str, Tensor] = {}
    metadata = {"format": FORMAT}
    for call in calls:
        name = call.info.name
        if not name or name == "format" or name in metadata:
            raise ValueError(f"capture: call name {name!r} is empty, repeated or reserved.")
        _check(str(path), call.info, {part: tuple(getattr(call, part).shape) for part in "qkv"})
        for part in "qkv":
            # Clones: heads cut from one projection share memory, which safetensors refuses.
            tensors[f"{name}.{part}"] = getattr(call, part).detach().cpu().contiguous().clone()
        metadata[name] = json.dumps({k: v for k, v in asdict(call.info).items() if k != "name"}, sort_keys=True)
    if not tensors:
        raise ValueError("capture: no calls to write.")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        save_file(tensors, partial, metadata=metadata)
        os.replace(partial, target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def captured_calls(path: str | Path, canvas: Canvas | None = None) -> list[CallInfo]:
    """The calls of a file, in order of name; no tensor is read.

    canvas: of calls whose record has no shape (a single grid with tokens before and after it at most). Raises
    FileNotFoundError, or ValueError naming the call and what is wrong with it.
    """
    file = Path(path)
    check_file("capture", file)
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()
            shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"capture {str(path)!r} is not a safetensors file: {error}.") from error
    metadata = {} if metadata is None else metadata
    found = metadata.get("format")
    if found is not None and found != FORMAT:
        raise ValueError(f"capture {str(path)!r} has format {found!r}; this version reads {FORMAT!r}.")
    names = sorted({key.rpartition(".")[0] for key in shapes})
    calls: list[CallInfo] = []
    for name in names:
        parts = {key.rpartition(".")[2]: s for key, s in shapes.items() if key.rpartition(".")[0] == name}
        if set(parts) != set("qkv"):
            raise ValueError(f"capture {str(path)!r}: call {name!r} has tensors {sorted(parts)}; legal: q, k, v.")
        info = _info(str(path), name, metadata.get(name))
        if not info.shape:
            info = _placed(str(path), info, canvas)
        _check(str(path), info, parts)
        calls.append(info)
    if not calls:
        raise ValueError(f"capture {str(path)!r} holds no call; tensors are named <call>.q, <call>.k, <call>.v.")
    return calls


def load_call(path: str | Path, name: str, canvas: Canvas | None = None) -> CapturedCall:
    """One call with its tensors; ValueError names the nearest call if there is none of this name."""
    calls = {info.name: info for info in captured_calls(path, canvas)}
    if name not in calls:
        near = get_close_matches(name, calls, n=1, cutoff=0.0)[0]
        raise ValueError(f"capture {str(path)!r} has no call {name!r}; nearest: {near!r}.")
    with safe_open(Path(path), framework="pt") as handle:
        return CapturedCall(calls[name], *(handle.get_tensor(f"{name}.{part}") for part in "qkv"))


def _info(path: str, name: str, text: str | None) -> CallInfo:
    if text is None:
        return CallInfo(name)
    data: Any = json.loads(text)
    legal = [f.name for f in fields(CallInfo) if f.name != "name"]
    for key in data:
        if key not in legal:
            near = get_close_matches(key, legal, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"capture {path!r}: call {name!r} has unknown field {key!r}; legal: {', '.join(legal)}; "
                f"nearest: {near!r}."
            )
    return CallInfo(name, **{**data, "shape": tuple(data.get("shape", ()))})


def _placed(path: str, info: CallInfo, canvas: Canvas | None) -> CallInfo:
    if canvas is None:
        raise ValueError(
            f"capture {path!r}: call {info.name!r} does not say its canvas; give canvas=, such as canvas=(16, 16, 16)."
        )
    around = {part.name: part.tokens for part in canvas.parts if not part.is_grid}
    if len(canvas.grids) != 1 or not set(around) <= {"before", "after"}:
        raise ValueError(f"canvas={canvas!r}; legal for captured calls: one grid, with tokens before and after it.")
    return replace(info, shape=canvas.grid.axes, **around)


def _check(path: str, info: CallInfo, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Shapes [B, H, N, D] of one call against each other and its canvas."""
    q, k, v = shapes["q"], shapes["k"], shapes["v"]
    where = f"capture {path!r}: call {info.name!r}"
    if not len(q) == len(k) == len(v) == 4:
        raise ValueError(f"{where} has shapes q {q}, k {k}, v {v}; legal: [B, H, N, D].")
    if q[0] != k[0] or k[:3] != v[:3] or q[3] != k[3] or q[1] % k[1]:
        raise ValueError(
            f"{where} has shapes q {q}, k {k}, v {v}; batch and D of q and k, and batch, heads and N of k and v must "
            f"agree, and query heads be a multiple of key heads."
        )
    if info.shape and not info.canvas.size == q[2] == k[2]:
        raise ValueError(
            f"{where} has {q[2]} queries and {k[2]} keys; its canvas {info.canvas!r} has {info.canvas.size} tokens."
        )
