"""Analytic-DPM: the optimal variance of the reverse process, estimated from the network by one pass.

statistics = estimate(denoiser, data=images)          # or from the model's own samples: n=..., no data
sampler = fs.Sampler(denoiser, "analytic_ddpm", steps=10, statistics=statistics)
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..builder import Builder, intervals
from ..denoiser import Denoiser, select
from ..grids import make
from ..noise import START, normal
from ..plan import write_atomically
from ..prediction import coefficients
from ..process import Process, TimeLike, as_time
from .first_order import posterior_std
from .registry import Claim, register
from .sde import ancestral_keep, check_noise, move

FORMAT = "fastsample.analytic"
SCHEMA = 1


@dataclass(frozen=True)
class Statistics:
    """What Analytic-DPM needs to know of a model, at some times.

    Attributes:
        times: the times, from noisy to clean.
        gamma: ``E ||eps(x_t)||^2 / d`` at each (Bao et al. 2022, eq. 8: at most 1 for a perfect network).
        mse: ``E ||x_0 - x_0(x_t)||^2 / d`` at each: the same knowledge where there is no signal and gamma
            has none.
        fingerprint: of the noise process that they belong to.
        samples: how many samples each is a mean over.
    """

    times: tuple[float, ...]
    gamma: tuple[float, ...]
    mse: tuple[float, ...]
    fingerprint: str
    samples: int

    def variance(self, process: Process, t: Tensor) -> float:
        """``E Var(x_0 | x_t) / d``; between the times linear in logarithms (of ``sigma/(alpha+sigma)``)."""
        known = torch.tensor(self.times, dtype=torch.float64)
        place = _log_tau(process, known)
        wanted = float(_log_tau(process, t.detach()))
        if not float(place[-1]) - 1e-6 <= wanted <= float(place[0]) + 1e-6:
            raise ValueError(
                f"statistics reach from t={self.times[0]:g} to t={self.times[-1]:g}, but the grid has "
                f"t={float(t):g}; estimate them with times= that cover the grid"
            )
        value = []
        for time, gamma, mse in zip(self.times, self.gamma, self.mse, strict=True):
            rho = float(process.rho(time))
            # a network's noise may be longer than a perfect one's: then hardly anything is left to add
            value.append(mse if math.isinf(rho) else rho**2 * max(1 - gamma, 1e-12))
        if len(value) == 1:
            return value[0]
        i = int(torch.searchsorted(-place, -wanted).clamp(1, len(value) - 1))
        w = (wanted - float(place[i - 1])) / (float(place[i]) - float(place[i - 1]))
        return math.exp((1 - w) * math.log(value[i - 1]) + w * math.log(value[i]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as JSON, atomically."""
        content = {"format": FORMAT, "schema": SCHEMA, **self.__dict__}
        write_atomically(path, json.dumps(content, indent=1).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read them back.

        Raises:
            ValueError: the file is not such JSON; the message says what is wrong.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != FORMAT or data["schema"] != SCHEMA:
                raise ValueError(f"format={data['format']!r}, schema={data['schema']!r}")
            arrays = {k: tuple(float(v) for v in data[k]) for k in ("times", "gamma", "mse")}
            return cls(**arrays, fingerprint=str(data["fingerprint"]), samples=int(data["samples"]))
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{os.fspath(path)}: not statistics of analytic.estimate ({e!r})") from e


def _log_tau(process: Process, t: Tensor) -> Tensor:
    return torch.log(process.sigma(t) / (process.alpha(t) + process.sigma(t)))


@torch.no_grad()
def estimate(
    denoiser: Denoiser,
    times: TimeLike | int = 50,
    data: Tensor | None = None,
    *,
    n: int = 256,
    steps: int = 50,
    sample_shape: tuple[int, ...] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    **conditions: Any,
) -> Statistics:
    """The statistics of a model by one pass over forward-noised samples (Bao et al. 2022, eq. 8).

    Without ``data`` the samples are the model's own (drawn with DDIM), which biases the estimate by what the
    model gets wrong, and needs no data.

    Args:
        denoiser: the model.
        times: the times, or how many (the process's own grid, from its start to the least noisy trained
            time).
        data: clean samples (N, ...) in the model's range.
        n: how many samples to draw where there are no data.
        steps: how many steps they are drawn with.
        sample_shape: of one sample, where the denoiser does not know it and there are no data.
        seed: of all noise.
        batch_size: samples at once.
        conditions: handed to the network; tensors with one value a sample must match the samples.

    Raises:
        ValueError: times that cannot be used, or no shape to draw.
    """
    process = denoiser.process
    if isinstance(times, int):
        times = make(process.grid, process, times, end="sigma_min")
    grid = as_time(times).flatten()
    levels = process.lam(grid)
    if bool((levels.diff() <= 0).any()) or not bool((levels < math.inf).all()):
        raise ValueError(f"times={grid.tolist()!r} must go strictly towards less noise, and stop before none")
    if data is None:
        from ..sampler import Sampler

        shape = sample_shape if sample_shape is not None else denoiser.sample_shape
        if shape is None:
            raise ValueError("give data=, or sample_shape= to draw the samples with the model itself")
        sampler = Sampler(denoiser, "ddim", steps)
        data = sampler((n, *shape), seed=seed, batch_size=batch_size, **conditions)
    total = data.shape[0]
    gamma = torch.zeros(grid.numel(), dtype=torch.float64)
    mse = torch.zeros_like(gamma)
    for first in range(0, total, batch_size):
        samples = slice(first, min(total, first + batch_size))
        x0 = data[samples]
        index = torch.arange(samples.start, samples.stop, device=x0.device)
        bound = denoiser.bind(x0.shape[0], select(conditions, samples, total), x0.device)
        for i, t in enumerate(grid):
            alpha, sigma = process.alpha(t), process.sigma(t)
            noise = normal(x0.shape, seed, index, START + 1 + i, dtype=x0.dtype)
            x = float(alpha) * x0 + float(sigma) * noise
            told = denoiser.told(process.network_time(t)).to(x.device, denoiser.time_dtype(x.dtype))
            out = bound(x, told.expand(x.shape[0]), float(sigma / alpha) if alpha > 0 else math.inf).double()
            wanted = {}
            for space in ("x0", "eps"):
                p, q = coefficients(denoiser.prediction, alpha, sigma, space)
                wanted[space] = float(p) * x + float(q) * out
            gamma[i] += float(wanted["eps"].square().sum())
            mse[i] += float((x0 - wanted["x0"]).square().sum())
    count = data.numel()
    return Statistics(
        tuple(grid.tolist()),
        tuple((gamma / count).tolist()),
        tuple((mse / count).tolist()),
        process.fingerprint,
        total,
    )


@register("analytic_ddpm", Claim(order=None, stochastic=True), eta=1.0)
@register("analytic_ddim", Claim(order=None, stochastic=True), eta=0.0)
def analytic(
    b: Builder,
    grid: Tensor,
    statistics: Statistics | str | os.PathLike[str] | None = None,
    clip_noise: float = 2.0,
    low: float = -1.0,
    high: float = 1.0,
    eta: float = 1.0,
) -> None:
    """Analytic-DDPM and Analytic-DDIM (Bao et al. 2022, eq. 10: the optimal reverse variance).

    ``sigma^2 = lambda^2 + (alpha_t - alpha_s sqrt(sigma_t^2 - lambda^2) / sigma_s)^2 E Var(x_0 | x_s) /
    d``, where ``lambda`` is the posterior's standard deviation (``analytic_ddpm``) or zero
    (``analytic_ddim``).

    Args:
        b, grid: the builder and the times.
        statistics: made by :func:`estimate`, or the path of their JSON.
        clip_noise: ``y``: before the last step the noise drawn is at most ``y / 255`` of the data's range on
            average (section 5 and appendix F.2); inf switches that off.
        low, high: the data's range, which bounds the variance (corollary 1).
        eta: fixed by the name.

    Raises:
        ValueError: no statistics, or those of another process.
    """
    if statistics is None:
        raise ValueError(
            "this solver needs statistics=...: make them once with "
            "fastsample.solvers.analytic.estimate(denoiser, ...)"
        )
    known = statistics if isinstance(statistics, Statistics) else Statistics.load(statistics)
    if known.fingerprint != b.process.fingerprint:
        raise ValueError(
            f"the statistics belong to another noise process than {b.process!r}; estimate them again"
        )
    if not low < high:
        raise ValueError(f"low={low!r} must be below high={high!r}")
    if not clip_noise >= 0:
        raise ValueError(f"clip_noise={clip_noise!r} must be at least 0")
    check_noise(b, grid, True, eta=1.0)
    x = b.x
    n = grid.numel() - 1
    for i, (s, t) in enumerate(intervals(grid)):
        m = b.x0(x)
        h = b.lam(t) - b.lam(s)
        if not bool(b.sigma(t) > 0):
            x = b.state(move(b, x, s, t, -h, m), t)
            continue
        fixed = eta * posterior_std(b, s, t)
        kept = b.sigma(t) / b.sigma(s) * ancestral_keep(h, eta).exp()
        of_x0 = b.alpha(t) - kept * b.alpha(s)
        # no data in [low, high] vary more
        spread = min(known.variance(b.process, s), ((high - low) / 2) ** 2)
        deviation = torch.sqrt(fixed**2 + of_x0**2 * spread)
        if i == n - 2:
            # E|N(0, s^2)| = s sqrt(2 / pi)
            deviation = deviation.clamp(max=clip_noise * (high - low) / 255 * math.sqrt(math.pi / 2))
        x = b.state(kept * x + of_x0 * m + deviation * b.noise(), t)
