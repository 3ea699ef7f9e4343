"""The benchmark: a grid of cells solver x steps x grid x seed on one model, with the same noise in all.

Everything is checked before any image is sampled. Each cell is written as it finishes; a run started again
with the same settings redoes nothing that is finished.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import os
import statistics
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsample import __version__
from fastsample.bench.cells import Cell, DamagedCell, digest
from fastsample.bench.claims import claimed
from fastsample.bench.conditions import Conditions, conditions_of, read_prompts
from fastsample.bench.cost import EnergyMeter, PeakMemory, network_flops
from fastsample.bench.data import ImageSet, embedded_data, embedded_metrics, load_images
from fastsample.bench.errors import DISK_FULL, UserError, checking
from fastsample.bench.measures import Accumulator, Batch, Measure, Wanted, prepare, wanted
from fastsample.bench.model import (
    Model,
    Tally,
    check_conditions,
    check_names,
    counted,
    load_model,
    make_sampler,
    plan_files,
    solver_label,
    student_folder,
    student_samplers,
)
from fastsample.bench.peers import PREFIX, FunctionSampler, Peer, installed
from fastsample.bench.provenance import device_name, provenance
from fastsample.bench.results import RUN_SCHEMA
from fastsample.conf import BenchConfig
from fastsample.denoiser import as_conditions
from fastsample.distributed import decided, rank_and_size, resolve_device, summed
from fastsample.errors import NonFiniteError
from fastsample.metrics import memorisation, rmse, to_uint8
from fastsample.metrics.extractors import frechet_metrics
from fastsample.plan import write_atomically
from fastsample.sampler import Sampler

_KEEP_BYTES = 1 << 28  # memorisation compares pixels: only where all samples fit in so much memory
_REFERENCE_CHECK = 128  # samples on which the reference solution is compared with one of half the steps


def bench(config: BenchConfig, command: str | None = None) -> Path:
    """Run the cells that are not finished yet and write the report.

    Args:
        config: the settings.
        command: the command line, for the report.

    Returns:
        Path of report.html in the run folder.

    Raises:
        UserError: on settings that cannot be used (before any work), a full disk or a network that fails (the
            cells finished so far are kept).
    """
    from fastsample.bench.report import render_run

    with _disk(config):
        with checking():
            config = _beside_its_teacher(config)
        job = _prepare(config)
        job.execute(command)
        return render_run(Path(config.out)) if rank_and_size()[0] == 0 else Path(config.out) / "report.html"


def _beside_its_teacher(config: BenchConfig) -> BenchConfig:
    """``model=`` a student's folder is its teacher with the student among the solvers."""
    if not student_folder(config.model):
        return config
    from fastsample.distill.student import record

    teacher = record(config.model)["training"].get("teacher")
    if teacher is None:
        raise ValueError(
            f"model={config.model} does not say who its teacher is; name it, and the student among the solvers: "
            f"model=... 'solvers=[auto,{{student: {config.model}}}]'"
        )
    return replace(config, model=teacher, solvers=[*config.solvers, {"student": config.model}])


