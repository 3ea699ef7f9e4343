"""Every noise process, random plans, and an interpreter of plans that shares no code with the executor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

import fastsample as fs
from fastsample.executor import Run, philox_noise
from fastsample.noise import normal
from fastsample.plan import Row

PROCESSES: dict[str, Callable[[], fs.Process]] = {
    "linear": fs.VP.linear,
    "scaled_linear": fs.VP.scaled_linear,
    "cosine": fs.VP.cosine,
    "zero_snr": lambda: fs.VP.scaled_linear().rescaled_zero_snr(),
    "ve": fs.VE,
    "edm": fs.EDM,
    "flow": fs.Flow,
    "flow_shift": lambda: fs.Flow(shift=3.0),
    "trigflow": fs.TrigFlow,
}


def net(x: Tensor, t: Tensor) -> Tensor:
    """A nonlinear network that depends on the time and treats each sample alone."""
    return torch.tanh(1.3 * x + (t.to(x.dtype) / 400).reshape(-1, *[1] * (x.ndim - 1))) - 0.2 * x


def random_plan(seed: int, *, noises: bool = True, sized: bool = False) -> fs.Plan:
    """A plan that reads at random: old states and predictions, several noises, copies."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    numbers: list[float] = []

    def subset(values: Sequence[int], most: int) -> tuple[int, ...]:
        count = min(len(values), int(rng.integers(0, most + 1)))
        return tuple(sorted(rng.choice(values, count, replace=False).tolist()))

    for r in range(int(rng.integers(1, 10))):
        evaluates, offset = bool(rng.random() < 0.75), len(numbers)
        if rng.random() < 0.2:  # a copy
            states, predictions, streams = (int(rng.integers(0, r + 1)),), (), ()
            numbers += [1.0]
        else:
            # mostly recent ones, as in solvers, sometimes any
            far = rng.random() < 0.3
            states = subset(range(0 if far else max(0, r - 1), r + 1), 3)
            made = [k for k, row in enumerate(rows) if row.evaluates]
            predictions = subset(made if far else made[-2:], 3)
            streams = subset(range(1, 6), 2) if noises and rng.random() < 0.3 else ()
            drawn = rng.normal(0, 0.6, len(states) + len(predictions) + len(streams))
            drawn[rng.random(len(drawn)) < 0.15] = 1.0
            numbers += drawn.tolist()
        angle = float(rng.uniform(0.1, 1.4))
        numbers += [float(rng.uniform(0, 999)), math.cos(angle), math.sin(angle)]
        step = evaluates and sized and bool(rng.random() < 0.5)
        if evaluates:
            p, q = rng.normal(0, 1, 2).tolist()
            kind = rng.random()
            numbers += [float(rng.uniform(0, 999)), 0.0 if kind < 0.2 else p, 0.0 if kind > 0.9 else q]
            numbers += [float(rng.uniform(0, 1))] if step else []
        space = "x0" if evaluates else None
        rows.append(Row(states, predictions, streams, evaluates, space, step, offset))
    process = fs.VP.linear()
    return fs.Plan(
        rows,
        torch.tensor(numbers, dtype=torch.float64),
        solver="random",
        prediction="v",
        process=repr(process),
        fingerprint=process.fingerprint,
        steps=len(rows),
        t0=999.0,
    )


def interpret(
    plan: fs.Plan,
    x: Tensor,
    net: Callable[..., Tensor],
    seed: int = 0,
    hook: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """All states, the input first, straight from the definition of a plan (for v prediction)."""
    states, predictions = [x], {}
    index = torch.arange(x.shape[0])
    for r, (row, v) in enumerate(zip(plan.rows, plan.values, strict=True)):
        state = 0 * x
        for j, c in zip(row.states, v.a, strict=True):
            state = state + c * states[j]
        for k, c in zip(row.predictions, v.b, strict=True):
            state = state + c * predictions[k]
        for s, c in zip(row.noises, v.c, strict=True):
            state = state + c * normal(x.shape, seed, index, s, dtype=x.dtype)
        states.append(state)
        if not row.evaluates:
            continue
        told = torch.full((x.shape[0],), v.t_in, dtype=x.dtype)
        extra = {"step": torch.full((x.shape[0],), v.step, dtype=x.dtype)} if row.sized else {}
        out = net(state.clone(), told, **extra).to(x.dtype)
        if hook is None:
            predictions[r] = v.p * state + v.q * out
        else:
            # v = alpha eps - sigma x0 with alpha^2 + sigma^2 = 1, so x0 = alpha x - sigma v
            x0 = hook(v.alpha * state - v.sigma * out)
            predictions[r] = v.p * state + v.q * (v.alpha * state - x0) / v.sigma
    return states


def run_of(denoiser: fs.Denoiser, x: Tensor, seed: int = 0, **settings: object) -> Run:
    """A run of all samples in ``x``."""
    bound = denoiser.bind(x.shape[0], {}, x.device)
    return Run(bound, philox_noise(seed, torch.arange(x.shape[0])), **settings)  # type: ignore[arg-type]
