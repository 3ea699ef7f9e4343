"""A small analytic model whose tuning takes a second: a Gaussian mixture in two dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastsample as fs
from fastsample.zoo.mixture import GaussianMixture, MixtureNet


def mixture() -> GaussianMixture:
    means = torch.tensor([[1.0, 0.2], [-0.8, 0.6], [0.1, -0.9]], dtype=torch.float64)
    covs = torch.stack(
        [
            torch.tensor([[0.04, 0.01], [0.01, 0.09]]),
            torch.tensor([[0.02, 0.0], [0.0, 0.05]]),
            torch.tensor([[0.06, -0.02], [-0.02, 0.03]]),
        ]
    ).double()
    return GaussianMixture(means, covs, torch.tensor([0.5, 0.3, 0.2]))


def model(process: fs.Process | None = None, prediction: str = "eps", **settings: Any) -> fs.Denoiser:
    process = process or fs.VP.linear()
    net = MixtureNet(mixture(), process, prediction)
    return fs.wrap(net, process, prediction=prediction, sample_shape=(2,), **settings)


QUICK = {"trajectories": 96, "heldout": 64, "reference_steps": 60, "iterations": 8}


def error(denoiser: fs.Denoiser, sampler: fs.Sampler, solution: Tensor | None = None, n: int = 256) -> float:
    """Distance to the model's own solution on noise that no fit has seen: the median over samples of each
    sample's root mean square, which the few that end in another mode do not decide."""
    if solution is None:
        solution = fs.Sampler(denoiser, steps=120)(n=n, seed=11)
    return float((sampler(n=n, seed=11) - solution).square().mean(1).sqrt().median())
