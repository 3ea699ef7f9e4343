"""A diffusers scheduler driven by a plan: any pipeline samples with any solver by one assignment.

pipe.scheduler = PlanScheduler.from_config(pipe.scheduler.config, solver="auto")
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .. import solvers
from ..executor import x0_pairs
from ..hooks import At
from ..plan import Plan
from ..process import as_time
from ..solvers import registry
from ..solvers.auto import auto
from .schedules import FLOW_TIME, Meaning, read


@dataclass
class PlanSchedulerOutput(BaseOutput):
    """What :meth:`PlanScheduler.step` gives.

    Attributes:
        prev_sample: the next state (B, ...).
        pred_original_sample: the predicted clean sample (B, ...).
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class PlanScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Runs a plan one evaluation a :meth:`step`; make it by :meth:`from_config` of the pipeline's own config.

    The state stays float32 between steps whatever the pipeline's precision. One object serves one run at a
    time: steps are counted, never looked up by their time.

    Attributes:
        timesteps: what the network is told at each evaluation.
        sigmas: the noise level of each evaluation (``sigma / alpha``; flows: ``sigma``), and of the end.
        init_noise_sigma: factor of unit noise.
        plan: the table of the last :meth:`set_timesteps`, None before.
        guidance: the guidance scale that ``solver="auto"`` chooses by.
    """

    order = 1
    _compatibles: list[str] = []  # noqa: RUF012 (diffusers' protocol)

    @register_to_config
    def __init__(
        self,
        source: dict[str, Any],
        solver: str = "auto",
        grid: str | Sequence[float] | None = None,
        end: str = "zero",
        guidance: float = 1.0,
        quantize: bool = False,
        options: dict[str, Any] | None = None,
        plan: str | None = None,
    ) -> None:
        """
        Args:
            source: the config of the scheduler that the model came with.
            solver: a name of ``fastsample.solvers.names()``.
            grid: a grid's name or times; by default the solver's own.
            end: "zero" or "sigma_min".
            guidance: the guidance scale that ``solver="auto"`` chooses by.
            quantize: tell the network whole indices only (networks with a table of times).
            options: the solver's or the grid's own, such as ``{"order": 2}``.
            plan: a plan's JSON instead of all of the above.

        Raises:
            ValueError: a config or a name that is not understood.
        """
        self._meaning = read(source)
        self.register_to_config(
            **{k: v for k, v in source.items() if not k.startswith("_") and k not in _OWN}
        )
        if solver != "auto":
            registry.get(solver)
        self._given = None if plan is None else Plan.from_json(plan)
        self.guidance = float(guidance)
        self.plan: Plan | None = None
        self.num_inference_steps: int | None = None
        steps = int(self.config.get("num_train_timesteps", 1000))
        self.timesteps = torch.arange(steps - 1, -1, -1)
        self.init_noise_sigma = 1.0
        self._begin_index: int | None = None
        self._run: _Run | None = None

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From the config of any scheduler that is understood, or of another PlanScheduler.

        Args:
            config: ``pipe.scheduler.config``.
            kwargs: as for the constructor; ``plan`` may be a :class:`fastsample.Plan` too.
        """
        if config is None:
            raise ValueError(
                "config=None: give the pipeline's, PlanScheduler.from_config(pipe.scheduler.config)"
            )
        if isinstance(kwargs.get("plan"), Plan):
            kwargs["plan"] = kwargs["plan"].to_json()
        for key in kwargs:
            if key not in _OWN:
                raise ValueError(f"{key}= is not understood; options of the solver go into options={{...}}")
        own = {k: config[k] for k in _OWN if k in config} if "source" in config else {}
        source = own.pop("source", None) or {
            k: v for k, v in config.items() if not k.startswith("_") or k == "_class_name"
        }
        scheduler = cls(source=dict(source), **(own | kwargs))
        return (scheduler, {}) if return_unused_kwargs else scheduler

    # -- the grid --------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | np.ndarray | None = None,
        mu: float | None = None,
    ) -> None:
        """Write the plan.

        Args:
            num_inference_steps: number of evaluations (most solvers; ``plan.nfe`` says).
            device: where ``timesteps`` lie.
            timesteps: the times of the evaluations instead, as the network is told them, decreasing.
            sigmas: the noise levels instead. A flow pipeline's default (evenly spaced) leaves the choice to
                the solver; others are shifted as diffusers does.
            mu: the logarithm of the flow's shift for this image size.

        Raises:
            ValueError: arguments that cannot be used.
        """
        if timesteps is not None and sigmas is not None:
            raise ValueError("give timesteps= or sigmas=, not both")
        meaning = read(self.config["source"], mu)
        if meaning.dynamic_shift and mu is None:
            raise ValueError("this model's shift depends on the image size: give mu=")
        if self.config["quantize"]:
            levels = torch.arange(int(meaning.process.t_start) + 1)
            meaning = Meaning(
                meaning.process.quantized(levels), meaning.prediction, False, False, meaning.hooks
            )
        self._meaning = meaning
        grid = self._grid_of(timesteps, sigmas)
        steps = num_inference_steps
        if grid is None and sigmas is not None:
            steps = len(sigmas)
        self.plan = self._plan_of(steps, grid)
        self._device = torch.device(device or "cpu")
        self._begin_index, self._run = None, None
        self._publish(self.plan)

    def _grid_of(self, timesteps: Any, sigmas: Any) -> Tensor | None:
        """The grid that was given, in the process's time with its end; None where the solver chooses."""
        process = self._meaning.process
        last = process.t_zero if self.config["end"] == "zero" else process.t_end
        if timesteps is not None:
            times = as_time(timesteps) / (FLOW_TIME if self._meaning.flow else 1.0)
        elif sigmas is not None:
            levels = as_time(np.asarray(sigmas, dtype=np.float64))
            levels = levels[:-1] if float(levels[-1]) == 0 else levels
            if self._meaning.flow:
                n = levels.numel()
                if torch.allclose(levels, torch.linspace(1, 1 / n, n, dtype=torch.float64), atol=1e-5):
                    return None
                times = process.t_of_uniform(levels)
            else:
                times = process.t_of_rho(levels)
        else:
            return None
        return torch.cat([times, torch.tensor([last], dtype=torch.float64)])

    def _plan_of(self, steps: int | None, grid: Tensor | None) -> Plan:
        config, meaning = self.config, self._meaning
        if self._given is not None:
            if steps is not None and steps != self._given.nfe:
                raise ValueError(
                    f"num_inference_steps={steps}, but the plan has {self._given.nfe} evaluations; give that number"
                )
            return self._given
        settings: dict[str, Any] = {
            "prediction": meaning.prediction,
            "grid": config["grid"] if grid is None else grid,
            "end": config["end"],
            **(config["options"] or {}),
        }
        if grid is None and steps is None and (config["grid"] is None or isinstance(config["grid"], str)):
            raise ValueError("num_inference_steps is missing")
        if config["solver"] == "auto":
            plan = auto(meaning.process, steps, guidance=self.guidance, **({"skip_start": False} | settings))
        else:
            plan = solvers.build(
                config["solver"], meaning.process, None if grid is not None else steps, **settings
            )
        return plan

    def _publish(self, plan: Plan) -> None:
        """What pipelines read."""
        evaluations = [v for row, v in zip(plan.rows, plan.values, strict=True) if row.evaluates]
        flow = self._meaning.flow
        told = torch.tensor([v.t_in for v in evaluations], dtype=torch.float64)
        told = told * FLOW_TIME if flow else told
        whole = not flow and bool((told == told.round()).all()) and self._meaning.process.levels is not None
        self.timesteps = told.to(self._device, torch.int64 if whole else torch.float32)
        final = plan.values[-1]
        levels = [
            v.sigma if flow else v.sigma / v.alpha if v.alpha else math.inf for v in (*evaluations, final)
        ]
        self.sigmas = torch.tensor(levels, dtype=torch.float32)
        self.num_inference_steps = len(evaluations)
        # unit noise wherever the grid begins, as diffusers' schedulers have it for VP models
        self.init_noise_sigma = _leading(plan)[1]

    # -- one evaluation --------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network sees the state as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
    ) -> Any:
        """From the network's output at a state to the state of the next evaluation.

        Args:
            model_output: (B, ...); twice the channels where the variance is learned (the second half is dropped).
            timestep: where a run begins in the middle, the first of its times; otherwise not looked at.
            sample: the state (B, ...) that the network saw.
            generator: of the noise, for solvers that draw some.
            eta, use_clipped_model_output: what pipelines hand to DDIM; an eta belongs into ``options``.

        Raises:
            ValueError: more steps than the plan has, or a start where the plan cannot begin.
        """
        if self.plan is None:
            raise ValueError("call set_timesteps first")
        if eta:
            raise ValueError(f'eta={eta!r}: give it to the solver, solver="ddim", options={{"eta": {eta!r}}}')
        if self._run is None:
            self._run = _Run(self._from(self._begin(timestep)), self._meaning)
        result, x0 = self._run.step(model_output, sample, generator)
        return PlanSchedulerOutput(result, x0) if return_dict else (result,)

    def _begin(self, timestep: Any) -> int:
        if self._begin_index is not None:
            return self._begin_index
        return self.index_for_timestep(timestep)

    def _from(self, begin: int) -> Plan:
        """The plan of the evaluations from ``begin`` on: multistep methods begin anew there."""
        plan = self.plan
        assert plan is not None
        if begin == 0:
            return plan
        skipped = plan.nfe - (len(plan.grid) - 1)
        if plan.solver not in registry.names() or skipped not in (0, -1):
            raise ValueError(
                f"solver={plan.solver!r} cannot begin at its evaluation {begin} of {plan.nfe} (strength < 1); "
                "use one with one evaluation a step, such as solver='auto'"
            )
        grid = as_time(plan.grid[begin - skipped :])
        options = plan.options | ({"skip_start": False} if "skip_start" in plan.options else {})
        return registry.on_grid(
            registry.get(plan.solver), self._meaning.process, plan.prediction, grid, options
        )

    # -- what pipelines ask for besides ----------------------------------------------------------------------

    @property
    def begin_index(self) -> int | None:
        """The evaluation that the run begins at, where a pipeline said so."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The next evaluation, None before the first."""
        return None if self._run is None else (self._begin_index or 0) + self._run.evaluation

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this evaluation (image-to-image)."""
        self._begin_index = int(begin_index)

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """The evaluation whose time is nearest to ``timestep``."""
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        return int((schedule.double() - float(timestep)).abs().argmin())

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean samples (B, ...) noised to ``timesteps``, () or (B,)."""
        process = self._meaning.process
        t = as_time(timesteps).flatten() / (FLOW_TIME if self._meaning.flow else 1.0)
        shape = (-1, *[1] * (original_samples.ndim - 1))
        alpha, sigma = (
            f(t).to(original_samples.device, torch.float32).view(shape)
            for f in (process.alpha, process.sigma)
        )
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """:meth:`add_noise` in the order of arguments of flow pipelines."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return int(self.config.get("num_train_timesteps", 1000))


_OWN = ("source", "solver", "grid", "end", "guidance", "quantize", "options", "plan")


def _leading(plan: Plan) -> tuple[int, float]:
    """The first row that evaluates, and the factor of the input in its state.

    Raises:
        ValueError: the rows before do more than scale.
    """
    factors = [1.0]
    for r, (row, v) in enumerate(zip(plan.rows, plan.values, strict=True)):
        if row.noises or row.predictions:
            break
        factors.append(sum(a * factors[j] for a, j in zip(v.a, row.states, strict=True)))
        if row.evaluates:
            return r, factors[-1]
    raise ValueError(f"solver={plan.solver!r} does not begin with an evaluation; a pipeline cannot run it")


class _Run:
    """One run through a plan, an evaluation at a time."""

    def __init__(self, plan: Plan, meaning: Meaning) -> None:
        self._plan, self._meaning = plan, meaning
        self._row, self._scale = _leading(plan)
        self._states: dict[int, Tensor] = {}
        self._predictions: dict[int, Tensor] = {}
        self._noises: dict[int, Tensor] = {}
        self._returned: Tensor | None = None
        self._last_use = {}
        for r, row in enumerate(plan.rows):
            for value in (*(("x", j) for j in row.states), *(("m", k) for k in row.predictions)):
                self._last_use[value] = r
        self.evaluation = 0

    def step(self, out: Tensor, sample: Tensor, generator: Any) -> tuple[Tensor, Tensor]:
        plan, r = self._plan, self._row
        if r >= len(plan.rows):
            raise ValueError(
                f"the plan has {plan.nfe} evaluations, all done; call set_timesteps for another run"
            )
        # the state in full precision, unless the pipeline changed it
        own = self._states.get(r + 1)
        x = own if own is not None and sample is self._returned else sample.to(torch.float32)
        if self.evaluation == 0:
            self._start(x)
        self._states[r + 1] = x
        if out.ndim > 1 and out.shape[1] == 2 * x.shape[1]:
            out = out[:, : x.shape[1]]
        v = plan.values[r]
        p, q = v.p, v.q
        p0, q0 = x0_pairs(plan)[r]
        out = out.to(x.dtype)
        x0 = p0 * x + q0 * out
        if self._meaning.hooks and q0:
            for hook in self._meaning.hooks:
                x0 = hook(x0, At(r, v.t, v.alpha, v.sigma, x, slice(0, len(x))))
            self._predictions[r] = (p - q * p0 / q0) * x + (q / q0) * x0
        else:
            self._predictions[r] = p * x + q * out
        self.evaluation += 1
        while True:
            r += 1
            if r == len(plan.rows):
                break
            self._states[r + 1] = self._next(r, x, generator)
            if plan.rows[r].evaluates:
                break
        self._row = r
        newest = self._states[min(r, len(plan.rows) - 1) + 1]
        self._forget(r)
        self._returned = newest.to(sample.dtype)
        return self._returned, x0.to(sample.dtype)

    def _start(self, x: Tensor) -> None:
        """The states before the first evaluation, which are multiples of it."""
        factors = [1.0]
        for r in range(self._row + 1):
            row, v = self._plan.rows[r], self._plan.values[r]
            factors.append(sum(a * factors[j] for a, j in zip(v.a, row.states, strict=True)))
        for j, factor in enumerate(factors):
            self._states[j] = x if factor == self._scale else x * (factor / self._scale)

    def _next(self, r: int, like: Tensor, generator: Any) -> Tensor:
        row, v = self._plan.rows[r], self._plan.values[r]
        state = torch.zeros_like(like)
        for c, j in zip(v.a, row.states, strict=True):
            state.add_(self._states[j], alpha=c)
        for c, k in zip(v.b, row.predictions, strict=True):
            state.add_(self._predictions[k], alpha=c)
        for c, s in zip(v.c, row.noises, strict=True):
            if s not in self._noises:
                self._noises[s] = randn_tensor(
                    like.shape, generator=generator, device=like.device, dtype=like.dtype
                )
            state.add_(self._noises[s], alpha=c)
        return state

    def _forget(self, r: int) -> None:
        """Drop what no later row reads; the newest state stays."""
        keep = min(r, len(self._plan.rows) - 1) + 1
        for j in [j for j in self._states if j != keep and self._last_use.get(("x", j), -1) <= r]:
            del self._states[j]
        for k in [k for k in self._predictions if self._last_use.get(("m", k), -1) <= r]:
            del self._predictions[k]
