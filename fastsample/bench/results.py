"""From finished cells to conclusions: averages over seeds, leaders at each NFE, headline; JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsample.bench.cells import DamagedCell, read_file
from fastsample.bench.errors import UserError
from fastsample.metrics.frechet import Difference, FrechetEstimate, average, paired_difference
from fastsample.metrics.scores import psnr

RUN_SCHEMA = "fastsample.run/2"
SCHEMA = "fastsample.results/2"

MARGIN = 0.1
"""A solver matches the baseline if its distance, plus two standard errors, is at most this much larger (a score, less
two standard errors, at most this much smaller)."""


@dataclass(frozen=True)
class Point:
    """The cells of one solver at one number of steps on one grid; a cell a seed."""

    solver: str
    grid: str | None
    steps: int
    cells: tuple[dict[str, Any], ...]

    @property
    def label(self) -> str:
        """Solver, and its grid where one was asked for."""
        return f"{self.solver} on {self.grid}" if self.grid else self.solver

    def mean(self, key: str) -> float | None:
        """Mean over seeds of a number of the result; None where a cell has none."""
        values = [cell["result"][key] for cell in self.cells]
        return None if None in values else math.fsum(values) / len(values)

    @property
    def nfe(self) -> float:
        """Counted evaluations per sample."""
        nfe = self.mean("nfe")
        assert nfe is not None
        return nfe

    @property
    def seconds_per_sample(self) -> float:
        """Median over seeds."""
        return statistics.median(cell["result"]["seconds_per_sample"] for cell in self.cells)

    def estimates(self, metric: str, split: str) -> dict[int, FrechetEstimate]:
        """The estimate of each seed that has one."""
        found = {c["seed"]: c["result"]["metrics"][metric][split] for c in self.cells}
        return {seed: FrechetEstimate.from_dict(e) for seed, e in found.items() if e is not None}

    def measured(self, metric: str, split: str) -> bool:
        """Whether there is an estimate (samplers that draw noise have no error to the converged solution)."""
        return bool(self.estimates(metric, split))

    def distance(self, metric: str, split: str) -> Difference:
        """The metric's value, averaged over seeds, with its standard error.

        Raises:
            ValueError: if there is none.
        """
        return average([Difference(e.value, e.se) for e in self.estimates(metric, split).values()])


def compare(a: Point, b: Point, metric: str, split: str) -> Difference | None:
    """The metric of ``a`` less that of ``b``, paired sample by sample; None if they share no seed."""
    first, second = a.estimates(metric, split), b.estimates(metric, split)
    shared = sorted(first.keys() & second.keys())
    return average([paired_difference(first[s], second[s]) for s in shared]) if shared else None


@dataclass(frozen=True)
class Results:
    """A run as far as it has come.

    Attributes:
        manifest: what the run was asked to do (run.json).
        points: finished points, by number of evaluations.
        references: the finished reference cells.
        missing: number of cells that are not finished.
        damaged: what is wrong with cells that cannot be read.
    """

    manifest: dict[str, Any]
    points: tuple[Point, ...]
    references: tuple[dict[str, Any], ...]
    missing: int
    damaged: tuple[str, ...]

    @property
    def metrics(self) -> list[str]:
        """Full names of the metrics, in the order that the user gave."""
        return list(self.manifest["metrics"])

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each metric with each of the sets that it compares with."""
        return [(m, split) for m, about in self.manifest["metrics"].items() for split in about["splits"]]

    def sign(self, metric: str) -> int:
        """-1 for metrics of which more is better, 1 for distances."""
        return -1 if self.manifest["metrics"][metric]["higher"] else 1

    @property
    def reference(self) -> Point | None:
        """The reference solution as a point."""
        cells = self.references
        return Point(cells[0]["solver"], None, cells[0]["steps"], cells) if cells else None


