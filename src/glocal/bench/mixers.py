"""Token mixers side by side in one small backbone, trained on equal terms: same frame, data order, updates and seeds.

    done = mixers(["hilo", "biformer", "my.py:Mine"], task_of("classification"), MixerSpec(steps=1500))

Every entry first runs forward and backward at the real size; those that cannot are rows with a reason. Entries are
matched by parameters, multiply-adds or measured time of a training step through the width of their MLPs. Scores are
paired by seed.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glocal._errors import check_choice
from glocal._files import write_atomic
from glocal._progress import NoProgress, Progress
from glocal.data.labelled import ImageFolder, Labelled, Stored, scene_masks, scene_relations
from glocal.measure import peak_memory
from glocal.models.flops import count_macs
from glocal.models.segment import Segmenter
from glocal.models.vision.plain import PlainBackbone
from glocal.nn.mixer import begin, mixer
from glocal.train.vision import Recipe, Trainer, accelerator_for, normalised

Match = Literal["none", "params", "flops", "latency"]
ENTRIES = (
    "dinat", "gc_vit", "maxvit", "davit", "hilo", "stvit", "sg_former", "duoformer", "biformer", "l2vit", "inline",
)  # fmt: skip
_HIDDEN = (1.0, 8.0)  # legal widths of an MLP over its dim


@dataclass(frozen=True)
class Frame:
    """The backbone that all entries share. dims, depths: a level each; head_dim: channels of a head."""

    dims: tuple[int, ...] = (48, 96, 192, 288)
    depths: tuple[int, ...] = (2, 2, 4, 2)
    head_dim: int = 24
    mlp_ratio: float = 3.0
    drop_path: float = 0.05


@dataclass(frozen=True)
class MixerSpec:
    """steps: updates of a run; None fits all runs into `budget` seconds. match: what is made equal. seeds: runs an
    entry. graph: updates are CUDA graphs, but for mixers in `WAITS`.
    """

    steps: int | None = 1500
    budget: float | None = None
    match: Match = "params"
    seeds: int = 3
    batch: int = 128
    lr: float = 1e-3
    device: str = "cpu"
    precision: str = "bf16"
    graph: bool = False
    frame: Frame = Frame()

    def __post_init__(self) -> None:
        check_choice("match", self.match, ("none", "params", "flops", "latency"))
        if self.steps is None and self.budget is None:
            raise ValueError("steps=None needs a budget in seconds.")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be at least 1.")


WAITS = ("biformer",)  # plans by content: no graph


@dataclass(frozen=True)
class Task:
    """What is learned. size: px a side. score: the name of the measure that decides."""

    name: str
    size: int
    train: Labelled
    test: Labelled
    score: str

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.train.classes)


@dataclass(frozen=True)
class Entry:
    """One mixer. scores: one a seed. step_seconds: of a training step. images_s: forward passes. memory: bytes of a
    training step above weights, 0 on a CPU. reason: why it did not run.
    """

    mixer: str
    mlp_ratio: float = float("nan")
    params: int = 0
    macs: int = 0
    step_seconds: float = float("nan")
    images_s: float = float("nan")
    memory: int = 0
    scores: tuple[float, ...] = ()
    seconds: float = 0.0
    reason: str = ""

    @property
    def mean(self) -> float:
        """Mean score."""
        return statistics.fmean(self.scores) if self.scores else float("nan")

    @property
    def spread(self) -> float:
        """Standard deviation over seeds."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else float("nan")


def task_of(
    kind: str,
    data: str | Path | None = None,
    size: int | None = None,
    device: str = "cpu",
    counts: tuple[int, int] = (20_000, 2_000),
) -> Task:
    """The task of a name: "classification" or "segmentation", on scenes, or on a folder with `train` and `test`.

    counts: scenes to train and to test on.
    """
    check_choice("task", kind, ("classification", "segmentation"))
    dense = kind == "segmentation"
    side = size if size is not None else 512 if dense else 112
    if data is not None:
        if dense:
            raise ValueError(
                "task='segmentation' reads scenes; give rows of a data set through glocal.data.labelled.Rows."
            )
        train, test = (ImageFolder(Path(data) / part, side) for part in ("train", "test"))
        return Task(f"{kind} of {Path(data).name}", side, train, test, "accuracy")
    make: Callable[..., Stored] = scene_masks if dense else scene_relations
    train_set, test_set = make(counts[0], side, 1, device), make(counts[1], side, 2, device)
    return Task(f"{kind} of scenes", side, train_set, test_set, "miou" if dense else "accuracy")


