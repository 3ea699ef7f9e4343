"""Measured order of convergence of every deterministic solver, with exact start values."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from helpers_solvers import (
    PROCESSES,
    deterministic,
    interpret,
    lam_grid,
    mixture,
    network_prediction,
    unlowered,
)
from torch import Tensor

import fastsample as fs
from fastsample.plan import RowValues

# The default process: alpha and sigma are smooth in its time, in which tAB interpolates; VP's have kinks.
SMOOTH = "trigflow"
ENDS = (-1.2, 1.5)  # half log-SNR
KNOWN = 8  # grid points with known exact states
PROBLEM = mixture()
START = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@functools.cache
def solution(key: str, steps: int) -> tuple[list[float], list[Tensor], Tensor]:
    """The grid, the exact states at its first points, and that at its end."""
    process = PROCESSES[key][0]()
    grid = lam_grid(process, torch.linspace(*ENDS, steps + 1)).tolist()
    states = PROBLEM.solve(process, START, [*grid[:KNOWN], grid[-1]])
    return grid, states[:-1], states[-1]


def error(key: str, name: str, steps: int, exact_starts: int, **settings: object) -> float:
    """RMSE at the grid's end, the states and predictions of the first evaluations being the exact ones."""
    make, prediction = PROCESSES[key]
    process = make()
    grid, known, truth = solution(key, steps)
    plan = fs.solvers.build(name, process, prediction=prediction, grid=grid, **settings)
    evaluated = [r for r, row in enumerate(plan.rows) if row.evaluates]
    last = evaluated[exact_starts - 1]
    at = dict(zip(grid, known, strict=False))

    def replace(r: int, v: RowValues, state: Tensor) -> Tensor:
        if r > last:
            return state
        if v.t not in at:  # an inner stage
            start = max(t for t in grid[:KNOWN] if t >= v.t)
            at[v.t] = PROBLEM.solve(process, at[start], [start, v.t])[-1]
        return at[v.t]

    result = interpret(plan, START, network_prediction(plan, PROBLEM), replace)[-1]
    return float((result - truth).square().mean().sqrt())


def slope(name: str, claimed: int, key: str = SMOOTH, **settings: object) -> float:
    """The order measured between ``n`` and ``2 n`` steps; high orders are reached later.

    ``n`` is a multiple of 6, so that single-step solvers of order 2 and 3 take whole steps.
    """
    n = 60 if claimed <= 3 else 120 if claimed == 4 else 240
    coarse, fine = (error(key, name, steps, claimed + 1, **settings) for steps in (n, 2 * n))
    return math.log2(coarse / fine)


@pytest.mark.parametrize("name", deterministic())
def test_slope_is_the_claimed_order(name: str) -> None:
    claim = fs.solvers.get(name).claim
    assert claim.order is not None, f"{name} draws no noise and must claim an order"
    measured = slope(name, claim.order, **unlowered(name))
    assert abs(measured - claim.order) < 0.15, f"{name}: claims {claim.order}, measured {measured:.3f}"


