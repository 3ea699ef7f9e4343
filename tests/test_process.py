"""Noise processes: inverses, ends, gradients, snapping, parity with diffusers' schedules."""

from __future__ import annotations

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tables import PROCESSES

import fastsample as fs

KINDS = st.sampled_from(sorted(PROCESSES))
UNIT = st.floats(0.0, 1.0)


def times(process: fs.Process, count: int = 101, inside: bool = False) -> torch.Tensor:
    """Times from the noisy to the clean end; strictly inside where asked."""
    u = torch.linspace(0.0, 1.0, count + 2 * inside, dtype=torch.float64)
    if inside:
        u = u[1:-1]
    return process.t_start + (process.t_zero - process.t_start) * u


# -- the functions and their ends -----------------------------------------------------------------------


def test_noise_decreases_from_start_to_zero(process: fs.Process) -> None:
    t = times(process)
    alpha, sigma, lam = process.alpha(t), process.sigma(t), process.lam(t)
    assert (torch.diff(sigma / alpha) < 0).all()
    assert (torch.diff(lam) > 0).all()
    assert sigma[-1] == 0
    assert alpha[-1] == pytest.approx(1, abs=1e-15)
    assert lam[-1] == math.inf
    assert process.sigma(process.t_zero) == 0
    assert process.lam(process.t_zero) == math.inf
    assert process.sigma(process.t_end) > 0


