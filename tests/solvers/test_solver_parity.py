"""Parity with the installed diffusers, in float32 to 1e-5, on grids where no rounding of times comes between.

Discrete schedulers: 9 steps divide 999 evenly ("linspace" with final_sigmas_type="sigma_min"); "leading" and
"trailing" spacing with 10 steps. The noise process is built from the scheduler's own ``alphas_cumprod``,
which diffusers computes in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastsample as fs

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # the "dpmsolver" forms are deprecated there

TOLERANCE = 1e-5
SHAPE = (4, 3, 6, 6)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
LINSPACE = torch.linspace(999, 0, 10).double()  # 9 intervals
TO_ZERO = torch.cat([LINSPACE, torch.tensor([-1.0]).double()])  # and on to zero noise
LEADING = torch.cat([torch.arange(900, -1, -100), torch.tensor([-1])]).double()

_MIX = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)) / 2


def network(x: Tensor, t: Tensor) -> Tensor:
    """A fixed nonlinear function of state and time (in units of the 1000 training steps)."""
    when = (t.reshape(-1)[:1].double() / 1000).to(x.dtype)
    mixed = torch.einsum("ij,bjhw->bihw", _MIX.to(x), x)
    rest = 0.4 * torch.tanh(mixed + 2 * when - 1) + 0.2 * torch.sin(3 * when) * mixed
    return (0.2 + 0.8 * when) * x + (1.05 - when) * rest  # mostly noise at much noise: samples of size one


def process_of(scheduler: Any) -> fs.VP:
    return fs.VP.from_alphas_cumprod(scheduler.alphas_cumprod.double())


def theirs(
    scheduler: Any, steps: int, x: Tensor, net: Callable[[Tensor, Tensor], Tensor] = network
) -> Tensor:
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


def ours(
    process: fs.Process,
    solver: str,
    grid: Tensor,
    x: Tensor,
    prediction: str = "eps",
    net: Callable[[Tensor, Tensor], Tensor] = network,
    **options: Any,
) -> Tensor:
    denoiser = fs.wrap(net, process, prediction)
    return fs.Sampler(denoiser, solver, grid=grid, **options)(x=x)


def assert_close(a: Tensor, b: Tensor) -> None:
    worst = float((a - b).abs().max())
    assert worst < TOLERANCE, f"largest difference {worst:.3g}"


def ve_state(process: fs.VP, x: Tensor, t: float) -> Tensor:
    """The state of schedulers that work with ``x / alpha``."""
    return x / float(process.alpha(t))


# -- first order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spacing", "grid"), [("leading", "leading"), ("trailing", "trailing")])
@pytest.mark.parametrize("solver", ["ddim", "euler", "dpm_solver_1"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim(spacing: str, grid: str, solver: str, prediction: str) -> None:
    scheduler = diffusers.DDIMScheduler(
        **BETAS,
        timestep_spacing=spacing,
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=True,
    )
    found = fs.Sampler(fs.wrap(network, process_of(scheduler), prediction), solver, 10, grid=grid)(x=NOISE)
    assert_close(found, theirs(scheduler, 10, NOISE))


def test_ddim_clips_as_a_hook() -> None:
    """A clipped x0 goes with the noise that belongs to it: diffusers' use_clipped_model_output=True."""
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=True, set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    process = process_of(scheduler)
    x = NOISE
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, use_clipped_model_output=True).prev_sample
    found = fs.Sampler(fs.wrap(network, process, "eps"), "ddim", 10, grid="leading", hooks=[fs.hooks.Clip()])
    assert_close(found(x=NOISE), x)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler(prediction: str) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(
        **BETAS, timestep_spacing="linspace", prediction_type=prediction
    )
    process = process_of(scheduler)
    found = ours(process, "euler", TO_ZERO, NOISE, prediction)
    assert_close(found, theirs(scheduler, 10, ve_state(process, NOISE, 999)))


# -- Adams ---------------------------------------------------------------------------------------------------


