"""What a step costs besides the network: ours, the floor, and diffusers, in the same run.

    pytest benchmarks/bench_step.py --benchmark-enable -s

The network is a stub that returns a tensor made before. A DPM-Solver++(2M) row reads the state, the output and
the last prediction, and writes the state and a prediction. The floor is one fused multiply-add pass over these
five tensors, timed in two ways: a three-term update in place (``mul_``, ``add_``, ``add_``), and a two-operand
``torch.add``, which touches three tensors, times 5/3. All candidates take turns and the best round of each
counts, since a shared machine can only make a round slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsample as fs
from fastsample.executor import Run, execute, philox_noise

STEPS = 20
SHAPES = [(1, 4, 64, 64), (64, 3, 64, 64), (256, 3, 64, 64)]
FLOOR, PEER = 2.0, 5.0  # at most so many floors, at least so many times cheaper than diffusers


def ours(shape: tuple[int, ...]) -> Callable[[], Any]:
    """``STEPS`` rows of the plan, per call."""
    out = torch.randn(shape)
    denoiser = fs.wrap(lambda x, t: out, fs.VP.linear())
    plan = fs.Sampler(denoiser, "dpmpp_2m", STEPS).plan
    x = torch.randn(shape)
    run = Run(denoiser.bind(shape[0], {}, x.device), philox_noise(0, torch.arange(shape[0])))
    return lambda: execute(plan, x, run)


def diffusers(shape: tuple[int, ...]) -> Callable[[], Any]:
    """``STEPS`` steps of the scheduler, per call; its set-up is not counted (see :func:`timed`)."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler()
    out, x = torch.randn(shape), torch.randn(shape)

    def run() -> Tensor:
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step(out, t, state, return_dict=False)[0]
        return state

    run.before = lambda: scheduler.set_timesteps(STEPS)  # type: ignore[attr-defined]
    return run


def three_terms(shape: tuple[int, ...]) -> Callable[[], Any]:
    """``STEPS`` in-place updates of three terms, per call."""
    x, m, n = (torch.randn(shape) for _ in range(3))

    def run() -> None:
        for _ in range(STEPS):
            x.mul_(0.9).add_(m, alpha=0.1).add_(n, alpha=-0.05)

    return run


def two_operands(shape: tuple[int, ...]) -> Callable[[], Any]:
    """``STEPS`` plain additions, per call."""
    x, m, out = (torch.randn(shape) for _ in range(3))

    def run() -> None:
        for _ in range(STEPS):
            torch.add(x, m, alpha=0.1, out=out)

    return run


def timed(candidates: dict[str, Callable[[], Any]], seconds: float = 6.0) -> dict[str, float]:
    """Seconds a step of each candidate: the best of rounds in which all take turns."""
    best = dict.fromkeys(candidates, float("inf"))
    stop = time.perf_counter() + seconds
    rounds = 0
    with torch.inference_mode():
        while rounds < 5 or time.perf_counter() < stop:
            for name, candidate in candidates.items():
                getattr(candidate, "before", lambda: None)()
                begin = time.perf_counter()
                candidate()
                best[name] = min(best[name], (time.perf_counter() - begin) / STEPS)
            rounds += 1
    return best


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_cost_of_a_step(benchmark: Any, shape: tuple[int, ...]) -> None:
    candidates = {
        "ours": ours(shape),
        "diffusers": diffusers(shape),
        "three terms": three_terms(shape),
        "two operands": two_operands(shape),
    }
    benchmark.group = "x".join(map(str, shape))
    benchmark.pedantic(candidates["ours"], rounds=10, warmup_rounds=2)
    if not benchmark.enabled:
        return
    seconds = timed(candidates)
    floors = {"three terms": seconds["three terms"], "two operands": seconds["two operands"] * 5 / 3}
    ratios = {f"ours / floor ({name})": seconds["ours"] / floor for name, floor in floors.items()}
    ratios["diffusers / ours"] = seconds["diffusers"] / seconds["ours"]
    micro = {name: round(1e6 * value, 2) for name, value in seconds.items()}
    benchmark.extra_info.update(microseconds=micro, threads=torch.get_num_threads(), **ratios)
    print(f"\n{benchmark.group}: {micro} us a step; " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()))
    assert ratios["diffusers / ours"] >= PEER
    if torch.Size(shape).numel() >= torch.Size((64, 3, 64, 64)).numel():
        assert max(ratios["ours / floor (three terms)"], ratios["ours / floor (two operands)"]) <= FLOOR
