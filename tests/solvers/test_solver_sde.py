"""Stochastic solvers: moments carried by the table itself, shared noise, deterministic limits, and parity."""

from __future__ import annotations

import importlib
import itertools
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers_gaussian import Gaussian, check_for_every_prediction, ends_of, moments, states, weak_error
from scipy.integrate import quad
from torch import Tensor

import fastsample as fs
from fastsample import solvers
from fastsample.executor import Run, execute
from fastsample.plan import Plan
from fastsample.process import Process
from fastsample.solvers import sde

NAMES = (
    "ddpm",
    "euler_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_1_sde",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "dpmpp_3m_sde_exact",
    "sa_solver",
    "er_sde",
    "er_sde_exact",
)
VP = fs.VP.linear()
PROCESSES: list[Process] = [
    VP,
    fs.VP.cosine(),
    VP.rescaled_zero_snr(),
    fs.VE(),
    fs.EDM(),
    fs.Flow(),
    fs.Flow(3.0),
    fs.TrigFlow(),
    VP.quantized(torch.arange(1000)),
]
# some that tell apart what the defaults do not
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    ("euler_ancestral", {"eta": 0.5}),
    ("euler_ancestral", {"eta": 1.3}),
    ("euler_ancestral", {"form": "flow"}),
    ("dpmpp_2s_ancestral", {"form": "flow", "eta": 0.7}),
    ("dpmpp_sde", {"eta": 0.5, "r": 0.3}),
    ("dpmpp_2m_sde", {"solver_type": "heun", "eta": 0.4}),
    ("sa_solver", {"tau": 0.4, "predictor_order": 3, "corrector_order": 4, "rescale": True}),
    ("sa_solver", {"s_tmin": 0.1, "s_tmax": 5.0}),
    *(("er_sde", {"noise_scale": scale}) for scale in sde.NOISE_SCALES),
]


def ids(value: object) -> str | None:
    if isinstance(value, Process):
        return f"{value!r:.24}"
    return "-".join(f"{k}={v}" for k, v in value.items()) or "default" if isinstance(value, dict) else None


def random_grid(process: Process, steps: int, seed: int, low: float = -3.0, high: float = 3.0) -> Tensor:
    """Times of unequal steps in lambda, by factors up to three."""
    generator = torch.Generator().manual_seed(seed)
    widths = 0.5 + torch.rand(steps, dtype=torch.float64, generator=generator)
    lam = low + (high - low) * torch.cat([torch.zeros(1), widths.cumsum(0) / widths.sum()]).double()
    return process.t_of_lam(lam)


# -- moments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=ids)
@pytest.mark.parametrize("process", [VP, fs.EDM(), fs.Flow()], ids=ids)
def test_noise_is_consistent_at_every_row(name: str, options: dict[str, Any], process: Process) -> None:
    """On data of one point every state, stages included, has exactly mean alpha x_0 and deviation sigma."""
    plan = solvers.build(name, process, grid=random_grid(process, 7, 0), **options)
    point = Gaussian(mean=0.7, variance=0.0)
    for state, v in zip(states(plan, point)[1:], plan.values, strict=True):
        mean, deviation = moments(state)
        assert mean == pytest.approx(v.alpha * 0.7, abs=1e-12 * (1 + v.sigma))
        assert deviation == pytest.approx(v.sigma, rel=1e-11)


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_large_variance_is_exact_on_unit_normal_data(steps: int) -> None:
    """``fixed_large`` is the right reverse variance for N(0, 1), and on VP it is ``beta_t``."""
    plan = solvers.build("ddpm", VP, steps, end="sigma_min", variance="fixed_large")
    for state in states(plan, Gaussian(0.0, 1.0)):
        assert moments(state) == (pytest.approx(0.0, abs=1e-15), pytest.approx(1.0, rel=1e-12))
    one = solvers.build("ddpm", VP, grid=[501, 500], variance="fixed_large").values[-1].c[0]
    betas = np.linspace(1e-4, 0.02, 1000)
    assert one**2 == pytest.approx(betas[501], rel=1e-9)


