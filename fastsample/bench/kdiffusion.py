"""k-diffusion's samplers in the same run, by name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from fastsample.bench.peers import Peer, PeerPlan
from fastsample.denoiser import Denoiser
from fastsample.errors import unknown
from fastsample.prediction import coefficients

PREFIX = "kdiffusion:"

_SCHEDULES = ("karras", "exponential", "polyexponential")


def function(name: str) -> Callable[..., Tensor]:
    """k-diffusion's ``sample_NAME`` of "kdiffusion:NAME".

    Raises:
        ValueError: k-diffusion is missing or does not import, or has no such sampler on a fixed grid.
    """
    if importlib.util.find_spec("k_diffusion") is None:
        raise ValueError(f"solver={name!r} needs k-diffusion: pip install k-diffusion")
    try:
        sampling = importlib.import_module("k_diffusion").sampling
    except ImportError as error:
        raise ValueError(
            f"solver={name!r}: k-diffusion does not import ({error}): pip install k-diffusion"
        ) from error
    known = {
        PREFIX + key.removeprefix("sample_"): value
        for key, value in vars(sampling).items()
        if key.startswith("sample_") and "sigmas" in inspect.signature(value).parameters
    }
    if name not in known:
        raise unknown("solver", name, known)
    return known[name]


class KDiffusionSampler(Peer):
    """One of k-diffusion's samplers, in its own coordinates ``x / alpha`` and on its own noise levels."""

    def __init__(self, denoiser: Denoiser, name: str, steps: int, settings: Mapping[str, Any]) -> None:
        """
        Args:
            denoiser: on any process that starts at a finite noise level.
            name: "kdiffusion:" and a sampler's name, ``dpmpp_2m``.
            steps: number of noise levels before the appended zero.
            settings: the sampler's own (``eta``, ``order``, ...), and ``schedule`` ("karras", "exponential" or
                "polyexponential") with its ``rho``.

        Raises:
            ValueError: what k-diffusion cannot run, or does not know.
        """
        self._function = function(name)
        own, chosen = inspect.signature(self._function).parameters, dict(settings)
        schedule, rho = chosen.pop("schedule", "karras"), chosen.pop("rho", None)
        if schedule not in _SCHEDULES:
            raise unknown(f"{name}'s schedule", schedule, _SCHEDULES)
        if rho is not None and schedule == "exponential":
            raise ValueError(f"{name}: rho={rho} belongs to schedule karras or polyexponential")
        taken = {"model", "x", "sigmas", "extra_args", "callback", "disable", "noise_sampler"}
        for key in chosen:
            if key not in own or key in taken:
                raise unknown(f"{name}'s setting", key, {*own, "schedule", "rho"} - taken)
        process = denoiser.process
        low, high = float(process.rho(process.t_end)), float(process.rho(process.t_start))
        if not math.isfinite(high):
            raise ValueError(f"{name} starts at a finite noise level; {process!r} starts at pure noise")
        sampling = inspect.getmodule(self._function)
        make = getattr(sampling, f"get_sigmas_{schedule}")
        self._sigmas: Tensor = make(steps, low, high, **({} if rho is None else {"rho": rho}))
        self.denoiser, self._settings, self._range = denoiser, chosen, (low, high)
        noisy = bool(chosen["eta"] if "eta" in chosen else own["eta"].default if "eta" in own else 0)
        described = {"schedule": schedule, **({} if rho is None else {"rho": rho}), **chosen}
        release = version("k-diffusion")
        self.plan = PeerPlan(
            nfe=self._count(),
            steps=steps,
            stochastic=noisy or bool(chosen.get("s_churn")),
            end_sigma=0.0,
            described=f"k-diffusion {name.removeprefix(PREFIX)}({steps} steps, "
            + ", ".join(f"{k}={v}" for k, v in described.items())
            + ")",
            settings=json.dumps([name, steps, described, release, process.fingerprint], default=str),
            notes=(f"k-diffusion {release}",),
        )

    def _count(self) -> int:
        """Evaluations, counted on a model that says nothing; they do not depend on what it says."""
        calls = 0

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return torch.zeros_like(x)

        with torch.random.fork_rng(devices=[]):
            self._function(model, torch.ones(1, 1), self._sigmas, disable=True, **self._settings)
        return calls

    def _run(self, x: Tensor, conditions: Mapping[str, Any], seed: int, first: int) -> Tensor:
        denoiser, process = self.denoiser, self.denoiser.process
        bound = denoiser.bind(len(x), conditions, x.device)

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            # all of a batch have one noise level, rounded to float32
            time = process.snap(process.t_of_rho(sigma[0].double().cpu().clamp(*self._range)))
            alpha, own = process.alpha(time), process.sigma(time)
            p, q = coefficients(denoiser.prediction, alpha, own, "x0")
            told = denoiser.told(process.network_time(time))
            told = told.to(x.device, denoiser.time_dtype(x.dtype)).expand(len(x))
            state = float(alpha) * x
            return float(p) * state + float(q) * bound(state, told, float(own / alpha)).float()

        sigmas = self._sigmas.to(x.device)
        cuda = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):  # its samplers draw from torch's own generator
            torch.manual_seed(hash((seed, first)) & 0xFFFFFFFF)
            return self._function(model, x * sigmas[0], sigmas, disable=True, **self._settings)