def test_lms() -> None:
    scheduler = diffusers.LMSDiscreteScheduler(**BETAS, timestep_spacing="linspace")
    process = process_of(scheduler)
    found = ours(process, "lms", TO_ZERO, NOISE, order=4)
    assert_close(found, theirs(scheduler, 10, ve_state(process, NOISE, 999)))


@pytest.mark.parametrize(("solver", "skip_prk", "nfe"), [("pndm", False, 19), ("plms", True, 11)])
def test_pndm(solver: str, skip_prk: bool, nfe: int) -> None:
    scheduler = diffusers.PNDMScheduler(
        **BETAS, timestep_spacing="leading", skip_prk_steps=skip_prk, set_alpha_to_one=True
    )
    found = ours(process_of(scheduler), solver, LEADING, NOISE)
    assert_close(found, theirs(scheduler, 10, NOISE))
    assert len(scheduler.timesteps) == nfe
    assert fs.solvers.build(solver, process_of(scheduler), grid=LEADING).nfe == nfe


def test_ipndm() -> None:
    """diffusers' IPNDM lives on TrigFlow's angle with a v-prediction; compared from its second point on.

    At its first point alpha = 0, and it divides what should be ``alpha x_0`` by ``max(alpha, 1e-8)``: its
    first step ignores the network.
    """
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(10)
    angles = torch.cat([scheduler.timesteps.double() * torch.pi / 2, torch.zeros(1).double()])

    first = scheduler.step(torch.full(SHAPE, 7.0), scheduler.timesteps[0], NOISE).prev_sample
    assert_close(first, float(angles[1].sin()) * NOISE)  # 7 does not matter

    def net(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t * 1000)

    scheduler.set_timesteps(10)
    x = NOISE
    for t in scheduler.timesteps[1:]:
        x = scheduler.step(net(x, t * torch.pi / 2), t, x).prev_sample
    assert_close(ours(fs.TrigFlow(), "ipndm", angles[1:], NOISE, "v", net), x)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order: int) -> None:
    """diffusers' DEIS interpolates in log rho: ``deis_logrho`` (lower_order_final acts below 15 steps)."""
    scheduler = diffusers.DEISMultistepScheduler(**BETAS, solver_order=order, lower_order_final=False)
    found = ours(process_of(scheduler), "deis_logrho", LINSPACE, NOISE, order=order)
    assert_close(found, theirs(scheduler, 9, NOISE))


# -- DPM-Solver ----------------------------------------------------------------------------------------------

_FAMILY = {"dpmsolver": "dpm_solver", "dpmsolver++": "dpmpp"}


@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize(
    ("order", "solver_type"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")]
)
@pytest.mark.parametrize("lowered", [True, False])
def test_dpm_multistep(algorithm: str, order: int, solver_type: str, lowered: bool) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS,
        algorithm_type=algorithm,
        solver_type=solver_type,
        solver_order=order,
        lower_order_final=lowered,
        final_sigmas_type="sigma_min",
        timestep_spacing="linspace",
    )
    process = process_of(scheduler)
    if order == 1:
        found = ours(process, "ddim", LINSPACE, NOISE)
    else:
        options: dict[str, Any] = {"lower_order_final": lowered}
        options |= {"solver_type": solver_type} if order == 2 else {}
        found = ours(process, f"{_FAMILY[algorithm]}_{order}m", LINSPACE, NOISE, **options)
    assert_close(found, theirs(scheduler, 9, NOISE))


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_dpm_multistep_to_zero(order: int, prediction: str) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS,
        solver_order=order,
        final_sigmas_type="zero",
        timestep_spacing="linspace",
        prediction_type=prediction,
    )
    process = process_of(scheduler)
    grid = torch.cat([LINSPACE[:-1], torch.tensor([-1.0]).double()])
    found = ours(process, f"dpmpp_{order}m", grid, NOISE, prediction)
    assert_close(found, theirs(scheduler, 9, NOISE))


@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize(("order", "solver_type"), [(2, "midpoint"), (2, "heun"), (3, "heun")])
def test_dpm_singlestep(algorithm: str, order: int, solver_type: str) -> None:
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        **BETAS,
        algorithm_type=algorithm,
        solver_type=solver_type,
        solver_order=order,
        lower_order_final=True,
        final_sigmas_type="sigma_min",
    )
    solver = f"{_FAMILY[algorithm]}_{order}s"
    found = ours(process_of(scheduler), solver, LINSPACE, NOISE, solver_type=solver_type)
    assert_close(found, theirs(scheduler, 9, NOISE))


