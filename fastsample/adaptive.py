"""Adaptive methods: DPM-Solver-12 and -23, and Dormand-Prince's RK45, with error control for each sample
alone.

Every sample has its own time and step size, so its result does not depend on what else is in the batch.
Step by step only the samples that still move are evaluated. A rejected step keeps the evaluation at its
start.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .denoiser import Bound, Denoiser, select
from .errors import NonFiniteError, nearest, unknown
from .executor import Run, philox_noise
from .grids import ENDS
from .hooks import At, Hook
from .prediction import coefficients
from .process import Process
from .sampler import Sampler, first_time

LEAST_ERROR = 1e-10  # so that a step without error still gives a finite next step

# (x, u) of the samples that are tried -> the prediction there
Evaluate = Callable[[Tensor, Tensor], Tensor]


def names() -> list[str]:
    """The names of the adaptive methods."""
    return sorted(_METHODS)


# -- the methods ------------------------------------------------------------------------------------------


class Method(ABC):
    """One embedded pair, in a coordinate ``u`` along which it steps.

    Attributes:
        space: the prediction that it integrates.
        order: of the error estimate's decay with the step.
        rtol, atol, h_init: its field's defaults.
        factors: the least and the largest change of step size at once.
    """

    space: str
    order: int
    rtol: float
    atol: float
    h_init: float
    factors: tuple[float, float] = (0.0, math.inf)

    def __init__(self, process: Process) -> None:
        self.process = process

    @abstractmethod
    def u_of_t(self, t: Tensor) -> Tensor:
        """The coordinate; rises towards the data."""

    @abstractmethod
    def t_of_u(self, u: Tensor) -> Tensor:
        """Its inverse."""

    @abstractmethod
    def attempt(
        self, x: Tensor, m: Tensor, u: Tensor, h: Tensor, evaluate: Evaluate
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One step of every sample.

        Args:
            x, m: states and predictions at u, (B, ...).
            u, h: float64 (B,), where each sample is and its step.
            evaluate: the network.

        Returns:
            The higher-order and the lower-order result, and the prediction at the end where it is known.
        """

    @abstractmethod
    def allowed(
        self, x: Tensor, low_x: Tensor, low: Tensor, high: Tensor, rtol: float, atol: float
    ) -> Tensor:
        """The size of error that is accepted, element by element.

        Args:
            x, low_x: the state that the step began at, as it is and as the lower order gave it.
            low, high: the results.
            rtol, atol: tolerances.
        """


