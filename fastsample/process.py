"""Noise processes: what ``t`` means to a model.

A process is the pair of functions in ``x_t = alpha(t) x_0 + sigma(t) eps`` with ``eps ~ N(0, I)``, in float64
on the host. The half log signal-to-noise ratio is ``lam(t) = log(alpha(t) / sigma(t))`` (Lu et al. 2022,
DPM-Solver, section 2.1). Time is in the model's own units: the index 0..N-1 for discrete VP models, sigma for
VE and EDM, [0, 1] for flows, the angle for TrigFlow.
"""

from __future__ import annotations

import functools
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import unknown

TimeLike = float | int | Tensor | np.ndarray | Sequence[float]

TRAINED_STEPS = 1000
_MEMO = 1 << 14
_RECENT = 4

_Found = tuple[Tensor, Tensor, Tensor]


def as_time(t: TimeLike) -> Tensor:
    """``t`` as a float64 CPU tensor (differentiable when it is a float64 tensor that requires grad)."""
    if isinstance(t, Tensor):
        return t.to(device="cpu", dtype=torch.float64)
    return torch.as_tensor(np.asarray(t, dtype=np.float64))


def _within(t: TimeLike, low: float, high: float, what: str) -> Tensor:
    """Times in [low, high]; float32 rounding of the ends is forgiven.

    Raises:
        ValueError: naming the first time outside.
    """
    time = as_time(t)
    if bool(((time >= low) & (time <= high)).all()):  # false for NaN
        return time
    slack = 1e-6 * (high - low if high < math.inf else 1.0)
    near = (time >= low - slack) & (time <= high + slack)
    if not bool(near.all()):
        first = float(time.reshape(-1)[(~near).reshape(-1).nonzero()[0, 0]])
        raise ValueError(f"t={first!r} lies outside the times of {what}: [{low:g}, {high:g}]")
    return _clamp(time, low, high)


def _clamp(time: Tensor, low: float, high: float) -> Tensor:
    """``time.clamp(low, high)``, which has no gradient at its ends; this has."""
    return torch.where(time < low, low, torch.where(time > high, high, time))


def _written(found: _Found) -> int:
    """How often what was found has been written to, by whoever was given it."""
    return sum(v._version for v in found)


