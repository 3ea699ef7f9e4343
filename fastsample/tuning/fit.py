"""``fs.tune``: fit a plan's numbers to a model."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..distributed import rank_and_size, summed
from ..executor import Run, extend, philox_noise
from ..identity import weights_hash
from ..plan import Plan, RowValues, write_atomically
from ..process import as_time
from ..sampler import Sampler
from .levenberg import Linearised, State, begin, minimise
from .moments import Moments, summed_changes, summed_moments
from .objective import Errors, Features, Objective
from .reference import Batch, Conditions, Trajectories
from .report import notes
from .table import FREE, Table

# What competes for the start: the best training-free plan on held-out noise is improved.
STARTS = ("auto", "exp_adams", "dpmpp_2m", "unipc", "deis", "ddim")

_FINE = 0.03  # difference quotients move the samples by this share of their error
_MATCHED = 0.1  # where features are of 8-bit images: a difference has to change many pixels' values
_COARSE = 3e-3  # the least relative displacement for networks in 16 bits

Select = Callable[[Tensor], float]


@dataclass(frozen=True)
class Budget:
    """When to stop before the optimisation does; None is never."""

    seconds: float | None = None
    evaluations: int | None = None

    @classmethod
    def parse(cls, budget: float | str | None) -> Budget:
        """Seconds as a number, or "90 s", "5 min", "100000 evaluations".

        Raises:
            ValueError: what cannot be understood.
        """
        if budget is None:
            return cls()
        words = f"{budget} s" if isinstance(budget, (int, float)) else str(budget)
        number = words.rstrip("abcdefghijklmnopqrstuvwxyz ")
        unit = words[len(number) :].strip() or "s"
        units = {"s": 1, "seconds": 1, "min": 60, "minutes": 60, "h": 3600, "evaluations": 0}
        try:
            amount = float(number)
        except ValueError:
            amount = math.nan
        if not amount > 0 or unit not in units:
            raise ValueError(
                f"budget={budget!r} is not understood; give seconds, '5 min' or '100000 evaluations'"
            )
        return cls(None, int(amount)) if unit == "evaluations" else cls(amount * units[unit])


def tune(
    denoiser: Denoiser,
    steps: int | Sequence[int],
    sample_shape: Sequence[int] | None = None,
    *,
    seed: int = 0,
    start: str | Plan | None = None,
    end: str | None = None,
    conditions: Conditions | None = None,
    trajectories: int | None = None,
    heldout: int | None = None,
    reference_steps: int = 100,
    objective: str = "huber",
    features: Features | None = None,
    match: Moments | None = None,
    select: Select | None = None,
    free: Sequence[str] = FREE,
    constraints: Sequence[str] = (),
    bound: float = 1.0,
    history: int = 4,
    relax: float = 0.0,
    regularization: float = 1e-6,
    iterations: int = 30,
    patience: int = 6,
    budget: float | str | None = None,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Any:
    """Fit a solver to a model: no data, only noise and the model's own high-accuracy solution.

    The best training-free plan at this number of steps is the start. Its time grid, its coefficients and the
    times told to the network are then fitted to a few hundred trajectories by Levenberg and Marquardt's
    method with difference quotients, so networks that no gradient passes are tuned too. The result is the
    point that is best on held-out noise, the start included: it is never worse there than it began.

    Args:
        denoiser: the model; guidance is part of it.
        steps: network evaluations of the result, or several of them, which share the trajectories.
        sample_shape: of one sample, where the denoiser does not know it.
        seed: of the trajectories' noise (a stream of its own: never the noise that samples start from).
        start: a solver's name or a plan; by default the best of ``fastsample.tuning.fit.STARTS``.
        end: "zero" or "sigma_min"; by default as ``solver="auto"``.
        conditions: shared by all samples; tensors of ``trajectories + heldout`` rows are one value a sample;
            or a function of the samples' indices (B,) that returns them.
        trajectories, heldout: how many to fit to, and how many to select on; by default as many as hold
            16,384 numbers, at least 256 and at most 2,048, and half as many.
        reference_steps: of the solution, by ``solver="auto"``.
        objective: "huber" (mean over samples of a pseudo-Huber loss, on the scale of the start's median
            error) or "rmse".
        features: a function of samples (B, ...); its outputs are compared instead of the samples.
        match: moments of features (the data's) that the samples shall have beside their small error; solvers
            of one error can differ much in these. It needs many trajectories: 24 and more a feature.
        select: a function of the held-out samples (B, ...), such as a Frechet distance, whose least value
            decides which iteration is the result; by default the objective on held-out noise.
        free: of "grid", "coefficients" and "time" (told to the network, apart from the solver's).
        constraints: "consistency": every row stays exact for constant predictions. The grid is monotone always.
        bound: of each coefficient's change, relative to the largest of its row.
        history: each row may read so many of the newest predictions.
        relax: the starting noise of the trajectories that are fitted may move by so much (root mean square,
            in units of the noise) towards where the plan meets the solution (LD3: Tong et al. 2024, eq. 10;
            here by one projected Gauss-Newton step). Needs a network that gradients pass; not with ``match``.
        regularization: weight of the squared (relative) change of the numbers against the start's objective.
        iterations, patience: at most so many, and so many without held-out progress.
        budget: seconds, "5 min" or "100000 evaluations", for each number of steps, after the trajectories.
        batch_size: trajectories at once; memory is that of so many states for each row.
        dtype: of the state, float32 or float64.
        folder: keeps trajectories and progress, so that the same call goes on where it was stopped, and the
            results: ``tuned-STEPS.json``.
        progress: show a bar with the held-out error.

    Returns:
        The :class:`Plan`, or a dict of one for each number of steps. It is used
        like any other: ``fs.Sampler(denoiser, plan=...)``.

    Raises:
        ValueError: an argument that cannot be used; the message names it.
        NonFiniteError: the model's own solution is not finite.
    """
    shape = tuple(sample_shape) if sample_shape is not None else denoiser.sample_shape
    if shape is None:
        raise ValueError("give sample_shape=, the shape of one sample; this denoiser does not know it")
    if trajectories is None:
        trajectories = default_trajectories(shape)
    if heldout is None:
        heldout = max(1, trajectories // 2) if isinstance(trajectories, int) else 1
    numbers = {
        "trajectories": trajectories,
        "heldout": heldout,
        "reference_steps": reference_steps,
        "iterations": iterations,
        "patience": patience,
        "batch_size": batch_size,
    }
    several = [steps] if isinstance(steps, int) else list(steps)
    for name, value in [*numbers.items(), *(("steps", n) for n in several)]:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    if not several:
        raise ValueError("steps=[]: give at least one number of evaluations")
    if max(several) >= reference_steps:
        raise ValueError(f"steps={max(several)} needs more than reference_steps={reference_steps}")
    for name, weight in (("regularization", regularization), ("relax", relax)):
        if not weight >= 0:
            raise ValueError(f"{name}={weight!r} must be at least 0")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype={dtype} cannot hold the state; use torch.float32 (the network has its own)")
    if relax and match is not None:
        raise ValueError(
            f"relax={relax} moves the noise of which match= takes the samples' moments; use one of them"
        )
    limit = Budget.parse(budget)
    goal = Objective(objective, features=features)
    made = Trajectories(
        denoiser,
        shape,
        trajectories + heldout,
        seed=seed,
        steps=reference_steps,
        end=end,
        conditions=conditions,
        batch_size=batch_size,
        folder=None if folder is None else Path(folder),
        dtype=dtype,
    )
    ranges = range(trajectories), range(trajectories, trajectories + heldout)
    made.check(ranges[0])
    settings = {
        "objective": objective,
        "free": list(free),
        "constraints": list(constraints),
        "bound": bound,
        "history": history,
        "relax": relax,
        "regularization": regularization,
        "iterations": iterations,
        "patience": patience,
        **({} if match is None else {"match": match.key}),
    }
    plans = {}
    for n in several:
        fitted = _Fit(denoiser, made, ranges, goal, match, select, settings, limit, folder, progress)
        plans[n] = fitted.run(n, start, end)
    return plans[steps] if isinstance(steps, int) else plans


@dataclass(frozen=True)
class _Start:
    """Where a fit begins.

    Attributes:
        name, plan: the solver's.
        median: its error on the training samples.
        least_square: the least squared error of the starts that competed, as a share of this one's.
        least_moments: the least squares of ``match=`` among them.
    """

    name: str
    plan: Plan
    median: float
    least_square: float
    least_moments: float


class _Fit:
    """One number of steps."""

    def __init__(
        self,
        denoiser: Denoiser,
        made: Trajectories,
        ranges: tuple[range, range],
        objective: Objective,
        match: Moments | None,
        select: Select | None,
        settings: dict[str, Any],
        budget: Budget,
        folder: str | os.PathLike[str] | None,
        progress: bool,
    ) -> None:
        self.denoiser, self.made, self.settings, self.budget = denoiser, made, settings, budget
        self.training, self.unseen = ranges
        self.objective, self.match, self.select = objective, match, select
        self.match_weight = 0.0  # in units of the objective; known with the start
        self.folder = None if folder is None else Path(folder)
        self.progress = progress
        self.evaluations = 0

    # -- the optimiser's problem -----------------------------------------------------------------------------

    def errors_of(self, plan: Plan, samples: range, relaxed: bool = False) -> Errors:
        """The errors of a plan on some trajectories; ``relaxed``: from where their noise may move to."""
        e = torch.zeros(len(samples), dtype=torch.float64)
        sums = self._no_moments()
        for batch in self.made.batches(samples, rank_and_size()):
            batch = self._relaxed(plan, batch) if relaxed else batch
            own = slice(batch.first - samples.start, batch.first - samples.start + len(batch.noise))
            x = self._rollout(plan, batch)[0][-1]
            e[own] = self._residual(x, batch).square().mean(dim=1).cpu()
            if self.match is not None:
                sums += summed_moments(self.match.of(x))
        e = summed(e)
        if not bool(torch.isfinite(e).all()):
            return Errors(math.inf, math.inf, math.inf)
        loss, moments = float(self.objective.losses(e).mean()), None
        if self.match is not None:
            moments = float(self.match.residual(summed(sums)).square().sum())
            loss += self.match_weight * moments
        return Errors(loss, float(e.mean().sqrt()), float(e.sqrt().median()), moments)

    def _no_moments(self) -> Tensor:
        d = 0 if self.match is None else len(self.match.mean)
        return torch.zeros(1 + d + d * d, dtype=torch.float64)

    def errors(self, theta: Tensor) -> Errors:
        try:
            return self.errors_of(self.table.plan(theta), self.training, relaxed=True)
        except ValueError:  # the table is not finite there
            return Errors(math.inf, math.inf, math.inf)

    def heldout(self, theta: Tensor) -> float:
        plan = self.table.plan(theta)
        if self.select is None:
            return self.errors_of(plan, self.unseen).loss
        ends = [self._rollout(plan, batch)[0][-1] for batch in self.made.batches(self.unseen)]
        return float(self.select(torch.cat(ends)))

    def clip(self, theta: Tensor) -> Tensor:
        return self.table.clip(theta)

    def linearise(self, theta: Tensor, displacements: Tensor) -> Linearised:
        plan = self.table.plan(theta)
        others = [self._displaced(theta, i, float(h)) for i, h in enumerate(displacements)]
        size = len(theta)
        hessian = torch.zeros(size, size, dtype=torch.float64)
        gradient, squares = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        sums = torch.zeros(3, dtype=torch.float64)
        moments, changes = self._no_moments(), self._no_moments()[1:].repeat(size, 1)
        for batch in self.made.batches(self.training, rank_and_size()):
            batch = self._relaxed(plan, batch)
            states, predictions, run = self._rollout(plan, batch)
            r = self._residual(states[-1], batch)
            f = None if self.match is None else self.match.of(states[-1])
            e = r.square().mean(dim=1)
            root = self.objective.weights(e).sqrt()[:, None] / math.sqrt(r.shape[1])
            columns = torch.zeros(size, *r.shape, dtype=torch.float64, device=r.device)
            for i, (other, h) in enumerate(others):
                if other is not None:
                    moved = self._again(plan, other, states, predictions, run)
                    columns[i] = (self.objective.seen(moved) - r - self._target(batch)) / h
                    if self.match is not None and f is not None:
                        changes[i] += summed_changes(f, (self.match.of(moved) - f) / h)
            if f is not None:
                moments += summed_moments(f)
            squares += columns.square().mean(dim=2).sum(dim=1).cpu()
            flat = (columns * root).flatten(1)
            hessian += (flat @ flat.T).cpu()
            gradient += (flat @ (r * root).flatten()).cpu()
            sums += torch.stack([self.objective.losses(e).sum(), e.sum(), e.new_tensor(len(e))]).cpu()
        packed = summed(torch.cat([hessian.flatten(), gradient, squares, sums]))
        hessian, gradient, squares, sums = packed.split([size * size, size, size, 3])
        total, square, count = sums.tolist()
        loss, hessian, gradient = total / count, hessian.view(size, size) / count, gradient / count
        if self.match is not None:
            both = summed(torch.cat([moments, changes.flatten()]))
            moments, changes = both[: len(moments)], both[len(moments) :].view_as(changes)
            residual, jacobian = self.match.residual(moments), self.match.jacobian(moments, changes)
            loss += self.match_weight * float(residual.square().sum())
            hessian = hessian + self.match_weight * jacobian @ jacobian.T
            gradient = gradient + self.match_weight * jacobian @ residual
        return Linearised(loss, hessian, gradient, (squares / count).sqrt(), math.sqrt(square / count))

    def _displaced(self, theta: Tensor, i: int, h: float) -> tuple[Plan | None, float]:
        """A plan with one parameter moved, by ``h`` or the other way, and by how much."""
        for signed in (h, -h):
            moved = theta.clone()
            moved[i] += signed
            try:
                plan = self.table.plan(moved)
            except ValueError:  # no plan on that side
                continue
            if plan.values != self.table.plan(theta).values:
                return plan, signed
        return None, h

    def _residual(self, x: Tensor, batch: Batch) -> Tensor:
        return self.objective.seen(x) - self._target(batch)

    def _target(self, batch: Batch) -> Tensor:
        return self.objective.seen(batch.solution)

    def _relaxed(self, plan: Plan, batch: Batch) -> Batch:
        """The batch with its noise moved down the gradient of each sample's error, within the radius."""
        radius = self.settings["relax"]
        if not radius:
            return batch
        z = batch.noise.detach().requires_grad_()
        sigma = float(self.denoiser.process.sigma(as_time(plan.t0)))
        run = Run(
            self.denoiser.bind(len(z), batch.conditions, z.device), philox_noise(0, torch.arange(len(z)))
        )
        states = [z * sigma]
        with torch.enable_grad():
            extend(plan, plan.values, states, {}, run)
            r = self._residual(states[-1], batch)
            if not r.requires_grad:
                raise ValueError(
                    f"relax={radius!r} needs a network that gradients pass; this one's have none"
                )
            (g,) = torch.autograd.grad(r.square().sum() / 2, z)
        self.evaluations += 3 * plan.nfe * len(z)  # a backward pass counts for two
        g, r = g.detach(), r.detach()
        size = g.flatten(1).square().mean(1).sqrt().clamp(min=1e-30)
        small = 1e-2 / size  # of root mean square 0.01
        moved = replace(batch, noise=batch.noise - g * _column(small, g))
        change = (self._residual(self._rollout(plan, moved)[0][-1], moved) - r) / small[:, None]
        best = -(r * change).sum(1) / change.square().sum(1).clamp(min=1e-30)  # along -g
        length = torch.minimum(best.clamp(min=0), radius / size).to(g.dtype)
        return replace(batch, noise=batch.noise - g * _column(length, g))

    def _rollout(self, plan: Plan, batch: Batch) -> tuple[list[Tensor], dict[int, Tensor], Run]:
        """All states and predictions of a plan."""
        x = batch.noise * float(self.denoiser.process.sigma(as_time(plan.t0)))
        bound = self.denoiser.bind(len(x), batch.conditions, x.device)
        run = Run(bound, philox_noise(0, torch.arange(len(x))))
        states, predictions = [x], dict[int, Tensor]()
        with torch.no_grad():
            extend(plan, plan.values, states, predictions, run)
        self.evaluations += plan.nfe * len(x)
        return states, predictions, run

    def _again(
        self, plan: Plan, other: Plan, states: list[Tensor], predictions: dict[int, Tensor], run: Run
    ) -> Tensor:
        """Where ``other`` ends, of which the rows that equal ``plan``'s are not run again."""
        pairs = zip(plan.values, other.values, strict=True)
        first = next(r for r, (a, b) in enumerate(pairs) if a != b)
        kept, known = states[: first + 1], {k: m for k, m in predictions.items() if k < first}
        a, b = plan.values[first], other.values[first]
        row = other.rows[first]
        if row.evaluates and _same_state(a, b):
            # only the evaluation differs: the state stands
            kept = states[: first + 2]
            known[first] = self._evaluate(other, first, kept[-1], run)
        with torch.no_grad():
            extend(other, other.values, kept, known, run)
        self.evaluations += sum(row.evaluates for row in other.rows[first:]) * len(kept[0])
        return kept[-1]

    def _evaluate(self, plan: Plan, r: int, state: Tensor, run: Run) -> Tensor:
        v, denoiser = plan.values[r], self.denoiser
        told = denoiser.told(as_time(v.t_in)).to(state.device, denoiser.time_dtype(state.dtype))
        size = None if v.step is None else torch.full_like(told.expand(len(state)), v.step)
        with torch.no_grad():
            out = run.network(
                state, told.expand(len(state)), v.sigma / v.alpha if v.alpha else math.inf, size
            )
        return v.p * state + v.q * out.to(state.dtype)

    # -- the whole fit ---------------------------------------------------------------------------------------

    def run(self, steps: int, start: str | Plan | None, end: str | None) -> Plan:
        began = time.perf_counter()
        if self.settings["relax"]:
            self._require_gradients()
        begin_with = self._start(steps, start, end)
        name, chosen = begin_with.name, begin_with.plan
        before = self.errors_of(chosen, self.unseen)
        # the scale from the training samples: held-out ones decide nothing but the selection
        self.objective = replace(self.objective, c=2 * max(begin_with.median, 1e-9))
        if self.match is not None:
            loss = self.errors_of(chosen, self.training).loss * begin_with.least_square
            self.match_weight = self.match.weight * loss / begin_with.least_moments
        process = self.denoiser.process
        keys = ("history", "free", "constraints", "bound")
        self.table = Table(chosen, process, **{k: self.settings[k] for k in keys})
        # a network in 16 bits answers in steps of its own: difference quotients have to be wider than these
        coarse = self.denoiser.dtype in (torch.float16, torch.bfloat16)
        smallest = torch.where(self.table.coarse, self._resolution(), 0.0)
        if coarse:
            smallest = smallest.clamp(min=_COARSE)
        path = self._state_path(chosen)
        state = self._resumed(path) or begin(self, len(self.table), smallest)
        earlier = state.spent
        reference_loss = max(self.errors(torch.zeros(len(self.table), dtype=torch.float64)).loss, 1e-30)
        with _bar(self.progress, steps, self.settings["iterations"]) as tick:

            def on_iteration(state: State) -> bool:
                state.spent = earlier + self._spent()
                if path is not None and rank_and_size()[0] == 0:
                    write_atomically(path, json.dumps(state.to_dict()).encode())
                tick(state)
                seconds = time.perf_counter() - began
                over = (
                    self.budget.seconds is not None and seconds >= self.budget.seconds,
                    self.budget.evaluations is not None and self.evaluations >= self.budget.evaluations,
                )
                return _agreed(any(over))

            minimise(
                self,
                state,
                on_iteration,
                smallest=smallest,
                relative=1.0 if coarse else _FINE if self.match is None else _MATCHED,
                regularization=self.settings["regularization"] * reference_loss,
                patience=self.settings["patience"],
                iterations=self.settings["iterations"],
            )
        best = self.table.plan(torch.tensor(state.best, dtype=torch.float64))
        after = self.errors_of(best, self.unseen), self.errors_of(best, self.training)
        spent = earlier + self._spent()
        batch = (len(self.training) + len(self.unseen)) * best.nfe
        record = {
            "trajectories": self.made.key,
            **{
                f"{name}_{k}": v
                for name, e in _named(before, *after)
                for k, v in asdict(e).items()
                if v is not None
            },
            "reference_error": self.made.error,
            "evaluations": spent,
            "evaluations_per_batch": spent / batch,
            **self.settings,
        }
        plan = best.replace(
            solver="tuned",
            steps=best.nfe,
            grid=(),
            options={
                "start": name,
                "model": weights_hash(self.denoiser),
                "record": {k: v for k, v in record.items() if not _is_nan(v)},
            },
            notes=notes(name, record, state),
        )
        if self.folder is not None and rank_and_size()[0] == 0:
            plan.save(self.folder / f"tuned-{steps}.json")
        return plan

    def _start(self, steps: int, start: str | Plan | None, end: str | None) -> _Start:
        """The plan to begin with, of at most ``steps`` evaluations."""
        if isinstance(start, Plan):
            plan = Sampler(self.denoiser, plan=start).plan  # checks that it fits the model
            if plan.nfe != steps:
                raise ValueError(f"start= has {plan.nfe} evaluations, but steps={steps}")
            return self._best({plan.solver: plan})
        auto = Sampler(self.denoiser, steps=steps, end=end).plan
        if start is not None:
            return self._best({start: auto if start == "auto" else self._named_plan(start, steps, auto)})
        plans = {"auto": auto}
        for name in STARTS[1:]:
            with suppress(ValueError):  # it has no plan of so few steps or on this process
                plans[name] = self._named_plan(name, steps, auto)
        return self._best(plans)

    def _best(self, plans: dict[str, Plan]) -> _Start:
        """The plan with the least error, and with ``match`` the least sum of error and moments in units of the
        least of each: the plan of the least error alone can be far from the data's moments, and a fit that
        begins there ends farther from them.
        """
        found = {name: self.errors_of(plan, self.training) for name, plan in plans.items()}
        square = max(min(e.rmse**2 for e in found.values()), 1e-30)
        # what is not finite has no moments
        moments = max(min((e.moments for e in found.values() if e.moments is not None), default=0.0), 1e-30)

        def badness(name: str) -> float:
            e = found[name]
            if self.match is None or e.moments is None:
                return e.rmse
            return e.rmse**2 / square + self.match.weight * e.moments / moments

        name = min(found, key=badness)
        chosen = found[name]
        return _Start(name, plans[name], chosen.median, square / max(chosen.rmse**2, 1e-30), moments)

    def _named_plan(self, name: str, steps: int, auto: Plan) -> Plan:
        """A solver at ``steps`` evaluations, ending where ``auto`` ends."""
        ends = "zero" if auto.values[-1].sigma == 0 else "sigma_min"
        for count in range(steps, 0, -1):
            plan = Sampler(self.denoiser, name, count, end=ends).plan
            if plan.nfe <= steps:
                if plan.stochastic:
                    raise ValueError(f"start={name!r} draws noise; tuning needs a deterministic solver")
                return plan
        raise ValueError(f"start={name!r} has no plan of {steps} evaluations or fewer")

    def _require_gradients(self) -> None:
        """The relaxed objective moves the noise down a gradient; refuse networks that none passes."""
        batch, process = next(self.made.batches(self.training)), self.denoiser.process
        t = process.network_time(process.t_end)
        told = self.denoiser.told(t).to(batch.noise.device, self.denoiser.time_dtype(batch.noise.dtype))
        bound = self.denoiser.bind(len(batch.noise), batch.conditions, batch.noise.device)
        with torch.enable_grad():
            x = batch.noise.detach().clone().requires_grad_()
            out = bound(x, told.expand(len(x)), float(process.rho(t)))
        if not out.requires_grad:
            raise ValueError(
                f"relax={self.settings['relax']!r} needs a network that gradients pass; use relax=0 for this one"
            )

    def _resolution(self) -> float:
        """The least change of a time parameter that every network evaluation sees.

        A network with a table of times, or one that rounds, sees whole units: difference quotients have to
        span them.
        """
        process = self.denoiser.process
        batch = next(self.made.batches(self.training))
        x, conditions = batch.noise, batch.conditions
        bound = self.denoiser.bind(len(x), conditions, x.device)
        low, high = process.phi(as_time([process.t_end, process.t_start]))
        t = process.snap(process.t_of_lam(-torch.tan(low + 0.6 * (high - low)).log()))
        dtype = self.denoiser.time_dtype(x.dtype)

        def out(lam: Tensor) -> Tensor:
            told = self.denoiser.told(process.network_time(process.t_of_lam(lam))).to(x.device, dtype)
            with torch.no_grad():
                return bound(x, told.expand(len(x)), float(process.rho(t)))

        lam = process.lam(t)
        base = out(lam)
        change = 1e-4
        while change < 0.05 and (
            torch.equal(out(lam + change), base) or torch.equal(out(lam - change), base)
        ):
            change *= 2
        return 0.0 if change == 1e-4 else min(2 * change, 0.1)

    def _state_path(self, start: Plan) -> Path | None:
        if self.folder is None:
            return None
        text = json.dumps(
            [self.made.key, start.to_json(), self.settings, len(self.training), len(self.unseen)]
        )
        return self.folder / f"state-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def _spent(self) -> int:
        """Network evaluations of all processes since the start of this one."""
        return int(summed(torch.tensor(self.evaluations + self.made.evaluations)))

    def _resumed(self, path: Path | None) -> State | None:
        if path is None or not path.exists():
            return None
        try:
            state = State(**json.loads(path.read_text()))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}: damaged ({error}); remove it to tune from the start") from error
        return state


def _column(values: Tensor, like: Tensor) -> Tensor:
    """One value a sample, as a factor of ``like`` (B, ...)."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _same_state(a: RowValues, b: RowValues) -> bool:
    return (a.a, a.b, a.c) == (b.a, b.b, b.c)


def _agreed(stop: bool) -> bool:
    """Whether any process wants to stop."""
    return bool(summed(torch.tensor([float(stop)])).item())


def default_trajectories(shape: Sequence[int]) -> int:
    """As many as hold 16,384 numbers, at least 256 and at most 2,048."""
    return min(2048, max(256, 16384 // math.prod(shape)))


def _named(before: Errors, after: Errors, training: Errors) -> list[tuple[str, Errors]]:
    return [("start", before), ("heldout", after), ("training", training)]


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@contextmanager
def _bar(wanted: bool, steps: int, iterations: int) -> Iterator[Callable[[State], None]]:
    if not wanted or rank_and_size()[0]:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{steps} steps", total=iterations)

        def tick(state: State) -> None:
            error = f"{steps} steps, held-out loss {state.best_heldout:.3g}"
            bar.update(task, completed=state.iteration, description=error)

        yield tick
