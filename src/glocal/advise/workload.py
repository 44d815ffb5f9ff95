"""What a model is asked to do: samples with seeds and call arguments, and their parts that never share either.

A file of samples is JSON lines, one sample each: ``id``, ``seed`` and the call arguments beside them, for instance
``{"id": "s01", "seed": 7, "shape": "disc", "colour": "red"}``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glocal._errors import check_file
from glocal.advise.capture import captured_calls
from glocal.advise.split import apart, shuffled
from glocal.canvas import Canvas
from glocal.models.generation import Field, load_demo


@dataclass(frozen=True)
class Sample:
    """One call. id: unique in its workload. seed: of everything random in it. args: call arguments by name."""

    id: str
    seed: int
    args: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The arguments as text: equal for samples that ask for the same. Files count by content, tensors by value."""
        return _text(dict(self.args), f"sample {self.id!r}")

    def record(self) -> dict[str, Any]:
        """What a recipe remembers of it: hash of the arguments, and the seed."""
        return {"args": hashlib.sha256(self.key.encode()).hexdigest()[:16], "seed": self.seed}


@dataclass(frozen=True)
class Split:
    """Parts of a workload; no two share arguments or a seed. further: more parts to validate on, where one failed."""

    probe: Workload
    weights: Workload
    validate: Workload
    further: tuple[Workload, ...] = ()

    @property
    def validations(self) -> tuple[Workload, ...]:
        """The parts to validate on, in the order they are used."""
        return (self.validate, *self.further)

    def sized(self, canvases: Sequence[Mapping[str, Any]]) -> Split:
        """The same parts on these canvases (arguments of a call): the first to probe, all in turn to validate on.

        Raises ValueError where a part to validate on has fewer than two samples for each.
        """
        if not canvases:
            return self
        for part in self.validations:
            if len(part) < 2 * len(canvases):
                raise ValueError(
                    f"{len(canvases)} canvases need {2 * len(canvases)} samples to validate on, two each; there are "
                    f"{len(part)}. Ask for fewer canvases or a larger effort."
                )
        probe, weights = (_with(part, canvases[:1]) for part in (self.probe, self.weights))
        validate, *further = (_with(part, canvases) for part in self.validations)
        return Split(probe, weights, validate, tuple(further))

    def records(self, validations: int = 1) -> dict[str, dict[str, Any]]:
        """Of each part the number of samples, its hash and what tells its samples, for `evidence.splits`; of the parts
        to validate on, the first `validations`.
        """
        parts = {"probe": self.probe, "weights": self.weights}
        for number, part in enumerate(self.validations[:validations]):
            parts["validate" if number == 0 else f"validate_{number + 1}"] = part
        return {name: part.records() for name, part in parts.items()}


