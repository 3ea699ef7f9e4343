"""report.html, results.json and results.csv of a run.

The report is one file that opens from the file system: data, pictures, style and script are inside, and its
content security policy forbids every network request.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsample.bench.errors import UserError, checking
from fastsample.bench.model import solver_label
from fastsample.bench.results import collect, compared, merge, summary, to_csv
from fastsample.metrics.frechet import RELIABLE_RATIO
from fastsample.plan import write_atomically

__all__ = ["markdown", "render", "render_run", "render_runs"]


def render_run(run: Path, out: Path | None = None) -> Path:
    """:func:`render_runs` of one folder, into that folder by default."""
    return render_runs([run], out)


def render_runs(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write results.json, results.csv, report.html and report.md of run folders, finished or not.

    Args:
        runs: folders of benchmark runs; several are put on one axis.
        out: where to write; by default the folder of a single run, "runs/merged" for several.

    Returns:
        Path of report.html.

    Raises:
        UserError: if a folder is not a run, nothing is finished in it, or the runs cannot share an axis.
    """
    if not runs:
        raise UserError("runs=[]: give at least one run folder")
    results = merge([collect(run) for run in runs], [run.name for run in runs])
    data = summary(results)
    pictures = {p.label + f"/{p.steps}": p.cells[0]["result"]["images"] for p in results.points}
    reference = results.reference
    if reference is not None:
        pictures["reference"] = reference.cells[0]["result"]["images"]
    folder = out if out is not None else runs[0] if len(runs) == 1 else Path("runs/merged")
    with checking(f"out={folder}"):
        write_atomically(folder / "results.json", json.dumps(data, indent=1).encode())
        write_atomically(folder / "results.csv", to_csv(data).encode())
        write_atomically(folder / "report.md", markdown(data).encode())
        write_atomically(folder / "report.html", render(data, pictures).encode())
    return folder / "report.html"


def markdown(data: dict[str, Any]) -> str:
    """The report for a pull request: the headline and one table, a row a solver, a column a budget."""
    title, details = headline_text(data)
    run = data["run"]
    budgets = sorted({row["nfe"] for row in data["points"]})
    metric = next(iter(run["metrics"]), None)
    split = run["metrics"][metric]["splits"][0] if metric else None
    what = "RMSE to the converged solution"
    if metric and split:
        better = "higher" if run["metrics"][metric]["higher"] else "lower"
        what = f"{compared(run, metric, split)}, +- two standard errors, {better} is better"
    lines = [f"## {title}", "", details, "", f"{what}, by counted evaluations:", ""]
    lines.append("| sampler | " + " | ".join(f"{b:g}" for b in budgets) + " |")
    lines.append("|---" * (len(budgets) + 1) + "|")
    for label in dict.fromkeys(row["label"] for row in data["points"]):
        cells = []
        for budget in budgets:
            row = next((r for r in data["points"] if (r["label"], r["nfe"]) == (label, budget)), None)
            if row is None:
                cells.append("")
            elif metric is None:
                cells.append(number(row["rmse"]))
            elif (entry := row["metrics"][metric][split]) is None:
                cells.append("–")
            else:
                text = with_error(entry["value"], entry["se"])
                cells.append(f"**{text}**" if entry["place"] == "best" else text)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    best = (
        "**Bold**: best at that budget beyond two standard errors of the paired difference. "
        if metric
        else ""
    )
    command = run["command"] or "fastsample bench"
    lines += ["", f"{best}Made by `{command}`, {run['provenance'].get('commit') or 'no commit'}.", ""]
    return "\n".join(lines)


