"""The sampler: a denoiser and a plan, held together; what users call."""

from __future__ import annotations

import contextlib
import math
import operator
import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import fused, grids, solvers
from .denoiser import Denoiser, as_conditions, select
from .errors import unknown
from .executor import (
    Callback,
    Run,
    Step,
    buffers_needed,
    execute,
    execute_differentiable,
    locate_nonfinite,
    philox_noise,
)
from .graph import Captured, require, run_captured
from .hooks import Hook
from .identity import weights_hash
from .noise import START, normal
from .plan import Plan
from .process import Process, as_time

# How far two tables of one schedule may differ: a product of 1,000 float32 factors is exact to this.
_ROUNDING = 2e-5


@dataclass(frozen=True)
class Trajectory:
    """The states of one call, in order.

    Attributes:
        t: the times, float64 (K,).
        x: the states (K, B, ...), the input first.
    """

    t: Tensor
    x: Tensor


class Sampler:
    """Samples from a denoiser by a plan.

    ``Sampler(denoiser, solver="dpmpp_2m", steps=10, grid="logsnr", end="zero")`` writes the plan;
    ``Sampler(denoiser, plan=...)`` uses a given one (a :class:`Plan` or the path of its JSON).

    Args:
        denoiser: made by ``fs.wrap``.
        solver: a name of ``fs.solvers.names()``, or an adaptive method of ``fs.adaptive.names()``.
        steps: number of grid intervals.
        grid: a name of ``fs.grids.names()``, an array of times, or a function; by default the solver's own.
        start: where to begin: a time, by default the noisiest; see also ``strength``.
        end: "zero" or "sigma_min"; by default the solver's own.
        strength: in (0, 1], begin after the first ``1 - strength`` of the uniform time range (img2img).
        plan: a ready plan instead of all of the above.
        hooks: what happens to each predicted clean sample, such as ``fs.hooks.Clip()``.
        options: the solver's or the grid's own, such as ``order=2``, ``eta=0.5``, ``rho=7``.

    Attributes:
        plan: the table.
        identity: what else tells it from others with the same plan (a student's weights), for the record.

    Raises:
        ValueError: an argument that cannot be used; the message names it and the remedy.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        solver: str = "auto",
        steps: int | None = None,
        *,
        grid: grids.Grid | None = None,
        start: float | None = None,
        end: str | None = None,
        strength: float | None = None,
        plan: Plan | str | os.PathLike[str] | None = None,
        hooks: Sequence[Hook] = (),
        **options: Any,
    ) -> None:
        self._wrap(denoiser, hooks)
        process = denoiser.process
        if plan is not None:
            given = {
                "steps": steps,
                "grid": grid,
                "start": start,
                "end": end,
                "strength": strength,
                **options,
            }
            beside = [name for name, value in given.items() if value is not None]
            if beside or solver != "auto":
                raise ValueError(
                    f"plan= already says {', '.join(beside) or 'the solver'}; give it alone or leave it out"
                )
            self.plan = plan if isinstance(plan, Plan) else Plan.load(Path(plan))
            if not _written_for(self.plan, process):
                raise ValueError(
                    f"the plan was written for {self.plan.process}, but the denoiser's process is "
                    f"{process!r}; make a plan for this process"
                )
            if self.plan.prediction != denoiser.prediction:
                raise ValueError(
                    f"the plan was written for prediction={self.plan.prediction!r}, but the denoiser "
                    f"predicts {denoiser.prediction!r}; make a plan for it"
                )
            _check_levels(denoiser, self.plan)
            _check_model(denoiser, self.plan)
            return
        start = first_time(denoiser, start, strength)
        if steps is not None and not _needs_steps(grid):
            intervals = as_time(grid).numel() - 1  # type: ignore[arg-type]
            if steps != intervals:
                raise ValueError(f"steps={steps!r} but the grid has {intervals} intervals; leave steps= out")
        self.plan = _build(
            denoiser, solver, 10 if steps is None and _needs_steps(grid) else steps, grid, start, end, options
        )

    def __new__(cls, denoiser: Any = None, solver: Any = "auto", *_: Any, **__: Any) -> Sampler:
        """Adaptive methods, which have no plan, have a sampler of their own."""
        if cls is Sampler and isinstance(solver, str):
            from . import adaptive

            if solver in adaptive.names():
                return object.__new__(adaptive.AdaptiveSampler)
        return object.__new__(cls)

    def _wrap(self, denoiser: Denoiser, hooks: Sequence[Hook]) -> None:
        if not isinstance(denoiser, Denoiser):
            raise TypeError(
                f"denoiser is a {type(denoiser).__name__}; wrap the network first: "
                'fs.wrap(net, fs.VP.linear(), prediction="eps")'
            )
        self.denoiser, self.hooks = denoiser, tuple(hooks)
        self.identity: str | None = None
        self._graphs: dict[Hashable, Captured] = {}

    def __repr__(self) -> str:
        return f"Sampler({self.plan!r})"

    @property
    def t0(self) -> float:
        """The time of the input state."""
        return self.plan.t0

    # -- sampling --------------------------------------------------------------------------------------------

    def __call__(
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
        memory: int | None = None,
        progress: bool = False,
        callback: Callback | None = None,
        hooks: Sequence[Hook] = (),
        return_trajectory: bool = False,
        differentiable: bool = False,
        graph: bool = False,
        kernels: bool = False,
        check: bool = True,
        **conditions: Any,
    ) -> Any:
        """Draw samples.

        Args:
            shape: (B, ...), of all samples; or ``n=B`` where the denoiser knows its ``sample_shape``.
            seed: the noise is a function of (seed, sample index, row) alone.
            index: the global index of the first sample, or one index for each sample.
            noise: unit-variance noise (B, ...) instead of drawing it; scaled to the starting sigma here.
            x: an explicit starting state (B, ...) at the plan's first time, used as it is.
            device, dtype: of the state; by default the network's device and float32 (or that of noise/x).
            batch_size: at most so many samples at once.
            memory: at most so many bytes at once (measured on one evaluation), instead of ``batch_size``.
            progress: show a progress bar over the evaluations.
            callback: called after each evaluation with an :class:`fastsample.executor.Step`.
            hooks: applied after the sampler's own.
            return_trajectory: also give the states of all rows.
            differentiable: keep the graph: gradients with respect to plan, network and input.
            graph: run through one CUDA graph, captured at the first call with these shapes; the noise of all
                rows is drawn before. Not for several threads at once.
            kernels: run each row as one launch of ``fastsample_kernels.update`` (float32 on a CUDA device); the
                network's own kernels are ``fs.accelerate``'s.
            check: raise when the result is not finite (one synchronisation, after the last row).
            conditions: handed to the network; tensors whose first dimension is B are one value a sample.

        Returns:
            Samples (B, ...), or ``(samples, Trajectory)``.

        Raises:
            ValueError: wrong shapes or arguments.
            NonFiniteError: the result is not finite; says from which row, time and samples on.
        """
        state, total = self._state(shape, n, noise, x, device, dtype)
        if graph:
            require(
                state.device,
                callback=callback,
                progress=progress,
                return_trajectory=return_trajectory,
                differentiable=differentiable,
            )
        if kernels:
            if differentiable:
                raise ValueError("kernels=True cannot be used with differentiable; leave one of them out")
            fused.require(state)
        indices = self._indices(index, total, state.device)
        conditions = as_conditions(conditions, state.device, total)
        size = self._batch_size(batch_size, memory, total, state, conditions)
        results: list[Tensor] = []
        trajectories: list[Tensor] = []
        with _progress(progress, self.plan.nfe * -(-total // size)) as tick:

            def on_step(step: Step) -> None:
                tick()
                if callback is not None:
                    callback(step)

            for first in range(0, total, size):
                samples = slice(first, min(total, first + size))
                chunk = indices[samples]
                run = Run(
                    self.denoiser.bind(chunk.numel(), select(conditions, samples, total), state.device),
                    philox_noise(seed, chunk),
                    (*self.hooks, *hooks),
                    on_step if progress or callback is not None else None,
                    samples,
                    draws=(seed, chunk) if kernels else None,
                )

                def begin(samples: slice = samples, chunk: Tensor = chunk) -> Tensor:
                    return self._start(state, samples, chunk, seed, given=x is not None, drawn=noise is None)

                states: list[Tensor] | None = None
                if differentiable:
                    start = begin()
                    states = [start] if return_trajectory else None
                    result = execute_differentiable(self.plan, start, run, trajectory=states)
                else:
                    # not in inference mode, whose tensors could not be updated in place by others later
                    with torch.inference_mode(False), torch.no_grad():
                        start = begin()
                        states = [start.clone()] if return_trajectory else None
                        if graph:
                            result = run_captured(self._graphs, self.plan, start, run)
                        elif kernels:
                            result = fused.execute_fused(self.plan, start, run, trajectory=states)
                        else:
                            # a state handed in is the user's: it is not overwritten
                            result = execute(self.plan, start, run, owned=x is None, trajectory=states)
                if check and not bool(torch.isfinite(result).all()):
                    with torch.no_grad():
                        raise locate_nonfinite(self.plan, begin(), run)
                results.append(result)
                if states is not None:
                    trajectories.append(torch.stack(states))
        out = results[0] if len(results) == 1 else torch.cat(results)
        if return_trajectory:
            t = torch.tensor([self.plan.t0, *(v.t for v in self.plan.values)], dtype=torch.float64)
            return out, Trajectory(t, torch.cat(trajectories, dim=1))
        return out

    def _state(
        self,
        shape: Sequence[int] | None,
        n: int | None,
        noise: Tensor | None,
        x: Tensor | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, int]:
        """The given tensor, or an empty one that only tells shape, dtype and device; and the sample count."""
        given = [
            name for name, v in (("shape", shape), ("n", n), ("noise", noise), ("x", x)) if v is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of shape=, n=, noise= and x=, got {' and '.join(given) or 'none'}"
            )
        tensor = noise if noise is not None else x
        if tensor is not None:
            if not isinstance(tensor, Tensor) or tensor.ndim < 1 or not tensor.is_floating_point():
                raise ValueError(
                    f"{given[0]}= must be a floating-point tensor of shape (B, ...), got {tensor!r:.80}"
                )
            full = tuple(tensor.shape)
        elif n is not None:
            if self.denoiser.sample_shape is None:
                raise ValueError(
                    "n= needs a denoiser that knows its sample_shape; give shape=(n, ...) instead"
                )
            full = (n, *self.denoiser.sample_shape)
        else:
            full = tuple(shape)  # type: ignore[arg-type]
        try:
            full = tuple(operator.index(d) for d in full)
        except TypeError as e:
            raise ValueError(f"{given[0]}={full!r} must be whole numbers") from e
        if not full or min(full) < 1:
            raise ValueError(f"{given[0]}={full!r}: give (B, ...) with every dimension at least 1")
        expected = self.denoiser.sample_shape
        if expected is not None and full[1:] != expected:
            raise ValueError(f"{given[0]} has samples of shape {full[1:]}, but the model's are {expected}")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(
                f"dtype={dtype} cannot hold the state; use torch.float32 (the network has its own)"
            )
        where, kind = self.denoiser.device, torch.float32
        if tensor is not None:
            # the state stays float32 or wider whatever the input is
            where, kind = tensor.device, torch.float64 if tensor.dtype == torch.float64 else torch.float32
        where, kind = torch.device(device or where), dtype or kind
        if tensor is not None:
            return tensor.to(where, kind), full[0]
        return torch.empty((), device=where, dtype=kind).expand(full), full[0]

    @staticmethod
    def _indices(index: int | Tensor | Sequence[int], total: int, device: torch.device) -> Tensor:
        if isinstance(index, (int, np.integer)):
            return torch.arange(int(index), int(index) + total, dtype=torch.int64, device=device)
        indices = torch.as_tensor(index, dtype=torch.int64, device=device)
        if indices.shape != (total,):
            raise ValueError(
                f"index has shape {tuple(indices.shape)}; give the first index or one for each of {total}"
            )
        return indices

    def _start(
        self, state: Tensor, samples: slice, index: Tensor, seed: int, *, given: bool, drawn: bool
    ) -> Tensor:
        if given:
            return state[samples]
        sigma = float(self.denoiser.process.sigma(as_time(self.t0)))
        if drawn:
            return normal(state[samples].shape, seed, index, START, dtype=state.dtype).mul_(sigma)
        return state[samples] * sigma

    def _batch_size(
        self,
        batch_size: int | None,
        memory: int | None,
        total: int,
        state: Tensor,
        conditions: dict[str, Any],
    ) -> int:
        if batch_size is not None and memory is not None:
            raise ValueError("give batch_size= or memory=, not both")
        if batch_size is not None:
            if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
                raise ValueError(f"batch_size={batch_size!r} must be a whole number of at least 1")
            return min(batch_size, total)
        if memory is None:
            return total
        from .memory import network_bytes

        evaluations = [
            (v.t_in, v.sigma / v.alpha if v.alpha else math.inf)
            for row, v in zip(self.plan.rows, self.plan.values, strict=True)
            if row.evaluates
        ]
        guidance = self.denoiser.guidance
        acting = [e for e in evaluations if guidance is not None and guidance.acts(e[1])]
        own = state[:1].numel() * state.element_size() * buffers_needed(self.plan)
        need = own
        if evaluations:
            one = select(conditions, slice(0, 1), total)
            need += network_bytes(self.denoiser, state[:1], one, *(acting or evaluations)[0])
        if need > memory:
            raise ValueError(f"memory={memory} bytes do not hold one sample, which needs about {need}")
        return min(total, memory // need)

    # -- other uses of the same plan -------------------------------------------------------------------------

    def noised(self, x0: Tensor, *, seed: int = 0, index: int | Tensor | Sequence[int] = 0) -> Tensor:
        """Clean samples (B, ...) noised to the plan's first time: the ``x=`` of image-to-image."""
        t = as_time(self.t0)
        process = self.denoiser.process
        indices = self._indices(index, x0.shape[0], x0.device)
        noise = normal(x0.shape, seed, indices, START, dtype=x0.dtype)
        return float(process.alpha(t)) * x0 + float(process.sigma(t)) * noise

    def inverse(self) -> Sampler:
        """The sampler that runs the same solver on the reversed grid: from samples to noise.

        The inverse begins at the least noisy time of this plan's grid that the network knows (zero noise is
        left out), and takes the sample there as ``x=``.

        Raises:
            ValueError: the plan draws noise, or was not made from a solver's name.
        """
        if self.plan.stochastic:
            raise ValueError(
                f"solver {self.plan.solver!r} draws noise and has no inverse; use eta=0 or an ODE solver"
            )
        if self.plan.solver not in solvers.names() or not self.plan.grid:
            raise ValueError(
                f"a plan of {self.plan.solver!r} without a grid cannot be reversed; build it from a solver's "
                "name"
            )
        process = self.denoiser.process
        grid = list(self.plan.grid)
        if grid[-1] == process.t_zero != process.t_end:
            grid[-1] = float(process.network_time(process.t_end))
            if grid[-2] == grid[-1]:
                grid.pop()
        return Sampler(
            self.denoiser, self.plan.solver, grid=grid[::-1], hooks=self.hooks, **self.plan.options
        )