@dataclass(frozen=True)
class Workload:
    """Samples with unique ids. Raises ValueError for repeated ids, no samples, or a seed that is no whole number."""

    samples: tuple[Sample, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("workload has no samples; give at least one.")
        seen: set[str] = set()
        for sample in self.samples:
            if sample.id in seen:
                raise ValueError(f"workload: id {sample.id!r} appears twice; ids must be unique.")
            seen.add(sample.id)
            if type(sample.seed) is not int or sample.seed < 0:
                raise ValueError(
                    f"workload: seed={sample.seed!r} of sample {sample.id!r}; legal: whole numbers from 0."
                )

    def __len__(self) -> int:
        return len(self.samples)

    @staticmethod
    def from_jsonl(path: str | Path, fields: Collection[str] | None = None) -> Workload:
        """Read JSON lines. fields: names of legal call arguments, None for any.

        Raises FileNotFoundError, or ValueError with the line number, the field and what is legal.
        """
        file = Path(path)
        check_file("workload", file)
        samples: list[Sample] = []
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            sample = _parse(line, where, fields)
            for other in samples:
                if other.id == sample.id:
                    raise ValueError(f"{where}: id {sample.id!r} appears twice; ids must be unique.")
            samples.append(sample)
        if not samples:
            raise ValueError(f"workload {str(path)!r} has no samples; give one JSON record a line.")
        return Workload(tuple(samples))

    @staticmethod
    def from_calls(calls: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Workload:
        """One sample a call, with the seed at the same place; ids s00, s01, ..."""
        if len(calls) != len(seeds):
            raise ValueError(f"calls has {len(calls)} entries and seeds {len(seeds)}; give one seed for each call.")
        return Workload(
            tuple(Sample(f"s{i:02d}", seed, dict(c)) for i, (c, seed) in enumerate(zip(calls, seeds, strict=True)))
        )

    @staticmethod
    def from_texts(paths: Sequence[str | Path], lengths: Sequence[int]) -> Workload:
        """Every text file at every length in tokens: arguments `file` and `tokens`.

        The seed is made from the content, so no part of a split shares a text with another.
        """
        samples: list[Sample] = []
        for path in map(Path, paths):
            check_file("text", path)
            if not path.stat().st_size:
                raise ValueError(f"text {str(path)!r} is empty.")
            for length in lengths:
                if length < 1:
                    raise ValueError(f"lengths holds {length}; legal: at least 1 token.")
                seed = int(_digest(path)[:8], 16)
                samples.append(Sample(f"{path.name}@{length}", seed, {"file": path, "tokens": int(length)}))
        return Workload(tuple(samples))

    @staticmethod
    def from_tensors(path: str | Path, canvas: Canvas | Sequence[int] | None = None) -> Workload:
        """One sample for each captured call of a safetensors file: arguments `file`, `call`, and `canvas` if given.

        canvas: where the tokens lie, if the file does not say. See `glocal.advise.capture` for the schema.
        """
        where = None if canvas is None else canvas if isinstance(canvas, Canvas) else Canvas(tuple(canvas))
        calls = captured_calls(path, where)
        extra = {} if where is None else {"canvas": where}
        return Workload(tuple(Sample(c.name, c.seed, {"file": Path(path), "call": c.name, **extra}) for c in calls))

    def split(self, *, probe: int = 2, weights: int = 2, validate: int = 8, validations: int = 1) -> Split:
        """Parts of these sizes that share neither arguments nor seeds; what is left over is not used. There is one part
        to validate on, and up to `validations` where the samples suffice.

        Which sample goes where depends on the samples alone, not on their order in the file. Raises ValueError with
        the numbers when the workload is too small.
        """
        sizes = {"probe": probe, "weights": weights, "validate": validate}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"split: {name}={size}; legal: at least 1.")
        pool = shuffled(self.samples)
        points = [(s.key, s.seed) for s in pool]
        parts = None
        for count in range(max(validations, 1), 0, -1):
            parts = apart(points, [probe, weights, *[validate] * count])
            if parts is not None:
                break
        if parts is None:
            have = f"{len(pool)} samples, {len({s.key for s in pool})} different arguments"
            have += f", {len({s.seed for s in pool})} different seeds"
            raise ValueError(
                f"workload is too small to split: probe={probe}, weights={weights} and validate={validate} need "
                f"{sum(sizes.values())} samples in parts that share neither arguments nor seeds; it has {have}. Give "
                f"every sample arguments and a seed of its own, or ask for fewer."
            )
        made = [Workload(tuple(pool[i] for i in part)) for part in parts]
        return Split(made[0], made[1], made[2], tuple(made[3:]))

    def records(self) -> dict[str, Any]:
        """Number of samples, hash, and what tells each sample: one entry of `evidence.splits`."""
        return {"n": len(self), "sha256": self.hash(), "samples": [s.record() for s in self.samples]}

    def unseen(self, splits: Mapping[str, Mapping[str, Any]]) -> Workload | None:
        """The samples that share neither arguments nor a seed with one of `evidence.splits`; None if there are none."""
        seen = [record for part in splits.values() for record in part.get("samples", [])]
        args, seeds = {r["args"] for r in seen}, {r["seed"] for r in seen}
        fresh = [s for s in self.samples if s.seed not in seeds and s.record()["args"] not in args]
        return Workload(tuple(fresh)) if fresh else None

    def hash(self) -> str:
        """SHA-256 over seeds and arguments; order and ids do not matter."""
        lines = sorted(f"{s.seed} {s.key}" for s in self.samples)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _with(part: Workload, canvases: Sequence[Mapping[str, Any]]) -> Workload:
    made = [replace(s, args={**s.args, **canvases[i % len(canvases)]}) for i, s in enumerate(part.samples)]
    return Workload(tuple(made))


def demo_workload(n: int = 12, *, first_seed: int = 0, fields: Sequence[Field] | None = None) -> Workload:
    """`n` conditions of the built-in video model, each with a seed of its own from `first_seed` on.

    fields: what a condition can say; default those of the shipped weights. Raises ValueError if there are fewer
    conditions than `n`.
    """
    known = load_demo().config.fields if fields is None else fields
    legal = 1
    for _, values in known:
        legal *= len(values)
    if not 1 <= n <= legal:
        raise ValueError(f"n={n}; legal: 1 to {legal}, the number of conditions of the model.")
    generator = torch.Generator().manual_seed(first_seed)
    chosen: dict[tuple[str, ...], None] = {}
    while len(chosen) < n:
        picks = [values[int(torch.randint(len(values), (1,), generator=generator))] for _, values in known]
        chosen.setdefault(tuple(picks))
    calls = [{name: value for (name, _), value in zip(known, picks, strict=True)} for picks in chosen]
    return Workload.from_calls(calls, range(first_seed, first_seed + n))


def _parse(line: str, where: str, fields: Collection[str] | None) -> Sample:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{where}: is {type(data).__name__}; legal: a record with id, seed and call arguments.")
    for name in ("id", "seed"):
        if name not in data:
            near = get_close_matches(name, list(data), n=1)
            hint = f"; nearest field here: {near[0]!r}" if near else ""
            raise ValueError(f"{where}: field {name!r} is missing{hint}.")
    if not isinstance(data["id"], str) or not data["id"]:
        raise ValueError(f"{where}: id={data['id']!r}; legal: a text that is not empty.")
    if type(data["seed"]) is not int or data["seed"] < 0:
        raise ValueError(f"{where}: seed={data['seed']!r}; legal: whole numbers from 0.")
    args = {name: value for name, value in data.items() if name not in ("id", "seed")}
    if fields is not None:
        legal = ["id", "seed", *fields]
        for name in args:
            if name not in legal:
                near = get_close_matches(name, legal, n=1, cutoff=0.0)[0]
                raise ValueError(f"{where}: field {name!r} is unknown; legal: {', '.join(legal)}; nearest: {near!r}.")
    return Sample(data["id"], data["seed"], args)


def _text(value: Any, where: str) -> str:
    """JSON of a value; a file becomes the hash of its content, a tensor that of its bytes."""

    def plain(item: Any) -> Any:
        if isinstance(item, Path):
            return {"file sha256": _digest(item)}
        if isinstance(item, Canvas):
            return repr(item)
        if isinstance(item, Tensor):
            data = item.detach().cpu().contiguous()
            raw = data.reshape(-1).view(torch.uint8).numpy().tobytes()
            return {
                "tensor sha256": hashlib.sha256(raw).hexdigest(),
                "shape": list(data.shape),
                "dtype": str(data.dtype),
            }
        raise ValueError(
            f"{where}: an argument is of type {type(item).__name__}, which cannot be told apart by content; legal: "
            f"what JSON holds, Path, Canvas and Tensor."
        )

    return json.dumps(value, sort_keys=True, default=plain)


def _digest(path: Path) -> str:
    stat = path.stat()
    return _digest_of(str(path.resolve()), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1024)
def _digest_of(path: str, changed: int, size: int) -> str:
    """SHA-256 of a file's content; the time of change and the size are there for the cache alone."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()
