"""Tuned plans beside every training-free solver on an embedded model: the table of results.

    fastsample tune model=digits steps=[3,4,5,6,8,10] out=runs/tuned
    fastsample tune model=digits match=fd-digits steps=[3,4,5,6,8,10] out=runs/matched
    fastsample bench 'solvers=[auto,ddim,lms,ipndm,deis,dpm_solver_2m,dpmpp_2m,dpmpp_3m,unipc,\
        {plan: runs/tuned, label: tuned},{plan: runs/matched, label: matched}]' \
        nfe=[3,4,5,6,8,10] n=2000 reference.n=2000 seeds=[0,1,2] out=runs/tuned-bench
    python benchmarks/tuned.py --run runs/tuned-bench --plans runs/tuned runs/matched

With ``--model fashion-mnist`` for a run and plans of that model. For the digits mixture, plans are tuned here (a few
seconds each) and measured on 512 noises that the fit has not seen.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import fastsample as fs
from fastsample.zoo import MODELS
from fastsample.zoo.mixture import digits_mixture

NFE = (3, 4, 5, 6, 8, 10)
HEADER = ["| |" + "".join(f" {n} |" for n in NFE), "|---" * (len(NFE) + 1) + "|"]


def mixture() -> list[str]:
    """Rows of error to the exact solution: auto and tuned."""
    denoiser = fs.zoo.load("digits-mixture")
    noise = fs.noise.normal((512, 1, 8, 8), 0, torch.arange(512), dtype=torch.float64)
    exact = digits_mixture().reference(noise * float(denoiser.process.sigma(999.0)), denoiser.process).x

    def cell(sampler: fs.Sampler) -> str:
        e = (sampler(noise=noise) - exact).square().flatten(1).mean(1)
        return f"{float(e.mean().sqrt()):.4f} / {float(e.sqrt().median()):.4f}"

    rows = {"`auto`": [], "tuned": []}
    for n in NFE:
        rows["`auto`"].append(cell(fs.Sampler(denoiser, steps=n)))
        rows["tuned"].append(cell(fs.Sampler(denoiser, plan=fs.tune(denoiser, n, seed=0))))
    return [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]


def network(run: Path) -> list[str]:
    """Rows of RMSE and Frechet distance of every solver of a finished run."""
    data = json.loads((run / "results.json").read_text(encoding="utf-8"))
    lines = []
    for label in dict.fromkeys(p["label"] for p in data["points"]):
        cells = []
        for n in NFE:
            point = next((p for p in data["points"] if p["label"] == label and p["nfe"] == n), None)
            if point is None:
                cells.append("")
                continue
            (by,) = point["metrics"].values()
            place = by["train"]["place"]
            distance = f"{by['train']['value']:.3f} +- {2 * by['train']['se']:.3f}"
            error = "" if point["rmse"] is None else f"{point['rmse']:.4f}; "  # of what draws no noise
            cells.append(error + (f"**{distance}**" if place == "best" else distance))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def solution(run: Path) -> str:
    """The distance of the model's own solution in a finished run."""
    (by,) = json.loads((run / "results.json").read_text(encoding="utf-8"))["reference"]["metrics"].values()
    return f"The model's own solution: {by['train']['value']:.3f} +- {2 * by['train']['se']:.3f}."


def fits(folder: Path) -> list[str]:
    """Rows of what each fit took."""
    lines = []
    for file in (f for n in NFE if (f := folder / f"tuned-{n}.json").exists()):
        record = (plan := fs.Plan.load(file)).options["record"]
        gap = record["heldout_rmse"] / record["training_rmse"]
        lines.append(
            f"| {folder.name} | {plan.nfe} | {plan.options['start']}, {record['start_rmse']:.4f} | "
            f"{record['heldout_rmse']:.4f} | {gap:.2f} | {record['evaluations']:,} | "
            f"{record['evaluations_per_batch']:.0f} |"
        )
    return lines


def config(run: Path) -> dict[str, Any]:
    """The settings of a run."""
    settings: dict[str, Any] = json.loads((run / "results.json").read_text(encoding="utf-8"))["run"]["config"]
    return settings


def others(run: Path) -> list[str]:
    """The table of a run of other solvers."""
    settings = config(run)
    return [
        f"The other solvers beside the same plans, {settings['n']} samples, seeds {settings['seeds']}; those that "
        "draw noise have a distance alone:",
        "",
        *HEADER,
        *network(run),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="digits", choices=("digits", "fashion-mnist"))
    parser.add_argument("--run", type=Path, default=Path("runs/tuned-bench"))
    parser.add_argument("--plans", type=Path, nargs="+", default=[Path("runs/tuned"), Path("runs/matched")])
    parser.add_argument("--others", type=Path, help="a run of other solvers and the same plans")
    parser.add_argument("--note", default="", help="a sentence on settings of the fits for the table")
    arguments = parser.parse_args()
    mixed = [
        "Digits mixture, RMSE / median over samples to the exact solution, 512 unseen noises, by evaluations:",
        "",
        *HEADER,
    ]
    settings = config(arguments.run)
    lines = [
        f"# Tuned plans on `{arguments.model}`",
        "",
        *([*mixed, *mixture(), ""] if arguments.model == "digits" else []),
        f"The network: RMSE to its own solution; `{MODELS[arguments.model].metric}` to the training images, +- two "
        f"standard errors (bold: best at that budget beyond them, paired); {settings['n']} samples, seeds "
        f"{settings['seeds']}. *tuned* plans are fitted to the error alone, *matched* ones to the data's moments, too:",
        "",
        *HEADER,
        *network(arguments.run),
        "",
        solution(arguments.run),
        "",
        *(others(arguments.others) if arguments.others else []),
        "What the fits took: error of the start and of the result on held-out noise, the result's error there "
        "over that on the noise it was fitted to, evaluations, and these as a multiple of sampling the "
        "trajectories once." + (f" {arguments.note}" if arguments.note else ""),
        "",
        "| plans | evaluations | start | fitted | held-out / fitted | spent | times |",
        "|---|---|---|---|---|---|---|",
        *(line for folder in arguments.plans for line in fits(folder)),
        "",
    ]
    out = Path(f"benchmarks/results/tuned-{arguments.model}.md")
    out.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
