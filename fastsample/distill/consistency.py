"""Consistency distillation (Song et al. 2023, "Consistency models", arXiv:2303.01469)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import grids
from ..errors import unknown
from ..process import Process
from .batch import Batch
from .limits import COUNT, DECAY, POSITIVE, Limit
from .method import Method, follow, pseudo_huber, squared
from .prediction import column, consistency_function, noised
from .teacher import teacher_step

METRICS = {"pseudo_huber": pseudo_huber, "l2": squared}


def as_v(error: Tensor, process: Process, t: Tensor, least: float = 0.02) -> Tensor:
    """Errors of the clean sample as errors of v: they are sin(phi) times those, and little noise would not count.

    Args:
        error: of the clean sample (B, ...).
        process, t: its times (B,).
        least: of sin(phi), below which the weights do not grow.
    """
    return error / column(torch.sin(process.phi(t)).clamp(min=least), error)


@dataclass
class ConsistencyModel(Method):
    """What all consistency models share: they sample by jumps to clean samples, with noise put back.

    Args:
        exponent: of the angles that noise is put back to, ``phi_i / phi_max = (1 - i/n)^exponent``. 1 is evenly;
            less noise leaves more of the last jump's sample, more noise corrects more of it (Song et al. 2023, section
            3, search the levels by the metric).
    """

    exponent: float = 1.5

    limits: ClassVar[dict[str, Limit]] = {"exponent": POSITIVE}

    @property
    def solver_options(self) -> dict[str, Any]:
        process = self.teacher.process
        at = {"boundary": float(process.rho(process.t_end))} if self.prediction == "x0" else {}
        return {"grid": "angle", "exponent": self.exponent, "end": "zero", **at}


@dataclass
class Consistency(ConsistencyModel):
    """Consistency distillation, algorithm 2: two neighbours on a teacher's trajectory have one end.

    ``d(f_theta(x_{n+1}, t_{n+1}), f_target(x_n, t_n))`` (eq. 7), where ``x_n`` is where the teacher
    gets from ``x_{n+1} = alpha x_0 + sigma eps``, and the target follows the student as a moving average (eq. 8).
    Errors are those of v; in the interval next to the data, where the teacher itself is the target, they are those of
    the clean sample, which weigh less.

    Args:
        intervals: N - 1, the number of intervals of the grid (the paper: 17), each a link of the chain that ties the
            student at pure noise to the teacher. Errors add up along it.
        substeps: steps of the teacher in an interval (the paper: 1): a chain of few links with a finer teacher.
        grid: the times, by name of ``fs.grids``; by default the process's own (the paper: Karras').
        jitter: t is anywhere on the grid's curve and x_n one interval below it, so that the student knows all
            times; False is the paper's, whose student knows the grid's times alone.
        order: of the teacher's step; 2 is Heun (the paper), 1 DDIM.
        target_decay: mu of the target's moving average (the paper: 0.95); 0 is the student itself.
        metric: "l2", or "pseudo_huber" (Song & Dhariwal 2024), whose force does not shrink with the error: the links of
            the chain that have small ones outweigh the one that ties the student to the teacher.
    """

    intervals: int = 4
    substeps: int = 6
    grid: str | None = None
    jitter: bool = True
    order: int = 1
    target_decay: float = 0.95
    metric: str = "l2"

    learning_rate: ClassVar[float] = 2e-3
    converts: ClassVar[bool] = False
    limits: ClassVar[dict[str, Limit]] = {"intervals": COUNT, "substeps": COUNT, "target_decay": DECAY}

    def build(self) -> None:
        if self.metric not in METRICS:
            raise unknown("metric", self.metric, METRICS)
        if self.order not in (1, 2):
            raise ValueError(f"order={self.order}: the teacher's step is of order 1 (DDIM) or 2 (Heun)")
        self.nets["target"] = self.copy_of("student")
        # from the least noise to the most: t_1 .. t_N of the paper, with zero noise before them
        process = self.teacher.process
        steps = self.intervals * self.substeps
        self.fine = grids.make(self.grid or process.grid, process, steps, end="zero").flip(0)
        if len(self.fine) != steps + 1:
            raise ValueError(
                f"intervals={self.intervals}, substeps={self.substeps}: the network knows too few times for so many; "
                f"the grid has {len(self.fine) - 1}"
            )
        self.times = self.fine[:: self.substeps]
        # in the first interval the teacher itself is the target: nothing is tied to the times within
        self.least = float(torch.sin(process.phi(self.times[1])))

    @property
    def solver_options(self) -> dict[str, Any]:
        options = super().solver_options
        if self.jitter:
            return options
        counts = range(1, min(8, self.intervals) + 1)
        return options | {"grids": {str(n): self.known_times(n) for n in counts}}

    def known_times(self, steps: int) -> list[float]:
        """Times of the grid for a number of steps, nearest to the angles: others are not learnt without jitter."""
        phi = self.teacher.process.phi(self.times)
        places: list[int] = []
        for left in range(steps, 0, -1):
            nearest = int((phi - phi[-1] * (left / steps) ** self.exponent).abs().argmin())
            last = places[-1] if places else len(phi)
            places.append(max(left, min(nearest, last - 1)))
        return [*self.times[places].tolist(), self.teacher.process.t_zero]

    def objective(self, batch: Batch, role: str) -> Tensor:
        u = batch.uniform("t", stratified=True) * self.intervals
        # with jitter half an interval more, so that the noisiest time has its share
        u = (u * (1 + 0.5 / self.intervals)).clamp(max=self.intervals) if self.jitter else u.floor() + 1
        below = (u - 1).clamp(min=0)
        path = [self.at(torch.lerp(u, below, j / self.substeps)) for j in range(self.substeps + 1)]
        t, s = path[0], path[-1]
        x = noised(self.teacher.process, batch.data, batch.normal("eps"), t)
        before = x
        for i, j in itertools.pairwise(path):
            before = self.step(before, i, j, batch)
        with torch.no_grad():
            target = consistency_function(self.denoiser("target"), before, s, batch.conditions)
        end = consistency_function(self.denoiser("student"), x, t, batch.conditions)
        return METRICS[self.metric](as_v(end - target, self.teacher.process, t, self.least))

    def at(self, place: Tensor) -> Tensor:
        """Times (B,) at places along the grid, in intervals from the data; linear between the teacher's steps."""
        place = place * self.substeps
        n = place.long().clamp(max=len(self.fine) - 2)
        t = torch.lerp(self.fine[n], self.fine[n + 1], place - n)
        return self.teacher.process.snap(t)

    def step(self, x: Tensor, t: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """The teacher's step from times t to s (B,)."""
        return teacher_step(self.teacher, x, t, s, batch.conditions, self.order)

    def after_update(self, step: int) -> None:
        follow(self.nets["target"], self.nets["student"], self.target_decay)