def collect(run: Path) -> Results:
    """Read a run folder.

    Raises:
        UserError: if it is not one, or nothing is finished.
    """
    path = run / "run.json"
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["schema"] != RUN_SCHEMA:
            raise ValueError(f"its schema is {manifest['schema']!r}, {RUN_SCHEMA} is needed")
        names = manifest["cells"]
    except FileNotFoundError as error:
        raise UserError(f"run={run}: no run.json there; give a folder that fastsample bench wrote") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"run={run}: run.json cannot be read ({error}); run the benchmark again") from error
    cells, damaged, missing = [], [], 0
    for name in names:
        file = run / "cells" / name
        if not file.exists():
            missing += 1
            continue
        try:
            cells.append(read_file(file))
        except DamagedCell as error:
            damaged.append(str(error))
    if not cells:
        raise UserError(f"run={run}: no cell is finished yet; start its benchmark again")
    groups: dict[tuple[str, str | None, int], list[dict[str, Any]]] = {}
    for cell in cells:
        if not cell["reference"]:
            groups.setdefault((cell["solver"], cell["grid"], cell["steps"]), []).append(cell)
    points = sorted(
        (Point(solver, grid, steps, tuple(group)) for (solver, grid, steps), group in groups.items()),
        key=lambda p: p.nfe,
    )
    references = tuple(cell for cell in cells if cell["reference"])
    return Results(manifest, tuple(points), references, missing + len(damaged), tuple(damaged))


def merge(runs: Sequence[Results], names: Sequence[str]) -> Results:
    """Several runs on one axis.

    Points keep their labels where those differ; equal ones get the run's name in front. The model, the reference
    solution and the provenance shown are those of the first run.

    Args:
        runs: at least one.
        names: what the runs are called.

    Raises:
        UserError: runs with other metrics, images or numbers of samples.
    """
    first = runs[0]
    for run, name in zip(runs[1:], names[1:], strict=True):
        for what, mine, theirs in (
            ("metrics", first.metrics, run.metrics),
            ("images", first.manifest["splits"], run.manifest["splits"]),
            ("shape", first.manifest["model"]["shape"], run.manifest["model"]["shape"]),
            ("n", first.manifest["config"]["n"], run.manifest["config"]["n"]),
        ):
            if mine != theirs:
                raise UserError(f"runs={names[0]} and {name} cannot share an axis: their {what} differ")
    taken = [{(p.label) for p in run.points} for run in runs]
    points = []
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        others = set().union(*(labels for j, labels in enumerate(taken) if j != i))
        for p in run.points:
            solver = f"{name}: {p.solver}" if p.label in others else p.solver
            points.append(Point(solver, p.grid, p.steps, p.cells))
    return Results(
        first.manifest,
        tuple(sorted(points, key=lambda p: p.nfe)),
        first.references,
        sum(run.missing for run in runs),
        tuple(text for run in runs for text in run.damaged),
    )


def compared(manifest: dict[str, Any], metric: str, split: str) -> str:
    """A metric in words, with the images that it compares with."""
    return f"{metric} to the {split} images" if split in manifest["splits"] else metric


def leaders(points: Sequence[Point], metric: str, split: str, sign: int = 1) -> dict[str, list[Point]]:
    """At each number of evaluations that several points share: the points that nothing beats.

    A point is beaten if the paired difference to the one with the smallest distance is beyond two standard
    errors. One leader alone is the best; several are tied.

    Args:
        points: those without the metric are left out.
        metric, split: what is compared.
        sign: 1 for distances, -1 where more is better.
    """
    result: dict[str, list[Point]] = {}
    for nfe in sorted({p.nfe for p in points}):
        same = [p for p in points if p.nfe == nfe and p.measured(metric, split)]
        if len(same) < 2:
            continue
        first = min(same, key=lambda p: sign * p.distance(metric, split).value)
        result[f"{nfe:g}"] = [p for p in same if p is first or not _worse(p, first, metric, split, sign)]
    return result


