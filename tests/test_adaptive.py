"""Adaptive methods: accuracy by tolerance, samples that do not know of each other, and clear errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import fastsample as fs
from fastsample import adaptive
from fastsample.hooks import At
from fastsample.process import Process

VP = fs.VP.linear()
PROCESSES: list[tuple[Process, str]] = [
    (VP, "eps"),
    (fs.VP.cosine(), "v"),
    (VP.rescaled_zero_snr(), "v"),
    (fs.VE(), "score"),
    (fs.EDM(), "x0"),
    (fs.Flow(), "flow"),
    (fs.TrigFlow(), "v"),
]


class TwoPoints:
    """The perfect network of data at -1 and +1 (each element alone): ``x_0 = tanh(alpha x / sigma^2)``.

    Its flow has stiff and easy samples. Counts its own rows.
    """

    def __init__(self, process: Process, prediction: str) -> None:
        self.process, self.prediction, self.rows = process, prediction, 0

    def __call__(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        self.rows += len(x)
        shape = (-1, *[1] * (x.ndim - 1))
        alpha, sigma = (f(t.double()).to(x).reshape(shape) for f in (self.process.alpha, self.process.sigma))
        x0 = torch.tanh(alpha * x / (sigma**2 + 0.05 * alpha**2))
        if shift is not None:
            x0 = x0 + shift.to(x).reshape(shape)
        if self.prediction == "x0":
            return x0
        eps = (x - alpha * x0) / sigma
        return {
            "eps": eps,
            "score": -eps / sigma,
            "v": alpha * eps - sigma * x0,
            "flow": eps - x0,
        }[self.prediction]


def denoiser(process: Process = VP, prediction: str = "eps", **settings: Any) -> fs.Denoiser:
    return fs.wrap(TwoPoints(process, prediction), process, prediction, **settings)


def noise(count: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 2, 3, generator=generator, dtype=torch.float64)


def reference(x: Tensor) -> Tensor:
    """The ODE in the angle, by SciPy's method of order 8, from t = 999 to 0."""

    def velocity(phi: float, y: Any) -> Any:
        a, s, x = math.cos(phi), math.sin(phi), torch.from_numpy(y)
        x0 = torch.tanh(a * x / (s**2 + 0.05 * a**2))
        return (a * (x - a * x0) / s - s * x0).numpy()

    ends = [float(VP.phi(t)) for t in (999.0, 0.0)]
    start = (float(VP.sigma(999.0)) * x).flatten().numpy()
    y = solve_ivp(velocity, ends, start, method="DOP853", rtol=1e-11, atol=1e-11).y[:, -1]
    return torch.from_numpy(y.copy()).reshape(x.shape)


@pytest.mark.parametrize("name", adaptive.names())
def test_error_follows_the_tolerance(name: str) -> None:
    x = noise(16)
    true = reference(x)
    errors, counts = [], []
    for tolerance in (1e-2, 2e-4):
        sampler = fs.Sampler(denoiser(), name, rtol=tolerance, atol=tolerance, end="sigma_min")
        result, nfe = sampler(noise=x, return_nfe=True)
        errors.append(float((result - true).abs().quantile(0.9)))
        counts.append(float(nfe.double().mean()))
    assert errors[0] < 5e-2
    assert errors[1] < min(2e-3, errors[0] / 10)
    assert counts[1] > counts[0]


@pytest.mark.parametrize("name", adaptive.names())
def test_a_sample_is_the_same_alone(name: str) -> None:
    """Steps, evaluations and result of a sample are its own; it may have its own conditions."""
    x, shift = noise(5), torch.linspace(-0.3, 0.3, 5)
    sampler = fs.Sampler(denoiser(), name)
    together, nfe = sampler(noise=x, shift=shift, return_nfe=True)
    assert len(set(nfe.tolist())) > 1
    for i in range(5):
        one, count = sampler(noise=x[i : i + 1], shift=shift[i : i + 1], return_nfe=True)
        torch.testing.assert_close(one[0], together[i], rtol=1e-12, atol=1e-12)
        assert int(count) == int(nfe[i])
    chunked, again = sampler(noise=x, shift=shift, return_nfe=True, batch_size=2)
    torch.testing.assert_close(chunked, together, rtol=1e-12, atol=1e-12)
    assert torch.equal(again, nfe)


