"""k-diffusion's samplers in the run, by the real package; without it, what to install."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian_model import SHAPE, make_model
from helpers_bench import points_of_run

import fastsample as fs
from fastsample.bench import kdiffusion
from fastsample.bench.errors import UserError

INSTALLED = importlib.util.find_spec("k_diffusion") is not None
needs_it = pytest.mark.skipif(not INSTALLED, reason="k-diffusion is not installed")


@pytest.mark.skipif(INSTALLED, reason="k-diffusion is installed")
def test_without_it_the_remedy_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'kdiffusion:dpmpp_2m' needs k-diffusion: pip install k-diffusion"):
        points_of_run(tmp_path, ["kdiffusion:dpmpp_2m"])
    assert not (tmp_path / "run" / "cells").exists()


@needs_it
@pytest.mark.parametrize(("theirs", "ours"), [("euler", "ddim"), ("dpmpp_2m", "dpmpp_2m"), ("heun", "heun")])
@pytest.mark.parametrize("process", ["vp", "edm"])
def test_theirs_and_ours_are_the_same_sampler(theirs: str, ours: str, process: str) -> None:
    """On the same noise levels: Euler in x / alpha is DDIM."""
    model = make_model()
    denoiser = model
    if process == "edm":
        # D(x, sigma) of the same data: what the model says of x / sqrt(1 + sigma^2) at its own time
        def net(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            s = float(sigma[0])
            return (0.04 * x + s**2 * model.net.mean) / (0.04 + s**2)  # type: ignore[union-attr]

        denoiser = fs.wrap(net, fs.EDM(), "x0", sample_shape=SHAPE)
    sampler = kdiffusion.KDiffusionSampler(denoiser, f"kdiffusion:{theirs}", 6, {})
    x = sampler((3, *SHAPE), seed=0, index=torch.arange(3), device=torch.device("cpu"))
    levels = sampler._sigmas[:-1].double()
    times = denoiser.process.t_of_rho(levels.clamp(*sampler._range))
    grid = [*times.tolist(), denoiser.process.t_zero]
    exact = fs.Sampler(denoiser, ours, grid=grid)((3, *SHAPE), seed=0)
    torch.testing.assert_close(x, exact, rtol=2e-4, atol=2e-4)
    assert sampler.plan.nfe == (11 if theirs == "heun" else 6)


@needs_it
def test_evaluations_are_counted_and_budgets_kept(tmp_path: Path) -> None:
    found = points_of_run(
        tmp_path,
        ["kdiffusion:heun", "kdiffusion:lms", "kdiffusion:euler_ancestral", "kdiffusion:dpmpp_sde", "ddim"],
        nfe=[8],
    )
    assert {k: p["steps"] for k, p in found.items()} == {
        ("kdiffusion:heun", 7.0): 4,
        ("kdiffusion:lms", 8.0): 8,
        ("kdiffusion:euler_ancestral", 8.0): 8,
        ("kdiffusion:dpmpp_sde", 7.0): 4,
        ("ddim", 8.0): 8,
    }
    for name in ("kdiffusion:euler_ancestral", "kdiffusion:dpmpp_sde"):
        (point,) = [p for (label, _), p in found.items() if label == name]
        assert point["stochastic"]
        assert point["rmse"] is None
    assert found["kdiffusion:lms", 8.0]["rmse"] < found["ddim", 8.0]["rmse"]
    assert "k-diffusion heun(4 steps" in found["kdiffusion:heun", 7.0]["plan"]


@needs_it
def test_noise_of_theirs_is_repeatable_and_leaves_the_generator_alone() -> None:
    sampler = kdiffusion.KDiffusionSampler(make_model(), "kdiffusion:dpmpp_2m_sde", 4, {"eta": 0.5})
    where = {"index": torch.arange(2), "device": torch.device("cpu")}
    state = torch.random.get_rng_state()
    first, second, other = (sampler((2, *SHAPE), seed=s, **where) for s in (0, 0, 1))  # type: ignore[arg-type]
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    quiet = kdiffusion.KDiffusionSampler(make_model(), "kdiffusion:dpmpp_2m_sde", 4, {"eta": 0.0})
    assert not quiet.plan.stochastic


@needs_it
@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ("kdiffusion:dpmpp2m", "did you mean 'kdiffusion:dpmpp_2m'"),
        ("kdiffusion:dpm_adaptive", "did you mean"),
        ({"name": "kdiffusion:lms", "oder": 3}, "did you mean 'order'"),
        ({"name": "kdiffusion:lms", "schedule": "karas"}, "did you mean 'karras'"),
        ({"name": "kdiffusion:lms", "schedule": "exponential", "rho": 3}, "rho=3 belongs to"),
    ],
)
def test_bad_settings_are_refused_before_any_work(solver: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        points_of_run(tmp_path, [solver])
    assert not (tmp_path / "run" / "cells").exists()


@needs_it
def test_a_flow_starts_at_pure_noise() -> None:
    flow = fs.wrap(lambda x, t: x, fs.Flow(), "flow", sample_shape=SHAPE)
    with pytest.raises(ValueError, match="starts at a finite noise level"):
        kdiffusion.KDiffusionSampler(flow, "kdiffusion:euler", 4, {})
