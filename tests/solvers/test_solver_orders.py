"""Measured order of convergence of every deterministic solver, with exact start values."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from helpers_solvers import deterministic, interpret, lam_grid, mixture, network_prediction, unlowered
from torch import Tensor

import fastsample as fs
from fastsample.plan import RowValues

# A process whose time, alpha and sigma are smooth: tAB interpolates in time, and VP's table has kinks.
PROCESS = fs.TrigFlow()
ENDS = (-1.2, 1.5)  # half log-SNR
STEPS = (60, 120, 240)  # multiples of 6: whole steps of the single-step solvers
PROBLEM = mixture()
START = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@functools.cache
def exact(times: tuple[float, ...]) -> tuple[Tensor, ...]:
    """The exact states at these times (decreasing noise), from START."""
    return tuple(PROBLEM.solve(PROCESS, START, list(times)))


@functools.cache
def solution(steps: int) -> tuple[list[float], list[Tensor], Tensor]:
    """The grid, the exact states at its points, and that at its end."""
    grid = lam_grid(PROCESS, torch.linspace(*ENDS, steps + 1)).tolist()
    states = exact(tuple(grid[:8]))
    return grid, list(states), PROBLEM.solve(PROCESS, states[-1], [grid[7], grid[-1]])[-1]


def error(name: str, steps: int, exact_starts: int, **settings: object) -> float:
    """RMSE at the grid's end, the states and predictions of the first evaluations being the exact ones."""
    grid, known, truth = solution(steps)
    plan = fs.solvers.build(name, PROCESS, prediction="v", grid=grid, **settings)
    evaluated = [r for r, row in enumerate(plan.rows) if row.evaluates]
    last = evaluated[exact_starts - 1] if exact_starts else -1
    at = dict(zip(grid[:8], known, strict=True))

    def replace(r: int, v: RowValues, state: Tensor) -> Tensor:
        if r > last:
            return state
        if v.t not in at:  # an inner stage
            start = max(t for t in grid[:8] if t >= v.t)
            at[v.t] = PROBLEM.solve(PROCESS, at[start], [start, v.t])[-1]
        return at[v.t]

    result = interpret(plan, START, network_prediction(plan, PROBLEM), replace)[-1]
    return float((result - truth).square().mean().sqrt())


def slope(name: str, claimed: int, **settings: object) -> float:
    """The order between two numbers of steps: larger ones for high orders, which get there later."""
    pair = STEPS[1:] if claimed >= 4 else STEPS[:-1]
    coarse, fine = (error(name, steps, claimed + 1, **settings) for steps in pair)
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