@contextmanager
def _disk(config: BenchConfig) -> Iterator[None]:
    """Say what a failing disk means for the run."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f"out={config.out}: {os.strerror(error.errno)}; the {_finished_cells(Path(config.out))} cells "
            "finished so far are kept. Free some space and start the same command again."
        ) from error


def _finished_cells(out: Path) -> int:
    return len(list((out / "cells").glob("*.json")))


@dataclass
class _Planned:
    """A cell and its sampler."""

    cell: Cell
    sampler: Sampler | Peer


@dataclass
class _Job:
    config: BenchConfig
    model: Model
    device: torch.device
    tally: Tally
    conditions: Conditions
    metrics: list[Measure]
    splits: dict[str, ImageSet]
    references: dict[int, _Planned]
    planned: list[_Planned]
    notes: list[str]
    flops: int

    # -- the whole run ---------------------------------------------------------------------------------------

    def execute(self, command: str | None) -> None:
        out = Path(self.config.out)
        (out / "cells").mkdir(parents=True, exist_ok=True)
        where = provenance(self.device)
        everything = [*self.references.values(), *self.planned]
        manifest = {
            "schema": RUN_SCHEMA,
            "command": command,
            "config": asdict(self.config),
            "config_sha256": digest(asdict(self.config)),
            "provenance": where,
            "model": {
                "name": self.model.name,
                "shape": list(self.model.image_shape),
                "labelled": self.config.labels is not None and self.model.classes is not None,
                "prompts": len(self.conditions.prompts),
                "identity": self.model.identity,
                "flops_per_row": self.flops,
            },
            "metrics": {m.name: m.describe() for m in self.metrics},
            "splits": {
                name: {"name": s.name, "n": s.n, "sha256": s.sha256} for name, s in self.splits.items()
            },
            "notes": self.notes,
            "cells": [p.cell.filename for p in everything],
        }
        rank, ranks = rank_and_size()
        first = rank == 0
        if first:
            write_atomically(out / "run.json", json.dumps(manifest, indent=1).encode())

        todo = [p for p in everything if not decided(first and self._finished(p.cell))]
        if first:
            done = len(everything) - len(todo)
            print(f"{done} of {len(everything)} cells are finished already", file=sys.stderr)
        if not todo:
            return
        planned = todo[0]
        try:
            # the first call pays for memory and kernels; no cell's time should
            self._sample(planned.sampler, planned.cell.seed, range(min(self.config.n, self.config.batch)))
            with _progress(todo, self.config.n, ranks) as progress:
                # Cells that another worker has in hand are looked at again at the end, then waited for. The
                # others need the reference solutions, so these are waited for at once.
                waiting = list(todo)
                for last in (False, True):
                    held: list[_Planned] = []
                    for planned in waiting:
                        wait = last or planned.cell.reference
                        file = out / "cells" / planned.cell.filename
                        with claimed(file, wait) if first else nullcontext(False) as claim:
                            if not decided(claim):
                                held.append(planned)
                                continue
                            started = time.perf_counter()
                            if not decided(first and self._finished(planned.cell)):
                                result = self._measure(planned, progress)
                                if result is not None:
                                    planned.cell.write(out / "cells", result, where)
                            progress.finished(planned, time.perf_counter() - started)
                    waiting = held
        except NonFiniteError as error:
            raise UserError(
                f"{planned.cell.solver}, {planned.cell.steps} steps, seed {planned.cell.seed}: {error}; the "
                f"{_finished_cells(out)} cells finished so far are kept"
            ) from error

    def _finished(self, cell: Cell) -> bool:
        folder = Path(self.config.out) / "cells"
        try:
            found = cell.read(folder)
            if found is not None and cell.reference:
                self._load_solution(cell, found["result"]["solution_sha256"])
        except DamagedCell as error:
            print(f"{error}; this cell is run again", file=sys.stderr)
            return False
        return found is not None

    # -- one cell --------------------------------------------------------------------------------------------

    def _measure(self, planned: _Planned, progress: _Progress) -> dict[str, Any] | None:
        """The cell's result; None on all processes of a launched run but the first.

        Batches are shared out by their number, and what they give is added up: the result is that of one process,
        beyond the rounding of sums.
        """
        cell, sampler, n = planned.cell, planned.sampler, self.config.n
        compared = min(n, self.config.reference.n) if self._comparable(sampler) else 0
        gathered = [Accumulator(measure) for measure in self.metrics]
        shape = self.model.image_shape
        pixels = n * 8 * torch.Size(shape).numel()
        keep_pixels = (
            set(self.splits) == {"train", "heldout"}
            and pixels <= _KEEP_BYTES
            and all(isinstance(s.source, Tensor) for s in self.splits.values())
        )
        kept = n if keep_pixels else min(n, self.config.images)
        shown = torch.zeros(kept, *shape, dtype=torch.uint8)
        x0 = torch.zeros(compared, *shape)
        rank, ranks = rank_and_size()
        solution = None
        if compared and not cell.reference:
            # the others may not see the first process's disk
            mine = None if rank else self._load_solution(self.references[cell.seed].cell)
            solution = summed(torch.zeros(compared, *shape) if mine is None else mine)
        starts = range(0, n, self.config.batch)
        seconds = torch.zeros(len(starts), dtype=torch.float64)  # a sample, of each batch
        self.tally.reset()
        memory, energy = PeakMemory(self.device), EnergyMeter(self.device)
        joules = torch.zeros(1, dtype=torch.float64)
        for i in range(rank, len(starts), ranks):
            index = range(starts[i], min(n, starts[i] + self.config.batch))
            used = energy.joules()
            began = time.perf_counter()
            x = self._sample(sampler, cell.seed, index)
            seconds[i] = (time.perf_counter() - began) / len(index)
            if used is not None:
                joules += (energy.joules() or 0.0) - used
            x = self.model.images(x)
            if cell.reference and i == rank:
                _check_range(self.model.name, x)
            quantised = to_uint8(x)
            batch = Batch(
                quantised,
                index,
                None if solution is None else _square_error(x, solution[index.start : index.stop]),
                self.conditions.prompt(cell.seed, torch.arange(index.start, index.stop)),
            )
            for one in gathered:
                one.update(batch)
            progress.sampled(planned, len(index))
            for whole, part in ((shown, quantised), (x0, x)):
                part = part[: max(0, len(whole) - index.start)].cpu()
                whole[index.start : index.start + len(part)] = part
        for one in gathered:
            one.state.reduce(summed)
        counts = torch.tensor([self.tally.evaluations, self.tally.rows], dtype=torch.float64)
        shown, x0, seconds, counts, joules = map(summed, (shown, x0, seconds, counts, joules))
        if rank:
            return None
        evaluations, rows = counts.tolist()
        whole_batches = seconds[: max(1, n // self.config.batch)]  # a ragged last one has another cost
        typical = statistics.median_low(whole_batches.tolist())
        result: dict[str, Any] = {
            "n": n,
            "nfe": evaluations / n,
            "rows_per_sample": rows / n,
            "seconds_per_sample": typical,
            "seconds": float(
                sum(s * min(self.config.batch, n - i) for s, i in zip(seconds, starts, strict=True))
            ),
            "images_per_second": ranks / typical,
            "flops_per_sample": round(self.flops * rows / n),
            "peak_memory_bytes": memory.bytes(),
            "joules_per_sample": float(joules) / n if energy.why is None else None,
            "stochastic": sampler.plan.stochastic,
            "plan": repr(sampler.plan),
            "notes": list(sampler.plan.notes),
            "metrics": {one.measure.name: one.estimates() for one in gathered},
            "memorisation": None,
            "rmse": None,
            "rmse_median": None,
            "images": [_png(image) for image in shown[: self.config.images]],
        }
        if keep_pixels:
            train, heldout = (self.splits[s].source for s in ("train", "heldout"))
            assert isinstance(train, Tensor)
            assert isinstance(heldout, Tensor)
            result["memorisation"] = memorisation(shown, train, heldout).to_dict()
        if cell.reference:
            result |= self._save_solution(planned, x0)
        elif solution is not None:
            result["rmse"], result["rmse_median"] = rmse(x0, solution)
        return result

    def _comparable(self, sampler: Sampler | Peer) -> bool:
        """Whether a sampler has an error: it draws no noise and ends where the reference solution ends."""
        reference = next(iter(self.references.values())).sampler
        return not sampler.plan.stochastic and _final_sigma(sampler) == _final_sigma(reference)

    def _sample(self, sampler: Sampler | Peer, seed: int, index: range) -> Tensor:
        which = torch.arange(index.start, index.stop, device=self.device)
        x = sampler(
            shape=(len(index), *self.model.shape),
            seed=seed,
            index=which,
            device=self.device,
            **self.conditions(seed, which),
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return x

    # -- the reference solution ------------------------------------------------------------------------------

    def _solution_path(self, cell: Cell) -> Path:
        return Path(self.config.out) / "solutions" / f"{Path(cell.filename).stem}.safetensors"

    def _save_solution(self, planned: _Planned, x: Tensor) -> dict[str, Any]:
        """Store the solution, and estimate its own error by comparing it with one of half the steps."""
        from safetensors.torch import save

        cell, reference = planned.cell, self.config.reference
        half = make_sampler(
            planned.sampler.denoiser, reference.solver, max(1, reference.steps // 2), None, self.config.end
        )
        few = range(min(len(x), _REFERENCE_CHECK))
        error, median = rmse(self.model.images(self._sample(half, cell.seed, few)).cpu(), x[: len(few)])
        content = save({"x": x.contiguous()})
        write_atomically(self._solution_path(cell), content)
        return {
            "solution_sha256": hashlib.sha256(content).hexdigest(),
            "half_steps_rmse": error,
            "half_steps_rmse_median": median,
        }

    def _load_solution(self, cell: Cell, sha256: str | None = None) -> Tensor:
        from safetensors.torch import load

        path = self._solution_path(cell)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DamagedCell(f"{path.name}: unreadable ({error})") from error
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise DamagedCell(f"{path.name}: its checksum does not match")
        return load(content)["x"]


def _prepare(config: BenchConfig) -> _Job:
    """Check every setting, cheapest first, and load what the run needs."""
    notes: list[str] = []
    wanted = config.solvers
    if wanted == BenchConfig().solvers and not installed():
        wanted = [s for s in wanted if not s.startswith(PREFIX)]
        notes.append(
            "diffusers is not installed: its samplers are left out (pip install 'fastsample[diffusers]')"
        )
    with checking():
        _check_numbers(config)
        for solver, grid in itertools.product([*wanted, config.reference.solver], config.grids):
            check_names(solver, grid)
        device = resolve_device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        model = load_model(
            config.model, shape=config.shape, classes=config.classes, guidance=config.guidance, device=device
        )
        if isinstance(config.labels, list):
            raise ValueError(f"labels={config.labels!r}: a benchmark takes auto, null or one label")
        prompts = () if config.prompts is None else read_prompts(config.prompts)
        conditions = conditions_of(model, config.labels, prompts)
        one_condition = conditions(0, torch.zeros(1, dtype=torch.int64))
        check_conditions(model, one_condition)
        # after the model, whose module may register extractors of its own
        asked = _metrics(config)
        splits = _splits(config, model)
        metrics = prepare(
            asked,
            model.image_shape,
            splits,
            cache=Path(config.out) / "statistics",
            batch=config.batch,
            kept=config.feature_samples,
            device=device,
            weights=_weights(config),
            prompts=prompts,
        )

    denoiser, tally = counted(model.denoiser)
    identity = {
        "fastsample": __version__,  # one report holds one version's numbers
        "model": model.identity,
        "shape": list(model.shape),
        "n": config.n,
        "labels": config.labels,
        "classes": model.classes,
        "end": config.end,
        "images": config.images,
        "prompts": conditions.sha256,
        "metrics": {m.name: m.identity for m in metrics},
        "data": {name: split.sha256 for name, split in splits.items()},
        # seconds are part of the result
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "batch": config.batch,
    }

    def cell(
        solver: Any, steps: int, grid: str | None, seed: int, sampler: Sampler | Peer, **more: Any
    ) -> Cell:
        plan = hashlib.sha256(sampler.plan.to_json().encode()).hexdigest()
        reference = bool(more.pop("is_reference", False))
        spec = {**identity, "plan": plan, "seed": seed, "reference": more}
        if (student := getattr(sampler, "identity", None)) is not None:
            spec["student"] = student
        return Cell(solver_label(solver), steps, grid, seed, spec, reference)

    with checking("reference"):
        sampler = make_sampler(denoiser, config.reference.solver, config.reference.steps, None, config.end)
        if sampler.plan.stochastic:
            raise ValueError(f"solver={config.reference.solver!r} draws noise; take a deterministic one")
    references = {
        seed: _Planned(
            cell(
                config.reference.solver,
                config.reference.steps,
                None,
                seed,
                sampler,
                is_reference=True,
                n=min(config.n, config.reference.n),
            ),
            sampler,
        )
        for seed in config.seeds
    }
    one_condition = as_conditions(one_condition, device)

    def count(sampler: FunctionSampler) -> None:
        sampler.count(lambda: tally.evaluations, one_condition)

    planned: list[_Planned] = []
    for solver, grid in itertools.product(wanted, config.grids):
        with checking(f"solver {solver_label(solver)}" + (f" on grid {grid}" if grid else "")):
            samplers = _samplers(config, denoiser, solver, grid, notes, count)
        for sampler, seed in itertools.product(samplers, config.seeds):
            one = cell(solver, sampler.plan.steps, grid, seed, sampler, key=references[seed].cell.key)
            planned.append(_Planned(one, sampler))
    if not planned:
        raise UserError(f"nfe={config.nfe}: no solver has a plan within these budgets")
    planned.sort(key=lambda p: p.sampler.plan.nfe)
    flops = network_flops(model.denoiser, model.shape, one_condition)
    return _Job(config, model, device, tally, conditions, metrics, splits, references, planned, notes, flops)


def _check_numbers(config: BenchConfig) -> None:
    for name, low in (("n", 1), ("batch", 1), ("images", 0), ("feature_samples", 1)):
        if getattr(config, name) < low:
            raise ValueError(f"{name}={getattr(config, name)}: at least {low} is needed")
    for name in ("solvers", "grids", "seeds", "steps" if config.steps is not None else "nfe"):
        if not getattr(config, name):
            raise ValueError(f"{name}=[]: at least one is needed")
    for name in ("nfe", "steps"):
        for value in getattr(config, name) or ():
            if value < 1:
                raise ValueError(f"{name}={getattr(config, name)}: {value} is refused; at least 1 is needed")
    for name in ("steps", "n"):
        if getattr(config.reference, name) < 1:
            raise ValueError(f"reference.{name}={getattr(config.reference, name)}: at least 1 is needed")
    if config.threads is not None and config.threads < 1:
        raise ValueError(f"threads={config.threads}: at least 1 is needed")
    labels = [solver_label(s) for s in config.solvers]
    if len(set(labels)) < len(labels):
        raise ValueError(f"solvers={labels}: a solver is named twice")
    if config.baseline not in labels and config.baseline != BenchConfig().baseline:
        from fastsample.errors import unknown

        raise unknown("baseline", config.baseline, labels)


def _metrics(config: BenchConfig) -> list[Wanted]:
    names = config.metrics if config.metrics is not None else embedded_metrics(config.model)
    return wanted(names, config.n, config.feature_samples, config.reference.n)


def _splits(config: BenchConfig, model: Model) -> dict[str, ImageSet]:
    embedded = embedded_data(config.model)
    sources = {"train": config.train or embedded[0], "heldout": config.heldout or embedded[1]}
    return {
        split: load_images(source, model.image_shape)
        for split, source in sources.items()
        if source is not None
    }


def _weights(config: BenchConfig) -> dict[str, str]:
    weights = dict(config.weights)
    if config.inception_weights is not None:
        weights[frechet_metrics()["fid"]] = config.inception_weights
    return weights


def _check_range(model: str, images: Tensor) -> None:
    """Check converged samples: images in [0, 1] or [0, 255] would be measured as others than they are.

    Raises:
        UserError: more than 5% of the values are beyond 1.5, or no value of 16 images is below 0.
    """
    low, high = float(images.min()), float(images.max())
    beyond = float((images.abs() > 1.5).double().mean())
    if beyond > 0.05 or (len(images) >= 16 and low >= 0 and high <= 1.01):
        raise UserError(
            f"model={model}: its converged samples lie in [{low:.3g}, {high:.3g}]; images in [-1, 1] are needed. Say "
            "how samples become images: fs.wrap(..., decode=lambda x: x * 2 - 1) for [0, 1]"
        )


def _square_error(x: Tensor, solution: Tensor) -> Tensor:
    """Mean square error of the first samples of a batch, ``[len(solution)]`` float64."""
    difference = x[: len(solution)].cpu().double() - solution.double()
    return difference.square().flatten(1).mean(1)


def _samplers(
    config: BenchConfig,
    denoiser: Any,
    solver: Any,
    grid: str | None,
    notes: list[str],
    count: Callable[[FunctionSampler], None],
) -> list[Any]:
    """The solver's samplers at the steps or within the budgets asked for, without duplicates; all plan files."""
    files = plan_files(solver)
    if files is not None:
        if grid is not None:
            raise ValueError(f"plan={solver['plan']} has its own grid; use grids=[null]")
        samplers = {s.plan.nfe: s for s in (Sampler(denoiser, plan=file) for file in files)}
        if len(samplers) < len(files):
            raise ValueError(f"plan={solver['plan']}: two of its plans have the same number of evaluations")
        return [samplers[nfe] for nfe in sorted(samplers)]
    if isinstance(solver, Mapping) and "student" in solver:
        return list(student_samplers(denoiser, solver["student"]))
    made: dict[int, Any] = {}

    def make(steps: int) -> Any:
        sampler = make_sampler(denoiser, solver, steps, grid, config.end)
        if isinstance(sampler, FunctionSampler):
            count(sampler)
        return sampler

    def nfe(steps: int) -> int:
        if steps not in made:
            made[steps] = make(steps)
        return made[steps].plan.nfe

    if config.steps is not None:
        return [make(steps) for steps in sorted(set(config.steps))]
    chosen: set[int] = set()
    for budget in sorted(set(config.nfe)):
        # most solvers take one evaluation a step; the number never falls with more steps
        steps = budget if nfe(budget) <= budget else bisect_right(range(1, budget), budget, key=nfe)
        if steps:
            chosen.add(steps)
        else:
            notes.append(f"{solver_label(solver)} has no plan with {budget} or fewer evaluations")
    return [made[steps] for steps in sorted(chosen)]


