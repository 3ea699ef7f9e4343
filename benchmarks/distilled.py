"""Students of an embedded network by every method, with default settings, beside their teacher.

    python benchmarks/distilled.py --out runs/distilled                     # all methods, three seeds: hours
    python benchmarks/distilled.py --methods knowledge ect --seeds 0 --steps 2000
    python benchmarks/distilled.py --out runs/distilled --table     # writes benchmarks/results/distilled-digits.md
    python benchmarks/distilled.py --teacher fashion-mnist --batch-size 64 --samples 2000 --out runs/fashion
    python benchmarks/distilled.py --teacher fashion-mnist --methods ect --steps 20000 --device cuda --out runs/fashion

Killed and started again it goes on, on whatever device. Fashion-MNIST is read from where FASTSAMPLE_DATA says.
"""

from __future__ import annotations

import argparse
import copy
import math
import resource
import statistics
import time
from pathlib import Path

import torch

import fastsample as fs
from fastsample import distill
from fastsample.bench.data import load_images
from fastsample.bench.provenance import device_name
from fastsample.distill.data import as_data
from fastsample.distill.evaluation import Evaluation
from fastsample.distill.student import Student, record
from fastsample.distributed import resolve_device
from fastsample.metrics import FrechetReference, memorisation, to_uint8
from fastsample.zoo import MODELS

SOLUTION = 60  # steps of auto after which nothing changes
TEACHERS = [("auto", k) for k in (1, 4, 5, 8, 16, 35)] + [("unipc", k) for k in (1, 4, 5, 8, 16, 35)]


class _Teacher(Student):
    """The teacher's sampler where an evaluation expects a student's."""

    def sampler(self, steps: int | None = None) -> fs.Sampler:
        return fs.Sampler(self.denoiser, self.solver, steps, end="zero")


def teacher_table(denoiser: fs.Denoiser, evaluation: Evaluation, nearest: Nearest) -> list[str]:
    lines = [
        f"| teacher's solver | evaluations | {evaluation.metric} | training images over others |",
        "|---|---|---|---|",
    ]
    for solver, steps in (*TEACHERS, ("auto", SOLUTION)):
        teacher = _Teacher(denoiser, solver)
        found = evaluation.distance(teacher, steps, seed=1)
        near = nearest.ratio(teacher, steps)
        lines.append(f"| `{solver}` | {steps} | {found.value:.3f} ± {found.se:.3f} | {near:.2f} |")
    return lines


def to_the_solution(denoiser: fs.Denoiser, evaluation: Evaluation) -> Evaluation:
    """The same evaluation, but against the teacher's own solution instead of the data."""
    own = copy.copy(evaluation)
    samples = evaluation.moments(_Teacher(denoiser, "auto"), SOLUTION, seed=2)
    own.reference = FrechetReference(samples.gaussian())
    return own


class Nearest:
    """How much nearer a student's samples are to training images than to others."""

    def __init__(self, teacher: str, evaluation: Evaluation, count: int) -> None:
        entry, self.evaluation, self.count = MODELS[teacher], evaluation, count
        assert entry.heldout is not None
        sets = (load_images(s, evaluation.data.shape) for s in (entry.train, entry.heldout))
        self.train, self.heldout = (torch.cat(list(images.batches(10_000))) for images in sets)

    def ratio(self, student: Student, steps: int) -> float:
        """The distance to the nearest training image over that to the nearest held-out one."""
        x = self.evaluation.drawn(student, steps, self.count, seed=3)
        return memorisation(to_uint8(x).cpu(), self.train, self.heldout).ratio