# (name, settings, order): what the families have besides their defaults. A free corrector adds one.
VARIANTS = [
    *[("lms", {"order": p}, p) for p in (1, 2, 3, 5)],
    *[("lms", {"order": p, "corrector": True}, p + 1) for p in (1, 2, 3)],
    *[("deis", {"order": p}, p) for p in (1, 2, 3)],
    *[("deis", {"order": p, "corrector": True}, p + 1) for p in (1, 2, 3)],
    *[("deis_logrho", {"order": p}, p) for p in (1, 2, 3)],
    *[("ipndm", {"order": p}, min(p, 2)) for p in (1, 2, 3)],
    *[("ipndm_v", {"order": p}, p) for p in (1, 2, 3)],
    *[("exp_adams", {"order": p}, p) for p in (1, 2, 4)],
    *[("exp_adams", {"order": p, "corrector": True}, p + 1) for p in (1, 2, 3)],
    *[("exp_adams", {"order": 3, "space": s, "variable": u}, 3) for s, u in (("v", "phi"), ("flow", "tau"))],
    *[("exp_adams", {"order": 2, "space": s, "corrector": True}, 3) for s in ("eps", "v", "flow")],
    ("dpmpp_2m", {"solver_type": "heun"}, 2),
    ("dpm_solver_2m", {"solver_type": "heun"}, 2),
    ("dpmpp_2m", {"corrector": True}, 3),
    ("dpm_solver_2m", {"corrector": True}, 3),
    ("dpmpp_3m_exact", {"corrector": True}, 4),
    ("dpmpp_2s", {"solver_type": "heun"}, 2),
    ("dpmpp_2s", {"fixed": True, "r1": 0.4}, 2),
    ("dpm_solver_2s", {"fixed": True}, 2),
    ("dpmpp_3s", {"solver_type": "heun"}, 3),
    ("dpmpp_3s", {"fixed": True, "r1": 0.5}, 3),
    ("dpm_solver_3s", {"fixed": True, "solver_type": "heun"}, 3),
    *[("unipc", {"order": p, "variant": v}, p + 1) for p in (1, 2) for v in ("bh1", "bh2", "vary_coeff")],
    *[("unipc", {"order": p, "variant": "bh1", "predict_x0": False}, p + 1) for p in (1, 2, 3)],
    *[("unipc", {"order": p, "corrector": False}, p) for p in (1, 2, 3, 4)],
    ("unipc", {"order": 4}, 5),
    ("heun", {"space": "eps"}, 2),
    ("heun", {"space": "v"}, 2),
]


@pytest.mark.parametrize(("name", "settings", "order"), VARIANTS, ids=lambda v: str(v).replace(" ", ""))
def test_slope_of_variants(name: str, settings: dict[str, object], order: int) -> None:
    measured = slope(name, order, **{**unlowered(name), **settings})
    assert abs(measured - order) < 0.15, f"{name} {settings}: order {order}, measured {measured:.3f}"


@pytest.mark.parametrize("key", sorted(PROCESSES))
@pytest.mark.parametrize(
    ("name", "order"), [("dpmpp_2m", 2), ("dpm_solver_3s", 3), ("unipc", 4), ("heun", 2)]
)
def test_slope_on_every_process(name: str, order: int, key: str) -> None:
    measured = slope(name, order, key, **unlowered(name))
    assert abs(measured - order) < 0.15, f"{name} on {key}: order {order}, measured {measured:.3f}"


def test_published_3m_has_half_of_its_second_difference() -> None:
    """The published DPM-Solver(++) 3M is of order 2; the whole term makes it 3, and far more accurate."""
    for family in ("dpmpp_3m", "dpm_solver_3m"):
        published, exact = (error(SMOOTH, name, 240, 4) for name in (family, f"{family}_exact"))
        assert slope(family, 3) < 2.1
        assert slope(f"{family}_exact", 3) > 2.9
        assert exact < published / 30


def test_fixed_weights_lose_an_order_on_a_rough_grid() -> None:
    """What PNDM's claim says: order 2 needs a smooth grid; steps that alternate in size give order 1."""
    process = fs.TrigFlow()

    def rough(steps: int) -> float:
        width = torch.tensor([1.0, 2.0]).repeat(steps // 2).double()
        lam = ENDS[0] + (ENDS[1] - ENDS[0]) * torch.cat([torch.zeros(1), width.cumsum(0) / width.sum()])
        grid = lam_grid(process, lam)
        plan = fs.solvers.build("ipndm", process, prediction="v", grid=grid, order=2)
        truth = PROBLEM.solve(process, START, [float(grid[0]), float(grid[-1])])[-1]
        return float((interpret(plan, START, network_prediction(plan, PROBLEM))[-1] - truth).norm())

    assert abs(math.log2(rough(120) / rough(240)) - 1) < 0.15
