"""What the harness costs beside the network: a whole run against the bare evaluations that it needs.

    pytest benchmarks/bench_harness.py -o addopts= --benchmark-enable -s

The run's own time leaves out feature extraction and reference solutions (there are no metrics here, and the
reference cells' seconds are taken off). The bare evaluations are the same numbers of the same batches through the
same network, taken in turn with runs.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import fastsample as fs
from fastsample.bench.run import bench
from fastsample.conf import BenchConfig, ReferenceConfig

LIMIT = 1.15
N, BATCH, NFE = 1000, 500, [5, 10, 20]
SOLVERS = ["auto", "ddim", "dpmpp_2m", "unipc"]


def bare() -> float:
    """Seconds of the network alone, for all cells."""
    denoiser = fs.zoo.load("digits")
    bound = denoiser.bind(BATCH, {"labels": torch.arange(BATCH) % 10}, torch.device("cpu"))
    x, t = torch.randn(BATCH, 1, 8, 8), torch.full((BATCH,), 500.0)
    with torch.no_grad():
        bound(x, t, 1.0)
        began = time.perf_counter()
        for _ in range(len(SOLVERS) * sum(NFE) * N // BATCH):
            bound(x, t, 1.0)
    return time.perf_counter() - began


def run(out: Path) -> float:
    """Seconds of a run, without its reference solution."""
    config = BenchConfig(
        solvers=SOLVERS,
        nfe=NFE,
        n=N,
        batch=BATCH,
        metrics=[],
        images=10,
        reference=ReferenceConfig(steps=20, n=N),
        out=str(out),
    )
    began = time.perf_counter()
    bench(config)
    total = time.perf_counter() - began
    reference = next((out / "cells").glob("reference-*.json"))
    # its cell, the check by half the steps on a few samples, and the first batch, which is the warm-up
    seconds = json.loads(reference.read_text())["result"]["seconds"]
    return total - seconds * (1 + 0.5 * 128 / N + BATCH / N)


def test_overhead(benchmark: Any, tmp_path: Path) -> None:
    ratios = []
    for i in range(3):
        spent, needed = run(tmp_path / str(i)), bare()
        ratios.append(spent / needed)
    ratio = statistics.median(ratios)
    benchmark.extra_info["run over bare evaluations"] = ratio
    benchmark.pedantic(bare, rounds=1)
    print(f"\nrun over bare evaluations: {ratio:.3f} ({', '.join(f'{r:.3f}' for r in ratios)})")
    assert ratio <= LIMIT
