"""Vision backbones beside timm's of the same shape, images a second, into results/vision_throughput.csv.

python bench/vision_throughput.py                          # on a GPU: all modes, minutes
python bench/vision_throughput.py --modes eager --rounds 5
python bench/vision_throughput.py --device cpu --batch 2 --train-batch 2 --rounds 2 --modes eager   # only to try it
python bench/vision_throughput.py --profile --only davit_tiny --modes eager     # where the time goes, no rows

Each pair has a process: it checks that both models give equal logits from equal weights (where timm has the same
model; otherwise ours against itself on the CPU), compiles and warms up; when all are ready they take turns, and the two
of a pair run interleaved. `infer` is a forward pass without gradients, `train` forward and backward in training mode.
Weights and images are random bfloat16. A time is that of three calls in a row and of the wait for the last, so that the
host counts where the device waits for it; mode `graph` launches each call as one CUDA graph, and the host does not
count. Pairs whose figures lie in --folder already are not run again.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from glocal._files import write_atomic
from glocal.kernels import windows
from glocal.measure import compare_paired
from glocal.models import create_model
from glocal.models.checkpoints import fill
from glocal.nn import neighborhood, window_attention

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "results" / "vision_throughput.csv"
# Ours -> timm's, and whether the two are one model.
PAIRS = {
    "davit_tiny": ("davit_tiny", True),
    "gc_vit_tiny": ("gcvit_tiny", True),
    "maxvit_tiny_tf_224": ("maxvit_tiny_tf_224", True),
    "swin_tiny": ("swin_tiny_patch4_window7_224", True),
    "dinat_tiny": ("swin_tiny_patch4_window7_224", False),
    "dinat_s_tiny": ("swin_tiny_patch4_window7_224", False),
    "biformer_tiny": ("swin_tiny_patch4_window7_224", False),
    "litv2_s": ("swin_tiny_patch4_window7_224", False),
    "stvit_small": ("swin_tiny_patch4_window7_224", False),
    "sgformer_s": ("swin_tiny_patch4_window7_224", False),
    "l2vit_tiny": ("swin_tiny_patch4_window7_224", False),
    "inline_swin_tiny": ("swin_tiny_patch4_window7_224", False),
}
# Largest errors: of logits over their largest, of gradients over the largest of their parameter; --quick in bfloat16.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}
GRADIENTS = 2e-2
ROW = 3  # calls in a row
SLOTS = 3  # first training steps at once


@dataclass(frozen=True)
class Plan:
    """What to run. passes: "infer", "train". modes: "eager", "graph", "compiled"."""

    device: str
    modes: tuple[str, ...]
    passes: tuple[str, ...]
    rounds: int
    batch: int
    train_batch: int
    profile: bool
    patience: float
    turn: str
    quick: bool


def models_of(name: str, plan: Plan) -> tuple[nn.Module, nn.Module, float]:
    """Ours, timm's, and the largest error of our logits over the largest logit."""
    import timm

    theirs_name, same = PAIRS[name]
    torch.manual_seed(0)
    theirs = timm.create_model(theirs_name, num_classes=1000).eval()
    ours = create_model(name, drop_path=0.0).eval()  # as timm makes its models
    dtype = torch.bfloat16 if plan.quick else torch.float32
    ours, theirs, image = ours.to(dtype), theirs.to(dtype), torch.randn(1, 3, 224, 224).to(dtype)
    # Kernels are compiled again for a batch of one, which is never timed.
    many = image.to(plan.device).repeat(plan.train_batch, 1, 1, 1)
    with torch.no_grad():
        if same:
            fill(ours, type(ours).convert(theirs.state_dict()), theirs_name)  # type: ignore[attr-defined]
            expected = theirs.to(plan.device)(many[:1])
        else:
            expected = ours(image).to(plan.device)
        found = ours.to(plan.device)(many)
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE[dtype]:
        raise RuntimeError(f"{name}: logits are off by {error:.2e} of the largest; no times taken")
    if same and "train" in plan.passes and not plan.quick:
        off = gradients_off(ours, theirs, image.to(plan.device))
        if not off <= GRADIENTS:
            raise RuntimeError(f"{name}: gradients are off by {off:.2e} of the largest; no times taken")
    return ours.to(plan.device).bfloat16(), theirs.to(plan.device).bfloat16(), error


def gradients_off(ours: nn.Module, theirs: nn.Module, image: Tensor) -> float:
    """Largest error of a gradient over the largest gradient of its parameter, both in float32 and evaluation mode."""
    grads = []
    for model in (ours, theirs):
        model.zero_grad(set_to_none=True)
        model(image).square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    wanted = type(ours).convert(grads[1])  # type: ignore[attr-defined]
    scale = max(float(g.abs().max()) for g in wanted.values())
    return max(
        float((grads[0][n] - g).abs().max()) / max(float(g.abs().max()), 1e-3 * scale) for n, g in wanted.items()
    )