def render(data: dict[str, Any], pictures: dict[str, list[str]]) -> str:
    """The report as HTML.

    Args:
        data: what ``summary`` returns.
        pictures: base64 PNGs of the first images, by ``"label/steps"``, and of the ``"reference"``.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fastsample.bench"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["number"] = number
    title, details = headline_text(data)
    run = data["run"]
    n = (data["points"] or [data["reference"]])[0]["n"]
    unreliable = any(
        entry is not None and not entry["reliable"]
        for row in data["points"]
        for by in row["metrics"].values()
        for entry in by.values()
    )
    page = {
        "metrics": list(run["metrics"]),  # in the user's order, which JSON objects lose
        "about": {
            name: {k: about[k] for k in ("splits", "higher")} for name, about in run["metrics"].items()
        },
        "baseline": run["config"]["baseline"],
        "points": [
            _for_page(row) | {"images": pictures.get(f"{row['label']}/{row['steps']}", [])}
            for row in data["points"]
        ],
        "reference": (
            _for_page(data["reference"]) | {"images": pictures.get("reference", [])}
            if data["reference"]
            else None
        ),
        "shape": run["model"]["shape"],
        "labels": _labels(data),
    }
    return environment.get_template("report.html.j2").render(
        title=title,
        details=details,
        data=data,
        run=run,
        n=n,
        unreliable=unreliable,
        ratio=RELIABLE_RATIO,
        page=page,
    )


def _labels(data: dict[str, Any]) -> list[str]:
    """The samplers in the order that the user named them; those of other runs behind."""
    config = data["run"]["config"]
    named = [
        f"{solver_label(solver)} on {grid}" if grid else solver_label(solver)
        for solver in config["solvers"]
        for grid in config["grids"]
    ]
    present = list(dict.fromkeys(row["label"] for row in data["points"]))
    return [label for label in named if label in present] + [label for label in present if label not in named]


def _for_page(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what only results.json needs."""
    keys = (
        "label",
        "steps",
        "nfe",
        "rows_per_sample",
        "seconds_per_sample",
        "joules_per_sample",
        "rmse",
        "rmse_median",
        "memorisation",
    )
    metrics = {
        metric: {
            split: entry and {key: entry.get(key) for key in ("value", "se", "plain", "place")}
            for split, entry in by.items()
        }
        for metric, by in row["metrics"].items()
    }
    return {key: row[key] for key in keys} | {"metrics": metrics}


def headline_text(data: dict[str, Any]) -> tuple[str, str]:
    """The headline in words: one sentence, and the numbers behind it."""
    head = data["headline"]
    if head is None:
        compared = [row for row in data["points"] if row["rmse"] is not None]
        if not compared:
            return f"{len(data['points'])} settings measured", ""
        best = min(compared, key=lambda row: row["rmse"])
        return (
            f"{best['label']} comes closest to the converged solution",
            f"RMSE {number(best['rmse'])} at {number(best['nfe'])} evaluations; no distance was asked for.",
        )
    where = head["where"]
    if head["kind"] == "no baseline":
        title = f"{len(data['points'])} settings measured"
        details = f"The baseline {head['baseline']} is not among the finished solvers."
        return title, f"{details} {_converged(head)}".strip()
    base = with_error(head["baseline_distance"], head["baseline_se"])
    if head["kind"] == "none":
        title = f"Nothing here matches {head['baseline']} at {head['baseline_nfe']:g} evaluations with fewer"
        details = (
            f"{where}: {base} for {head['baseline']}; to match, what is lost plus two standard errors must "
            f"be at most {head['margin']:.0%} of that."
        )
        return title, f"{details} {_converged(head)}".strip()
    if head["solver"] == head["baseline"]:
        title = f"{head['solver']} needs only {head['nfe']:g} of its {head['baseline_nfe']:g} evaluations"
    else:
        title = (
            f"{head['solver']} does in {head['nfe']:g} evaluations what {head['baseline']} "
            f"takes {head['baseline_nfe']:g} for"
        )
    details = (
        f"{where}: {with_error(head['distance'], head['se'])} against {base}; paired difference "
        f"{with_error(head['difference'], head['difference_se'])} (two standard errors), and "
        f"{head['speedup']:.1f} times faster per sample."
    )
    return title, f"{details} {_converged(head)}".strip()


def _converged(head: dict[str, Any]) -> str:
    """What the headline says about the model's own converged solution."""
    converged, closest = head["converged"], head["closest"]
    if converged is None:
        return ""
    distance = with_error(converged["distance"], converged["se"])
    what = "score" if head["higher"] else "distance"
    goal = f"the {what} of the model's own converged solution ({distance})"
    match = converged["match"]
    text = (
        f"Nothing here reaches {goal}."
        if match is None
        else f"{match['solver']} reaches {goal} in {match['nfe']:g} evaluations."
    )
    if closest is not None:
        often = "every" if closest["wins"] == closest["of"] else f"{closest['wins']} of {closest['of']}"
        number_of = "number" if often == "every" else "numbers"
        text += f" {closest['solver']} stays closest to that solution at {often} {number_of} of evaluations."
    return text


def with_error(value: float, se: float) -> str:
    """``value ± two standard errors``: two digits of the error, and the value to the same decimal."""
    decimals = min(8, max(0, 1 - math.floor(math.log10(2 * se)))) if se > 0 else 3
    return f"{value:.{decimals}f} ± {2 * se:.{decimals}f}".replace("-", "−")


def number(value: float | None) -> str:
    """A number in three significant digits; a dash for None."""
    if value is None:
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    text = f"{value:.3g}"
    return f"{value:.0f}" if "e" in text else text