@pytest.mark.parametrize("name", adaptive.names())
def test_evaluations_are_really_counted(name: str) -> None:
    model = denoiser()
    _, nfe = fs.Sampler(model, name)(noise=noise(), return_nfe=True)
    assert model.net.rows == int(nfe.sum())


@pytest.mark.parametrize(("process", "prediction"), PROCESSES, ids=lambda v: f"{v!r:.34}")
@pytest.mark.parametrize("name", ["dpm12", "dpm23", "rk45"])
def test_every_process(name: str, process: Process, prediction: str) -> None:
    """The same samples, to the tolerance, by a fixed grid of many steps."""
    model, x = denoiser(process, prediction), noise(4)
    options: dict[str, Any] = {"order": 3, "corrector": True, "space": "v", "variable": "phi"}
    for end in ("zero", "sigma_min"):
        ours = fs.Sampler(model, name, end=end, rtol=5e-3, atol=5e-3)(noise=x)
        fixed = fs.Sampler(model, "exp_adams", 100, end=end, grid="logsnr", **options)(noise=x)
        assert float((ours - fixed).abs().median()) < 1e-2


def test_dpm_solver_12_by_hand() -> None:
    """The first accepted steps, by the algorithm of Lu et al. 2022 (appendix C) written for one sample."""
    model, x = denoiser(), noise(1)
    seen: list[float] = []

    def net(state: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return model.net(state, t)

    fs.Sampler(fs.wrap(net, VP, "eps"), "dpm12", rtol=0.05, atol=0.0078, end="sigma_min")(noise=x)

    times: list[float] = []
    state = previous = float(VP.sigma(999.0)) * x
    lam, last, h = float(VP.lam(999.0)), float(VP.lam(0.0)), 0.05

    def eps(y: Tensor, at: float) -> Tensor:
        t = VP.t_of_lam(at)
        times.append(float(t))
        return model.net(y, t[None])

    fresh = True
    first = torch.empty_like(x)
    while lam < last - 1e-12:
        h = min(h, last - lam)
        s, middle, t = (VP.t_of_lam(lam + f * h) for f in (0.0, 0.5, 1.0))
        alpha, sigma = VP.alpha, VP.sigma
        if fresh:
            first = eps(state, lam)
        stage = alpha(middle) / alpha(s) * state - sigma(middle) * math.expm1(h / 2) * first
        second = eps(stage, lam + h / 2)
        low = alpha(t) / alpha(s) * state - sigma(t) * math.expm1(h) * first
        high = low - sigma(t) * math.expm1(h) * (second - first)
        delta = torch.clamp(0.05 * torch.maximum(low.abs(), previous.abs()), min=0.0078)
        error = float(((low - high) / delta).norm() / math.sqrt(x.numel()))
        fresh = error <= 1
        if fresh:
            state, previous, lam = high, low, lam + h
        h = 0.9 * h * error**-0.5
    assert seen == pytest.approx(times, rel=1e-9)


def test_image_to_image_and_strength() -> None:
    sampler = fs.Sampler(denoiser(), "rk45", strength=0.4)
    assert sampler.t0 == pytest.approx(0.4 * 999)
    clean = torch.sign(noise(4)) * 0.95
    back = sampler(x=sampler.noised(clean, seed=3))
    assert float((back - clean).abs().median()) < 0.5
    same = fs.Sampler(denoiser(), "rk45", start=0.4 * 999)(x=sampler.noised(clean, seed=3))
    torch.testing.assert_close(back, same)


def test_guidance_acts_within_its_interval_sample_by_sample() -> None:
    """Two calls or one doubled batch, acting at some samples' times and not at others': the same samples."""
    results = []
    for batched in (True, False):
        guidance = fs.Guidance(2.0, null={"shift": 0.0}, interval=(0.2, 3.0), batched=batched)
        sampler = fs.Sampler(denoiser(guidance=guidance), "dpm23")
        shift = torch.linspace(-0.3, 0.3, 5)
        together = sampler(noise=noise(5), shift=shift)
        alone = torch.cat([sampler(noise=noise(5)[i : i + 1], shift=shift[i : i + 1]) for i in range(5)])
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
        results.append(together)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_hooks_see_each_sample_at_its_own_time() -> None:
    seen: list[At] = []

    def spy(x0: Tensor, at: At) -> Tensor:
        assert len(x0) == len(at.x) == 1
        seen.append(at)
        return x0.clamp(-0.5, 0.5)

    result = fs.Sampler(denoiser(), "dpm12", hooks=[spy])(noise=noise(3), batch_size=2)
    assert float(result.abs().max()) < 0.51
    assert {at.samples.start for at in seen} == {0, 1, 2}
    assert all(at.sigma == pytest.approx(float(VP.sigma(at.t))) for at in seen[:20])


def test_seeds_are_those_of_other_samplers() -> None:
    """The starting noise is a function of seed and sample index alone."""
    sampler = fs.Sampler(denoiser(), "dpm23")
    all_of = sampler(shape=(4, 2, 3), seed=5, dtype=torch.float64)
    torch.testing.assert_close(sampler(shape=(2, 2, 3), seed=5, index=2, dtype=torch.float64), all_of[2:])


# -- errors --------------------------------------------------------------------------------------------------


def test_there_is_no_plan() -> None:
    sampler = fs.Sampler(denoiser(), "rk45")
    assert "rk45" in repr(sampler)
    with pytest.raises(AttributeError, match="rk45 chooses its steps as it goes and has no plan"):
        _ = sampler.plan
    with pytest.raises(ValueError, match="no inverse"):
        sampler.inverse()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 10}, "takes no steps=10"),
        ({"grid": "logsnr"}, "takes no grid='logsnr'"),
        ({"rtoll": 1e-3}, "did you mean 'rtol'"),
        ({"rtol": 0.0}, "rtol=0.0"),
        ({"atol": math.nan}, "atol=nan"),
        ({"safety": 1.0}, "safety=1.0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"end": "zeros"}, "end='zeros'"),
        ({"start": 2000.0}, "start=2000.0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fs.Sampler(denoiser(), "rk45", **options)


@pytest.mark.parametrize("option", ["progress", "return_trajectory", "differentiable"])
def test_what_only_plans_can_do_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"no {option}="):
        fs.Sampler(denoiser(), "rk45")(noise=noise(), **{option: True})


def test_networks_with_a_table_of_times_are_refused() -> None:
    with pytest.raises(ValueError, match="continuous time"):
        fs.Sampler(denoiser(quantize=True), "dpm23")


def test_eps_without_signal_is_refused() -> None:
    process = VP.rescaled_zero_snr()
    with pytest.raises(ValueError, match="zero signal-to-noise"):
        fs.Sampler(denoiser(process, "eps"), "rk45")(noise=noise())


@pytest.mark.parametrize("name", adaptive.names())
def test_nan_is_located(name: str) -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        out = 0.1 * x
        out[(t < 500) & (torch.arange(len(x)) == 1)] = torch.nan
        return out

    with pytest.raises(fs.NonFiniteError, match=r"not finite after t=.* for samples \[1\]"):
        fs.Sampler(fs.wrap(net, VP, "eps"), name, rtol=1e-12, atol=1.0)(noise=noise(2))


def test_giving_up_says_which_samples() -> None:
    with pytest.raises(RuntimeError, match=r"samples \[0, 1, 2\] are not done after max_steps=3"):
        fs.Sampler(denoiser(), "rk45", max_steps=3)(noise=noise(3))