def build(name: str, task: Task, frame: Frame) -> nn.Module:
    """The model of an entry."""
    dense = task.train.segmentation
    trunk = PlainBackbone(
        name,
        frame.dims,
        frame.depths,
        frame.head_dim,
        frame.mlp_ratio,
        frame.drop_path,
        num_classes=0 if dense else task.classes,
        features_only=dense,
    )
    return Segmenter(trunk, task.classes) if dense else trunk


def mixers(
    entries: Sequence[str],
    task: Task,
    spec: MixerSpec,
    out: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Entry, ...]:
    """Train every entry with every seed; best mean score first, entries that could not run last.

    entries: names of `glocal.nn.list_mixers()` or "file.py:Class". out: folder where finished runs and the state of
    the present one lie; a call with the same folder goes on. Raises ValueError where no entry can run.
    """
    bar = NoProgress() if progress is None else progress
    found = examine(entries, task, spec, bar)
    able = [name for name, entry in found.items() if not entry.reason]
    if not able:
        raise ValueError("; ".join(f"{e.mixer} cannot run: {e.reason}" for e in found.values()))
    steps = spec.steps
    if steps is None:
        assert spec.budget is not None
        each = sum(found[name].step_seconds for name in able) * spec.seeds
        steps = max(20, int(0.9 * spec.budget / each))
    bar.stage(f"train, {steps} updates a run", len(able) * spec.seeds)
    for seed in range(spec.seeds):
        for name in able:
            entry = found[name]
            frame = replace(spec.frame, mlp_ratio=entry.mlp_ratio)
            score, seconds = trained(name, task, replace(spec, frame=frame, steps=steps), seed, out)
            found[name] = replace(entry, scores=(*entry.scores, score), seconds=entry.seconds + seconds)
            bar.step()
    return tuple(sorted(found.values(), key=lambda e: (bool(e.reason), -e.mean if e.scores else 0.0)))


def examine(entries: Sequence[str], task: Task, spec: MixerSpec, progress: Progress | None = None) -> dict[str, Entry]:
    """Every entry forward and backward at the real size, matched and measured; nothing is trained."""
    bar = NoProgress() if progress is None else progress
    bar.stage("every entry forward and backward", len(entries))
    found: dict[str, Entry] = {}
    for name in dict.fromkeys(entries):
        try:
            found[name] = _examined(name, task, spec, found)
        except Exception as error:  # an entry that cannot run is a row, and the others still run
            found[name] = Entry(name, reason=f"{type(error).__name__}: {error}")
        bar.step()
    return found


def measured(entry: Entry, task: Task, spec: MixerSpec, alone: Callable[[], AbstractContextManager[Any]]) -> Entry:
    """The entry with times and memory of its model; `alone` makes a context that holds the device for the timing."""
    model = build(entry.mixer, task, replace(spec.frame, mlp_ratio=entry.mlp_ratio))
    _figures(model, task, spec)  # what is compiled or allocated on first use
    with alone():
        found = _figures(model, task, spec)
    return replace(found, mixer=entry.mixer, mlp_ratio=entry.mlp_ratio)