def _written_for(plan: Plan, process: Process) -> bool:
    """Whether a plan's rows lie on a process; tables that differ by float32 rounding are the same process."""
    if plan.fingerprint == process.fingerprint:
        return True
    low, high = sorted((process.t_zero, process.t_start))
    t, alpha, sigma = torch.tensor([(v.t, v.alpha, v.sigma) for v in plan.values], dtype=torch.float64).T
    if not low <= float(t.min()) <= float(t.max()) <= high or not low <= plan.t0 <= high:
        return False
    near = [(alpha, process.alpha(t)), (sigma, process.sigma(t))]
    return all(torch.allclose(own, other, rtol=_ROUNDING, atol=_ROUNDING) for own, other in near)


def _check_levels(denoiser: Denoiser, plan: Plan) -> None:
    """A plan made for continuous time would tell a network with a table of times what it does not know."""
    levels = denoiser.process.levels
    if levels is None:
        return
    known = set(levels.tolist())
    for r, (row, v) in enumerate(zip(plan.rows, plan.values, strict=True)):
        if row.evaluates and v.t_in not in known:
            raise ValueError(
                f"row {r} of the plan evaluates at t={v.t_in!r}, which is none of the {len(known)} times "
                "that the network knows; make the plan for this denoiser"
            )


_warned: set[tuple[str, str]] = set()


