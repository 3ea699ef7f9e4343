"""Moment conditions: solvers integrate polynomial predictions exactly, or asymptotically, up to their order.

A table is run with its predictions replaced by the values of a polynomial ``f(u)`` in the variable that the
solver claims. The exact solution is then an integral, ``x_t / c_t = x_s / c_s + int f dG``. Grids are random,
so that mistakes which cancel on uniform grids or with constant models show.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers_solvers import deterministic, interpret, lam_grid, unlowered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastsample as fs
from fastsample.plan import Plan, RowValues
from fastsample.process import Process
from fastsample.solvers import Claim

Function = Callable[[np.ndarray], np.ndarray]

# Polynomials in the time itself are tested where time is smooth; see test_tab_on_a_table_of_times.
MAKERS = {"edm": fs.EDM, "vp": fs.VP.linear, "flow": fs.Flow, "trigflow": fs.TrigFlow}
CORRECTED = {"unipc"}  # solvers with a free corrector by default
WARM_UP = 5  # steps until every multistep method has its full history
STEPS = WARM_UP + 4

# The homogeneous factor c and the measure G of each space (Lu et al. 2022b, eq. 8; Zhang & Chen 2023, eq. 11;
# for v and flow the angle and the flow's own time).
FACTOR: dict[str, Callable[[float, float], float]] = {
    "x0": lambda alpha, sigma: sigma,
    "eps": lambda alpha, sigma: alpha,
    "v": math.hypot,
    "flow": lambda alpha, sigma: alpha + sigma,
}
VARIABLE: dict[str, Callable[[Process, float], float]] = {
    "lam": lambda process, t: float(process.lam(t)),
    "rho": lambda process, t: float(process.rho(t)),
    "t": lambda process, t: t,
    "phi": lambda process, t: float(process.phi(t)),
    "tau": lambda process, t: float(process.sigma(t) / (process.alpha(t) + process.sigma(t))),
}
MEASURE: dict[tuple[str, str], Callable[[Process, np.ndarray], np.ndarray]] = {
    ("x0", "lam"): lambda process, u: np.exp(u),
    ("eps", "lam"): lambda process, u: np.exp(-u),
    ("eps", "rho"): lambda process, u: u,
    ("eps", "t"): lambda process, u: process.rho(u).numpy(),
    ("v", "phi"): lambda process, u: u,
    ("flow", "tau"): lambda process, u: u,
}


def integral(
    process: Process, claim: Claim, f: Function, slope: Function, first: float, last: float
) -> float:
    """``int f dG`` from u = first to last, by parts: ``[f G] - int f' G du``, Gauss-Legendre on panels."""
    measure = MEASURE[claim.space, claim.variable]
    x, w = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(first, last, 9)
    width = np.diff(edges)
    u = edges[:-1, None] + (x + 1) / 2 * width[:, None]
    inner = float((slope(u) * measure(process, u) * w * width[:, None] / 2).sum())
    ends = np.array([first, last])
    return float(np.diff(f(ends) * measure(process, ends))[0]) - inner


def residuals(
    plan: Plan, process: Process, claim: Claim, grid: Tensor, f: Function, slope: Function
) -> np.ndarray:
    """What each step adds to ``x / c`` less what it should, for predictions ``f(u)``."""

    def predict(r: int, v: RowValues, state: Tensor) -> Tensor:
        return torch.tensor(f(np.array(VARIABLE[claim.variable](process, v.t))), dtype=torch.float64)

    states = interpret(plan, torch.zeros((), dtype=torch.float64), predict)
    times = grid.tolist()
    at = dict(zip((v.t for v in plan.values), states, strict=True))  # the last row at a time holds
    scaled = [
        float(at[t]) / FACTOR[claim.space](float(process.alpha(t)), float(process.sigma(t))) for t in times
    ]
    u = [VARIABLE[claim.variable](process, t) for t in times]
    exact = [integral(process, claim, f, slope, a, b) for a, b in itertools.pairwise(u)]
    return np.diff(scaled) - np.array(exact)


def polynomial(degree: int, center: float, width: float) -> tuple[Function, Function]:
    """``((u - center) / width)^degree`` and its derivative."""
    if not degree:
        return np.ones_like, np.zeros_like
    return (
        lambda u: ((u - center) / width) ** degree,
        lambda u: degree * ((u - center) / width) ** (degree - 1) / width,
    )


def polynomials(
    process: Process, claim: Claim, grid: Tensor, degrees: range
) -> list[tuple[Function, Function]]:
    """Polynomials of size one on the grid."""
    u = [VARIABLE[claim.variable](process, t) for t in grid.tolist()]
    center, width = (max(u) + min(u)) / 2, (max(u) - min(u)) / 2
    return [polynomial(degree, center, width) for degree in degrees]


def case(name: str) -> tuple[Claim, dict[str, object]]:
    """The claim, and settings under which the whole grid is made of full steps."""
    options = fs.solvers.options(name)
    chosen: dict[str, object] = dict(unlowered(name))
    if "fixed" in options:  # stages in fixed ratios instead of at the grid's own points
        chosen["fixed"] = True
    claim = fs.solvers.get(name).claim
    if name == "heun":
        chosen["space"] = claim.space
    return claim, chosen


def with_moments(kind: str) -> list[str]:
    return [name for name in deterministic() if fs.solvers.get(name).claim.moments == kind]