# weak order on Gaussian data: first-order methods 1; where drift is integrated to order 2 or more, 2
RATES: list[tuple[str, dict[str, Any], float]] = [
    ("ddpm", {}, 1),
    ("ddpm", {"variance": "fixed_large"}, 1),
    ("euler_ancestral", {}, 1),
    ("euler_ancestral", {"eta": 0.5}, 1),
    ("euler_ancestral", {"form": "flow"}, 1),
    ("dpmpp_2s_ancestral", {}, 2),
    ("dpmpp_2s_ancestral", {"form": "flow", "eta": 0.5}, 2),
    ("dpmpp_sde", {}, 2),
    ("dpmpp_sde", {"eta": 0.5}, 2),
    ("dpmpp_1_sde", {}, 1),
    ("dpmpp_2m_sde", {"lower_order_final": False}, 2),
    ("dpmpp_2m_sde", {"solver_type": "heun"}, 2),
    ("dpmpp_2m_sde", {"eta": 0.25, "lower_order_final": False}, 2),
    ("dpmpp_3m_sde", {"lower_order_final": False}, 2),
    ("dpmpp_3m_sde_exact", {"lower_order_final": False}, 2),
    ("sa_solver", {"predictor_order": 3, "corrector_order": 4}, 2),
    ("sa_solver", {"tau": 0.3, "predictor_order": 3, "corrector_order": 4, "lower_order_final": False}, 2),
    ("er_sde", {"order": 1}, 1),
    ("er_sde", {"order": 2}, 2),
    ("er_sde", {}, 2),
    ("er_sde_exact", {"noise_scale": "sde"}, 2),
    ("er_sde_exact", {"noise_scale": "ode"}, 3),
]


@pytest.mark.parametrize(("name", "options", "rate"), RATES, ids=ids)
def test_weak_rate(name: str, options: dict[str, Any], rate: float) -> None:
    errors = []
    for steps in (160, 320):
        grid = VP.t_of_lam(torch.linspace(-3.0, 2.0, steps + 1, dtype=torch.float64))
        mean, deviation = weak_error(solvers.build(name, VP, grid=grid, **options), Gaussian())
        assert mean < 1e-10  # the mean of the perfect network at the mean is the mean
        errors.append(deviation)
    assert math.log2(errors[0] / errors[1]) == pytest.approx(rate, abs=0.15)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddpm", {}),
        ("dpmpp_1_sde", {}),
        ("dpmpp_2m_sde", {}),
        ("dpmpp_sde", {}),
        ("sa_solver", {}),
        ("er_sde", {"noise_scale": "sde"}),
    ],
    ids=ids,
)
def test_memory_of_the_start_is_that_of_the_reverse_process(name: str, options: dict[str, Any]) -> None:
    """With tau = 1 start and end are jointly as in the forward process: cov = (alpha_s / alpha_t) var_t."""
    grid = VP.t_of_lam(torch.linspace(-1.0, 1.0, 401, dtype=torch.float64))
    plan, data = solvers.build(name, VP, grid=grid, **options), Gaussian()
    (alpha_s, sigma_s), (alpha_t, sigma_t) = ends_of(plan)
    var_s, var_t = (data.marginal(a, s)[1] ** 2 for a, s in ((alpha_s, sigma_s), (alpha_t, sigma_t)))
    kept = states(plan, data)[-1][1] / math.sqrt(var_s)
    assert kept == pytest.approx(alpha_s / alpha_t * var_t / var_s, rel=5e-3)


@pytest.mark.parametrize(("eta", "r"), [(1.0, 0.5), (1.0, 0.3)])
def test_stage_and_step_share_the_brownian_path(eta: float, r: float) -> None:
    """Given x_0 and y_s, ``y = x / alpha`` is a Brownian bridge in rho^2.

    So ``cov(y_t, y_m) = rho_t^2 (1 - rho_m^2 / rho_s^2)``.
    """
    plan = solvers.build("dpmpp_sde", VP, grid=[900.0, 500.0], eta=eta, r=r)
    _, stage, step = states(plan, Gaussian(0.7, 0.0))[-3:]
    middle, last = plan.values[-2], plan.values[-1]
    covariance = float(np.dot(stage[2:], step[2:])) / (middle.alpha * last.alpha)
    rho_s, rho_m, rho_t = (float(VP.rho(t)) for t in (900.0, middle.t, last.t))
    assert covariance == pytest.approx(rho_t**2 * (1 - rho_m**2 / rho_s**2), rel=1e-10)


# -- limits and identities -----------------------------------------------------------------------------------