def _check_model(denoiser: Denoiser, plan: Plan) -> None:
    """Warn, once for each pair, of a tuned plan that is used on another model than it was tuned for."""
    fitted = plan.options.get("model") if plan.solver == "tuned" else None
    if fitted is None:
        return
    own = weights_hash(denoiser)
    if own is None or own == fitted or (fitted, own) in _warned:
        return
    _warned.add((fitted, own))
    warnings.warn(
        "the plan was tuned for a model with other weights; it will run, but tune one for this model "
        "(fs.tune) or use solver='auto'",
        stacklevel=4,
    )


def start_of(denoiser: Denoiser, strength: float) -> float:
    """The time at a fraction of the way from the least to the most noise, in the uniform coordinate."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength!r} must lie in (0, 1]; 1 starts from pure noise")
    process = denoiser.process
    ends = process.uniform_of_t(torch.tensor([process.t_end, process.t_start], dtype=torch.float64))
    return float(process.t_of_uniform(ends[0] + strength * (ends[1] - ends[0])))


def first_time(denoiser: Denoiser, start: float | None, strength: float | None) -> float | None:
    """The time given by ``start`` or by ``strength``, checked; None where neither is given."""
    if strength is not None:
        if start is not None:
            raise ValueError("give start= (a time) or strength= (a fraction), not both")
        start = start_of(denoiser, strength)
    if start is not None:
        _check_time(denoiser, "start", start)
    return start


def _check_time(denoiser: Denoiser, name: str, t: float) -> None:
    process = denoiser.process
    low, high = sorted((process.t_end, process.t_start))
    if not low < t <= high:
        raise ValueError(f"{name}={t!r} lies outside the times of {process!r}: ({low:g}, {high:g}]")


def _needs_steps(grid: grids.Grid | None) -> bool:
    return grid is None or isinstance(grid, str) or callable(grid)


def _build(
    denoiser: Denoiser,
    solver: str,
    steps: int | None,
    grid: grids.Grid | None,
    start: float | None,
    end: str | None,
    options: dict[str, Any],
) -> Plan:
    settings: dict[str, Any] = {
        "prediction": denoiser.prediction,
        "grid": grid,
        "start": start,
        "end": end,
        **options,
    }
    if solver == "auto":
        from .solvers.auto import auto

        scale = denoiser.guidance.scale if denoiser.guidance is not None else 1.0
        return auto(denoiser.process, steps, guidance=scale, **settings)
    if solver not in solvers.names():
        from . import adaptive

        raise unknown("solver", solver, [*solvers.names(), *adaptive.names()])
    return solvers.build(solver, denoiser.process, steps, **settings)


@contextlib.contextmanager
def _progress(wanted: bool, total: int) -> Iterator[Callable[[], None]]:
    if not wanted:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("sampling", total=total)
        yield lambda: bar.advance(task)