def planned(entries: Sequence[str], task: Task, spec: MixerSpec) -> dict[str, Entry]:
    """The widths of the MLPs, parameters and multiply-adds of every entry, from shapes: nothing runs on the device.

    Raises ValueError where entries are to be matched by measured time.
    """
    if spec.match == "latency":
        raise ValueError("planned: match='latency' is measured, by `examine`; legal here: none, params, flops.")
    found: dict[str, Entry] = {}
    for name in dict.fromkeys(entries):
        first = next((e for e in found.values() if not e.reason), None)
        try:
            frame = spec.frame
            with torch.device("meta"):
                if first is not None and spec.match != "none":
                    frame = _matched(name, task, spec, first)
                model = build(name, task, frame)
            macs = count_macs(model, task.size)
        except Exception as error:  # as in `examine`
            found[name] = Entry(name, reason=f"{type(error).__name__}: {error}")
        else:
            params = sum(p.numel() for p in model.parameters())
            found[name] = Entry(name, mlp_ratio=frame.mlp_ratio, params=params, macs=macs)
    return found


def compared(entries: Sequence[Entry], baseline: str) -> dict[str, tuple[float, float, float]]:
    """Mean difference of scores to `baseline`, paired by seed, and its interval at 95 % over all comparisons together.

    Student's t with Bonferroni's correction; NaN bounds under two seeds.
    """
    from glocal.measure.student import t_quantile

    base = next(e for e in entries if e.mixer == baseline)
    others = [e for e in entries if e.scores and e.mixer != baseline]
    found = {}
    for e in others:
        pairs = [a - b for a, b in zip(e.scores, base.scores, strict=True)]
        mean, n = statistics.fmean(pairs), len(pairs)
        half = float("nan")
        if n > 1:
            half = t_quantile(1 - 0.05 / (2 * len(others)), n - 1) * statistics.stdev(pairs) / math.sqrt(n)
        found[e.mixer] = (mean, mean - half, mean + half)
    return found


def _examined(name: str, task: Task, spec: MixerSpec, found: dict[str, Entry]) -> Entry:
    """The figures of an entry, matched to the first that runs."""
    first = next((e for e in found.values() if not e.reason), None)
    frame = spec.frame
    _keeps_contract(name, task, spec)
    if first is not None and spec.match != "none":
        frame = _matched(name, task, spec, first)
    model = build(name, task, frame)
    figures = _figures(model, task, spec)
    return replace(figures, mixer=name, mlp_ratio=frame.mlp_ratio)


