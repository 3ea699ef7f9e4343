"""The README's picture: the same noise through three samplers, and each sampler's error per evaluation.

    python benchmarks/picture.py [--run runs/bench] [--out docs/images/demo.png]

The curves come from the results.json of a finished ``fastsample bench``; the digits are drawn anew.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import fastsample as fs

SOLVERS = {"auto": "#c2185b", "dpmpp_2m": "#1976d2", "ddim": "#757575"}
BUDGETS = (4, 6, 10, 20)
DIGITS = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/bench"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/demo.png"))
    arguments = parser.parse_args()
    points = json.loads((arguments.run / "results.json").read_text(encoding="utf-8"))["points"]

    denoiser = fs.zoo.load("digits")
    figure, axes = plt.subplots(
        len(SOLVERS), len(BUDGETS) + 1, figsize=(12, 3.0), width_ratios=[2.6] * len(BUDGETS) + [4.5], dpi=120
    )
    for axis in axes[:, -1]:
        axis.remove()
    for row, solver in enumerate(SOLVERS):
        for column, nfe in enumerate(BUDGETS):
            x = fs.Sampler(denoiser, solver, nfe)(n=DIGITS, seed=0, labels=torch.arange(DIGITS))
            sheet = x.view(2, DIGITS // 2, 8, 8).permute(0, 2, 1, 3).reshape(16, -1)
            axis = axes[row, column]
            axis.imshow(sheet, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(f"{nfe} evaluations", fontsize=9)
            if column == 0:
                axis.set_ylabel(solver, fontsize=9, color=SOLVERS[solver])
    curve = figure.add_subplot(axes[0, -1].get_gridspec()[:, -1])
    for solver, color in SOLVERS.items():
        line = sorted(
            (c["nfe"], c["rmse"]) for c in points if c["label"] == solver and c.get("rmse") is not None
        )
        curve.loglog(*zip(*line, strict=True), "o-", color=color, label=solver, markersize=4)
    curve.set_xlabel("network evaluations", fontsize=9)
    curve.set_ylabel("RMSE to the model's own solution", fontsize=9)
    curve.set_xticks([4, 6, 10, 20, 50], ["4", "6", "10", "20", "50"])
    curve.minorticks_off()
    curve.tick_params(labelsize=8)
    curve.grid(alpha=0.3)
    curve.legend(fontsize=8, frameon=False)
    figure.tight_layout(w_pad=0.4, h_pad=0.4)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