def calls(model: nn.Module, step: str, plan: Plan) -> Callable[[], object]:
    """One call of the pass `step`."""
    count = plan.batch if step == "infer" else plan.train_batch
    image = torch.randn(count, 3, 224, 224, device=plan.device).bfloat16()
    if step == "infer":

        def infer() -> Tensor:
            with torch.no_grad():
                return model(image)

        return infer
    labels = torch.randint(1000, (count,), device=plan.device)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(image).float(), labels).backward()

    return train


def captured(run: Callable[[], object], plan: Plan) -> Callable[[], object]:
    """The call as a CUDA graph. It has run before, so that nothing is compiled or planned any more."""
    if plan.device != "cuda":
        raise ValueError("--modes graph: CUDA graphs need a GPU; legal on a CPU: eager, compiled.")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def in_a_row(run: Callable[[], object], plan: Plan) -> Callable[[], None]:
    """ROW calls, and the wait for the device."""

    def several() -> None:
        for _ in range(ROW):
            run()
        if plan.device == "cuda":
            torch.cuda.synchronize()

    return several


def without_windows(name: str, problem: Exception) -> str:
    """Leave out the kernels of small windows: figures without them are worth more than none."""
    print(f"{name}: {type(problem).__name__}: {str(problem)[:600]}", file=sys.stderr, flush=True)
    for module in (window_attention, neighborhood):
        setattr(module, "small_windows", lambda *call: False)  # noqa: B010
    return "without the kernels of small windows"


@contextmanager
def slot(folder: Path, step: str) -> Iterator[None]:
    """A place among SLOTS: so many training steps at once fit into the memory of a GPU."""
    if step == "infer":
        yield
        return
    files = [(folder / f"slot{i}").open("w") for i in range(SLOTS)]
    held = None
    while held is None:
        for file in files:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            held = file
            break
        else:
            time.sleep(0.05)
    try:
        yield
    finally:
        for file in files:
            file.close()


