"""Consistency sampling, LCM and TCD: parity with diffusers on the same noise, limits, and what is refused."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers_gaussian import Gaussian, check_for_every_prediction, moments, states
from torch import Tensor

import fastsample as fs
from fastsample import solvers
from fastsample.executor import Run, execute
from fastsample.plan import Plan
from fastsample.process import Process

NAMES = ("consistency", "lcm", "tcd")
VP = fs.VP.linear()
LATENT = fs.VP.scaled_linear()
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


def field(x: Tensor, t: Tensor) -> Tensor:
    time = (t.to(x) / 1000).reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(1.3 * x + 0.4 * x.roll(1, -1) - time) + 0.3 * torch.sin(2 * x + time)


def drawn(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def run(plan: Plan, x: Tensor, noises: list[Tensor], process: Process = VP, net: Any = field) -> Tensor:
    bound = fs.wrap(net, process, plan.prediction).bind(len(x), {}, x.device)
    return execute(plan, x, Run(bound, lambda stream, like: noises[stream - 1].to(like)))


# -- what they are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["consistency", "tcd"])
@pytest.mark.parametrize("process", [VP, fs.EDM(), fs.Flow()], ids=lambda p: f"{p!r:.12}")
def test_marginals_on_a_point(name: str, process: Process) -> None:
    """With a perfect x0 every state has the marginal of its time."""
    plan = solvers.build(name, process, 4, prediction="v")
    for state, v in zip(states(plan, Gaussian(0.7, 0.0))[1:], plan.values, strict=True):
        mean, deviation = moments(state)
        assert mean == pytest.approx(v.alpha * 0.7, rel=1e-9, abs=1e-10)
        assert deviation == pytest.approx(v.sigma, rel=1e-9, abs=1e-12)


# time 0 of a flow is clean; index 0 of a VP model is not quite, and TCD noises up from there
TWINS: list[tuple[Process, tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = [
    (VP, ("tcd", {"gamma": 0.0}), ("ddim", {})),
    (fs.Flow(), ("tcd", {"gamma": 1.0}), ("consistency", {})),
    (fs.Flow(), ("lcm", {"timestep_scaling": 1e12}), ("consistency", {})),
]


@pytest.mark.parametrize(("process", "one", "other"), TWINS, ids=["tcd-0", "tcd-1", "lcm"])
def test_limits(process: Process, one: tuple[str, Any], other: tuple[str, Any]) -> None:
    noises = drawn(6, torch.float64)
    plans = (solvers.build(name, process, 5, prediction="v", **kw) for name, kw in (one, other))
    ours, theirs = (run(plan, noises[-1], noises, process) for plan in plans)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_lcm_boundary() -> None:
    """At the least noisy time LCM's function is the identity, whatever the network says."""
    for process in (VP, fs.Flow(), fs.EDM()):
        grid = [process.t_end, process.t_zero]
        x = drawn(1)[0]
        plan = solvers.build("lcm", process, grid=grid, prediction="v")
        alpha = float(process.alpha(process.t_zero))
        torch.testing.assert_close(run(plan, x, [], process), alpha * x)


# -- parity --------------------------------------------------------------------------------------------------

schedulers = pytest.importorskip("diffusers.schedulers")


def feed(monkeypatch: pytest.MonkeyPatch, module: str, noises: list[Tensor]) -> None:
    queue: Iterator[Tensor] = iter(noises)
    where = importlib.import_module(f"diffusers.schedulers.{module}")
    monkeypatch.setattr(where, "randn_tensor", lambda shape, **kw: next(queue))


