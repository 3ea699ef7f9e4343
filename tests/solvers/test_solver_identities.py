"""What must hold between solvers, and of every solver on every process, prediction, grid and end."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from helpers_solvers import PROCESSES, deterministic, interpret, lam_grid, mixture, network_prediction
from torch import Tensor

import fastsample as fs
from fastsample.noise import START, normal
from fastsample.plan import Plan
from fastsample.process import Process

PROBLEM = mixture()
STATE = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def run(plan: Plan, x: Tensor = STATE) -> Tensor:
    return interpret(plan, x, network_prediction(plan, PROBLEM))[-1]


def build(name: str, key: str, grid: Any, **settings: Any) -> Plan:
    make, prediction = PROCESSES[key]
    return fs.solvers.build(name, make(), prediction=prediction, grid=grid, **settings)


# -- identities ----------------------------------------------------------------------------------------------

ROUGH = [-2.0, -1.7, -1.1, -0.8, -0.1, 0.2, 0.9, 1.3]  # half log-SNR

SAME = [
    *[
        (("ddim", {}), other)
        for other in (
            ("euler", {}),
            ("dpm_solver_1", {}),
            ("lms", {"order": 1}),
            ("deis", {"order": 1}),
            ("deis_logrho", {"order": 1}),
            ("ipndm", {"order": 1}),
            ("exp_adams", {"order": 1}),
            ("exp_adams", {"order": 1, "space": "flow", "variable": "tau"}),
            ("unipc", {"order": 1, "corrector": False}),
        )
    ],
    (("lms", {}), ("deis_rhoab", {})),
    (("lms", {}), ("ipndm_v", {})),
    (("deis_tab", {}), ("deis", {"variable": "t"})),
    (("deis_logrho", {"order": 3}), ("dpm_solver_3m_exact", {"lower_order_final": False})),
    (("dpmpp_3m_exact", {"lower_order_final": False}), ("exp_adams", {"order": 3})),
    (("dpmpp_2m", {"solver_type": "heun", "lower_order_final": False}), ("exp_adams", {"order": 2})),
    (("dpmpp_2m", {"lower_order_final": True}), ("unipc", {"order": 2, "corrector": False})),
    (
        ("unipc", {"order": 3, "variant": "vary_coeff", "lower_order_final": False}),
        ("exp_adams", {"order": 3, "corrector": True}),
    ),
    (("dpm_2", {}), ("dpm_solver_2s", {"fixed": True})),
]


@pytest.mark.parametrize("key", ["vp", "edm", "flow"])
@pytest.mark.parametrize(("one", "other"), SAME, ids=lambda v: v[0] + "".join(str(w) for w in v[1].values()))
def test_the_same_method_by_two_names(one: Any, other: Any, key: str) -> None:
    grid = lam_grid(PROCESSES[key][0](), ROUGH)
    a, b = (run(build(name, key, grid, **settings)) for name, settings in (one, other))
    assert float((a - b).abs().max()) < 1e-12


def test_2m_by_its_published_formula() -> None:
    """DPM-Solver++(2M) on a grid uniform in lam: ``D = 3/2 m_0 - 1/2 m_1`` (Lu et al. 2022b, algorithm 2)."""
    process = fs.VP.linear()
    grid = lam_grid(process, torch.linspace(-2, 2, 9))
    x, before = STATE, None
    h = 0.5
    for s, t in itertools.pairwise(grid.tolist()):
        m = PROBLEM.x0(x, float(process.alpha(s)), float(process.sigma(s)))
        d = m if before is None or t == float(grid[-1]) else 1.5 * m - 0.5 * before
        ratio = float(process.sigma(t) / process.sigma(s))
        x, before = ratio * x - float(process.alpha(t)) * math.expm1(-h) * d, m
    assert float((run(build("dpmpp_2m", "vp", grid)) - x).abs().max()) < 1e-12


@pytest.mark.parametrize("churn", [{}, {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}])
def test_heun_by_edm_algorithm_2(churn: dict[str, float]) -> None:
    """Karras et al. 2022, algorithm 2 with the paper's own settings, written out, on the same noise."""
    process, steps, seed = fs.EDM(), 18, 3

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return PROBLEM.x0(x, 1.0, sigma)

    sampler = fs.Sampler(fs.wrap(PROBLEM.network(process, "x0"), process, "x0"), "heun", steps, **churn)
    found = sampler(shape=(6, 2), seed=seed, dtype=torch.float64)

    index = torch.arange(6)
    sigmas = [
        (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(steps)
    ]
    x = normal((6, 2), seed, index, START, dtype=torch.float64) * sigmas[0]
    stream = 0
    for sigma, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        raised = sigma
        if churn and churn["s_tmin"] <= sigma <= churn["s_tmax"]:
            stream += 1
            raised = sigma * (1 + min(churn["s_churn"] / steps, math.sqrt(2) - 1))
            fresh = normal((6, 2), seed, index, stream, dtype=torch.float64)
            x = x + math.sqrt(raised**2 - sigma**2) * churn["s_noise"] * fresh
        d = (x - denoise(x, raised)) / raised
        euler = x + (after - raised) * d
        x = euler if not after else x + (after - raised) / 2 * (d + (euler - denoise(euler, after)) / after)
    assert float((found - x).abs().max()) < 1e-10
    assert sampler.plan.nfe == 2 * steps - 1
    assert sampler.plan.stochastic == bool(churn)


def test_churn_stays_within_the_process() -> None:
    """The raised level is one that the network knows, on any process."""
    for key in PROCESSES:
        process = PROCESSES[key][0]()
        plan = fs.solvers.build("heun", process, 6, prediction="x0", s_churn=100.0)
        assert plan.stochastic
        assert all(v.t <= process.t_start for v in plan.values)
        assert any(row.noises for row in plan.rows)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 20])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_counted_evaluations(steps: int, end: str) -> None:
    def nfe(name: str, **settings: Any) -> int:
        return fs.solvers.build(name, fs.VP.linear(), steps, prediction="eps", end=end, **settings).nfe

    zero = end == "zero"
    for name in (
        "dpmpp_2s",
        "dpmpp_3s",
        "dpm_solver_3s",
        "dpmpp_3m",
        "unipc",
        "lms",
        "deis",
        "ipndm",
        "exp_adams",
    ):
        assert nfe(name) == steps
    assert nfe("dpmpp_3s", lower_order_final=False) == steps
    assert nfe("dpmpp_2s", fixed=True) == 2 * steps - zero
    assert nfe("dpmpp_3s", fixed=True) == 3 * steps - 2 * zero
    assert nfe("heun") == nfe("dpm_2") == 2 * steps - zero
    # a start that would evaluate at zero noise is left out
    assert nfe("pndm") == steps + 3 * min(3, steps - zero)
    assert nfe("plms") == steps + min(1, steps - zero)


