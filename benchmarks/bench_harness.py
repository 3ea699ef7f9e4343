"""What the harness costs beside the network: a whole run against the bare evaluations that it needs.

    pytest benchmarks/bench_harness.py -o addopts= --benchmark-enable -s

The run's own time leaves out feature extraction and reference solutions (there are no metrics here, and the
reference cells' seconds are taken off). The bare evaluations are the same numbers of the same batches through the
same network, in two ways: by the mean time of the run's own, which sees the machine as the run does, and timed
alone, in turn with runs.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastsample as fs
from fastsample.bench.run import bench
from fastsample.conf import BenchConfig, ReferenceConfig
from fastsample.zoo.unet import UNet

LIMIT = 1.15
N, BATCH, NFE = 1000, 500, [5, 10, 20]
SOLVERS = ["auto", "ddim", "dpmpp_2m", "unipc"]
NEEDED = len(SOLVERS) * sum(NFE) * N // BATCH


def bare() -> float:
    """Seconds of the network alone, for all cells."""
    denoiser = fs.zoo.load("digits")
    bound = denoiser.bind(BATCH, {"labels": torch.arange(BATCH) % 10}, torch.device("cpu"))
    x, t = torch.randn(BATCH, 1, 8, 8), torch.full((BATCH,), 500.0)
    with torch.no_grad():
        bound(x, t, 1.0)
        began = time.perf_counter()
        for _ in range(NEEDED):
            bound(x, t, 1.0)
    return time.perf_counter() - began


@contextmanager
def timed_evaluations() -> Iterator[list[float]]:
    """The seconds of each evaluation of a whole batch within."""
    seconds: list[float] = []
    began: list[float] = []

    def before(module: nn.Module, args: Any) -> None:
        if isinstance(module, UNet):
            began.append(time.perf_counter())

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, UNet):
            spent = time.perf_counter() - began.pop()
            if len(output) == BATCH:
                seconds.append(spent)

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(before),
        nn.modules.module.register_module_forward_hook(after),
    ]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def run(out: Path) -> tuple[float, float]:
    """Seconds of a run without its reference solution, and of the evaluations it needs by the mean of its own."""
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
    with timed_evaluations() as seconds:
        began = time.perf_counter()
        bench(config)
        total = time.perf_counter() - began
    assert len(seconds) >= NEEDED
    reference = next((out / "cells").glob("reference-*.json"))
    # its cell, the check by half the steps on a few samples, and the first batch, which is the warm-up
    solution = json.loads(reference.read_text())["result"]["seconds"] * (1 + 0.5 * 128 / N + BATCH / N)
    return total - solution, NEEDED * statistics.fmean(seconds)


def test_overhead(benchmark: Any, tmp_path: Path) -> None:
    own, alone = [], []
    for i in range(3):
        spent, needed = run(tmp_path / str(i))
        own.append(spent / needed)
        alone.append(spent / bare())
    ratio = statistics.median(own)
    benchmark.extra_info["run over its evaluations"] = ratio
    benchmark.extra_info["run over evaluations alone"] = statistics.median(alone)
    benchmark.pedantic(bare, rounds=1)
    for name, ratios in (("its evaluations", own), ("evaluations alone", alone)):
        print(f"\nrun over {name}: {statistics.median(ratios):.3f} ({', '.join(f'{r:.3f}' for r in ratios)})")
    assert ratio <= LIMIT