def test_lam_rho_phi_agree_with_alpha_and_sigma(process: fs.Process) -> None:
    t = times(process, inside=True)
    alpha, sigma = process.alpha(t), process.sigma(t)
    torch.testing.assert_close(process.lam(t), (alpha / sigma).log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(process.rho(t), (-process.lam(t)).exp(), rtol=1e-12, atol=0)
    torch.testing.assert_close(process.phi(t).tan(), sigma / alpha, rtol=1e-11, atol=0)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine", "zero_snr"])
def test_vp_preserves_variance(kind: str) -> None:
    process = PROCESSES[kind]()
    t = times(process, 777)
    torch.testing.assert_close(
        process.alpha(t) ** 2 + process.sigma(t) ** 2,
        torch.ones(777, dtype=torch.float64),
        rtol=0,
        atol=1e-15,
    )


def test_flow_and_trigflow_closed_forms() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(fs.Flow().alpha(t), 1 - t)
    assert torch.equal(fs.Flow().sigma(t), t)
    angle = t * math.pi / 2
    torch.testing.assert_close(fs.TrigFlow().alpha(angle), angle.cos(), rtol=0, atol=2e-16)
    torch.testing.assert_close(fs.TrigFlow().sigma(angle), angle.sin(), rtol=0, atol=0)
    assert fs.EDM().sigma(80.0) == 80.0
    assert fs.EDM().alpha(80.0) == 1.0


@pytest.mark.parametrize("kind", ["zero_snr", "flow", "trigflow"])
def test_zero_terminal_snr_is_exact(kind: str) -> None:
    process = PROCESSES[kind]()
    t = process.t_start
    assert process.alpha(t) == 0
    assert process.sigma(t) == 1
    assert process.lam(t) == -math.inf
    assert process.rho(t) == math.inf
    assert process.phi(t) == math.pi / 2
    assert process.t_of_lam(-math.inf) == t


def test_rescaled_zero_snr_is_lin_et_al() -> None:
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    process = fs.VP.scaled_linear().rescaled_zero_snr()
    ours = process.alpha(torch.arange(1000.0)) ** 2
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    # between the last two indices alpha is a straight line to zero
    last = process.alpha(998.0)
    torch.testing.assert_close(process.alpha(998.25), 0.75 * last)


@pytest.mark.parametrize(
    ("process", "schedule"),
    [
        (fs.VP.linear(), {"beta_schedule": "linear"}),
        (
            fs.VP.scaled_linear(),
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
        (fs.VP.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    ],
    ids=["linear", "scaled_linear", "cosine"],
)
def test_alphas_are_those_of_diffusers(process: fs.Process, schedule: dict[str, object]) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=1000, **schedule).alphas_cumprod.double()
    ours = process.alpha(torch.arange(1000)) ** 2
    torch.testing.assert_close(ours, theirs, rtol=5e-5, atol=0)  # theirs are products in float32
    assert process.t_start == 999
    assert process.num_train_steps == 1000


def test_from_betas_and_from_alphas_cumprod_are_one_process() -> None:
    betas = np.linspace(1e-4, 0.02, 1000)
    one, two = fs.VP.from_betas(betas), fs.VP.from_alphas_cumprod(np.cumprod(1 - betas))
    assert one.fingerprint == two.fingerprint == fs.VP.linear().fingerprint
    assert fs.VP.cosine().fingerprint != one.fingerprint


def test_log_alpha_is_linear_between_indices() -> None:
    process = fs.VP.linear()
    for t in (-0.5, 0.25, 500.75):
        low, high = (process.alpha(v).log() for v in (math.floor(t), math.floor(t) + 1))
        torch.testing.assert_close(process.alpha(t).log(), low + (t - math.floor(t)) * (high - low))


# -- inverses -------------------------------------------------------------------------------------------


@given(KINDS, UNIT)
def test_t_of_lam_inverts_lam(kind: str, u: float) -> None:
    process = PROCESSES[kind]()
    t = process.t_start + (process.t_end - process.t_start) * u
    lam = process.lam(t)
    again = process.t_of_lam(lam)
    assert float(again) == pytest.approx(t, rel=1e-9, abs=1e-9)
    if bool(torch.isfinite(lam)):
        assert float(process.lam(again)) == pytest.approx(float(lam), rel=1e-9, abs=1e-9)
        assert float(process.t_of_rho(process.rho(t))) == pytest.approx(t, rel=1e-9, abs=1e-9)


def test_t_of_lam_at_the_ends(process: fs.Process) -> None:
    assert process.t_of_lam(math.inf) == process.t_zero
    assert float(process.t_of_lam(process.lam(process.t_start))) == pytest.approx(process.t_start, rel=1e-12)


@given(st.floats(0.2, 8.0), UNIT)
def test_uniform_coordinate_of_shifted_flows(shift: float, u: float) -> None:
    process = fs.Flow(shift=shift)
    t = process.t_of_uniform(u)
    assert 0 <= float(t) <= 1 + 1e-15
    assert float(process.uniform_of_t(t)) == pytest.approx(u, abs=1e-14)
    assert fs.Flow().t_of_uniform(u) == u


def test_shift_moves_towards_the_noise() -> None:
    # Esser et al. 2024, eq. 23: shift multiplies sigma / alpha
    plain, shifted = fs.Flow(), fs.Flow(shift=3.0)
    assert float(shifted.rho(shifted.t_of_uniform(0.4))) == pytest.approx(3 * float(plain.rho(0.4)))


# -- gradients ------------------------------------------------------------------------------------------


def test_functions_are_differentiable(process: fs.Process) -> None:
    # between knots of the tables, where the functions are smooth
    t = (times(process, 7, inside=True) + 0.31 * (process.t_zero == -1)).requires_grad_(True)
    for function in (process.alpha, process.sigma, process.lam, process.rho, process.phi):
        if bool(function(t).requires_grad):
            assert torch.autograd.gradcheck(function, (t,), eps=1e-5 * float(t.detach().max()), atol=1e-5)
    lam = process.lam(t.detach()).requires_grad_(True)
    assert torch.autograd.gradcheck(process.t_of_lam, (lam,), eps=1e-6, atol=1e-3)


def test_gradients_stay_finite_at_the_ends(process: fs.Process) -> None:
    for end in (process.t_start, process.t_zero):
        t = torch.tensor(end, dtype=torch.float64, requires_grad=True)
        total = process.alpha(t) + process.sigma(t) + process.phi(t)
        if total.requires_grad:
            (gradient,) = torch.autograd.grad(total, t)
            assert bool(torch.isfinite(gradient)), f"gradient at {end} is {gradient}"


def test_flow_gradients_at_the_ends_are_the_true_ones() -> None:
    for t in (0.0, 1.0):
        x = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.grad(fs.Flow().alpha(x), x)[0] == -1
        assert torch.autograd.grad(fs.Flow().sigma(x), x)[0] == 1


# -- networks with a table of times ---------------------------------------------------------------------


def test_snap_moves_to_the_nearest_level() -> None:
    process = fs.VP.linear().quantized([999, 0, 10, 500])
    assert process.levels is not None
    assert process.levels.tolist() == [0, 10, 500, 999]
    given_t = torch.tensor([-1.0, -0.4, 4.9, 5.1, 300.0, 2000.0 - 1001.0], dtype=torch.float64)
    assert process.snap(given_t).tolist() == [-1, 0, 0, 10, 500, 999]
    assert process.network_time(-1.0) == 0  # never told to the network
    assert fs.VP.linear().network_time(-1.0) == 0
    assert fs.VP.linear().network_time(3.7) == 3.7


@given(st.lists(st.integers(0, 999), min_size=1, max_size=30, unique=True), st.floats(-1.0, 999.0))
def test_snap_is_the_brute_force_nearest(levels: list[int], t: float) -> None:
    process = fs.VP.linear().quantized(levels)
    got = float(process.network_time(t))
    assert got in levels
    assert abs(got - max(t, 0.0)) == pytest.approx(min(abs(v - max(t, 0.0)) for v in levels))


@pytest.mark.parametrize("solver", ["ddim", "dpm_solver_2s", "exp_adams"])
@pytest.mark.parametrize("levels", [range(1000), range(3, 1000, 37)])
def test_sigma_and_network_time_never_disagree(solver: str, levels: range) -> None:
    process = fs.VP.linear().quantized(list(levels))
    continuous = fs.VP.linear()
    plan = fs.solvers.build(solver, process, 7, grid="logsnr")
    for row, v in zip(plan.rows, plan.values, strict=True):
        if row.evaluates:
            assert v.t_in in levels
            assert v.t == v.t_in
            assert v.sigma == float(continuous.sigma(v.t_in))


def test_stage_is_snapped() -> None:
    process = fs.VP.linear().quantized(range(1000))
    lam = process.lam(500.3)
    assert process.stage(lam) == 500
    assert float(fs.VP.linear().stage(lam)) == pytest.approx(500.3)


# -- identity and errors --------------------------------------------------------------------------------


def test_equality_and_hash() -> None:
    assert fs.VP.linear() == fs.VP.linear()
    assert hash(fs.VP.linear()) == hash(fs.VP.linear())
    assert fs.Flow() != fs.Flow(shift=2.0)
    assert fs.EDM() != fs.VE(0.002, 80.0)
    assert fs.VP.linear() != fs.VP.linear().quantized([1, 2])
    assert fs.VP.linear().quantized([2, 1]) == fs.VP.linear().quantized([1, 2])
    assert fs.VP.linear() != "VP"


def test_copies_are_equal(process: fs.Process) -> None:
    process.lam(process.t_end)
    for other in (copy.deepcopy(process), pickle.loads(pickle.dumps(process))):
        assert other == process
        assert other.fingerprint == process.fingerprint


def test_repr_says_what_it_is() -> None:
    assert repr(fs.Flow(shift=3.0)) == "Flow(shift=3.0, t_min=0.001)"
    assert "<1000 numbers>" in repr(fs.VP.linear().rescaled_zero_snr())
    assert "quantized to 3 times" in repr(fs.VP.linear().quantized([1, 2, 3]))


def test_threads_share_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsample.process._MEMO", 8)  # so that the look-up is emptied all the time
    process = fs.VP.linear()
    expected = [float(process.sigma(t)) for t in range(60)]

    def work(_: int) -> list[float]:
        return [float(process.sigma(t)) for t in range(60)]

    with ThreadPoolExecutor(8) as pool:
        assert all(got == expected for got in pool.map(work, range(32)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fs.VP.from_betas([0.1, 1.5]), "betas must lie in"),
        (lambda: fs.VP.from_betas([0.1, 0.0]), "betas must lie in"),
        (lambda: fs.VP([0.5, 0.7]), "decrease strictly"),
        (lambda: fs.VP([0.5, math.nan]), "decrease strictly"),
        (lambda: fs.VP([1.0, 0.7]), r"\[0, 1\)"),
        (lambda: fs.VP([0.7]), "shape"),
        (lambda: fs.VE(2.0, 1.0), "sigma_min=2.0"),
        (lambda: fs.EDM(0.0, 1.0), "sigma_min=0.0"),
        (lambda: fs.Flow(shift=0.0), "shift=0.0"),
        (lambda: fs.Flow(t_min=1.0), "t_min=1.0"),
        (lambda: fs.TrigFlow(t_max=2.0), "t_max=2.0"),
        (lambda: fs.VP.linear().quantized([]), "levels"),
        (lambda: fs.VP.linear().quantized([5, 1200]), "1200"),
        (lambda: fs.VP.linear().quantized([5, math.nan]), "nan"),
        (lambda: fs.VP.linear().sigma(1001.0), "t=1001.0 lies outside"),
        (lambda: fs.VP.linear().sigma([3.0, -2.0]), "t=-2.0 lies outside"),
        (lambda: fs.VP.linear().sigma(math.nan), "t=nan lies outside"),
        (lambda: fs.EDM().sigma(-1.0), "t=-1.0 lies outside"),
        (lambda: fs.VP.linear().t_of_lam(-8.0), "noisier than"),
    ],
)
def test_errors_name_the_value(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_look_ups_are_remembered_and_not_spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same times are looked up once; times or results that were written to since are looked up anew."""
    process = fs.VP.linear()
    calls = []
    at = fs.VP._at
    monkeypatch.setattr(fs.VP, "_at", lambda self, t: calls.append(t) or at(self, t))  # type: ignore[func-returns-value]
    t = torch.linspace(0, 999, 8, dtype=torch.float64)
    expected = at(process, t)[0]
    assert process.alpha(t) is process.alpha(t)
    process.sigma(t)
    assert len(calls) == 1
    process.alpha(t).mul_(2)
    torch.testing.assert_close(process.alpha(t), expected)
    t[0] = 500.0
    torch.testing.assert_close(process.alpha(t), at(process, t)[0])
    one = process.alpha(500)
    assert process.alpha(500) is one
    expected = one.clone()
    one.mul_(2)
    assert float(process.alpha(500)) == float(expected)


def test_look_ups_in_inference_mode_serve_training_later() -> None:
    """What is remembered in inference mode can be differentiated through afterwards."""
    process = fs.VP.linear()
    t = torch.tensor([3.0, 7.0], dtype=torch.float64)
    with torch.inference_mode():
        process.alpha(250)
        process.alpha(t)
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (process.alpha(250) * process.alpha(t) * x).sum().backward()
    torch.testing.assert_close(x.grad, process.alpha(250) * process.alpha(t))


def test_float32_rounding_of_the_ends_is_forgiven() -> None:
    assert fs.Flow().sigma(torch.tensor(1.0 + 1e-7, dtype=torch.float32)) == 1
    assert fs.VP.linear().sigma(-1.0000001) == 0