@torch.no_grad()
def _keeps_contract(name: str, task: Task, spec: MixerSpec) -> None:
    """Raise ValueError unless the mixers of two blocks keep the shape of a map, finite and sample by sample."""
    dim, side = spec.frame.dims[0], task.size // 4
    layers = [mixer(name, dim, dim // spec.frame.head_dim, block=j).to(spec.device).eval() for j in range(2)]
    x = torch.randn(2, side, side, dim, generator=torch.Generator().manual_seed(0)).to(spec.device)

    def through(x: Tensor) -> Tensor:
        stage = begin(layers, x)
        for layer in layers:
            y = layer(x, stage)
            if not isinstance(y, Tensor) or y.shape != x.shape:
                found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
                raise ValueError(f"{name} returns {found} for a map of {tuple(x.shape)}; a mixer keeps the shape.")
            x = y
        return x

    together, alone = through(x)[1:], through(x[1:])
    if not bool(together.isfinite().all()):
        raise ValueError(f"{name} returns numbers that are not finite.")
    if float((together - alone).abs().max()) > 1e-2 * float(together.abs().max()):
        raise ValueError(f"{name} gives a sample another result beside others; a mixer treats samples alone.")


def _matched(name: str, task: Task, spec: MixerSpec, first: Entry) -> Frame:
    """The frame whose MLPs make the entry as large, as costly or as slow as `first`."""

    def measured(ratio: float) -> float:
        model = build(name, task, replace(spec.frame, mlp_ratio=ratio))
        if spec.match == "params":
            return sum(p.numel() for p in model.parameters())
        if spec.match == "flops":
            return count_macs(model, task.size)
        return _step_seconds(model, task, spec)

    want = {"params": first.params, "flops": first.macs, "latency": first.step_seconds}[spec.match]
    low, high = _HIDDEN
    for _ in range(4 if spec.match == "latency" else 9):
        middle = (low + high) / 2
        low, high = (middle, high) if measured(middle) < want else (low, middle)
    return replace(spec.frame, mlp_ratio=round((low + high) / 2, 3))


def _figures(model: nn.Module, task: Task, spec: MixerSpec) -> Entry:
    step = _step(model, task, spec)
    step()  # what is compiled or allocated on first use
    memory = peak_memory(step, device=spec.device).extra if spec.device != "cpu" else 0
    images = normalised(task.train.batch(torch.arange(min(spec.batch, len(task.train))))[0].to(spec.device))
    model.eval()

    def forward() -> None:
        with torch.no_grad(), _autocast(spec):
            model(images)

    forward()
    return Entry(
        "",
        params=sum(p.numel() for p in model.parameters()),
        macs=count_macs(model, task.size),
        step_seconds=_seconds(step, spec.device),
        images_s=len(images) / _seconds(forward, spec.device),
        memory=memory,
    )


def _step(model: nn.Module, task: Task, spec: MixerSpec) -> Callable[[], None]:
    """Forward and backward on one batch, every parameter's gradient finite."""
    model.to(spec.device).train()
    images, targets = task.train.batch(torch.arange(min(spec.batch, len(task.train))))
    images, targets = normalised(images.to(spec.device)), targets.to(spec.device)

    def step() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        with _autocast(spec):
            logits = model(images)
        nn.functional.cross_entropy(logits.float(), targets).backward()

    step()
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    if bad:
        raise FloatingPointError(f"gradient of {bad[0]} is not finite")
    return step


def _step_seconds(model: nn.Module, task: Task, spec: MixerSpec) -> float:
    return _seconds(_step(model, task, spec), spec.device)


def _seconds(call: Callable[[], None], device: str) -> float:
    """Median of three calls."""
    times = []
    for _ in range(3):
        _wait(device)
        begin = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _autocast(spec: MixerSpec) -> Any:
    return torch.autocast(torch.device(spec.device).type, torch.bfloat16, enabled=spec.precision == "bf16")


def trained(
    name: str,
    task: Task,
    spec: MixerSpec,
    seed: int,
    out: Path | None,
    after: Callable[[Trainer], None] | None = None,
) -> tuple[float, float]:
    """Score and seconds of one run in the frame of `spec`; read from `out` if it is there, gone on with if begun.

    after: called whenever a twentieth of the updates is done.
    """
    assert spec.steps is not None
    folder = None if out is None else run_folder(out, name, seed)
    recipe = Recipe(
        steps=spec.steps,
        batch=spec.batch,
        lr=spec.lr,
        warmup=max(1, spec.steps // 20),
        precision=spec.precision,
        graph=spec.graph and name not in WAITS,
        seed=seed,
        save=max(spec.steps // 2, min(spec.steps, 250)),
        every=max(spec.steps // 20, 1),
    )
    key = {"task": task.name, "size": task.size, "recipe": asdict(recipe), "frame": _listed(asdict(spec.frame))}
    done = None if folder is None else folder / "done.json"
    if done is not None and done.is_file():
        known = json.loads(done.read_text(encoding="utf-8"))
        if known["key"] == json.loads(json.dumps(key)):
            return known["score"], known["seconds"]
    torch.manual_seed(seed)
    where = accelerator_for(cpu=spec.device == "cpu")
    trainer = Trainer(build(name, task, spec.frame), task.train, recipe, folder, where)
    trainer.run(after=after)
    score = trainer.evaluate(task.test)[task.score]
    if done is not None:
        curve = [asdict(row) for row in trainer.curve]
        content = {"key": key, "score": score, "seconds": trainer.seconds, "curve": curve}
        write_atomic(done, json.dumps(content, indent=1).encode())
        (done.parent / "state.pt").unlink(missing_ok=True)
    return score, trainer.seconds


def run_folder(out: Path, name: str, seed: int) -> Path:
    """Where a run of `trained` lies; it holds done.json once it is finished."""
    return out / "runs" / f"{_plain(name)}-{seed}"


def _listed(record: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in record.items()}


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "_." else "_" for c in name)
