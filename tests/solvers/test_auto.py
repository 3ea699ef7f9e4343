"""``solver="auto"``: accurate per evaluation, never NaN, never worse with more steps, and it says what it chose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastsample as fs
from fastsample.solvers.auto import auto
from fastsample.zoo.mixture import MixtureNet, digits_mixture

SAMPLES = 128
# Error to the exact ODE on the digits mixture (512 samples): the better of diffusers' best of 17 settings and
# of a 40-line prototype, at each number of evaluations: RMSE over everything, and median of each sample's RMSE.
RMSE = {
    3: 0.196,
    4: 0.138,
    5: 0.087,
    6: 0.076,
    8: 0.054,
    10: 0.036,
    15: 0.019,
    20: 0.012,
    30: 0.0019,
    50: 0.0008,
}
MEDIAN = {
    3: 0.189,
    4: 0.118,
    5: 0.074,
    6: 0.067,
    8: 0.039,
    10: 0.026,
    15: 0.010,
    20: 0.0049,
    30: 0.0016,
    50: 0.0008,
}

PROCESSES = {
    "vp": fs.VP.linear(),
    "scaled": fs.VP.scaled_linear(),
    "cosine": fs.VP.cosine(),
    "zero_snr": fs.VP.linear().rescaled_zero_snr(),
    "edm": fs.EDM(),
    "ve": fs.VE(),
    "flow": fs.Flow(),
    "flow3": fs.Flow(shift=3.0),
    "trig": fs.TrigFlow(),
}


@pytest.fixture(scope="module")
def exact() -> tuple[fs.Denoiser, Tensor, Tensor, Tensor]:
    denoiser = fs.zoo.load("digits-mixture")
    noise = fs.noise.normal((SAMPLES, 1, 8, 8), 0, torch.arange(SAMPLES), dtype=torch.float64)
    process = denoiser.process
    start = noise * float(process.sigma(process.t_start))
    solution = digits_mixture().reference(start, process)
    return denoiser, noise, solution.x, solution.x0


def errors(x: Tensor, *solutions: Tensor) -> tuple[float, float]:
    """RMSE and median RMSE, each to the nearer of the solutions (the state and its denoised image)."""
    each = [(x - s).square().flatten(1).mean(1) for s in solutions]
    return min(float(e.mean().sqrt()) for e in each), min(float(e.sqrt().median()) for e in each)


def test_accuracy_per_evaluation(exact: tuple[fs.Denoiser, Tensor, Tensor, Tensor]) -> None:
    denoiser, noise, x, x0 = exact
    worst_so_far = float("inf")
    for nfe in RMSE:
        sampler = fs.Sampler(denoiser, steps=nfe)
        assert sampler.plan.nfe == nfe
        rmse, median = errors(sampler(noise=noise), x, x0)
        assert rmse <= RMSE[nfe], f"{nfe} evaluations: RMSE {rmse:.4f}"
        assert median <= MEDIAN[nfe], f"{nfe} evaluations: median {median:.4f}"
        assert median <= worst_so_far, f"{nfe} evaluations: the median rises to {median:.5f}"
        worst_so_far = median


@pytest.mark.parametrize("scale", [2.0, 4.0, 7.5])
def test_under_guidance_it_beats_what_people_use(scale: float) -> None:
    """RMSE to the exact guided ODE, beside DDIM and DPM-Solver++(2M) with as many evaluations."""
    samples = 32
    labels = torch.arange(samples) % 10
    noise = fs.noise.normal((samples, 1, 8, 8), 0, torch.arange(samples), dtype=torch.float64)
    denoiser = fs.zoo.load("digits-mixture").guided(scale, null={"labels": 10})
    process = denoiser.process
    start = noise * float(process.sigma(process.t_start))
    exact = digits_mixture().reference(start, process, labels=labels, guidance=scale, tolerance=1e-6).x
    for nfe in (5, 6, 8, 10, 15, 20):
        error = {}
        for solver in ("auto", "ddim", "dpmpp_2m"):
            x = fs.Sampler(denoiser, solver, nfe)(noise=noise, labels=labels)
            error[solver] = float((x - exact).square().mean().sqrt())
        assert error["auto"] < min(error["ddim"], error["dpmpp_2m"]), (nfe, error)


@pytest.mark.parametrize("name", PROCESSES)
def test_finite_and_converging_from_1_to_1000_steps(name: str) -> None:
    process = PROCESSES[name]
    mixture = digits_mixture()
    prediction = "v" if name in ("zero_snr", "flow", "flow3", "trig") else "eps"
    denoiser = fs.wrap(MixtureNet(mixture, process, prediction), process, prediction)
    noise = fs.noise.normal((8, 1, 8, 8), 0, torch.arange(8), dtype=torch.float64)
    results = {}
    for steps in (1, 2, 3, 7, 30, 100):
        sampler = fs.Sampler(denoiser, steps=steps)
        assert sampler.plan.nfe <= steps
        results[steps] = sampler(noise=noise)
    change = [float((results[s] - results[100]).square().mean().sqrt()) for s in (3, 7, 30)]
    assert change[0] > change[1] > change[2]
    assert change[2] < 0.02
    assert auto(process, 1000, prediction=prediction).nfe <= 1000  # the table itself is checked to be finite


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_both_ends(name: str, end: str) -> None:
    process = PROCESSES[name]
    plan = auto(process, 5, prediction="v", end=end)
    assert plan.values[-1].t == (process.t_zero if end == "zero" else process.t_end)


def test_it_says_what_it_chose() -> None:
    text = str(auto(fs.VP.linear(), 6))
    assert "auto" in text
    assert "order" in text
    assert "grid" in text


def test_it_is_the_default_and_can_be_overridden() -> None:
    denoiser = fs.zoo.load("digits-mixture")
    assert fs.Sampler(denoiser, steps=5).plan == fs.Sampler(denoiser, "auto", 5).plan
    assert fs.Sampler(denoiser, steps=5, order=2).plan != fs.Sampler(denoiser, steps=5).plan
    assert fs.Sampler(denoiser, grid=[999.0, 500.0, 100.0, 0.0]).plan.nfe == 3
    with pytest.raises(ValueError, match=r"ordr.*order"):
        fs.Sampler(denoiser, steps=5, ordr=2)
    with pytest.raises(ValueError, match="steps=0"):
        fs.Sampler(denoiser, steps=0)


def test_a_start_with_an_image_in_it_is_evaluated() -> None:
    """Image to image begins with the prediction at its start; only pure noise is not worth an evaluation."""
    process = fs.VP.linear()
    assert auto(process, 4, start=400.0).times[0] == 400.0
    assert auto(process, 4).times[0] < process.t_start


def test_eps_at_zero_snr_is_refused_though_the_start_is_not_evaluated() -> None:
    with pytest.raises(ValueError, match="zero signal-to-noise"):
        auto(PROCESSES["zero_snr"], 5, prediction="eps")