def _singlestep_3(process: fs.VP, groups: list[int], x: Tensor, halved_stage: bool) -> Tensor:
    """DPM-Solver++(3S) in so many words (Lu et al. 2022b, appendix), stages at the points of LINSPACE.

    ``halved_stage`` puts ``(1 - e^-h) / 2`` for ``(e^-h - 1) / h + 1`` in the second stage.
    """

    def x0(x: Tensor, t: float) -> Tensor:
        return (x - float(process.sigma(t)) * network(x, torch.tensor([t]))) / float(process.alpha(t))

    def step(x: Tensor, s: float, t: float, m: Tensor) -> Tensor:
        alpha, ratio = float(process.alpha(t)), float(process.sigma(t) / process.sigma(s))
        return ratio * x - alpha * np.expm1(-lam(s, t)) * m

    def lam(s: float, t: float) -> float:
        return float(process.lam(t) - process.lam(s))

    def phi(h: float, halved: bool) -> float:
        return -np.expm1(-h) / 2 if halved else np.expm1(-h) / h + 1

    first = 0
    for size in groups:
        s, *inner, t = LINSPACE[first : first + size + 1].tolist()
        first += size
        m, slope, h = x0(x, s), torch.zeros_like(x), lam(s, t)
        for i, u in enumerate(inner):
            stage = step(x, s, u, m)
            if i:
                stage = stage + float(process.alpha(u)) * phi(lam(s, u), halved_stage) * slope * lam(s, u)
            slope = (x0(stage, u) - m) / lam(s, u)
        x = step(x, s, t, m) + float(process.alpha(t)) * phi(h, size == 2) * slope * h
    return x


def test_dpm_singlestep_order_3_midpoint() -> None:
    """diffusers takes the second stage of order 3 by a midpoint rule; the official code, and ours, do not."""
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        **BETAS, solver_order=3, lower_order_final=True, final_sigmas_type="sigma_min"
    )
    process, groups = process_of(scheduler), [3, 3, 2, 1]
    official, halved = (_singlestep_3(process, groups, NOISE.double(), h).float() for h in (False, True))
    assert_close(ours(process, "dpmpp_3s", LINSPACE, NOISE), official)
    assert_close(theirs(scheduler, 9, NOISE), halved)
    assert float((official - halved).abs().max()) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("order", "solver_type", "steps"), [(2, "midpoint", 8), (3, "heun", 9), (3, "heun", 10), (3, "heun", 11)]
)
def test_dpm_singlestep_to_zero(order: int, solver_type: str, steps: int) -> None:
    """The last step to zero noise is of order 1 whatever the number of steps; both arrange the rest alike."""
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        **BETAS, solver_order=order, solver_type=solver_type, lower_order_final=True, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    grid = torch.cat([scheduler.timesteps.double(), torch.tensor([-1.0]).double()])
    found = ours(process_of(scheduler), f"dpmpp_{order}s", grid, NOISE, solver_type=solver_type)
    assert_close(found, theirs(scheduler, steps, NOISE))


def test_dpm_2() -> None:
    """Its stages lie between integers, where diffusers' time is another function of sigma."""
    scheduler = diffusers.KDPM2DiscreteScheduler(**BETAS, timestep_spacing="linspace")
    process = process_of(scheduler)
    reference = theirs(scheduler, 10, ve_state(process, NOISE, 999))
    log_sigmas = scheduler.log_sigmas.numpy()

    def net(x: Tensor, t: Tensor) -> Tensor:
        rho = process.rho(t[:1].double()).numpy()
        return network(x, torch.from_numpy(scheduler._sigma_to_t(rho, log_sigmas)))

    assert_close(ours(process, "dpm_2", TO_ZERO, NOISE, net=net), reference)


# -- UniPC ---------------------------------------------------------------------------------------------------


