"""What a step costs besides the network: ours, the floor, and diffusers, in the same run.

    pytest benchmarks/bench_step.py --benchmark-enable -s

The network is a stub that returns a tensor made before. A DPM-Solver++(2M) row reads the state, the output
and the last prediction, and writes the state and a prediction. The floor is one fused multiply-add pass
over these tensors, timed in two ways: a three-term update in place (``mul_``, ``add_``, ``add_``), and
``torch.add``, which touches three tensors where the row touches five, times 5/3. Both walk through as many
tensors as the row holds. All candidates take turns; each step counts with its best round, since a shared
machine can only make it slower, and a run with the median of its steps (the first ones also get fresh
memory from the system; "whole call" is the mean with everything). With one thread the clock is that
thread's own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import cycle, islice, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsample as fs
from fastsample.executor import Run, execute, philox_noise

STEPS = 10
SHAPES = [(1, 4, 64, 64), (64, 3, 64, 64), (256, 3, 64, 64)]
FLOOR, PEER = 2.0, 5.0  # at most so many floors, at least so many times cheaper than diffusers

clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

Candidate = Callable[[], list[float]]  # one run, as the STEPS + 1 instants between its steps


def ours(shape: tuple[int, ...]) -> Candidate:
    out, x = torch.randn(shape), torch.randn(shape)
    instants: list[float] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        instants.append(clock())
        return out

    denoiser = fs.wrap(net, fs.VP.linear())
    plan = fs.Sampler(denoiser, "dpmpp_2m", STEPS).plan
    run = Run(denoiser.bind(shape[0], {}, x.device), philox_noise(0, torch.arange(shape[0])))

    def once() -> list[float]:
        instants.clear()
        execute(plan, x, run)
        return [*instants, clock()]

    return once


def diffusers(shape: tuple[int, ...]) -> Candidate:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler()
    out, x = torch.randn(shape), torch.randn(shape)

    def once() -> list[float]:
        scheduler.set_timesteps(STEPS)
        state, instants = x, [clock()]
        for t in scheduler.timesteps:
            state = scheduler.step(out, t, state, return_dict=False)[0]
            instants.append(clock())
        return instants

    return once


def floor(shape: tuple[int, ...], pass_over: Callable[[Tensor, Tensor, Tensor], Any]) -> Candidate:
    # the row's tensors: the state, the output, and two predictions
    tensors = [torch.randn(shape) for _ in range(4)]

    def once() -> list[float]:
        walk, instants = cycle(tensors), [clock()]
        for _ in range(STEPS):
            pass_over(*islice(walk, 3))
            instants.append(clock())
        return instants

    return once


def three_terms(x: Tensor, m: Tensor, n: Tensor) -> None:
    x.mul_(0.9).add_(m, alpha=0.1).add_(n, alpha=-0.05)


def two_operands(x: Tensor, m: Tensor, out: Tensor) -> None:
    torch.add(x, m, alpha=0.1, out=out)


def timed(
    candidates: dict[str, Candidate], seconds: float = 8.0
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds a step, and seconds of a whole call by step, of each candidate."""
    steps = {name: [float("inf")] * STEPS for name in candidates}
    whole = dict.fromkeys(candidates, float("inf"))
    stop, rounds = time.perf_counter() + seconds, 0
    with torch.inference_mode():
        while rounds < 5 or time.perf_counter() < stop:
            for name, candidate in candidates.items():
                if name == "diffusers" and rounds >= 5:  # slow, and far from its limit
                    continue
                begin = clock()
                instants = candidate()
                whole[name] = min(whole[name], (instants[-1] - begin) / STEPS)
                durations = [b - a for a, b in pairwise(instants)]
                steps[name] = [min(pair) for pair in zip(steps[name], durations, strict=True)]
            rounds += 1
    return {name: statistics.median(durations) for name, durations in steps.items()}, whole


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_cost_of_a_step(benchmark: Any, shape: tuple[int, ...]) -> None:
    candidates = {
        "ours": ours(shape),
        "diffusers": diffusers(shape),
        "three terms": floor(shape, three_terms),
        "two operands": floor(shape, two_operands),
    }
    benchmark.group = "x".join(map(str, shape))
    benchmark.pedantic(candidates["ours"], rounds=10, warmup_rounds=2)
    if not benchmark.enabled:
        return
    step, whole = timed(candidates)
    ratios = {
        "ours / floor (three terms)": step["ours"] / step["three terms"],
        "ours / floor (two operands)": step["ours"] / (step["two operands"] * 5 / 3),
        "diffusers / ours": step["diffusers"] / step["ours"],
    }
    micro = {name: round(1e6 * value, 1) for name, value in step.items()}
    calls = {name: round(1e6 * whole[name], 1) for name in ("ours", "diffusers")}
    threads = torch.get_num_threads()
    benchmark.extra_info.update(step_us=micro, whole_call_us=calls, threads=threads, ratios=ratios)
    print(f"\n{benchmark.group}, {threads} threads: us a step {micro}, whole call / steps {calls}")
    print("  " + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    assert ratios["diffusers / ours"] >= PEER
    if torch.Size(shape).numel() >= torch.Size((64, 3, 64, 64)).numel():
        assert ratios["ours / floor (three terms)"] <= FLOOR
        assert ratios["ours / floor (two operands)"] <= FLOOR
