"""Samplers of others in the same run: diffusers' schedulers, and a function of the user's own.

They start from the same noise, run on the same counted network and are compared at the same number of counted
evaluations.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsample.denoiser import Denoiser, as_conditions
from fastsample.errors import unknown
from fastsample.noise import normal
from fastsample.process import VP, Flow, as_time

PREFIX = "diffusers:"
_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}

_STOCHASTIC = ("DDPMScheduler", "LCMScheduler", "TCDScheduler", "DPMSolverSDEScheduler")

# Short names for the settings that people compare with.
SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


@dataclass(frozen=True)
class PeerPlan:
    """What the harness asks of a plan, of a sampler that has none.

    Attributes:
        nfe: evaluations of a sample.
        steps: the number that the sampler was asked for.
        stochastic: whether it draws noise.
        end_sigma: the noise level of its result.
        described: the sampler in words.
        settings: all that distinguishes it.
        notes: for the report.
    """

    nfe: int
    steps: int
    stochastic: bool
    end_sigma: float
    described: str
    settings: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """What distinguishes the sampler, as JSON."""
        return self.settings

    def __repr__(self) -> str:
        return self.described


class Peer:
    """A sampler of others as the harness calls its own."""

    denoiser: Denoiser
    plan: PeerPlan

    def _run(self, x: Tensor, conditions: Mapping[str, Any], seed: int, first: int) -> Tensor:
        """From unit noise (B, ...) to samples."""
        raise NotImplementedError

    def __call__(
        self,
        shape: Sequence[int],
        *,
        seed: int,
        index: Tensor,
        device: torch.device,
        **conditions: Any,
    ) -> Tensor:
        """Samples of the noise (seed, index), as :class:`fastsample.Sampler` draws it."""
        noise = normal(tuple(shape), seed, index.to(device))
        ready = as_conditions(conditions, device, len(noise))
        with torch.no_grad():
            return self._run(noise, ready, seed, int(index[0])).float()


class DiffusersSampler(Peer):
    """A diffusers scheduler in the loop that its pipelines run."""

    def __init__(self, denoiser: Denoiser, name: str, steps: int, settings: Mapping[str, Any]) -> None:
        """
        Args:
            denoiser: on a discrete VP process or a flow.
            name: "diffusers:" and a short name or a scheduler's class.
            steps: its ``num_inference_steps``.
            settings: of its constructor; clipping is off where they do not say.

        Raises:
            ValueError: what diffusers cannot run, or does not know.
        """
        import diffusers

        cls, preset = scheduler_class(name)
        make = getattr(diffusers, cls)
        known = set(inspect.signature(make.__init__).parameters)
        for key in settings:
            if key not in known:
                raise unknown(f"{name}'s setting", key, known - {"self"})
        given = _meaning(denoiser, cls, known) | preset | dict(settings)
        self.denoiser, self._make = denoiser, lambda: make(**given)
        scheduler = self._make()
        scheduler.set_timesteps(steps)
        accepts = inspect.signature(scheduler.step).parameters
        self._steps, self._noisy = steps, "generator" in accepts
        described = {"cls": cls, "steps": steps, "diffusers": diffusers.__version__, **given}
        described.pop("trained_betas", None)
        self.plan = PeerPlan(
            nfe=len(scheduler.timesteps),
            steps=steps,
            stochastic=_draws_noise(cls, given),
            end_sigma=_end_sigma(scheduler),
            described=f"diffusers {cls}({', '.join(f'{k}={v}' for k, v in described.items() if k != 'cls')})",
            settings=json.dumps([described, denoiser.process.fingerprint], default=str),
            notes=(f"diffusers {diffusers.__version__}",),
        )

    def _run(self, x: Tensor, conditions: Mapping[str, Any], seed: int, first: int) -> Tensor:
        scheduler, flow = self._make(), isinstance(self.denoiser.process, Flow)
        scheduler.set_timesteps(self._steps, device=x.device)
        bound = self.denoiser.bind(len(x), conditions, x.device)
        process = self.denoiser.process
        extra = {}
        if self._noisy and self.plan.stochastic:
            extra["generator"] = torch.Generator(x.device).manual_seed(hash((seed, first)) & 0xFFFFFFFF)
        x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            time = as_time(float(t) / 1000 if flow else float(t))
            told = self.denoiser.told(time).to(x.device, self.denoiser.time_dtype(x.dtype)).expand(len(x))
            alpha = float(process.alpha(time))
            rho = float(process.sigma(time)) / alpha if alpha else math.inf
            out = bound(given.float(), told, rho)
            x = scheduler.step(out.float(), t, x, **extra).prev_sample
        return x


class FunctionSampler(Peer):
    """A function of the user's: ``function(denoiser, noise, steps, **conditions) -> samples``."""

    def __init__(
        self, denoiser: Denoiser, target: str, steps: int, settings: Mapping[str, Any], shape: tuple[int, ...]
    ) -> None:
        """
        Args:
            denoiser: handed to the function; call it (``denoiser(x, t)`` is the clean sample) or ``bind`` it.
            target: the function, ``my.module.sample``.
            steps: handed to the function.
            settings: further keywords.
            shape: of one sample.

        Raises:
            ValueError: no such function, or a result of another shape.
        """
        self.denoiser, self._settings, self._steps = denoiser, dict(settings), steps
        self._function = _imported(target)
        self._shape = shape
        described = {"target": target, "steps": steps, **self._settings}
        source = hashlib.sha256(inspect.getsource(self._function).encode()).hexdigest()
        self.plan = PeerPlan(
            nfe=0,
            steps=steps,
            stochastic=False,
            end_sigma=0.0,
            described=f"{target}({', '.join(f'{k}={v}' for k, v in described.items() if k != 'target')})",
            settings=json.dumps([described, source], default=str),
        )

    def count(self, evaluations: Callable[[], float], conditions: Mapping[str, Any]) -> None:
        """Find the number of evaluations by drawing one sample."""
        before = evaluations()
        device = self.denoiser.device
        self((1, *self._shape), seed=0, index=torch.zeros(1, dtype=torch.int64), device=device, **conditions)
        nfe = round(evaluations() - before)
        if nfe < 1:
            raise ValueError(
                f"{self.plan.described} never called the denoiser; call denoiser(x, t) or denoiser.bind(..)(x, t, rho)"
            )
        self.plan = PeerPlan(**{**vars(self.plan), "nfe": nfe})

    def _run(self, x: Tensor, conditions: Mapping[str, Any], seed: int, first: int) -> Tensor:
        out = self._function(self.denoiser, x, self._steps, **conditions, **self._settings)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{self.plan.described} returned {got} for noise of shape {tuple(x.shape)}")
        return out