def _worse(a: Point, b: Point, metric: str, split: str, sign: int) -> bool:
    difference = compare(a, b, metric, split)
    return difference is None or (sign * difference.value > 0 and difference.significant)


def headline(results: Results, metric: str, split: str) -> dict[str, Any]:
    """What the run shows, as data.

    - The cheapest point that matches the baseline at its largest number of evaluations. "Matches" means that
      the paired difference plus two standard errors is at most ``MARGIN`` of the baseline's distance. The
      search takes the first of many points, so its own claim is a little optimistic; the numbers with their
      errors are part of the result.
    - The same for the model's converged solution. A solver cannot be expected to do better than that: where
      an inexact one has a smaller distance, its errors happen to make up for the network's.
    - Who is closest to the converged solution, at how many of the shared numbers of evaluations.

    Returns:
        ``kind`` ("fewer", "none" or "no baseline") with the numbers behind it; ``converged`` and ``closest``,
        None where nothing can be said.
    """
    name, sign = results.manifest["config"]["baseline"], results.sign(metric)
    points = [p for p in results.points if p.measured(metric, split)]
    candidates = [p for p in points if p.solver == name]
    common: dict[str, Any] = {
        "baseline": name,
        "metric": metric,
        "split": split,
        "where": compared(results.manifest, metric, split),
        "higher": sign < 0,
        "margin": MARGIN,
        "converged": None,
        "closest": _closest(results.points),
    }
    reference = results.reference
    if reference is not None and reference.measured(metric, split):
        distance = reference.distance(metric, split)
        match = _cheapest_match(points, reference, metric, split, sign)
        common["converged"] = {
            "distance": distance.value,
            "se": distance.se,
            "nfe": reference.nfe,
            "match": match,
        }
    if not candidates:
        return {"kind": "no baseline", **common}
    baseline = max(candidates, key=lambda p: p.nfe)
    base = baseline.distance(metric, split)
    common |= {
        "baseline": baseline.label,
        "baseline_nfe": baseline.nfe,
        "baseline_distance": base.value,
        "baseline_se": base.se,
    }
    match = _cheapest_match(points, baseline, metric, split, sign)
    return {"kind": "none", **common} if match is None else {"kind": "fewer", **common, **match}


def _cheapest_match(
    points: Sequence[Point], target: Point, metric: str, split: str, sign: int
) -> dict[str, Any] | None:
    """The point with the fewest evaluations, fewer than the target's, whose distance matches the target's."""
    limit = MARGIN * abs(target.distance(metric, split).value)
    matching = []
    for point in points:
        difference = compare(point, target, metric, split) if point.nfe < target.nfe else None
        if difference is not None and sign * difference.value + 2 * difference.se <= limit:
            matching.append((point.nfe, sign * point.distance(metric, split).value, point, difference))
    if not matching:
        return None
    _, _, point, difference = min(matching, key=lambda m: m[:2])
    distance = point.distance(metric, split)
    return {
        "solver": point.label,
        "nfe": point.nfe,
        "distance": distance.value,
        "se": distance.se,
        "difference": difference.value,
        "difference_se": difference.se,
        "speedup": target.seconds_per_sample / point.seconds_per_sample,
    }


def _closest(points: Sequence[Point]) -> dict[str, Any] | None:
    """The solver with the smallest RMSE at most of the numbers of evaluations that several points share."""
    winners = []
    for nfe in sorted({p.nfe for p in points}):
        errors = [(error, p.label) for p in points if p.nfe == nfe and (error := p.mean("rmse")) is not None]
        if len(errors) > 1:
            winners.append(min(errors)[1])
    if not winners:
        return None
    label = statistics.mode(winners)
    return {"solver": label, "wins": winners.count(label), "of": len(winners)}


