"""ECT by default beside ECT as published, on the digits: the same network, data, batch and number of updates.

    python benchmarks/ect_peer.py                                  # three seeds: an hour or more
    python benchmarks/ect_peer.py --steps 500 --seeds 0 --table benchmarks/results/other.md

The peer is written from the paper (Geng et al. 2024, "Consistency models made easy", arXiv:2406.14548) in plain torch:
loss and schedule use nothing of fastsample. Both start from the embedded teacher's weights, read as EDM's F with
sigma_data = 1, and are measured by the same code: the better of their averages, at the best of ten evaluations.
Finished cells are kept under --out; started again, the rest is made.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastsample as fs
from fastsample import distill
from fastsample.distill.data import as_data
from fastsample.distill.evaluation import Evaluation
from fastsample.distill.student import Student
from fastsample.plan import write_atomically
from fastsample.zoo.data import digits

BATCH, EMA, EVALUATIONS = 256, (0.99, 0.999), 10
SAMPLES, FINAL = 1000, 10_000
MID = 0.821  # the noise level of the second step, of the authors' CIFAR-10 models
CELLS: dict[str, dict[str, float]] = {
    "fastsample": {},
    "published, lr 1e-4": {"lr": 1e-4},
    "published, lr 1e-3": {"lr": 1e-3},
}

# DDPM's noise levels sigma / alpha by training index, 0 to 999
_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
LEVELS = np.sqrt((1 - _BAR) / _BAR)


# -- the peer: x + sigma eps, as in EDM ------------------------------------------------------------------------


def index_of(sigma: Tensor) -> Tensor:
    """The training index that the network is told for noise levels (B,)."""
    return torch.from_numpy(np.interp(sigma.log().numpy(), np.log(LEVELS), np.arange(1000.0)))


def denoised(net: nn.Module, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """``D = c_skip x + c_out F(c_in x)`` (Karras et al. 2022, table 1) with sigma_data = 1 and F = -v."""
    s = sigma.reshape(-1, 1, 1, 1).float()
    root = torch.sqrt(1 + s**2)
    v = net(x / root, index_of(sigma).float(), labels)
    return x / root**2 - s / root * v


def lower(t: Tensor, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Tensor:
    """``r = t (1 - n(t) / q^(stage + 1))``, not below 0; ``n(t) = 1 + k sigmoid(-b t)`` (the paper's eq. 16)."""
    return (t * (1 - (1 + k * torch.sigmoid(-b * t)) / q ** (stage + 1))).clamp(min=0)


def loss_of(
    net: nn.Module, x: Tensor, labels: Tensor, stage: int, generator: torch.Generator, c: float = 0.06
) -> Tensor:
    """``w(t) (sqrt(|f(t) - sg f(r)|^2 + c^2) - c)``, ``w = 1 / (t - r)``, ``ln t ~ N(-1.1, 2.0^2)``."""
    t = torch.exp(-1.1 + 2.0 * torch.randn(len(x), generator=generator, dtype=torch.float64))
    t = t.clamp(float(LEVELS[0]), float(LEVELS[-1]))
    r = lower(t, stage)
    eps = torch.randn(x.shape, generator=generator)
    dropout = torch.get_rng_state()  # one mask for both
    with torch.no_grad():
        at_r = r.clamp(min=float(LEVELS[0]))
        target = denoised(net, x + r.reshape(-1, 1, 1, 1).float() * eps, at_r, labels)
        target = torch.where((r > 0).reshape(-1, 1, 1, 1), target, x)
    torch.set_rng_state(dropout)
    error = denoised(net, x + t.reshape(-1, 1, 1, 1).float() * eps, t, labels) - target
    size = torch.sqrt(error.flatten(1).square().sum(dim=1) + c**2) - c
    return ((1 / (t - r)).float() * size).mean()


def student_of(net: nn.Module) -> Student:
    """The peer's network, to be measured as ours is."""
    process = fs.VP.linear()
    denoiser = fs.wrap(net, process, "v", sample_shape=(1, 8, 8))
    start, middle = process.t_start, float(process.t_of_rho(MID))
    grids = {"1": [start, process.t_zero], "2": [start, middle, process.t_zero]}
    return Student(denoiser, "consistency", {"grids": grids}, (1, 2))


def train_peer(steps: int, seed: int, lr: float) -> tuple[nn.Module, float]:
    """The best of the peer's averages, and the seconds of the training alone."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, labels = digits("train")
    net: Any = copy.deepcopy(fs.zoo.load("digits").net)
    net.requires_grad_(True).train()
    optimizer = torch.optim.RAdam(net.parameters(), lr=lr)
    averages = [copy.deepcopy(net).eval().requires_grad_(False) for _ in EMA]
    evaluation = Evaluation("fd-digits", SAMPLES, as_data("digits"), torch.device("cpu"))
    best, kept, spent = math.inf, averages[0], 0.0
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        began = time.perf_counter()
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(x), generator=generator)])
        rows, order = order[:BATCH], order[BATCH:]
        loss = loss_of(net, x[rows], labels[rows], min(7, 8 * step // steps), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for decay, average in zip(EMA, averages, strict=True):
                rate = min(decay, (1 + step) / (10 + step))
                for a, p in zip(average.parameters(), net.parameters(), strict=True):
                    a.lerp_(p, 1 - rate)
        spent += time.perf_counter() - began
        if (step + 1) % max(1, steps // EVALUATIONS) == 0 or step + 1 == steps:
            for average in averages:
                value = statistics.fmean(evaluation.distance(student_of(average), k).value for k in (1, 2))
                if value < best:
                    best, kept = value, copy.deepcopy(average)
    return kept, spent


# -- both ------------------------------------------------------------------------------------------------------


def train_ours(steps: int, seed: int, folder: Path) -> tuple[Student, float]:
    """Our default, with its trainer; the seconds of the training without its evaluations."""
    method = distill.ECT(fs.zoo.load("digits"))
    trainer = distill.Trainer(
        method,
        "digits",
        steps=steps,
        batch_size=BATCH,
        seed=seed,
        metric="fd-digits",
        samples=SAMPLES,
        final_samples=FINAL,
        device="cpu",
        evaluate_every=max(1, steps // EVALUATIONS),
    )
    measuring = 0.0
    distance = Evaluation.distance

    def timed(self: Evaluation, *arguments: Any, **settings: Any) -> Any:
        nonlocal measuring
        began = time.perf_counter()
        try:
            return distance(self, *arguments, **settings)
        finally:
            measuring += time.perf_counter() - began

    Evaluation.distance = timed  # type: ignore[method-assign]
    try:
        began = time.perf_counter()
        student = trainer.fit(folder)
        return student, time.perf_counter() - began - measuring
    finally:
        Evaluation.distance = distance  # type: ignore[method-assign]


def cell(name: str, steps: int, seed: int, out: Path) -> dict[str, Any]:
    """One training, measured; read back where it is finished."""
    folder = out / f"{name.replace(', ', '-').replace(' ', '-')}-{steps}-{seed}"
    file = folder / "cell.json"
    if file.exists():
        return json.loads(file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    if name == "fastsample":
        student, seconds = train_ours(steps, seed, folder / "student")
    else:
        net, seconds = train_peer(steps, seed, **CELLS[name])
        student = student_of(net)
    final = Evaluation("fd-digits", FINAL, as_data("digits"), torch.device("cpu"))
    found = {k: final.distance(student, k, seed=1) for k in (1, 2)}
    result = {
        "name": name,
        "seed": seed,
        "minutes": seconds / 60,
        **{f"{k}": {"value": f.value, "error": f.se} for k, f in found.items()},
    }
    write_atomically(file, json.dumps(result).encode())
    print(json.dumps(result), flush=True)
    return result


def table(cells: list[dict[str, Any]], steps: int, threads: int) -> str:
    lines = [
        "# ECT: the default beside the published loss and schedule",
        "",
        f"Digits network, {steps} updates of {BATCH}, `fd-digits` to the training images, {FINAL} samples, lower is "
        "better: mean over the seeds ± their standard deviation (of one seed: the measurement's). Minutes are those of "
        f"the training without its evaluations; {threads} CPU thread, torch {torch.__version__}, {platform.machine()}. "
        "Written by `python benchmarks/ect_peer.py`.",
        "",
        "| training | seeds | 1 step | 2 steps | minutes |",
        "|---|---|---|---|---|",
    ]
    for name in CELLS:
        mine = [c for c in cells if c["name"] == name]
        shown = []
        for k in ("1", "2"):
            values = [c[k]["value"] for c in mine]
            spread = statistics.stdev(values) if len(values) > 1 else mine[0][k]["error"]
            shown.append(f"{statistics.fmean(values):.3f} ± {spread:.3f}")
        minutes = statistics.fmean(c["minutes"] for c in mine)
        lines.append(f"| {name} | {len(mine)} | {' | '.join(shown)} | {minutes:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/ect-peer"))
    parser.add_argument("--table", type=Path, default=Path("benchmarks/results/ect-peer.md"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cells = [cell(name, args.steps, seed, args.out) for seed in args.seeds for name in CELLS]
    args.table.parent.mkdir(parents=True, exist_ok=True)
    args.table.write_text(table(cells, args.steps, args.threads))


if __name__ == "__main__":
    main()