class Process(ABC):
    """A Gaussian noise process ``x_t = alpha(t) x_0 + sigma(t) eps``.

    Attributes:
        t_start: the noisiest time of the model.
        t_end: the least noisy time that the network was trained at.
        t_zero: the time at which ``sigma`` is zero (never handed to the network unless it equals ``t_end``).
        grid: the grid that solvers use on this process when none is named.
    """

    grid = "uniform"

    t_start: float
    t_end: float
    t_zero: float
    _levels: Tensor | None = None

    # -- the two functions and their inverse -----------------------------------------------------------------

    @abstractmethod
    def _at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``alpha(t), sigma(t), lam(t)`` for float64 times; gradients stay finite where these do."""

    @abstractmethod
    def t_of_lam(self, lam: TimeLike) -> Tensor:
        """The time at which the half log-SNR is ``lam``; the inverse of :meth:`lam`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """A JSON-compatible description: ``kind`` and the constructor's numbers."""

    def alpha(self, t: TimeLike) -> Tensor:
        """The signal's coefficient ``alpha(t)``, float64."""
        return self._look_up(t)[0]

    def sigma(self, t: TimeLike) -> Tensor:
        """The noise's coefficient ``sigma(t)``, float64."""
        return self._look_up(t)[1]

    def lam(self, t: TimeLike) -> Tensor:
        """The half log-SNR ``log(alpha / sigma)``, float64; infinite at the ends of some processes."""
        return self._look_up(t)[2]

    def _look_up(self, t: TimeLike) -> _Found:
        time = as_time(t)
        if time.requires_grad:
            return self._at(time)
        return self._several(time) if time.ndim else self._one(time)

    def _one(self, time: Tensor) -> _Found:
        # Solvers ask for the same few times again and again; a look-up is 50 times cheaper than the formula.
        memo: dict[float, tuple[_Found, int]] = self.__dict__.setdefault("_memo", {})
        key = float(time)
        known = memo.get(key)
        if known is not None and known[1] == _written(known[0]):
            return known[0]
        if len(memo) > _MEMO:
            memo.clear()
        with torch.inference_mode(False):  # for those who ask later, too
            found = self._at(torch.tensor(key, dtype=torch.float64))
        memo[key] = found, _written(found)
        return found

    def _several(self, time: Tensor) -> _Found:
        # An update of a training asks for the very same times again and again.
        if time.is_inference() or torch.is_inference_mode_enabled():
            return self._at(time)
        recent: list[tuple[Tensor, int, _Found, int]] = self.__dict__.get("_recent", [])
        for known, version, found, written in recent:
            if known is time and version == time._version and written == _written(found):
                return found
        found = self._at(time)
        self.__dict__["_recent"] = [(time, time._version, found, _written(found)), *recent[: _RECENT - 1]]
        return found

    def rho(self, t: TimeLike) -> Tensor:
        """The noise-to-signal ratio ``sigma / alpha = exp(-lam)`` (the sigma of EDM), float64."""
        alpha, sigma, _ = self._look_up(t)
        return sigma / alpha

    def phi(self, t: TimeLike) -> Tensor:
        """The angle ``atan2(sigma, alpha)`` in [0, pi/2] (TrigFlow's time), float64: finite at both ends."""
        alpha, sigma, _ = self._look_up(t)
        return torch.atan2(sigma, alpha)

    def t_of_rho(self, rho: TimeLike) -> Tensor:
        """The time at which ``sigma / alpha`` is ``rho``."""
        return self.t_of_lam(-as_time(rho).log())

    # -- the coordinate in which "uniform" grids are uniform -------------------------------------------------

    def t_of_uniform(self, u: TimeLike) -> Tensor:
        """Time from the coordinate in which uniform grids are laid; the identity but for shifted flows."""
        return as_time(u)

    def uniform_of_t(self, t: TimeLike) -> Tensor:
        """The inverse of :meth:`t_of_uniform`."""
        return as_time(t)

    # -- networks with an embedding table --------------------------------------------------------------------

    def quantized(self, levels: TimeLike) -> Process:
        """The same process for a network that knows only the times in ``levels``.

        Grids and intermediate stages are snapped to the nearest level *before* any coefficient is computed,
        so that the solver's sigma and the network's time always agree.

        Raises:
            ValueError: no level, or one outside the times of the process.
        """
        known = torch.unique(as_time(levels).flatten())
        if known.numel() == 0:
            raise ValueError("levels is empty; give the times that the network knows")
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        low, high = sorted((self.t_zero, self.t_start))
        other._levels = _within(known, low, high, f"{self!r}, as levels")
        return other

    @property
    def levels(self) -> Tensor | None:
        """The times that a quantized network knows (ascending), or None when time is continuous."""
        return self._levels

    def snap(self, t: TimeLike) -> Tensor:
        """``t`` moved to the nearest time the network knows; ``t_zero`` and continuous time stay."""
        time = as_time(t)
        if self._levels is None:
            return time
        return torch.where(time == self.t_zero, time, self._nearest(time))

    def _nearest(self, time: Tensor) -> Tensor:
        levels = self._levels
        assert levels is not None
        above = torch.searchsorted(levels, time.detach().contiguous()).clamp(max=levels.numel() - 1)
        below = (above - 1).clamp(min=0)
        return torch.where(time - levels[below] <= levels[above] - time, levels[below], levels[above])

    def network_time(self, t: TimeLike) -> Tensor:
        """What a network is told for a state at ``t``: within the trained range, and a time it knows."""
        low, high = sorted((self.t_end, self.t_start))
        time = _clamp(as_time(t), low, high)
        return time if self._levels is None else self._nearest(time)

    def stage(self, lam: TimeLike) -> Tensor:
        """The time of an intermediate stage wanted at ``lam``: snapped where the network needs it."""
        return self.snap(self.t_of_lam(lam))

    # -- identity --------------------------------------------------------------------------------------------

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of the functions themselves, equal for equal processes however they were made."""
        u = torch.linspace(0.0, 1.0, 65, dtype=torch.float64)
        t = self.t_end + (self.t_start - self.t_end) * u
        table = torch.stack([t, self.alpha(t), self.sigma(t)])
        # Ten digits: the same process through another order of operations is the same process.
        text = " ".join(f"{v:.9e}" for v in table.flatten().tolist())
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        parts = self.describe()
        kind = parts.pop("kind")
        shown = [f"{k}=<{len(v)} numbers>" if isinstance(v, list) else f"{k}={v}" for k, v in parts.items()]
        if self._levels is not None:
            shown.append(f"quantized to {self._levels.numel()} times")
        return f"{kind}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Process):
            return NotImplemented
        mine, theirs = (None if p.levels is None else p.levels.tolist() for p in (self, other))
        return self.describe() == other.describe() and mine == theirs

    def __hash__(self) -> int:
        return hash(self.fingerprint)


class Scaled(Process):
    """A process seen by data divided by ``sigma_data``: ``alpha`` is multiplied by it, time is the same."""

    def __init__(self, process: Process, sigma_data: float) -> None:
        """
        Raises:
            ValueError: ``sigma_data`` is not a positive number.
        """
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data={sigma_data!r} must be a positive number: the data's scale")
        self._process, self._shift = process, math.log(sigma_data)
        self.t_start, self.t_end, self.t_zero = process.t_start, process.t_end, process.t_zero

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma, lam = self._process.alpha(t), self._process.sigma(t), self._process.lam(t)
        return alpha * math.exp(self._shift), sigma, lam + self._shift

    def t_of_lam(self, lam: TimeLike) -> Tensor:
        return self._process.t_of_lam(as_time(lam) - self._shift)

    def describe(self) -> dict[str, Any]:
        return {"kind": "Scaled", "process": self._process.describe(), "sigma_data": math.exp(self._shift)}


class VP(Process):
    """Variance-preserving process with ``alpha^2 + sigma^2 = 1``, from a table of ``N`` training steps.

    ``t`` is the training index, 0 (least noise) to N-1, fractional allowed: ``log alpha`` is linear between
    integers, as in the official DPM-Solver, and reaches 0 at ``t = -1`` (before the first noising step).
    In an interval whose noisier end has ``alpha = 0`` (zero terminal SNR), ``alpha`` itself is linear.
    """

    def __init__(self, alphas_cumprod: TimeLike, _made: dict[str, Any] | None = None) -> None:
        """
        Args:
            alphas_cumprod: ``alpha_t^2`` for t = 0..N-1, shape (N,), in [0, 1), strictly decreasing.

        Raises:
            ValueError: the table is not one-dimensional, not decreasing or not in [0, 1).
        """
        table = as_time(alphas_cumprod)
        if table.ndim != 1 or table.numel() < 2:
            raise ValueError(
                f"alphas_cumprod has shape {tuple(table.shape)}; give one number for each training step"
            )
        if not bool(torch.isfinite(table).all()) or bool((table[1:] >= table[:-1]).any()):
            raise ValueError("alphas_cumprod must decrease strictly with the training step; check its order")
        if bool(table[0] >= 1) or bool(table[-1] < 0):
            raise ValueError(
                f"alphas_cumprod must lie in [0, 1), got {float(table[-1])!r} to {float(table[0])!r}"
            )
        self._made = _made or {"kind": "VP", "alphas_cumprod": table.tolist()}
        # Knots at t = -1, 0, .., N-1.
        zero = torch.zeros(1, dtype=torch.float64)
        self._log_alpha = torch.cat([zero, 0.5 * table.log()])
        self._fades = bool(table[-1] == 0)
        self._lam_knots = self._log_alpha - 0.5 * torch.log(-torch.expm1(2 * self._log_alpha))
        self.t_start = float(table.numel() - 1)
        self.t_end = 0.0
        self.t_zero = -1.0

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: TimeLike) -> VP:
        """From ``alpha_t^2``, shape (N,)."""
        return cls(alphas_cumprod)

    @classmethod
    def from_betas(cls, betas: TimeLike) -> VP:
        """From the forward variances ``beta_t``, shape (N,), in (0, 1] (Ho et al. 2020, eq. 2)."""
        table = as_time(betas)
        if bool((table <= 0).any()) or bool((table > 1).any()):
            raise ValueError(
                f"betas must lie in (0, 1], got {float(table.min())!r} to {float(table.max())!r}"
            )
        return cls(torch.cumprod(1 - table, dim=0))

    @classmethod
    def _named(cls, kind: str, betas: Tensor, **numbers: float) -> VP:
        process = cls.from_betas(betas)
        process._made = {"kind": f"VP.{kind}", **numbers}
        return process

    @classmethod
    def linear(
        cls, beta_start: float = 1e-4, beta_end: float = 0.02, num_train_steps: int = TRAINED_STEPS
    ) -> VP:
        """DDPM's schedule: betas linear in the index (Ho et al. 2020, section 4)."""
        betas = torch.from_numpy(np.linspace(beta_start, beta_end, num_train_steps))
        return cls._named(
            "linear", betas, beta_start=beta_start, beta_end=beta_end, num_train_steps=num_train_steps
        )

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, num_train_steps: int = TRAINED_STEPS
    ) -> VP:
        """Latent diffusion's schedule: roots of the betas linear in the index (Rombach et al. 2022)."""
        betas = torch.from_numpy(np.linspace(beta_start**0.5, beta_end**0.5, num_train_steps) ** 2)
        return cls._named(
            "scaled_linear", betas, beta_start=beta_start, beta_end=beta_end, num_train_steps=num_train_steps
        )

    @classmethod
    def cosine(cls, s: float = 0.008, max_beta: float = 0.999, num_train_steps: int = TRAINED_STEPS) -> VP:
        """The cosine schedule with its clipped betas (Nichol & Dhariwal 2021, eq. 17)."""
        u = np.arange(num_train_steps + 1) / num_train_steps
        bar = np.cos((u + s) / (1 + s) * math.pi / 2) ** 2
        betas = torch.from_numpy(np.minimum(1 - bar[1:] / bar[:-1], max_beta))
        return cls._named("cosine", betas, s=s, max_beta=max_beta, num_train_steps=num_train_steps)

    def rescaled_zero_snr(self) -> VP:
        """The same schedule shifted and scaled to zero terminal SNR (Lin et al. 2024, algorithm 1)."""
        root = self._log_alpha[1:].exp()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        return VP(root**2)

    @property
    def num_train_steps(self) -> int:
        """The number of training steps ``N``."""
        return int(self.t_start) + 1

    def _interval(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Left knot's and right knot's ``log alpha``, and the fraction between them."""
        t = _within(t, -1.0, self.t_start, "this VP process (-1 is no noise)")
        left = (t.detach() + 1).floor().long().clamp_(0, self._log_alpha.numel() - 2)
        return self._log_alpha[left], self._log_alpha[left + 1], t + 1 - left

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high, w = self._interval(t)
        fading = torch.isinf(high) if self._fades else None
        straight = low + w * ((high if fading is None else torch.where(fading, low, high)) - low)
        alpha, log_alpha, square = straight.exp(), straight, -torch.expm1(2 * straight)
        if fading is not None:
            linear = low.exp() * (1 - w)
            alpha = torch.where(fading, linear, alpha)
            log_alpha = torch.where(fading, torch.where(fading, linear, 1.0).log(), straight)
            square = torch.where(fading, 1 - linear**2, square)
        # sqrt has no derivative at zero, where grids end: that end is a constant, and its gradient zero.
        clean = square == 0
        sigma = torch.where(clean, 0.0, torch.where(clean, 1.0, square).sqrt())
        return alpha, sigma, log_alpha - 0.5 * square.log()

    def t_of_lam(self, lam: TimeLike) -> Tensor:
        value = as_time(lam)
        noisiest = self._lam_knots[-1]
        if bool((value < noisiest - 1e-9 * (1 + noisiest.abs())).any()):
            raise ValueError(
                f"lam={float(value.min())!r} is noisier than {self!r}, which starts at {float(noisiest)!r}"
            )
        value = value.clamp(min=noisiest)
        # log alpha = -softplus(-2 lam) / 2, stable at both ends
        log_alpha = -0.5 * torch.nn.functional.softplus(-2 * value, threshold=40.0)
        knots = self._log_alpha
        left = torch.searchsorted(-knots, -log_alpha.detach().contiguous(), right=True) - 1
        left = left.clamp(0, knots.numel() - 2)
        low, high = knots[left], knots[left + 1]
        fading = torch.isinf(high)
        w = torch.where(
            fading,
            -torch.expm1(log_alpha - low),
            (log_alpha - low) / (torch.where(fading, low - 1, high) - low),
        )
        return left + w - 1

    def describe(self) -> dict[str, Any]:
        return dict(self._made)


class _SigmaTime(Process):
    """Processes with ``alpha = 1`` whose time is sigma itself."""

    _kind: str
    grid = "karras"

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(
                f"sigma_min={sigma_min!r}, sigma_max={sigma_max!r}: need 0 < sigma_min < sigma_max < inf"
            )
        self.t_start, self.t_end, self.t_zero = float(sigma_max), float(sigma_min), 0.0

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sigma = _within(t, 0.0, math.inf, f"{self._kind} (sigma)")
        return torch.ones_like(sigma), sigma, -sigma.log()

    def t_of_lam(self, lam: TimeLike) -> Tensor:
        return (-as_time(lam)).exp()

    def describe(self) -> dict[str, Any]:
        return {"kind": self._kind, "sigma_min": self.t_end, "sigma_max": self.t_start}


class VE(_SigmaTime):
    """Variance-exploding process ``x_t = x_0 + sigma eps`` with ``t = sigma`` (Song et al. 2021, eq. 9)."""

    _kind = "VE"

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        super().__init__(sigma_min, sigma_max)


class EDM(_SigmaTime):
    """EDM's process ``x_t = x_0 + t eps`` with ``t = sigma`` (Karras et al. 2022, table 1)."""

    _kind = "EDM"

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        super().__init__(sigma_min, sigma_max)


class Flow(Process):
    """Rectified flow ``x_t = (1 - t) x_0 + t eps``, t from 1 (noise) to 0 (Liu et al., Lipman et al. 2023).

    ``shift`` moves uniform grids towards the noise, ``t = shift u / (1 + (shift - 1) u)`` (Esser et al. 2024,
    eq. 23); alpha and sigma at a given ``t`` do not depend on it.
    """

    def __init__(self, shift: float = 1.0, t_min: float = 1e-3) -> None:
        if not 0 < shift < math.inf:
            raise ValueError(f"shift={shift!r} must be a positive number")
        if not 0 < t_min < 1:
            raise ValueError(f"t_min={t_min!r} must lie in (0, 1): where grids in log-SNR end")
        self.shift = float(shift)
        self.t_start, self.t_end, self.t_zero = 1.0, float(t_min), 0.0

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sigma = _within(t, 0.0, 1.0, "a flow (1 is noise)")
        return 1 - sigma, sigma, torch.log1p(-sigma) - sigma.log()

    def t_of_lam(self, lam: TimeLike) -> Tensor:
        return torch.sigmoid(-as_time(lam))

    def t_of_uniform(self, u: TimeLike) -> Tensor:
        value = as_time(u)
        return self.shift * value / (1 + (self.shift - 1) * value)

    def uniform_of_t(self, t: TimeLike) -> Tensor:
        value = as_time(t)
        return value / (self.shift + (1 - self.shift) * value)

    def describe(self) -> dict[str, Any]:
        return {"kind": "Flow", "shift": self.shift, "t_min": self.t_end}


class TrigFlow(Process):
    """TrigFlow ``x_t = cos(t) x_0 + sin(t) eps``, t from pi/2 (noise) to 0 (Lu & Song 2025, section 3).

    For unit-variance noise; the paper's ``sigma_d`` belongs to the network's wrapper.
    """

    def __init__(self, t_max: float = math.pi / 2, t_min: float = 0.004) -> None:
        if not 0 < t_min < t_max <= math.pi / 2:
            raise ValueError(f"t_min={t_min!r}, t_max={t_max!r}: need 0 < t_min < t_max <= pi/2")
        self.t_start, self.t_end, self.t_zero = float(t_max), float(t_min), 0.0

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angle = _within(t, 0.0, math.pi / 2, "TrigFlow")
        # cos(pi/2) is 6e-17 in floating point; the process means zero.
        alpha, sigma = torch.sin(math.pi / 2 - angle), torch.sin(angle)
        return alpha, sigma, alpha.log() - sigma.log()

    def t_of_lam(self, lam: TimeLike) -> Tensor:
        return torch.atan((-as_time(lam)).exp())

    def describe(self) -> dict[str, Any]:
        return {"kind": "TrigFlow", "t_max": self.t_start, "t_min": self.t_end}


def from_description(description: dict[str, Any]) -> Process:
    """The process that :meth:`Process.describe` describes.

    Raises:
        ValueError: an unknown kind.
    """
    settings = dict(description)
    kind = settings.pop("kind", None)
    if kind == "Scaled":
        return Scaled(from_description(settings["process"]), settings["sigma_data"])
    makers: dict[str, Any] = {
        "VP": VP,
        "VP.linear": VP.linear,
        "VP.scaled_linear": VP.scaled_linear,
        "VP.cosine": VP.cosine,
        "VE": VE,
        "EDM": EDM,
        "Flow": Flow,
        "TrigFlow": TrigFlow,
    }
    if kind not in makers:
        raise unknown("kind", kind, makers)
    return makers[kind](**settings)