@pytest.mark.parametrize(
    ("steps", "order", "lowered", "expected"),
    [
        (9, 3, True, [3, 3, 2, 1]),
        (10, 3, True, [3, 3, 3, 1]),
        (11, 3, True, [3, 3, 3, 2]),
        (9, 3, False, [3, 3, 3]),
        (3, 3, True, [2, 1]),
        (2, 3, True, [2]),
        (8, 2, True, [2, 2, 2, 2]),
        (9, 2, True, [2, 2, 2, 2, 1]),
    ],
)
def test_official_arrangement(steps: int, order: int, lowered: bool, expected: list[int]) -> None:
    """The official code's ``get_orders_and_timesteps_for_singlestep_solver``."""
    from fastsample.solvers.dpm import orders

    assert orders(steps, order, lowered) == expected


# -- every solver, everywhere --------------------------------------------------------------------------------

ALL_PROCESSES: dict[str, tuple[Process, list[str]]] = {
    "linear": (fs.VP.linear(), ["eps", "x0", "v", "flow", "score"]),
    "cosine": (fs.VP.cosine(), ["eps", "x0", "v", "score"]),
    "zero_snr": (fs.VP.scaled_linear().rescaled_zero_snr(), ["x0", "v", "flow"]),
    "quantized": (fs.VP.linear().quantized(torch.arange(1000)), ["eps", "v"]),
    "ve": (fs.VE(), ["score", "eps", "x0"]),
    "edm": (fs.EDM(), ["x0", "v", "eps"]),
    "flow": (fs.Flow(shift=3.0), ["flow", "x0", "v"]),
    "trigflow": (fs.TrigFlow(), ["v", "x0", "flow"]),
}
GRIDS = ("uniform", "logsnr", "karras", "power", "beta", None)


@pytest.mark.parametrize("name", deterministic())
def test_finite_everywhere(name: str) -> None:
    """Building a plan checks that its coefficients are finite; every process, end and number of steps.

    Predictions and grids take turns: they enter the table independently of each other.
    """
    grids, turn = itertools.cycle(GRIDS), itertools.count()
    for process, predictions in ALL_PROCESSES.values():
        for end, steps in itertools.product(("zero", "sigma_min"), (1, 2, 3, 5, 20)):
            prediction = predictions[next(turn) % len(predictions)]
            plan = fs.solvers.build(name, process, steps, prediction=prediction, grid=next(grids), end=end)
            last = plan.values[-1]
            assert last.t == (process.t_zero if end == "zero" else process.t_end)
            for row, v in zip(plan.rows, plan.values, strict=True):
                if process.levels is not None and row.evaluates:
                    assert v.t_in == v.t == round(v.t), "the network's time and the solver's disagree"
            assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("name", deterministic())
def test_finite_when_inverting(name: str) -> None:
    """Rising noise, from the least trained level (or none) to the most, alpha = 0 included."""
    for process, predictions in ALL_PROCESSES.values():
        for prediction, steps in itertools.product(predictions, (1, 4)):
            if prediction in ("eps", "score") and not float(process.alpha(process.t_start)):
                continue
            start = process.t_end if prediction in ("x0", "score", "eps") else process.t_zero
            grid = torch.linspace(start, process.t_start, steps + 1)
            fs.solvers.build(name, process, prediction=prediction, grid=grid)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("unipc", "zero"),
        ("unipc", "sigma_min"),
        ("dpmpp_3m", "zero"),
        ("deis", "sigma_min"),
        ("dpmpp_3s", "zero"),
    ],
)
def test_a_thousand_steps(name: str, end: str) -> None:
    plan = fs.solvers.build(name, fs.VP.linear(), 1000, prediction="eps", end=end)
    assert plan.steps == 1000
    result = run(plan, STATE)
    assert bool(torch.isfinite(result).all())