def child(name: str, plan: Plan, folder: Path, count: int) -> None:
    """Measure one pair; its rows go to folder/name.json."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    note = "kernels of small windows named" if windows.CAPABILITY.by_name_only is not None else ""
    windows.CAPABILITY = replace(windows.CAPABILITY, by_name_only=None)
    try:
        ours, theirs, error = models_of(name, plan)
    except Exception as problem:
        note = without_windows(name, problem)
        ours, theirs, error = models_of(name, plan)
    contenders: dict[tuple[str, str], dict[str, Callable[[], object]]] = {}
    seconds: dict[str, float] = {}
    for mode in plan.modes:
        for step in plan.passes:
            ready = {}
            for who, model in (("timm", theirs), ("glocal", ours)):
                model.train(step == "train")
                # one compiled module for each pass: a change between training and evaluation would compile again
                wrapped = torch.compile(model) if mode == "compiled" else model
                run = calls(wrapped, step, plan)
                begin = time.monotonic()
                with slot(folder, step):
                    try:
                        run()
                    except Exception as problem:
                        if who == "timm":
                            raise
                        note = without_windows(name, problem)
                        run()
                    if plan.device == "cuda":
                        model.zero_grad(set_to_none=True)
                        torch.cuda.empty_cache()
                seconds[f"{mode} {step} {who}"] = time.monotonic() - begin
                ready[who] = run
            contenders[mode, step] = ready
    (folder / f"{name}.ready").touch()
    limit = time.monotonic() + plan.patience
    while len(list(folder.glob("*.ready"))) < count and time.monotonic() < limit:
        time.sleep(0.2)
    rows = []
    with Path(plan.turn if plan.turn else folder / "turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for (mode, step), ready in contenders.items():
            for model in (ours, theirs):
                model.train(step == "train")
            if plan.profile:
                profiled(f"{name} {mode} {step}", ready, plan)
                continue
            images = plan.batch if step == "infer" else plan.train_batch
            peaks = {who: peak(run, plan) for who, run in ready.items()}
            launched = {who: captured(run, plan) if mode == "graph" else run for who, run in ready.items()}
            rows_of = {who: in_a_row(run, plan) for who, run in launched.items()}
            timed = compare_paired(rows_of, plan.rounds, plan.device, baseline="timm", warmup=1)
            del launched, rows_of
            ratio = timed.ratios["glocal"]
            rows.append(
                {
                    "model": name,
                    "beside": PAIRS[name][0],
                    "same_model": str(PAIRS[name][1]).lower(),
                    "mode": mode,
                    "pass": step,
                    "batch": images,
                    "images_s": f"{ROW * images / timed.times['glocal'].median:.0f}",
                    "timm_images_s": f"{ROW * images / timed.times['timm'].median:.0f}",
                    "ratio": f"{ratio.median:.3f}",
                    "ratio_low": f"{ratio.low:.3f}",
                    "ratio_high": f"{ratio.high:.3f}",
                    "peak_gib": f"{peaks['glocal']:.2f}",
                    "timm_peak_gib": f"{peaks['timm']:.2f}",
                    "error": f"{error:.1e}",
                    "rounds": plan.rounds,
                    "compile_s": f"{seconds[f'{mode} {step} glocal']:.0f}" if mode == "compiled" else "",
                    "note": note,
                    "device": torch.cuda.get_device_name() if plan.device == "cuda" else "cpu",
                    "torch": torch.__version__,
                    "timm": timm_version(),
                }
            )
            (folder / f"{name}.json").write_text(json.dumps(rows))
            print(name, mode, step, {k: rows[-1][k] for k in ("images_s", "timm_images_s", "ratio")}, flush=True)
        if plan.device == "cuda":
            torch.cuda.empty_cache()
    if rows:
        (folder / f"{name}.done").touch()


def timm_version() -> str:
    """Of the package."""
    import timm

    return timm.__version__


def peak(run: Callable[[], object], plan: Plan) -> float:
    """Largest memory during a call, GiB; NaN on a CPU."""
    if plan.device != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**30


def profiled(title: str, ready: dict[str, Callable[[], object]], plan: Plan) -> None:
    """Print the kernels that take most of the time."""
    from torch.profiler import ProfilerActivity, profile

    for who, run in ready.items():
        run()
        kinds = [ProfilerActivity.CUDA] if plan.device == "cuda" else [ProfilerActivity.CPU]
        with profile(activities=kinds) as found:
            for _ in range(2):
                run()
            if plan.device == "cuda":
                torch.cuda.synchronize()
        events = [e for e in found.key_averages() if e.self_device_time_total > 0 or plan.device == "cpu"]
        events.sort(key=lambda e: -(e.self_device_time_total or e.self_cpu_time_total))
        total = sum(e.self_device_time_total for e in events) / 2e3
        print(f"== {title} {who}: {total:.2f} ms of kernels", flush=True)
        for e in events[:22]:
            print(f"{e.self_device_time_total / 2e3:8.3f} ms {e.count // 2:5d} x {e.key[:110]}", flush=True)


def parent(plan: Plan, only: list[str], out: Path, kept: Path | None) -> int:
    """All pairs; 0 if every one was measured."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) if kept is None else kept
        folder.mkdir(parents=True, exist_ok=True)
        spec = json.dumps(vars(plan))
        wanted = [name for name in only if not (folder / f"{name}.done").is_file()]
        processes = {}
        for name in wanted:
            command = [sys.executable, __file__, "--child", name, "--spec", spec, "--folder", str(folder)]
            command += ["--count", str(len(wanted))]
            processes[name] = subprocess.Popen(command, env=os.environ)
        failed = []
        for name, process in processes.items():
            if process.wait() != 0:
                failed.append(name)
                (folder / f"{name}.ready").touch()
        found = [folder / f"{name}.json" for name in only]
        rows = [row for file in found if file.is_file() for row in json.loads(file.read_text())]
    if rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(out, text.getvalue().encode())
    if failed:
        print(f"not measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main() -> None:
    """Read the arguments and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda")
    p.add_argument("--only", default=",".join(PAIRS))
    p.add_argument("--modes", default="eager,graph,compiled")
    p.add_argument("--passes", default="infer,train")
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--train-batch", type=int, default=128)
    p.add_argument("--out", type=Path, default=CSV)
    p.add_argument("--profile", action="store_true")
    p.add_argument("--patience", type=float, default=900.0, help="seconds that ready pairs wait for the others")
    p.add_argument("--turn", default="", help="a file that several runs lock, so that they time one after the other")
    p.add_argument("--quick", action="store_true", help="check logits in bfloat16 alone: kernels compile for one type")
    p.add_argument("--child")
    p.add_argument("--spec")
    p.add_argument("--folder", type=Path, help="where figures of finished pairs lie")
    p.add_argument("--count", type=int)
    a = p.parse_args()
    if a.child:
        fields = json.loads(a.spec)
        plan = Plan(**{**fields, "modes": tuple(fields["modes"]), "passes": tuple(fields["passes"])})
        child(a.child, plan, a.folder, a.count)
        return
    modes, passes = tuple(a.modes.split(",")), tuple(a.passes.split(","))
    plan = Plan(a.device, modes, passes, a.rounds, a.batch, a.train_batch, a.profile, a.patience, a.turn, a.quick)
    raise SystemExit(parent(plan, a.only.split(","), a.out, a.folder))


if __name__ == "__main__":
    main()
