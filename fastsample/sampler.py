"""The sampler: a denoiser and a plan, held together; what users call."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import grids, solvers
from .denoiser import Denoiser, select
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
from .hooks import Hook
from .noise import START, normal
from .plan import Plan, is_copy
from .process import as_time


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
        strength: in (0, 1], begin after the first ``1 - strength`` of the (uniform) time range (image-to-image).
        plan: a ready plan instead of all of the above.
        hooks: what happens to each predicted clean sample, such as ``fs.hooks.Clip()``.
        options: the solver's or the grid's own, such as ``order=2``, ``eta=0.5``, ``rho=7``.

    Attributes:
        plan: the table.

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
        if not isinstance(denoiser, Denoiser):
            raise TypeError(
                f"denoiser is a {type(denoiser).__name__}; wrap the network first: "
                'fs.wrap(net, fs.VP.linear(), prediction="eps")'
            )
        self.denoiser, self.hooks = denoiser, tuple(hooks)
        process = denoiser.process
        if plan is not None:
            if steps is not None or grid is not None or start is not None or options:
                raise ValueError("give either plan= or solver/steps/grid/start and options, not both")
            self.plan = plan if isinstance(plan, Plan) else Plan.load(Path(plan))
            if self.plan.fingerprint != process.fingerprint:
                raise ValueError(
                    f"the plan was written for {self.plan.process}, but the denoiser's process is {process!r}; "
                    "make a plan for this process"
                )
            if self.plan.prediction != denoiser.prediction:
                raise ValueError(
                    f"the plan was written for prediction={self.plan.prediction!r}, but the denoiser predicts "
                    f"{denoiser.prediction!r}; make a plan for it"
                )
            return
        if strength is not None:
            if start is not None:
                raise ValueError("give start= (a time) or strength= (a fraction), not both")
            start = start_of(denoiser, strength)
        if start is not None:
            _check_time(denoiser, "start", start)
        self.plan = _build(
            denoiser, solver, 10 if steps is None and _needs_steps(grid) else steps, grid, start, end, options
        )

    def __repr__(self) -> str:
        return f"Sampler({self.plan!r})"

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
            memory: at most so many bytes at once (measured on the first evaluation), instead of ``batch_size``.
            progress: show a progress bar over the evaluations.
            callback: called after each evaluation with an :class:`fastsample.executor.Step`.
            hooks: applied after the sampler's own.
            return_trajectory: also give the states of all rows.
            differentiable: keep the graph: gradients with respect to plan, network and input.
            check: raise when the result is not finite (one synchronisation, after the last row).
            conditions: handed to the network; tensors whose first dimension is B are one value a sample.

        Returns:
            Samples (B, ...), or ``(samples, Trajectory)``.

        Raises:
            ValueError: wrong shapes or arguments.
            NonFiniteError: the result is not finite; says from which row, time and samples on.
        """
        state, total = self._state(shape, n, noise, x, device, dtype)
        indices = self._indices(index, total, state.device)
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
                begin = self._start(state, samples, chunk, seed, given=x is not None, drawn=noise is None)
                run = Run(
                    self.denoiser.bind(chunk.numel(), select(conditions, samples, total), begin.device),
                    philox_noise(seed, chunk),
                    (*self.hooks, *hooks),
                    on_step if progress or callback is not None else None,
                    samples,
                )
                states: list[Tensor] | None = [begin.clone()] if return_trajectory else None
                if differentiable:
                    result = execute_differentiable(self.plan, begin, run, trajectory=states)
                else:
                    with torch.inference_mode(False), torch.no_grad():
                        # a state handed in is the user's: it is not overwritten
                        owned = x is None
                        result = execute(self.plan, begin, run, owned=owned, trajectory=states)
                        if check and not bool(torch.isfinite(result).all()):
                            begin = self._start(
                                state, samples, chunk, seed, given=x is not None, drawn=noise is None
                            )
                            raise locate_nonfinite(self.plan, begin, run)
                        if result is x:
                            result = result.clone()
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
        if not all(isinstance(d, int) and d > 0 for d in full):
            raise ValueError(
                f"{given[0]}={full if tensor is None else tuple(full)!r}: every dimension must be >= 1"
            )
        expected = self.denoiser.sample_shape
        if expected is not None and full[1:] != expected:
            raise ValueError(f"{given[0]} has samples of shape {full[1:]}, but the model's are {expected}")
        where = (
            torch.device(device)
            if device is not None
            else tensor.device
            if tensor is not None
            else self.denoiser.device
        )
        kind = dtype if dtype is not None else tensor.dtype if tensor is not None else torch.float32
        if kind not in (torch.float32, torch.float64):
            kind = torch.float32  # the state stays float32 whatever the network or the input is
        if tensor is not None:
            return tensor.to(where, kind), full[0]
        return torch.empty((), device=where, dtype=kind).expand(full), full[0]

    @staticmethod
    def _indices(index: int | Tensor | Sequence[int], total: int, device: torch.device) -> Tensor:
        if isinstance(index, int):
            return torch.arange(index, index + total, dtype=torch.int64, device=device)
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
        sigma = float(self.denoiser.process.sigma(as_time(self.plan.t0)))
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
            if batch_size < 1:
                raise ValueError(f"batch_size={batch_size!r} must be at least 1")
            return min(batch_size, total)
        if memory is None:
            return total
        from .memory import network_bytes

        own = state[:1].numel() * state.element_size() * buffers_needed(self.plan)
        need = own + network_bytes(
            self.denoiser, state[:1], select(conditions, slice(0, 1), total), self.plan.times[0]
        )
        if need > memory:
            raise ValueError(f"memory={memory} bytes do not hold one sample, which needs about {need}")
        return min(total, memory // need)

    # -- other uses of the same plan -------------------------------------------------------------------------

    def noised(self, x0: Tensor, *, seed: int = 0, index: int | Tensor | Sequence[int] = 0) -> Tensor:
        """Clean samples (B, ...) noised to the plan's first time: the ``x=`` of image-to-image."""
        t = as_time(self.plan.t0)
        process = self.denoiser.process
        indices = self._indices(index, x0.shape[0], x0.device)
        noise = normal(x0.shape, seed, indices, START, dtype=x0.dtype)
        return float(process.alpha(t)) * x0 + float(process.sigma(t)) * noise

    def inverse(self) -> Sampler:
        """The sampler that runs the same solver on the reversed grid: from samples to noise.

        The inverse begins at the least noisy time of this plan's grid that the network knows (zero noise is left
        out), and takes the sample there as ``x=``.

        Raises:
            ValueError: the plan draws noise, or was not made from a solver's name.
        """
        if self.plan.stochastic:
            raise ValueError(
                f"solver {self.plan.solver!r} draws noise and has no inverse; use eta=0 or an ODE solver"
            )
        if self.plan.solver not in solvers.names():
            raise ValueError(
                f"a plan of {self.plan.solver!r} cannot be reversed; build it from a solver's name"
            )
        process = self.denoiser.process
        times = [self.plan.t0]
        for row, v in zip(self.plan.rows, self.plan.values, strict=True):
            if not is_copy(row, v):
                times.append(v.t)
        if times[-1] == process.t_zero != process.t_end:
            times[-1] = process.t_end
            if times[-2] == times[-1]:
                times.pop()
        monotone = [t for i, t in enumerate(times) if i == 0 or process.lam(t) > process.lam(times[i - 1])]
        return Sampler(
            self.denoiser, self.plan.solver, grid=monotone[::-1], hooks=self.hooks, **self.plan.options
        )


def start_of(denoiser: Denoiser, strength: float) -> float:
    """The time at a fraction of the way from the least to the most noise, in the process's uniform coordinate."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength!r} must lie in (0, 1]; 1 starts from pure noise")
    process = denoiser.process
    ends = process.uniform_of_t(torch.tensor([process.t_end, process.t_start], dtype=torch.float64))
    return float(process.t_of_uniform(ends[0] + strength * (ends[1] - ends[0])))


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
    if not isinstance(solver, str):
        raise unknown("solver", solver, solvers.names())
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