def installed() -> bool:
    """Whether diffusers can be imported."""
    return importlib.util.find_spec("diffusers") is not None


def scheduler_class(name: str) -> tuple[str, dict[str, Any]]:
    """The scheduler's class and preset settings of "diffusers:NAME".

    Raises:
        ValueError: diffusers is missing, or has no such scheduler.
    """
    if not installed():
        raise ValueError(f"solver={name!r} needs diffusers: pip install 'fastsample[diffusers]'")
    short = name.removeprefix(PREFIX)
    if short in SHORT:
        return SHORT[short]
    import diffusers

    classes = [c for c in dir(diffusers) if c.endswith("Scheduler")]
    if short not in classes:
        raise unknown("solver", name, [PREFIX + n for n in (*SHORT, *classes)])
    return short, {}


def _meaning(denoiser: Denoiser, cls: str, known: set[str]) -> dict[str, Any]:
    """The constructor's arguments that say what the model means."""
    process = denoiser.process
    if isinstance(process, Flow):
        if denoiser.prediction != "flow" or not cls.startswith("FlowMatch"):
            raise ValueError(
                f"{cls} does not run flows as its own; take diffusers:FlowMatchEulerDiscreteScheduler"
            )
        return {"shift": process.shift}
    if not isinstance(process, VP):
        raise ValueError(f"diffusers' schedulers run discrete VP processes and flows, not {process!r}")
    if denoiser.prediction not in _PREDICTIONS:
        raise ValueError(f"diffusers' schedulers know no prediction={denoiser.prediction!r}")
    times = torch.arange(-1, process.num_train_steps, dtype=torch.float64)
    bar = process.alpha(times) ** 2
    given: dict[str, Any] = {
        "num_train_timesteps": process.num_train_steps,
        "trained_betas": (1 - bar[1:] / bar[:-1]).tolist(),
        "prediction_type": _PREDICTIONS[denoiser.prediction],
        "clip_sample": False,
    }
    return {k: v for k, v in given.items() if k in known}


def _draws_noise(cls: str, settings: Mapping[str, Any]) -> bool:
    sde = str(settings.get("algorithm_type", "")).startswith("sde")
    return (
        sde
        or "Ancestral" in cls
        or cls in ("DDPMScheduler", "LCMScheduler", "TCDScheduler", "DPMSolverSDEScheduler")
    )


def _end_sigma(scheduler: Any) -> float:
    """The noise level of a scheduler's result."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        return float(sigmas[-1])
    return math.sqrt(max(0.0, 1 - float(getattr(scheduler, "final_alpha_cumprod", 1.0))))


def _imported(target: str) -> Callable[..., Any]:
    from hydra.errors import HydraException
    from hydra.utils import get_method

    try:
        return get_method(target)
    except (HydraException, ValueError, ImportError) as error:
        raise ValueError(f"_target_={target}: {error}") from error