def loop(scheduler: Any, x: Tensor, net: Any = field, **options: Any) -> Tensor:
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t)
        x = scheduler.step(net(given, t.expand(len(x)).to(torch.float64)), t, x, **options).prev_sample
    return x


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_parity_lcm(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    scheduler = schedulers.LCMScheduler(
        clip_sample=False, set_alpha_to_one=True, prediction_type="v_prediction"
    )
    scheduler.set_timesteps(steps)
    noises = drawn(steps + 1)
    feed(monkeypatch, "scheduling_lcm", noises)
    grid = [*scheduler.timesteps.tolist(), -1]
    plan = solvers.build("lcm", LATENT, grid=grid, prediction="v")
    close(run(plan, noises[-1], noises, LATENT), loop(scheduler, noises[-1]))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_parity_tcd(monkeypatch: pytest.MonkeyPatch, gamma: float) -> None:
    """Their time after the jump is rounded down to an index; here it is one already."""
    scheduler = schedulers.TCDScheduler(clip_sample=False, prediction_type="v_prediction")
    times = [999, 800, 500, 200]
    scheduler.set_timesteps(timesteps=times)
    noises = drawn(6)
    feed(monkeypatch, "scheduling_tcd", noises)
    plan = solvers.build("tcd", LATENT, grid=[*times, 0], prediction="v", gamma=gamma)
    # floor(0.7 * 500) is 349 in float32; an eta a hair below gives 350
    theirs = loop(scheduler, noises[-1], eta=gamma - 1e-6 if 0 < gamma < 1 else gamma)
    close(run(plan, noises[-1], noises, LATENT), theirs)


def test_parity_consistency_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Song et al. 2023 on EDM's process: noise is put back less the model's own sigma_min."""
    scheduler = schedulers.CMStochasticIterativeScheduler()
    scheduler.set_timesteps(3)
    noises = drawn(4)
    feed(monkeypatch, "scheduling_consistency_models", noises)
    low, data = scheduler.config.sigma_min, scheduler.config.sigma_data
    process = fs.EDM()

    def function(x: Tensor, t: Tensor) -> Tensor:
        sigma = t.reshape(-1, *[1] * (x.ndim - 1)).to(x)
        skip = data**2 / ((sigma - low) ** 2 + data**2)
        out = (sigma - low) * data / torch.sqrt(sigma**2 + data**2)
        inner = x / torch.sqrt(sigma**2 + data**2)
        return skip * x + out * field(inner, torch.zeros(len(x)))

    theirs = scheduler.init_noise_sigma * noises[-1]
    start = theirs.clone()
    grid = [float(s) for s in scheduler.sigmas]
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(theirs, t)
        theirs = scheduler.step(field(given, torch.zeros(len(given))), t, theirs).prev_sample
    # their clean sample is clipped to [-1, 1] by default; so is ours, by a hook
    plan = solvers.build("consistency", process, grid=grid, prediction="x0", sigma_min=low)
    bound = fs.wrap(function, process, "x0").bind(2, {}, start.device)
    hooks = (fs.hooks.Clip(),) if scheduler.config.clip_denoised else ()
    ours = execute(plan, start, Run(bound, lambda stream, like: noises[stream - 1], hooks))
    close(ours, theirs)


def test_parity_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few-step flow models (diffusers' FlowMatchLCMScheduler) take the same loop."""
    scheduler = schedulers.FlowMatchLCMScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    noises = drawn(5)
    feed(monkeypatch, "scheduling_flow_match_lcm", noises)
    process = fs.Flow(shift=3.0)
    plan = solvers.build("consistency", process, grid=scheduler.sigmas.tolist(), prediction="flow")
    theirs = noises[-1]
    for t in scheduler.timesteps:
        theirs = scheduler.step(field(theirs, torch.zeros(2)), t, theirs).prev_sample
    close(run(plan, noises[-1], noises, process, lambda x, t: field(x, torch.zeros(2))), theirs)


# -- everywhere ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: f"{p!r:.34}")
@pytest.mark.parametrize("name", NAMES)
def test_finite_everywhere(name: str, process: Process) -> None:
    for end, steps in itertools.product(("zero", "sigma_min"), (1, 2, 5, 50)):
        plan = solvers.build(name, process, steps, prediction="v", end=end)
        check_for_every_prediction(plan)
        assert plan.nfe == plan.steps <= steps
        assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("consistency", {"sigma_min": -1.0}, "sigma_min=-1.0"),
        ("lcm", {"timestep_scaling": -1.0}, "timestep_scaling=-1.0"),
        ("tcd", {"gamma": 1.5}, "gamma=1.5"),
        ("tcd", {"s_noise": float("inf")}, "s_noise=inf"),
    ],
)
def test_bad_options(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solvers.build(name, VP, 4, **options)


@pytest.mark.parametrize("name", NAMES)
def test_only_towards_the_data(name: str) -> None:
    with pytest.raises(ValueError, match="less noise"):
        solvers.build(name, VP, grid=[100.0, 500.0])