def field(x: Tensor, t: Tensor) -> Tensor:
    """A smooth v-network, far from linear, that depends on every element and on time."""
    time = (t.to(x) / 1000).reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(1.3 * x + 0.4 * x.roll(1, -1) - time) + 0.3 * torch.sin(2 * x + time)


def timeless(x: Tensor, t: Tensor) -> Tensor:
    """The same without time, for peers whose time between integers is another."""
    return field(x, torch.zeros_like(t))


def noises(
    count: int, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (2, 3, 4, 4)
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def run(plan: Plan, x: Tensor, drawn: list[Tensor], net: Any = field, process: Process = VP) -> Tensor:
    denoiser = fs.wrap(net, process, plan.prediction)
    bound = denoiser.bind(x.shape[0], {}, x.device)
    return execute(plan, x, Run(bound, lambda stream, like: drawn[stream - 1].to(like)))


GRID = VP.t_of_lam(torch.tensor([-4.0, -2.4, -1.5, -0.2, 0.4, 1.7, 2.1, 3.0], dtype=torch.float64))
TWINS: list[tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = [
    (("euler_ancestral", {"eta": 0.0}), ("euler", {})),
    (("dpmpp_1_sde", {"eta": 0.0}), ("ddim", {})),
    (("dpmpp_2s_ancestral", {"eta": 0.0}), ("dpmpp_sde", {"eta": 0.0})),
    (("dpmpp_2m_sde", {"eta": 0.0, "lower_order_final": False}), ("dpmpp_2m", {"lower_order_final": False})),
    (
        ("dpmpp_2m_sde", {"eta": 0.0, "solver_type": "heun", "lower_order_final": False}),
        ("exp_adams", {"order": 2}),
    ),
    (("dpmpp_3m_sde_exact", {"eta": 0.0}), ("exp_adams", {"order": 3, "lower_order_final": True})),
    (
        ("sa_solver", {"tau": 0.0, "predictor_order": 3, "corrector_order": 4, "lower_order_final": False}),
        ("exp_adams", {"order": 3, "corrector": True}),
    ),
    (
        ("er_sde_exact", {"noise_scale": "ode"}),
        ("exp_adams", {"order": 3, "variable": "rho"}),
    ),
    (("er_sde", {"noise_scale": "ode", "order": 2}), ("exp_adams", {"order": 2, "variable": "rho"})),
    # with noise, by different routes
    (("ddpm", {}), ("ddim", {"eta": 1.0})),
    (("ddpm", {}), ("euler_ancestral", {"eta": 1.0})),
    (("ddpm", {}), ("dpmpp_1_sde", {"eta": 1.0})),
    (("ddpm", {}), ("er_sde", {"noise_scale": "sde", "order": 1})),
    (("euler_ancestral", {"eta": 0.6}), ("ddim", {"eta": 0.6})),
    (
        ("sa_solver", {"tau": 1.2, "predictor_order": 3, "corrector_order": 0}),
        ("dpmpp_3m_sde_exact", {"eta": 1.44}),
    ),
    (("sa_solver", {"tau": 0.7, "s_tmin": 1e9}), ("sa_solver", {"tau": 0.0})),
]


@pytest.mark.parametrize(("one", "other"), TWINS, ids=lambda v: f"{v[0]}-{ids(v[1])}")
def test_twins(one: tuple[str, dict[str, Any]], other: tuple[str, dict[str, Any]]) -> None:
    """Without noise each solver is its deterministic twin; methods that are one method agree."""
    drawn = noises(20)
    a, b = (
        run(solvers.build(name, VP, grid=GRID, prediction="v", **kw), drawn[-1], drawn)
        for name, kw in (one, other)
    )
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_published_third_order_without_noise_is_dpmpp_3m() -> None:
    """Once there are three predictions: k-diffusion's second step is the exact one, DPM-Solver's is not."""
    one = solvers.build("dpmpp_3m_sde", VP, grid=GRID, eta=0.0, lower_order_final=False).values
    other = solvers.build("dpmpp_3m", VP, grid=GRID, lower_order_final=False).values
    for a, b in list(zip(one, other, strict=True))[3:]:
        assert (*a.a, *a.b) == pytest.approx((*b.a, *b.b), rel=1e-9)


@pytest.mark.parametrize("name", [n for n in NAMES if {"eta", "tau"} & set(solvers.options(n))])
def test_without_noise_the_reversed_grid_inverts(name: str) -> None:
    option = "eta" if "eta" in solvers.options(name) else "tau"
    grid = VP.t_of_lam(torch.linspace(-2.0, 2.0, 161, dtype=torch.float64))
    x = noises(1)[0]
    there = run(solvers.build(name, VP, grid=grid, prediction="v", **{option: 0.0}), x, [])
    back = run(solvers.build(name, VP, grid=grid.flip(0), prediction="v", **{option: 0.0}), there, [])
    assert float((back - x).abs().max()) < (0.1 if name in ("euler_ancestral", "dpmpp_1_sde") else 2e-3)


# -- every process, prediction, end and number of steps ------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=ids)
@pytest.mark.parametrize("name", NAMES)
def test_finite_everywhere(name: str, process: Process) -> None:
    """Plans refuse coefficients that are not finite, so building is the test."""
    for end, steps in itertools.product(("zero", "sigma_min"), (1, 2, 5, 50)):
        plan = solvers.build(name, process, steps, prediction="v", end=end)
        check_for_every_prediction(plan)
        assert Plan.from_json(plan.to_json()) == plan
    if not bool(process.alpha(process.t_start) > 0):
        with pytest.raises(ValueError, match="zero signal-to-noise"):
            solvers.build(name, process, 5, prediction="eps")


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_finite(name: str) -> None:
    for process, prediction in ((VP, "eps"), (fs.Flow(), "flow"), (fs.EDM(), "x0")):
        denoiser = fs.wrap(lambda x, t: torch.tanh(x), process, prediction)
        assert torch.isfinite(fs.Sampler(denoiser, name, steps=6)(shape=(2, 3, 4, 4))).all()


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=ids)
def test_differentiable_in_the_grid(name: str, options: dict[str, Any]) -> None:
    """The gradient with respect to each time is the table's finite difference."""

    times = random_grid(VP, 5, 3, -2.0, 2.0)
    leaf = times.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(digest(solvers.build(name, VP, grid=leaf, **options)), leaf)
    for i in range(len(times)):
        moved = [times.clone(), times.clone()]
        moved[0][i] -= 1e-4
        moved[1][i] += 1e-4
        low, high = (digest(solvers.build(name, VP, grid=m, **options)) for m in moved)
        assert float(gradient[i]) == pytest.approx(float(high - low) / 2e-4, rel=1e-4, abs=1e-6)
    for process, ends in ((VP, (999.0, -1.0)), (fs.Flow(), (1.0, 0.0))):
        inner = torch.linspace(ends[0], ends[1], 6, dtype=torch.float64)[1:-1].requires_grad_()
        first, last = (torch.tensor([t], dtype=torch.float64) for t in ends)
        plan = solvers.build(name, process, grid=torch.cat([first, inner, last]), prediction="v", **options)
        assert torch.isfinite(torch.autograd.grad(digest(plan), inner)[0]).all()


def digest(plan: Plan) -> Tensor:
    """A number that depends on every entry of a table (zero coefficients count as absent ones)."""
    total = torch.zeros((), dtype=torch.float64)
    for r, row in enumerate(plan.rows):
        for column, value in zip(row.columns, plan.numbers[row.offset :], strict=False):
            total = total + math.cos(r + sum(map(ord, column))) * value
    return total


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddpm", {"variance": "fixed_smal"}, "did you mean 'fixed_small'"),
        ("euler_ancestral", {"eta": -1.0}, "eta=-1.0"),
        ("euler_ancestral", {"form": "vp"}, "form='vp'"),
        ("dpmpp_sde", {"r": 0.0}, "r=0.0"),
        ("dpmpp_sde", {"s_noise": math.nan}, "s_noise=nan"),
        ("dpmpp_2m_sde", {"solver_type": "huen"}, "did you mean 'heun'"),
        ("dpmpp_2m_sde", {"order": 3}, "no option 'order'"),
        ("sa_solver", {"predictor_order": 0}, "predictor_order=0"),
        ("sa_solver", {"corrector_order": -1}, "corrector_order=-1"),
        ("er_sde", {"order": 4}, "order=4"),
        ("er_sde", {"noise_scale": "sde_9"}, "noise_scale='sde_9'"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solvers.build(name, VP, 5, **options)


@pytest.mark.parametrize("name", NAMES)
def test_noise_towards_more_noise_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="towards more noise"):
        solvers.build(name, VP, grid=[100.0, 500.0])


# -- ER-SDE against its algorithm written out ----------------------------------------------------------------

PHI: dict[str, Callable[[float], float]] = {
    "ode": lambda x: x,
    "sde": lambda x: x**2,
    "sde_1": lambda x: x * (math.exp(-1 / x) + 10),
    "sde_2": lambda x: x**1.5,
    "sde_3": lambda x: x**2.5,
    "sde_4": lambda x: x**0.9 * math.log10(1 + 100 * x**1.5),
    "sde_5": lambda x: x * (math.exp(x**0.3) + 10),
}


@pytest.mark.parametrize("scale", PHI)
def test_er_sde_is_the_published_algorithm(scale: str) -> None:
    """Cui et al. 2023, algorithm 3 (VP), its integrals by adaptive quadrature."""
    phi = PHI[scale]
    drawn = noises(8)
    x = drawn[-1]
    ours = run(
        solvers.build("er_sde", VP, grid=GRID, prediction="v", noise_scale=scale, s_noise=0.9), x, drawn
    )
    alpha, rho = VP.alpha(GRID).tolist(), VP.rho(GRID).tolist()
    clean: list[Tensor] = []
    slopes: list[Tensor] = []
    for i in range(len(GRID) - 1):
        a, b, s, t = alpha[i], alpha[i + 1], rho[i], rho[i + 1]
        clean.append(a * x - a * s * field(x, GRID[i].expand(len(x))))
        r = phi(t) / phi(s)
        x_next = b / a * r * x + b * (1 - r) * clean[-1]
        if i >= 1:
            slopes.append((clean[-1] - clean[-2]) / (s - rho[i - 1]))
            flat = quad(lambda u: 1 / phi(u), t, s, epsabs=0, epsrel=1e-12)[0]
            x_next = x_next + b * (t - s + flat * phi(t)) * slopes[-1]
        if i >= 2:
            curve = 2 * (slopes[-1] - slopes[-2]) / (s - rho[i - 2])
            tilted = quad(lambda u, s=s: (u - s) / phi(u), t, s, epsabs=0, epsrel=1e-12)[0]
            x_next = x_next + b * ((t - s) ** 2 / 2 + tilted * phi(t)) * curve
        x = x_next + 0.9 * b * math.sqrt(max(t**2 - (s * r) ** 2, 0.0)) * drawn[i]
    torch.testing.assert_close(ours, x, rtol=1e-8, atol=1e-8)


# -- parity with diffusers, the same noise handed to both ----------------------------------------------------

schedulers = pytest.importorskip("diffusers.schedulers")
STEPS = 9  # divides 999: no rounding of times


def feed(monkeypatch: pytest.MonkeyPatch, module: str, drawn: list[Tensor]) -> None:
    """Makes a scheduler draw the given noises in turn."""
    queue: Iterator[Tensor] = iter(drawn)
    where = importlib.import_module(f"diffusers.schedulers.{module}")
    monkeypatch.setattr(where, "randn_tensor", lambda shape, **kw: next(queue))


def loop(scheduler: Any, x: Tensor, net: Any = field) -> Tensor:
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t)
        x = scheduler.step(net(given, t.expand(len(x)).to(torch.float64)), t, x).prev_sample
    return x