def _unipc(variant: str, order: int, predict_x0: bool, lowered: bool) -> tuple[Any, dict[str, Any]]:
    common = {"predict_x0": predict_x0, "lower_order_final": lowered}
    scheduler = diffusers.UniPCMultistepScheduler(
        **BETAS, solver_type=variant, solver_order=order, final_sigmas_type="sigma_min", **common
    )
    return scheduler, {"order": order, "variant": variant, **common}


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_unipc(variant: str, order: int, predict_x0: bool) -> None:
    scheduler, options = _unipc(variant, order, predict_x0, True)
    found = ours(process_of(scheduler), "unipc", LINSPACE, NOISE, **options)
    assert_close(found, theirs(scheduler, 9, NOISE))


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("lowered", [True, False])
def test_unipc_in_float64(variant: str, order: int, predict_x0: bool, lowered: bool) -> None:
    """With sigmas in float64 the two agree to rounding, also where high orders at the end amplify it."""
    scheduler, options = _unipc(variant, order, predict_x0, lowered)
    process = process_of(scheduler)
    scheduler.set_timesteps(9)
    scheduler.sigmas = process.rho(LINSPACE)
    x = NOISE.double()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    found = ours(process, "unipc", LINSPACE, NOISE.double(), **options)
    assert float((found - x).abs().max()) < 1e-11


def test_unipc_bh1_to_zero_noise() -> None:
    """diffusers' bh1 multiplies an infinite B(h) by zero on the step to zero noise: NaN. Ours is finite."""
    scheduler = diffusers.UniPCMultistepScheduler(**BETAS, solver_type="bh1", final_sigmas_type="zero")
    scheduler.set_timesteps(9)
    x, before = NOISE, NOISE
    for t in scheduler.timesteps:
        before, x = x, scheduler.step(network(x, t), t, x).prev_sample
    assert bool(torch.isfinite(before).all())
    assert bool(torch.isnan(x).all())
    process = process_of(scheduler)
    grid = torch.cat([LINSPACE[:-1], torch.tensor([-1.0]).double()])
    sampler = fs.Sampler(fs.wrap(network, process, "eps"), "unipc", grid=grid, order=2, variant="bh1")
    found, trajectory = sampler(x=NOISE, return_trajectory=True)
    assert_close(trajectory.x[-2], before)
    assert bool(torch.isfinite(found).all())


# -- Heun ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_heun(prediction: str) -> None:
    scheduler = diffusers.HeunDiscreteScheduler(
        **BETAS, timestep_spacing="linspace", prediction_type=prediction
    )
    process = process_of(scheduler)
    found = ours(process, "heun", TO_ZERO, NOISE, prediction)
    assert_close(found, theirs(scheduler, 10, ve_state(process, NOISE, 999)))
    assert len(scheduler.timesteps) == fs.solvers.build("heun", process, grid=TO_ZERO).nfe == 19


# -- flows ---------------------------------------------------------------------------------------------------


def _flow_net(x: Tensor, t: Tensor) -> Tensor:
    return network(x, t * 1000)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("solver", "cls"), [("euler", "Euler"), ("heun", "Heun")])
def test_flow_match(solver: str, cls: str, shift: float) -> None:
    scheduler = getattr(diffusers, f"FlowMatch{cls}DiscreteScheduler")(shift=shift)
    scheduler.set_timesteps(10)
    grid = torch.cat([scheduler.timesteps.double().unique().flip(0) / 1000, torch.zeros(1).double()])
    x = NOISE
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    assert_close(ours(fs.Flow(shift), solver, grid, NOISE, "flow", _flow_net), x)


@pytest.mark.parametrize(
    ("cls", "options", "solver", "mine"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 2}, "dpmpp_2m", {}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpmpp_3m", {}),
        ("UniPCMultistepScheduler", {"solver_order": 2}, "unipc", {"order": 2}),
        ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc", {"order": 3}),
    ],
)
def test_flow_sigmas(cls: str, options: dict[str, Any], solver: str, mine: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, cls)(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=2.0,
        final_sigmas_type="zero",
        **options,
    )
    scheduler.set_timesteps(9)
    grid = scheduler.sigmas.double()
    x = NOISE
    for i, t in enumerate(scheduler.timesteps):  # truncated to integers; the network is told sigma itself
        x = scheduler.step(_flow_net(x, grid[i]), t, x).prev_sample
    assert_close(ours(fs.Flow(), solver, grid, NOISE, "flow", _flow_net, **mine), x)