def test_every_deterministic_solver_is_tested_here() -> None:
    fixed_weights = {"pndm", "plms", "ipndm"}
    assert set(with_moments("exact")) | set(with_moments("asymptotic")) | fixed_weights == set(
        deterministic()
    )


def past_warm_up(
    name: str, process: Process, prediction: str, grid: Tensor, f: Function, slope: Function
) -> np.ndarray:
    """The residuals of full steps, relative to the size of the measure on the grid.

    With a free corrector the states of the table are the predicted ones: each is off by the predictor's own
    residual, which the same solver without corrector shows, and which the next row takes back.
    """
    claim, chosen = case(name)
    plan = fs.solvers.build(name, process, prediction=prediction, grid=grid, **chosen)
    found = residuals(plan, process, claim, grid, f, slope)
    if name in CORRECTED:
        plain = fs.solvers.build(name, process, prediction=prediction, grid=grid, corrector=False, **chosen)
        found = found[1:] - np.diff(residuals(plain, process, claim, grid, f, slope))
    u = np.array([VARIABLE[claim.variable](process, t) for t in grid.tolist()])
    return found[WARM_UP:] / np.abs(MEASURE[claim.space, claim.variable](process, u)).max()


spacings = st.lists(st.floats(0.08, 0.8), min_size=STEPS, max_size=STEPS)


@pytest.mark.parametrize("name", with_moments("exact"))
@given(widths=spacings, start=st.floats(-2.0, 0.0), key=st.sampled_from(sorted(MAKERS)), rising=st.booleans())
@settings(max_examples=8, deadline=None, derandomize=True)
def test_exact(name: str, widths: list[float], start: float, key: str, rising: bool) -> None:
    """Every full step adds exactly the integral of polynomials below the order, generating or inverting."""
    claim = fs.solvers.get(name).claim
    process = fs.TrigFlow() if claim.variable == "t" and key == "vp" else MAKERS[key]()
    lam = start + np.cumsum([0.0, *widths])
    grid = lam_grid(process, lam if rising else lam[::-1].copy())
    prediction = "x0" if key == "edm" else "v"
    assert claim.order is not None
    for f, slope in polynomials(process, claim, grid, range(claim.order)):
        found = past_warm_up(name, process, prediction, grid, f, slope)
        assert np.abs(found).max() < 1e-11, f"{name} on {key}: {found}"


@pytest.mark.parametrize("name", with_moments("exact"))
def test_exact_claims_are_tight(name: str) -> None:
    """The next degree is not integrated exactly: the test can fail, and the claim is no understatement."""
    process = fs.TrigFlow()
    claim = fs.solvers.get(name).claim
    grid = lam_grid(process, np.cumsum([-1.5, 0.3, 0.5, 0.2, 0.4, 0.3, 0.6, 0.2, 0.4, 0.5]))
    assert claim.order is not None
    ((f, slope),) = polynomials(process, claim, grid, range(claim.order, claim.order + 1))
    assert np.abs(past_warm_up(name, process, "v", grid, f, slope)).max() > 1e-5


@pytest.mark.parametrize("name", with_moments("asymptotic"))
@given(widths=spacings, center=st.floats(-1.0, 1.0), key=st.sampled_from(sorted(MAKERS)))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_asymptotic(name: str, widths: list[float], center: float, key: str) -> None:
    """Constants are exact; for other degrees below the order a step's residual is O(h^(order + 1))."""
    claim = fs.solvers.get(name).claim
    assert claim.order is not None
    process = MAKERS[key]()
    prediction = "x0" if key == "edm" else "v"
    pattern = np.cumsum([0.0, *widths]) / sum(widths)

    def largest(h: float, degree: int) -> float:
        grid = lam_grid(process, center + h * pattern)
        u = VARIABLE[claim.variable](process, float(lam_grid(process, [center])))
        return float(np.abs(past_warm_up(name, process, prediction, grid, *polynomial(degree, u, 1.0))).max())

    assert largest(1.0, 0) < 1e-12
    for degree in range(1, claim.order):
        coarse, fine = largest(0.1, degree), largest(0.05, degree)
        exact = fine < 1e-15
        assert exact or math.log2(coarse / fine) > claim.order + 0.85, f"{name} on {key}: degree {degree}"
    assert not exact, "no degree below the order has a residual: claim moments='exact'"


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_fixed_weights_are_exact_on_a_uniform_grid(order: int) -> None:
    """iPNDM is Adams-Bashforth: on a grid that is uniform in rho its order is that of its weights."""
    process, claim = fs.EDM(), Claim(order=order, space="eps", variable="rho")
    grid = torch.linspace(6.0, 1.0, STEPS + 1, dtype=torch.float64)
    plan = fs.solvers.build("ipndm", process, prediction="x0", grid=grid, order=order)
    for degree in range(order + 1):
        found = residuals(plan, process, claim, grid, *polynomial(degree, 3.0, 3.0))[WARM_UP:]
        assert (np.abs(found).max() < 1e-13) == (degree < order)


def test_tab_on_a_table_of_times() -> None:
    """On a discrete process ``rho(t)`` has kinks at integers; tAB's integrals hold to 1e-6 across them."""
    process, claim = fs.VP.linear(), fs.solvers.get("deis_tab").claim
    grid = torch.tensor([950.0, 871.3, 760.2, 650.0, 531.7, 402.2, 271.0, 149.6, 60.3, 12.4]).double()
    for f, slope in polynomials(process, claim, grid, range(4)):
        found = past_warm_up("deis_tab", process, "eps", grid, f, slope)
        assert np.abs(found).max() < 1e-6
