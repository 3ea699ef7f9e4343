"""``sampler(kernels=True)``: every row by the Triton kernel, in samplers of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastsample as fs


def net(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(1.3 * x + (t.to(x.dtype) / 400).reshape(-1, *[1] * (x.ndim - 1))) - 0.2 * x


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("auto", {}),
        ("dpmpp_3m", {}),
        ("unipc", {}),
        ("deis", {}),
        ("ddim", {"eta": 1.0}),
        ("dpmpp_2m_sde", {}),
    ],
)
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 8)])
def test_the_same_samples(solver: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    """To float32's rounding, the noise of each sample and row included, in chunks and with guidance's hooks."""
    denoiser = fs.wrap(net, fs.VP.linear(), "v")
    sampler = fs.Sampler(denoiser, solver, 5, **options)
    for more in ({}, {"batch_size": 2}, {"hooks": (fs.hooks.Clip(),)}, {"index": 2**33}):
        plain, fused = (sampler(shape, seed=3, kernels=k, **more) for k in (False, True))
        torch.testing.assert_close(fused, plain, rtol=2e-5, atol=2e-5)


def test_float64_states() -> None:
    denoiser = fs.wrap(net, fs.VP.linear(), "v")
    x = torch.randn(2, 3, dtype=torch.float64)
    sampler = fs.Sampler(denoiser, "unipc", 6)
    torch.testing.assert_close(sampler(x=x, kernels=True), sampler(x=x), rtol=1e-12, atol=1e-12)


def test_the_trajectory() -> None:
    sampler = fs.Sampler(fs.wrap(net, fs.VP.linear(), "v"), "dpmpp_2m", 4)
    (_, plain), (_, fused) = (sampler((2, 3), kernels=k, return_trajectory=True) for k in (False, True))
    torch.testing.assert_close(fused.x, plain.x, rtol=2e-5, atol=2e-5)