class _DPM(Method):
    """DPM-Solver-12 and -23 (Lu et al. 2022, appendix C), in lambda: each order within the next."""

    space = "eps"
    rtol, atol, h_init = 0.05, 0.0078, 0.05

    def u_of_t(self, t: Tensor) -> Tensor:
        return self.process.lam(t)

    def t_of_u(self, u: Tensor) -> Tensor:
        return self.process.t_of_lam(u)

    def allowed(
        self, x: Tensor, low_x: Tensor, low: Tensor, high: Tensor, rtol: float, atol: float
    ) -> Tensor:
        return torch.clamp(rtol * torch.maximum(low.abs(), low_x.abs()), min=atol)

    def _move(self, x: Tensor, u: Tensor, h: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
        """``(alpha_t / alpha_s) x - sigma_t sum c_j d_j`` at ``u + h``."""
        s, t = self.t_of_u(u), self.t_of_u(u + h)
        moved = _each(self.process.alpha(t) / self.process.alpha(s), x) * x
        for c, d in terms:
            moved = moved - _each(self.process.sigma(t) * c, x) * d
        return moved


class DPM12(_DPM):
    """DPM-Solver-1 in DPM-Solver-2, ``r_1 = 1/2``."""

    order = 2

    def attempt(
        self, x: Tensor, m: Tensor, u: Tensor, h: Tensor, evaluate: Evaluate
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        r1 = 0.5
        phi_1 = torch.expm1(h)
        stage = evaluate(self._move(x, u, r1 * h, (torch.expm1(r1 * h), m)), u + r1 * h)
        low = self._move(x, u, h, (phi_1, m))
        return self._move(x, u, h, (phi_1, m), (phi_1 / (2 * r1), stage - m)), low, None


class DPM23(_DPM):
    """DPM-Solver-2 in DPM-Solver-3, ``r_1 = 1/3``, ``r_2 = 2/3``."""

    order = 3

    def attempt(
        self, x: Tensor, m: Tensor, u: Tensor, h: Tensor, evaluate: Evaluate
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        r1, r2 = 1 / 3, 2 / 3
        phi_1 = torch.expm1(h)
        first = evaluate(self._move(x, u, r1 * h, (torch.expm1(r1 * h), m)), u + r1 * h) - m
        phi_12 = torch.expm1(r2 * h)
        middle = self._move(x, u, r2 * h, (phi_12, m), (r2 / r1 * (phi_12 / (r2 * h) - 1), first))
        second = evaluate(middle, u + r2 * h) - m
        low = self._move(x, u, h, (phi_1, m), (phi_1 / (2 * r1), first))
        return self._move(x, u, h, (phi_1, m), ((phi_1 / h - 1) / r2, second)), low, None


class RK45(Method):
    """Dormand & Prince 1980, table 2, on the probability-flow ODE ``dz/dtau = eps - x_0``.

    ``z = x / (alpha + sigma)`` and ``tau = sigma / (alpha + sigma)`` are finite at both ends of any
    process. The last stage is the next step's first.
    """

    space = "flow"
    order = 5
    rtol, atol, h_init = 1e-5, 1e-5, 0.01
    factors = (0.2, 10.0)

    A = (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    )
    C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
    # the embedded fourth-order weights
    LOW = (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)

    def u_of_t(self, t: Tensor) -> Tensor:
        return -self.process.sigma(t) / self._total(t)

    def t_of_u(self, u: Tensor) -> Tensor:
        ends = torch.tensor([self.process.t_start, self.process.t_zero], dtype=torch.float64)
        tau = -u
        inside = (tau > 0) & (tau < 1)
        t = self.process.t_of_lam(-torch.logit(torch.where(inside, tau, 0.5)))
        return torch.where(inside, t, torch.where(tau >= 1, ends[0], ends[1]))

    def allowed(
        self, x: Tensor, low_x: Tensor, low: Tensor, high: Tensor, rtol: float, atol: float
    ) -> Tensor:
        return atol + rtol * torch.maximum(x.abs(), high.abs())

    def _total(self, t: Tensor) -> Tensor:
        return self.process.alpha(t) + self.process.sigma(t)

    def attempt(
        self, x: Tensor, m: Tensor, u: Tensor, h: Tensor, evaluate: Evaluate
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        z = x / _each(self._total(self.t_of_u(u)), x)
        k = [m]
        for row, c in zip(self.A, self.C, strict=True):
            there = u + c * h
            total = self._total(self.t_of_u(there))
            high = _each(total, x) * (z - _each(h, x) * _sum(row, k))  # u is minus tau
            k.append(evaluate(high, there))
        low = _each(total, x) * (z - _each(h, x) * _sum(self.LOW, k))
        return high, low, k[-1]


def _each(c: Tensor, x: Tensor) -> Tensor:
    """One number for each sample, shaped and placed to multiply ``x`` (B, ...)."""
    return c.to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _sum(row: Sequence[float], k: Sequence[Tensor]) -> Tensor:
    total = row[0] * k[0]
    for c, value in zip(row[1:], k[1:], strict=True):
        if c:
            total = total + c * value
    return total


# dpm_adaptive is k-diffusion's name, at its default order
_METHODS: dict[str, type[Method]] = {"dpm12": DPM12, "dpm23": DPM23, "dpm_adaptive": DPM23, "rk45": RK45}


# -- the network at many times at once -----------------------------------------------------------------------


class _Network:
    """A bound network evaluated for some of its samples, each at its own time; counts evaluations."""

    def __init__(self, run: Run, batch: int) -> None:
        self.run, self.batch = run, batch
        self.denoiser = run.network.denoiser
        self.nfe = torch.zeros(batch, dtype=torch.int64)

    def __call__(self, x: Tensor, t: Tensor, index: Tensor, space: str) -> Tensor:
        """The predictions of samples ``index`` with states x (len(index), ...) at times t (len(index),)."""
        denoiser, process = self.denoiser, self.denoiser.process
        self.nfe[index] += 1
        alpha, sigma = process.alpha(t), process.sigma(t)
        told = denoiser.told(process.network_time(t)).to(x.device, denoiser.time_dtype(x.dtype))
        rho = sigma / alpha
        guidance = denoiser.guidance
        acts = torch.tensor([guidance is not None and guidance.acts(float(level)) for level in rho])
        out = torch.empty_like(x)
        for group in (acts, ~acts):
            where = group.nonzero().flatten()
            if len(where):
                bound = self._bound(index[where])
                out[where] = bound(x[where], told[where], float(rho[where[0]])).to(x.dtype)
        p, q = (_each(c, x) for c in coefficients(denoiser.prediction, alpha, sigma, space))
        if self.run.hooks:
            p0, q0 = (_each(c, x) for c in coefficients(denoiser.prediction, alpha, sigma, "x0"))
            x0 = p0 * x + q0 * out
            each = range(len(index))
            x0 = torch.cat([self._hooked(x0[i : i + 1], x[i : i + 1], t[i], index[i]) for i in each])
            p, q, out = p - q * p0 / q0, q / q0, x0
        return p * x + q * out

    def _hooked(self, x0: Tensor, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        process = self.denoiser.process
        first = (self.run.samples.start or 0) + int(sample)
        alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
        at = At(int(self.nfe[sample]) - 1, float(t), alpha, sigma, x, slice(first, first + 1))
        for hook in self.run.hooks:
            x0 = hook(x0, at)
        return x0

    def _bound(self, index: Tensor) -> Bound:
        """The network bound to the conditions of some samples."""
        whole, batch = self.run.network, self.batch
        if len(index) == batch:
            return whole

        def pick(value: Any, like: Any, rows: Tensor) -> Any:
            per_sample = isinstance(like, Tensor) and like.ndim > 0 and like.shape[0] == batch
            return value[rows.to(value.device)] if per_sample else value

        part = copy.copy(whole)
        part.batch = len(index)
        part.cond = tree_map(lambda v: pick(v, v, index), whole.cond)
        if whole.null is not None:
            part.null = tree_map(lambda v: pick(v, v, index), whole.null)
        if whole.both is not None:
            double = torch.cat([index, index + batch])
            part.both = tree_map(lambda v, like: pick(v, like, double), whole.both, whole.cond)
        return part


# -- the loop ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adaptive:
    """An adaptive method with its tolerances; made by :func:`make`.

    Attributes:
        solver: its name.
        method: the embedded pair.
        t0: where it starts.
        end: "zero" (a last first-order step from the least noisy trained time) or "sigma_min".
        rtol, atol: relative and absolute tolerance of a step's error (root mean square over a sample).
        h_init: the first step, in the method's coordinate.
        safety: the factor of the step size that the error estimate suggests.
        max_steps: steps, rejected ones too, after which a sample is given up.
    """

    solver: str
    method: Method
    t0: float
    end: str
    rtol: float
    atol: float
    h_init: float
    safety: float
    max_steps: int

    def __repr__(self) -> str:
        return f"{self.solver}(rtol={self.rtol:g}, atol={self.atol:g}) on {self.method.process!r}"

    def run(self, x: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Integrate every sample.

        Args:
            x: states (B, ...) at ``t0``; not changed.
            run: network and hooks.

        Returns:
            Samples (B, ...), and the evaluations that each took, int64 (B,).

        Raises:
            NonFiniteError: the network or the state became NaN or infinite; names time and samples.
            RuntimeError: a sample needs more than ``max_steps``, or steps too small to move.
        """
        method, process = self.method, self.method.process
        batch = x.shape[0]
        network = _Network(run, batch)
        ends = torch.tensor([self.t0, process.t_end, process.t_zero], dtype=torch.float64)
        begin, end, zero = ends.unbind()
        if bool(torch.isfinite(method.u_of_t(begin))):
            x = x.clone()
        else:
            # lambda is infinite without signal: get off that end by one small step
            near = begin + 1e-3 * (end - begin)
            x, begin = _first_order(process, x, begin, near, _flow(network, x, begin)), near
        last = method.u_of_t(end)
        u = method.u_of_t(begin).repeat(batch)
        h = torch.full((batch,), self.h_init, dtype=torch.float64)
        m, low_x = torch.empty_like(x), x.clone()
        known = torch.zeros(batch, dtype=torch.bool)
        for _ in range(self.max_steps):
            active = (u < last).nonzero().flatten()
            if not len(active):
                break
            asked = active[~known[active]]
            if len(asked):
                m[asked] = network(x[asked], method.t_of_u(u[asked]), asked, method.space)
                known[asked] = True
            here, rest = u[active], last - u[active]
            step = torch.minimum(h[active], rest)

            def evaluate(state: Tensor, at: Tensor, which: Tensor = active) -> Tensor:
                return network(state, method.t_of_u(torch.minimum(at, last)), which, method.space)

            high, low, at_end = method.attempt(x[active], m[active], here, step, evaluate)
            allowed = method.allowed(x[active], low_x[active], low, high, self.rtol, self.atol)
            error = ((high - low) / allowed).flatten(1).double().square().mean(dim=1).sqrt().cpu()
            self._check(error, here, step, active, run)
            factor = self.safety * error.clamp(min=LEAST_ERROR) ** (-1 / method.order)
            h[active] = step * factor.clamp(*method.factors)
            rows = (error <= 1).nonzero().flatten()
            won = active[rows]
            x[won], low_x[won] = high[rows], low[rows]
            # exactly the end where the step was all the rest of the way
            u[won] = torch.where(step == rest, last, here + step)[rows]
            known[won] = at_end is not None
            if at_end is not None:
                m[won] = at_end[rows]
        else:
            late = ((u < last).nonzero().flatten() + (run.samples.start or 0)).tolist()
            if late:
                raise RuntimeError(
                    f"{self!r}: samples {late[:8]} are not done after max_steps={self.max_steps} steps; "
                    "loosen rtol and atol, or raise max_steps"
                )
        if self.end == "zero" and process.t_zero != process.t_end:
            reuse = method.space == "flow" and bool(known.all())
            x = _first_order(process, x, end, zero, m if reuse else _flow(network, x, end))
        return x, network.nfe

    def _check(self, error: Tensor, u: Tensor, step: Tensor, index: Tensor, run: Run) -> None:
        """Refuse errors that are not numbers, and steps that no longer move."""
        first = run.samples.start or 0
        bad = ~torch.isfinite(error)
        if bool(bad.any()):
            t = float(self.method.t_of_u(u[bad])[0])
            raise NonFiniteError(
                f"sampling with {self!r} failed: the state or the network's output is not finite after "
                f"t={t:g} for samples {(index[bad] + first).tolist()[:8]}; try the network in float32"
            )
        stuck = u + step <= u
        if bool(stuck.any()):
            raise RuntimeError(
                f"{self!r}: the step size of samples {(index[stuck] + first).tolist()[:8]} fell to nothing; "
                "loosen rtol and atol, or sample in float64"
            )


def _flow(network: _Network, x: Tensor, t: Tensor) -> Tensor:
    """``eps - x_0`` of all samples at one time."""
    return network(x, t.repeat(x.shape[0]), torch.arange(x.shape[0]), "flow")


def _first_order(process: Process, x: Tensor, s: Tensor, t: Tensor, flow: Tensor) -> Tensor:
    """The step that holds ``x_0`` and ``eps``, finite at both ends of any process."""
    total_s, total_t = (process.alpha(v) + process.sigma(v) for v in (s, t))
    passed = process.sigma(t) / total_t - process.sigma(s) / total_s
    return float(total_t / total_s) * x + float(total_t * passed) * flow


def make(
    name: str,
    process: Process,
    *,
    start: float | None = None,
    end: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    h_init: float | None = None,
    safety: float = 0.9,
    max_steps: int = 10_000,
) -> Adaptive:
    """An adaptive method by name.

    Args:
        name: one of :func:`names`.
        process: the noise process.
        start: where to begin; by default the noisiest time.
        end: "zero" (the default) or "sigma_min".
        rtol, atol: tolerances; by default 0.05 and 0.0078 (DPM-Solver), 1e-5 and 1e-5 (RK45, Song et al.
            2021).
        h_init: the first step in lambda (DPM-Solver: 0.05) or in ``sigma / (alpha + sigma)`` (RK45: 0.01).
        safety: in (0, 1), factor of each suggested step size.
        max_steps: steps, rejected ones too, after which a sample is given up.

    Raises:
        ValueError: an unknown name, or a number that cannot be used.
    """
    if name not in _METHODS:
        raise unknown("solver", name, _METHODS)
    if process.levels is not None:
        raise ValueError(
            f"solver={name!r} needs a network of continuous time, but this one knows {len(process.levels)} "
            "times; wrap it with quantize=False, or use a fixed-grid solver"
        )
    chosen = "zero" if end is None else end
    if chosen not in ENDS:
        raise unknown("end", chosen, ENDS)
    method = _METHODS[name](process)
    numbers = {
        "rtol": method.rtol if rtol is None else rtol,
        "atol": method.atol if atol is None else atol,
        "h_init": method.h_init if h_init is None else h_init,
        "safety": safety,
    }
    for key, value in numbers.items():
        limit = 1.0 if key == "safety" else math.inf
        if not 0 < value < limit:
            raise ValueError(f"{key}={value!r} must lie between 0 and {limit:g}")
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps!r} must be at least 1")
    t0 = process.t_start if start is None else float(start)
    return Adaptive(name, method, t0, chosen, max_steps=int(max_steps), **numbers)


# -- what users hold -----------------------------------------------------------------------------------------

OPTIONS = ("rtol", "atol", "h_init", "safety", "max_steps")


class AdaptiveSampler(Sampler):
    """Samples from a denoiser by an adaptive method; ``Sampler(denoiser, solver="rk45")`` makes one.

    Args:
        denoiser: made by ``fs.wrap``, of continuous time.
        solver: one of ``fs.adaptive.names()``.
        steps, grid: not for these methods.
        start, strength, end, hooks: as for :class:`fastsample.Sampler`.
        options: as for :func:`make`: rtol, atol, h_init, safety, max_steps.

    Attributes:
        adaptive: the method with its tolerances. There is no plan.

    Raises:
        ValueError: an argument that cannot be used; the message names it and the remedy.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        solver: str,
        steps: None = None,
        *,
        start: float | None = None,
        end: str | None = None,
        strength: float | None = None,
        hooks: Sequence[Hook] = (),
        **options: Any,
    ) -> None:
        if steps is not None or "grid" in options:
            given = f"steps={steps!r}" if steps is not None else f"grid={options['grid']!r}"
            raise ValueError(
                f"solver={solver!r} chooses its own steps and takes no {given}; set rtol and atol"
            )
        for key in options:
            if key not in OPTIONS:
                raise ValueError(f"solver={solver!r} has no option {key!r}; {nearest(key, OPTIONS)}")
        self._wrap(denoiser, hooks)
        start = first_time(denoiser, start, strength)
        self.adaptive = make(solver, denoiser.process, start=start, end=end, **options)

    def __getattr__(self, name: str) -> Any:
        if name == "plan":
            solver = self.__dict__["adaptive"].solver if "adaptive" in self.__dict__ else "this solver"
            raise AttributeError(f"{solver} chooses its steps as it goes and has no plan; see .adaptive")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"Sampler({self.adaptive!r})"

    @property
    def t0(self) -> float:
        """The time of the input state."""
        return self.adaptive.t0

    def __call__(  # type: ignore[override]
        self,
        shape: Sequence[int] | None = None,
        *,
        n: int | None = None,
        seed: int = 0,
        index: int | Tensor | Sequence[int] = 0,
        noise: Tensor | None = None,
        x: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
        hooks: Sequence[Hook] = (),
        return_nfe: bool = False,
        **conditions: Any,
    ) -> Any:
        """Draw samples; the arguments are those of :class:`fastsample.Sampler`.

        Args:
            return_nfe: also give the evaluations that each sample took.

        Returns:
            Samples (B, ...), or with ``return_nfe`` (samples, int64 (B,)).

        Raises:
            ValueError: wrong shapes or arguments.
            NonFiniteError: the network or the state became NaN or infinite; names time and samples.
            RuntimeError: a sample does not meet the tolerances within ``max_steps``.
        """
        refused = [name for name in _OF_PLANS if conditions.pop(name, None)]
        if refused:
            raise ValueError(
                f"solver={self.adaptive.solver!r} has no {refused[0]}=, as every sample has its own steps; "
                "use a fixed-grid solver"
            )
        state, total = self._state(shape, n, noise, x, device, dtype)
        indices = self._indices(index, total, state.device)
        size = self._batch_size(batch_size, None, total, state, conditions)
        results, counts = [], []
        for first in range(0, total, size):
            samples = slice(first, min(total, first + size))
            chunk = indices[samples]
            begin = self._start(state, samples, chunk, seed, given=x is not None, drawn=noise is None)
            bound = self.denoiser.bind(chunk.numel(), select(conditions, samples, total), begin.device)
            run = Run(bound, philox_noise(seed, chunk), (*self.hooks, *hooks), None, samples)
            with torch.no_grad():
                result, nfe = self.adaptive.run(begin, run)
            results.append(result)
            counts.append(nfe)
        out = torch.cat(results)
        return (out, torch.cat(counts)) if return_nfe else out

    def inverse(self) -> Sampler:
        """Not available: use a fixed-grid solver's."""
        raise ValueError(f"solver={self.adaptive.solver!r} has no inverse; use a fixed-grid ODE solver's")


# what only a table of rows can do
_OF_PLANS = ("memory", "progress", "callback", "return_trajectory", "differentiable")