def student_rows(
    out: Path, evaluation: Evaluation, own: Evaluation, nearest: Nearest, again: bool
) -> list[str]:
    """The rows of all students that are finished, by method, number and size of updates, and where they were made.

    Args:
        out: where the students are.
        evaluation, own: distances to the data, and to the teacher's solution.
        nearest: of the samples to training images.
        again: measure the distances to the data anew, instead of taking those of the students' cards.
    """
    lines = [
        "| method | updates | of images | seeds | 1 step | 2 steps | 4 steps | 1 step, to the teacher's solution "
        "| training images over others, 1 / 2 / 4 steps | minutes | peak MB | on |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[int, int, int, str], list[Path]] = {}
    order = list(distill.METHODS)
    for folder in sorted(f.parent for f in out.glob("*/manifest.json")):
        name, updates, _ = folder.name.rsplit("-", 2)
        size, machine = record(folder)["training"]["batch_size"], folder / "machine.txt"
        made = machine.read_text() if machine.exists() else ""
        groups.setdefault((order.index(name), int(updates), size, made), []).append(folder)
    for (place, updates, size, made), folders in sorted(groups.items()):
        students = [fs.load(f, device=own.device) for f in folders]
        cells: list[str] = []
        for k in (1, 2, 4):
            rows = [row for s in students for row in s.measured if row["steps"] == k]
            if not rows:
                cells.append("")
                continue
            if again:
                found = [evaluation.distance(s, k, seed=1) for s in students]
                cells.append(_mean([e.value for e in found], [e.se for e in found]))
            else:
                cells.append(_mean([r[evaluation.metric] for r in rows], [r["standard error"] for r in rows]))
        followed = [own.distance(s, 1) for s in students]
        cells.append(_mean([e.value for e in followed], [e.se for e in followed]))
        steps = [row["steps"] for row in students[0].measured]
        cells.append(
            " / ".join(f"{statistics.fmean(nearest.ratio(s, k) for s in students):.2f}" for k in steps)
        )
        minutes = statistics.median(float((f / "minutes.txt").read_text()) for f in folders)
        known = [float(file.read_text()) for f in folders if (file := f / "memory.txt").exists()]
        memory = f"{statistics.median(known):.0f}" if known else ""
        lines.append(
            f"| `{order[place]}` | {updates} | {size} | {len(folders)} | {' | '.join(cells)} | {minutes:.1f} "
            f"| {memory} | {made} |"
        )
    return lines


def _mean(values: list[float], errors: list[float]) -> str:
    """The mean over seeds and its standard error."""
    error = math.sqrt(sum(e**2 for e in errors)) / len(errors)
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"


def peak_memory(device: torch.device) -> float:
    """In MB: the GPU's that tensors took, or the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(distill.METHODS), choices=list(distill.METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--teacher", default="digits", choices=fs.zoo.names())
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--samples", type=int, default=10_000, help="of each distance in the table")
    parser.add_argument(
        "--neighbours", type=int, default=1500, help="samples whose nearest images are sought"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/distilled"))
    parser.add_argument("--note", default="", help="a sentence about the machine for the table")
    parser.add_argument("--table", action="store_true", help="only write the table of what is finished")
    parser.add_argument("--again", action="store_true", help="measure the students of the table again")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    entry = MODELS[args.teacher]
    alone = True  # so far in this process, whose peak of memory cannot be reset
    for seed in [] if args.table else args.seeds:
        for name in args.methods:
            folder = args.out / f"{name}-{args.steps}-{seed}"
            if (folder / "manifest.json").exists():
                continue
            started = time.perf_counter()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            method = getattr(distill, distill.METHODS[name][1])(fs.zoo.load(args.teacher))
            trainer = distill.Trainer(
                method,
                entry.data,
                steps=args.steps,
                batch_size=args.batch_size,
                seed=seed,
                metric=entry.metric,
                final_samples=args.samples,
                device=args.device,
            )
            student = trainer.fit(folder)
            minutes = (time.perf_counter() - started) / 60
            (folder / "minutes.txt").write_text(f"{minutes:.2f}")
            (folder / "machine.txt").write_text(device_name(device))
            peak = peak_memory(device)
            if alone or device.type == "cuda":
                (folder / "memory.txt").write_text(f"{peak:.0f}")
            alone = False
            print(name, seed, student.measured, f"{minutes:.1f} min", f"peak {peak:.0f} MB", flush=True)
    if args.table:
        denoiser = fs.zoo.load(args.teacher)
        denoiser.net.to(device)
        evaluation = Evaluation(entry.metric, args.samples, as_data(entry.data).near(device), device)
        nearest = Nearest(args.teacher, evaluation, args.neighbours)
        text = [
            f"# Students of the network `{args.teacher}`",
            "",
            f"`{entry.metric}` to the training images, {args.samples} samples, lower is better, with its standard "
            f"error; measured with torch {torch.__version__} on {device_name(device)}. Written by "
            f"`python benchmarks/distilled.py --teacher {args.teacher} --table`.",
            *(["", args.note] if args.note else []),
            "",
            "Training images over others: the distance from a sample to the nearest training image over that to the "
            "nearest held-out one, of sets of one size; 1 where nothing is learnt by heart.",
            "",
            *student_rows(args.out, evaluation, to_the_solution(denoiser, evaluation), nearest, args.again),
            "",
            *teacher_table(denoiser, evaluation, nearest),
        ]
        Path(f"benchmarks/results/distilled-{args.teacher}.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