# -- EDM -----------------------------------------------------------------------------------------------------


def _edm_denoiser() -> Callable[[Tensor, Tensor], Tensor]:
    """EDM's preconditioned denoiser around the same network, as the schedulers apply it."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        sigma = t.reshape(-1)[:1].float()
        c_in = 1 / (sigma**2 + 0.25) ** 0.5
        out = network(x * c_in, sigma.log() / 4 * 1000)
        return 0.25 / (sigma**2 + 0.25) * x + sigma * 0.5 * c_in * out

    return net


@pytest.mark.parametrize(
    ("cls", "options", "solver"),
    [
        ("EDMEulerScheduler", {}, "euler"),
        ("EDMDPMSolverMultistepScheduler", {"solver_order": 2}, "dpmpp_2m"),
        ("EDMDPMSolverMultistepScheduler", {"solver_order": 2, "solver_type": "heun"}, "dpmpp_2m"),
        ("EDMDPMSolverMultistepScheduler", {"solver_order": 3}, "dpmpp_3m"),
    ],
)
def test_edm(cls: str, options: dict[str, Any], solver: str) -> None:
    scheduler = getattr(diffusers, cls)(sigma_min=0.02, sigma_max=10.0, sigma_data=0.5, **options)
    scheduler.set_timesteps(9)
    x = NOISE * 10
    for t in scheduler.timesteps:  # c_noise = log(sigma) / 4
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t * 1000), t, x).prev_sample
    settings = {k: v for k, v in options.items() if k == "solver_type"}
    process = fs.EDM(sigma_min=0.02, sigma_max=10.0)
    found = ours(process, solver, scheduler.sigmas.double(), NOISE * 10, "x0", _edm_denoiser(), **settings)
    assert_close(found, x)


# -- inversion -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_inverse(algorithm: str, order: int) -> None:
    scheduler = diffusers.DPMSolverMultistepInverseScheduler(
        **BETAS, algorithm_type=algorithm, solver_order=order, timestep_spacing="linspace"
    )
    found = ours(process_of(scheduler), f"{_FAMILY[algorithm]}_{order}m", LINSPACE.flip(0), NOISE)
    assert_close(found, theirs(scheduler, 9, NOISE))


def test_ddim_inverse() -> None:
    """diffusers tells the network the time a step leads to, not the state's; told the same, ours agrees."""
    scheduler = diffusers.DDIMInverseScheduler(**BETAS, set_alpha_to_one=True, clip_sample=False)
    reference = theirs(scheduler, 10, NOISE)
    targets = iter(scheduler.timesteps)
    grid = torch.cat([torch.tensor([-1.0]).double(), scheduler.timesteps.double()])
    found = ours(process_of(scheduler), "ddim", grid, NOISE, net=lambda x, t: network(x, next(targets)))
    assert_close(found, reference)


# -- where diffusers differs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [9, 27])
def test_lower_order_final_without_a_setting(steps: int) -> None:
    """Unset, the official code lowers the last orders below 10 steps and ours does; diffusers below 15."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, solver_order=3, final_sigmas_type="sigma_min")
    grid = torch.linspace(999, 0, steps + 1).double()
    assert_close(ours(process_of(scheduler), "dpmpp_3m", grid, NOISE), theirs(scheduler, steps, NOISE))


def test_third_order_by_its_difference_to_the_exact_form() -> None:
    """diffusers' order 3 is the published form, far from the exact one."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, solver_order=3, final_sigmas_type="sigma_min")
    reference = theirs(scheduler, 27, NOISE)
    grid = torch.linspace(999, 0, 28).double()
    exact = ours(process_of(scheduler), "dpmpp_3m_exact", grid, NOISE)
    assert float((exact - reference).abs().max()) > 100 * TOLERANCE
    assert np.isfinite(float(exact.abs().max()))