def both(
    monkeypatch: pytest.MonkeyPatch, scheduler: Any, module: str, plan: Plan, net: Any = field
) -> tuple[Tensor, Tensor]:
    drawn = noises(2 * STEPS + 4, torch.float32)
    feed(monkeypatch, module, drawn)
    x = drawn[-1]
    return run(plan, x, drawn, net), loop(scheduler, x, net)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_parity_ddpm(monkeypatch: pytest.MonkeyPatch, variance: str) -> None:
    scheduler = schedulers.DDPMScheduler(
        clip_sample=False, prediction_type="v_prediction", variance_type=variance
    )
    scheduler.set_timesteps(timesteps=list(range(999, -1, -111)))
    plan = solvers.build("ddpm", VP, grid=[*range(999, -1, -111), -1], prediction="v", variance=variance)
    close(*both(monkeypatch, scheduler, "scheduling_ddpm", plan))


def test_parity_euler_ancestral(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = schedulers.EulerAncestralDiscreteScheduler(
        timestep_spacing="linspace", prediction_type="v_prediction"
    )
    scheduler.set_timesteps(STEPS + 1)
    drawn = noises(STEPS + 3, torch.float32)
    feed(monkeypatch, "scheduling_euler_ancestral_discrete", drawn)
    plan = solvers.build("euler_ancestral", VP, grid=[*range(999, -1, -111), -1], prediction="v")
    ours = run(plan, drawn[-1], drawn)
    # theirs lives in x / alpha
    close(ours, loop(scheduler, drawn[-1] / VP.alpha(999.0).float()))


@pytest.mark.parametrize(
    ("order", "solver_type"), [(1, "midpoint"), (2, "midpoint"), (2, "heun")], ids=["1", "2m", "2m-heun"]
)
def test_parity_dpmpp_sde_multistep(monkeypatch: pytest.MonkeyPatch, order: int, solver_type: str) -> None:
    scheduler = multistep_scheduler(order, solver_type)
    name = {1: "dpmpp_1_sde", 2: "dpmpp_2m_sde"}[order]
    kind = {"solver_type": solver_type} if order == 2 else {}
    plan = solvers.build(name, VP, STEPS, prediction="v", end="sigma_min", lower_order_final=True, **kind)
    close(*both(monkeypatch, scheduler, "scheduling_dpmsolver_multistep", plan))


def multistep_scheduler(order: int, solver_type: str = "midpoint") -> Any:
    scheduler = schedulers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++",
        prediction_type="v_prediction",
        solver_order=order,
        solver_type=solver_type,
        final_sigmas_type="sigma_min",
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(STEPS)
    return scheduler


def wrong_third_order(monkeypatch: pytest.MonkeyPatch, steps: int, prediction: str) -> Plan:
    """``dpmpp_3m_sde`` with diffusers' error: ``- 0.5`` in the second-difference term where ``+ 0.5`` is
    right.

    The weight of that term becomes ``int v^2 dK / 2 - 1``, never small.
    """
    right = sde._moments
    with monkeypatch.context() as patch:
        patch.setattr(sde, "_moments", lambda ch, n: [*right(ch, n)[:2], *(m - 2 for m in right(ch, n)[2:])])
        return solvers.build("dpmpp_3m_sde", VP, steps, prediction=prediction, end="sigma_min")


def test_order_3_of_diffusers_has_a_sign_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """With that one sign turned in ours, the two are equal; as they are, they are far apart."""
    scheduler, module = multistep_scheduler(3, "heun"), "scheduling_dpmsolver_multistep"
    ours, theirs = both(monkeypatch, scheduler, module, wrong_third_order(monkeypatch, STEPS, "v"))
    close(ours, theirs)
    drawn = noises(2 * STEPS + 4, torch.float32)
    published = solvers.build("dpmpp_3m_sde", VP, STEPS, prediction="v", end="sigma_min")
    assert float((run(published, drawn[-1], drawn) - theirs).abs().max()) > 0.1


def test_what_that_sign_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 50 steps on Gaussian data the error of the deviation is several times that of the right forms."""
    data = Gaussian(variance=0.6)
    names = ("dpmpp_3m_sde", "dpmpp_3m_sde_exact", "dpmpp_2m_sde")
    right = [weak_error(solvers.build(n, VP, 50, end="sigma_min"), data)[1] for n in names]
    assert weak_error(wrong_third_order(monkeypatch, 50, "eps"), data)[1] > 3 * max(right)


@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("orders", [(1, 1), (2, 2), (3, 4)], ids=str)
def test_parity_sa_solver(monkeypatch: pytest.MonkeyPatch, tau: float, orders: tuple[int, int]) -> None:
    predictor, corrector = orders
    scheduler = schedulers.SASolverScheduler(
        predictor_order=predictor,
        corrector_order=corrector,
        prediction_type="v_prediction",
        tau_func=lambda t: torch.tensor(tau),
    )
    scheduler.set_timesteps(STEPS)
    # their coefficients cancel in float32; from sigmas in float64 they have the digits
    grid = torch.linspace(999.0, 0.0, STEPS + 1, dtype=torch.float64)
    scheduler.sigmas = VP.rho(grid)
    plan = solvers.build(
        "sa_solver",
        VP,
        STEPS,
        prediction="v",
        end="sigma_min",
        tau=tau,
        predictor_order=predictor,
        corrector_order=corrector,
        rescale=True,
    )
    close(*both(monkeypatch, scheduler, "scheduling_sasolver", plan))


def test_parity_dpmpp_sde(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages a step. Their time between integers is another, hence a network without time."""
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))  # for its Brownian tree only
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    scheduler = module.DPMSolverSDEScheduler(
        beta_start=1e-4, beta_end=0.02, timestep_spacing="linspace", prediction_type="v_prediction"
    )
    scheduler.set_timesteps(STEPS + 1)
    plan = solvers.build("dpmpp_sde", VP, grid=[*range(999, -1, -111), -1], prediction="v")
    drawn = noises(2 * STEPS + 4, torch.float32)
    ours = run(plan, drawn[-1], drawn, timeless)
    # what our steps draw, in units of their standard deviation: their sampler is asked for these in turn
    asked = []
    for row, v in zip(plan.rows, plan.values, strict=True):
        if row.noises:
            total = sum(c * drawn[s - 1] for s, c in zip(row.noises, v.c, strict=True))
            asked.append(total / math.hypot(*v.c))
    queue = iter(asked)
    scheduler.noise_sampler = lambda sigma, sigma_next: next(queue)
    theirs = drawn[-1] / VP.alpha(999.0).float()
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(theirs, t)
        theirs = scheduler.step(timeless(given, t.expand(len(given))), t, theirs).prev_sample
    close(ours, theirs)