def summary(results: Results) -> dict[str, Any]:
    """Everything that results.json holds."""
    rows = []
    best = {(m, s): leaders(results.points, m, s, results.sign(m)) for m, s in results.pairs}
    for point in results.points:
        row = _row(point, results)
        for (metric, split), by_nfe in best.items():
            tied = by_nfe.get(f"{point.nfe:g}", [])
            if (entry := row["metrics"][metric][split]) is not None:
                entry["place"] = ("best" if len(tied) == 1 else "tied") if point in tied else None
        rows.append(row)
    reference = results.reference
    manifest = {key: value for key, value in results.manifest.items() if key not in ("schema", "cells")}
    return {
        "schema": SCHEMA,
        "complete": results.missing == 0,
        "missing_cells": results.missing,
        "damaged_cells": list(results.damaged),
        "headline": headline(results, *results.pairs[0]) if results.pairs else None,
        "run": manifest,
        "reference": _row(reference, results) if reference else None,
        "points": rows,
    }


def _row(point: Point, results: Results) -> dict[str, Any]:
    first = point.cells[0]["result"]
    metrics: dict[str, Any] = {metric: {} for metric in results.metrics}
    for metric, split in results.pairs:
        metrics[metric][split] = None
        if estimates := point.estimates(metric, split):
            distance = point.distance(metric, split)
            metrics[metric][split] = {
                "value": distance.value,
                "se": distance.se,
                "plain": math.fsum(e.plain for e in estimates.values()) / len(estimates),
                "reliable": all(e.reliable for e in estimates.values()),
                "seeds": {str(seed): e.to_dict() for seed, e in estimates.items()},
            }
    memory = [c["result"]["memorisation"] for c in point.cells if c["result"]["memorisation"]]
    row = {
        "label": point.label,
        "solver": point.solver,
        "grid": point.grid,
        "steps": point.steps,
        "n": first["n"],
        "seeds": [cell["seed"] for cell in point.cells],
        "nfe": point.nfe,
        "rows_per_sample": point.mean("rows_per_sample"),
        "seconds_per_sample": point.seconds_per_sample,
        "images_per_second": 1 / point.seconds_per_sample,
        "flops_per_sample": first["flops_per_sample"],
        "peak_memory_bytes": first["peak_memory_bytes"],
        "joules_per_sample": point.mean("joules_per_sample"),
        "rmse": point.mean("rmse"),
        "rmse_median": point.mean("rmse_median"),
        "psnr": psnr(error**2) if (error := point.mean("rmse")) else None,
        "stochastic": first["stochastic"],
        "metrics": metrics,
        "memorisation": {k: statistics.fmean(m[k] for m in memory) for k in ("ratio", "copies")}
        if memory
        else None,
        "plan": first["plan"],
        "notes": first["notes"],
    }
    if "half_steps_rmse" in first:
        row["half_steps_rmse"] = point.mean("half_steps_rmse")
        row["half_steps_rmse_median"] = point.mean("half_steps_rmse_median")
    return row


def to_csv(data: dict[str, Any]) -> str:
    """results.csv: one line a point, one column a number."""
    fixed = (
        "label",
        "solver",
        "grid",
        "steps",
        "nfe",
        "rows_per_sample",
        "seconds_per_sample",
        "images_per_second",
        "flops_per_sample",
        "peak_memory_bytes",
        "joules_per_sample",
        "n",
        "rmse",
        "rmse_median",
        "psnr",
    )
    run = data["run"]
    pairs = [(metric, split) for metric, about in run["metrics"].items() for split in about["splits"]]
    header = [*fixed, "memorisation_ratio", "copies"]
    header += [f"{metric}_{split}{suffix}" for metric, split in pairs for suffix in ("", "_se", "_place")]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for row in data["points"]:
        memory = row["memorisation"] or {}
        writer.writerow(
            [
                *(row[key] for key in fixed),
                memory.get("ratio"),
                memory.get("copies"),
                *_flat(row["metrics"][metric][split] for metric, split in pairs),
            ]
        )
    return buffer.getvalue()


def _flat(entries: Iterable[dict[str, Any] | None]) -> list[Any]:
    return [entry and entry[key] for entry in entries for key in ("value", "se", "place")]