@functools.cache
def clean(key: str) -> Tensor:
    """The exact solution at zero noise: the denoised state where the noise is next to nothing."""
    process = PROCESSES[key][0]()
    t = float(process.t_of_lam(9.0))
    state = PROBLEM.solve(process, STATE, [process.t_start, t])[-1]
    return PROBLEM.x0(state, float(process.alpha(t)), float(process.sigma(t)))


@pytest.mark.parametrize("name", deterministic())
@pytest.mark.parametrize("key", ["vp", "flow"])
def test_samples_are_near_the_exact_solution(name: str, key: str) -> None:
    """40 steps to zero noise from the noisiest time, through the sampler, in float64 and float32."""
    make, prediction = PROCESSES[key]
    process = make()
    denoiser = fs.wrap(PROBLEM.network(process, prediction), process, prediction)
    sampler = fs.Sampler(denoiser, name, 40, grid="logsnr")
    found = sampler(x=STATE)
    allowed = 0.1 if fs.solvers.get(name).claim.order == 1 else 0.04
    assert float((found - clean(key)).square().mean().sqrt()) < allowed
    single = sampler(x=STATE.float())
    assert single.dtype == torch.float32
    assert float((single - found).abs().max()) < 1e-4


@pytest.mark.parametrize("name", deterministic())
def test_inverting_takes_samples_back_to_noise(name: str) -> None:
    """Generating, then inverting on the reversed grid, returns to the start as far as the order allows."""
    process = fs.VP.cosine()
    noise_to_data = lam_grid(process, torch.linspace(-2.5, 2.0, 121))
    there = fs.solvers.build(name, process, prediction="v", grid=noise_to_data)
    back = fs.solvers.build(name, process, prediction="v", grid=noise_to_data.flip(0))
    allowed = 0.05 if fs.solvers.get(name).claim.order == 1 else 5e-3
    assert float((run(back, run(there)) - STATE).square().mean().sqrt()) < allowed


@pytest.mark.parametrize("name", deterministic())
def test_differentiable_in_the_grid(name: str) -> None:
    """The derivative of a random combination of all numbers, against central differences."""
    process = fs.TrigFlow()
    grid = lam_grid(process, torch.tensor([-1.5, -1.1, -0.4, -0.1, 0.5, 0.8, 1.4]).double())

    def numbers(times: Tensor) -> Tensor:
        return fs.solvers.build(name, process, prediction="v", grid=times.requires_grad_()).numbers

    weights = torch.randn(numbers(grid.clone()).numel(), dtype=torch.float64, generator=torch.manual_seed(0))

    def value(times: Tensor) -> Tensor:
        return (weights * numbers(times)).sum()

    leaf = grid.clone()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    for i in range(1, grid.numel() - 1):
        shift = torch.zeros_like(grid)
        shift[i] = 1e-6
        difference = float((value(grid + shift) - value(grid - shift)).detach()) / 2e-6
        assert abs(difference - float(gradient[i])) < 1e-6 * max(1.0, abs(difference))


# -- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lms", {"order": 0}, "order=0 must be"),
        ("deis", {"order": 2.5}, "order=2.5 must be"),
        ("deis", {"variable": "sigma"}, "variable='sigma' is unknown"),
        ("ipndm", {"order": 5}, "order=5 must be 1, 2, 3 or 4"),
        ("unipc", {"order": True}, "order=True must be"),
        ("unipc", {"variant": "bh3"}, "variant='bh3' is unknown; did you mean"),
        ("dpmpp_2m", {"solver_type": "taylor"}, "solver_type='taylor' is unknown"),
        ("dpmpp_2s", {"solver_type": "euler"}, "solver_type='euler' is unknown"),
        ("dpmpp_2s", {"r1": 0.3}, "r1=0.3 needs fixed=True"),
        ("dpmpp_3s", {"fixed": True, "r1": 0.7}, "r1=0.7, r2=0.66"),
        ("dpmpp_2s", {"fixed": True, "r1": 1.0}, "must rise strictly between 0 and 1"),
        ("heun", {"s_churn": -1.0}, "s_churn=-1.0 must be"),
        ("heun", {"s_noise": float("nan")}, "s_noise=nan must be"),
        ("heun", {"space": "x0"}, "space='x0' is unknown"),
        ("dpm_2", {"s_churn": float("nan")}, "s_churn=nan must be"),
        ("dpmpp_3m", {"exact": True}, "no option 'exact'"),
    ],
)
def test_options_that_cannot_be_used(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fs.solvers.build(name, fs.VP.linear(), 5, prediction="eps", **settings)