@pytest.mark.parametrize(("order", "solver_type"), [(1, "midpoint"), (2, "midpoint"), (2, "heun")], ids=str)
def test_parity_edm_multistep(monkeypatch: pytest.MonkeyPatch, order: int, solver_type: str) -> None:
    """EDM's process and grid, through its preconditioning."""
    scheduler = schedulers.EDMDPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++",
        solver_order=order,
        solver_type=solver_type,
        final_sigmas_type="zero",
        lower_order_final=False,
        euler_at_final=False,
    )
    scheduler.set_timesteps(STEPS)
    drawn = noises(STEPS + 1, torch.float32)
    feed(monkeypatch, "scheduling_edm_dpmsolver_multistep", drawn)
    data = scheduler.config.sigma_data
    process = fs.EDM()

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        sigma = t.reshape(-1, *[1] * (x.ndim - 1))
        square = sigma**2 + data**2
        inner = timeless(x / square.sqrt(), t)
        return data**2 / square * x + sigma * data / square.sqrt() * inner

    name = {1: "dpmpp_1_sde", 2: "dpmpp_2m_sde"}[order]
    kind = {"solver_type": solver_type} if order == 2 else {}
    plan = solvers.build(name, process, STEPS, prediction="x0", **kind)
    theirs = start = 80.0 * drawn[-1]
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(theirs, t)
        theirs = scheduler.step(timeless(given, t.expand(len(given))), t, theirs).prev_sample
    close(run(plan, start, drawn, denoise, process), theirs)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_parity_flow_form(monkeypatch: pytest.MonkeyPatch, eta: float) -> None:
    """Euler ancestral on rectified flows (ComfyUI's form, diffusers' LTX scheduler)."""
    scheduler = schedulers.LTXEulerAncestralRFScheduler(eta=eta)
    times = torch.tensor([1.0, 0.93, 0.8, 0.55, 0.3, 0.1, 0.0])
    scheduler.set_timesteps(sigmas=times, num_inference_steps=6)
    drawn = noises(8, torch.float32)
    feed(monkeypatch, "scheduling_ltx_euler_ancestral_rf", drawn)
    process = fs.Flow()
    plan = solvers.build("euler_ancestral", process, grid=times, prediction="flow", eta=eta)
    theirs = drawn[-1]
    for t in scheduler.timesteps[:-1]:
        theirs = scheduler.step(timeless(theirs, t.expand(len(theirs))), t, theirs).prev_sample
    close(run(plan, drawn[-1], drawn, timeless, process), theirs)


def test_the_multistep_function_serves_all_its_names() -> None:
    assert all(
        solvers.get(name).function is sde.dpmpp_multistep_sde
        for name in ("dpmpp_1_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_3m_sde_exact")
    )