def _final_sigma(sampler: Sampler | Peer) -> float:
    return sampler.plan.end_sigma


def _png(image: Tensor) -> str:
    """A uint8 image [C, H, W] as base64 PNG."""
    from PIL import Image

    array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


class _Progress:
    """What a run says of its progress; in logs a line a cell."""

    def sampled(self, planned: _Planned, count: int) -> None:
        """So many samples of a cell are done."""

    def finished(self, planned: _Planned, seconds: float) -> None:
        """A cell is done, here or by another worker."""
        cell, nfe = planned.cell, planned.sampler.plan.nfe
        kind = "reference " if cell.reference else ""
        print(f"{kind}{cell.solver}: {nfe} evaluations, seed {cell.seed}, {seconds:.1f} s", file=sys.stderr)


class _Silent(_Progress):
    def finished(self, planned: _Planned, seconds: float) -> None:
        pass


class _Bar(_Progress):
    """One bar over the evaluations of all cells, with cells, images per second and the time that remains."""

    def __init__(self, bar: Any, todo: list[_Planned], n: int, ranks: int) -> None:
        self._bar, self._n, self._ranks, self._cells = bar, n, ranks, len(todo)
        self._done, self._evaluations, self._images = 0, 0, 0
        total = sum(self._weight(p) for p in todo)
        self._task = bar.add_task("cells", total=total, cells=f"0/{self._cells} cells", rate="")

    def _weight(self, planned: _Planned) -> int:
        return planned.sampler.plan.nfe * self._n

    def sampled(self, planned: _Planned, count: int) -> None:
        nfe = planned.sampler.plan.nfe
        self._images += count * self._ranks
        elapsed = self._bar.tasks[0].elapsed
        self._bar.update(
            self._task,
            advance=nfe * count * self._ranks,
            description=f"{planned.cell.solver}, {nfe} evaluations",
            rate=f"{self._images / elapsed:.3g} images/s" if elapsed else "",
        )

    def finished(self, planned: _Planned, seconds: float) -> None:
        self._done += 1
        self._evaluations += self._weight(planned)
        self._bar.update(self._task, completed=self._evaluations, cells=f"{self._done}/{self._cells} cells")


@contextmanager
def _progress(todo: list[_Planned], n: int, ranks: int) -> Iterator[_Progress]:
    """A bar on a terminal, a line a cell elsewhere; by the first process alone."""
    if rank_and_size()[0]:
        yield _Silent()
        return
    if not sys.stderr.isatty():
        yield _Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    texts = (TextColumn("{task.fields[cells]}"), TextColumn("{task.fields[rate]}"))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *texts,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield _Bar(bar, todo, n, ranks)
