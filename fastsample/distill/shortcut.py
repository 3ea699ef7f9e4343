"""Shortcut models (Frans et al. 2025, "One step diffusion via shortcut models", arXiv:2410.12557)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .batch import Batch
from .limits import DECAY, Limit
from .method import Method, follow, squared
from .prediction import column, known_fraction, noised, predict
from .teacher import teacher_step


@dataclass
class StepSized(Method):
    """What students share that are told their step: average velocities of a straight flow.

    All is said in a straight flow's time ``tau = sigma / (alpha + sigma)`` and state ``z = x / (alpha +
    sigma)``, of which any process is a scaled copy.

    Args:
        at: the name of the network's time embedding, where it is not found by itself.
        from_teacher: instantaneous velocities are the teacher's; False is those of the data (the papers'), and the
            teacher where the training starts.
    """

    at: str | None = None
    from_teacher: bool = False

    solver: ClassVar[str] = "shortcut"
    converts: ClassVar[bool] = False

    @property
    def solver_options(self) -> dict[str, Any]:
        return {"grid": "fraction", "end": "zero"}

    def build(self) -> None:
        process = self.teacher.process
        alpha, sigma = float(process.alpha(process.t_start)), float(process.sigma(process.t_start))
        self.tau_max = sigma / (alpha + sigma)

    def adapt(self, conditions: dict[str, Any]) -> None:
        """Let the student be told its step."""
        self.give_number("student", "step", self.at, conditions)

    def scale(self, t: Tensor, like: Tensor) -> Tensor:
        """``alpha + sigma`` at times (B,), to multiply ``like``."""
        process = self.teacher.process
        return column(process.alpha(t) + process.sigma(t), like)

    def velocity(self, role: str, x: Tensor, t: Tensor, step: Tensor, conditions: Any) -> Tensor:
        """``s(x_t, t, d)``: the average velocity over the next ``step`` (B,) of flow time."""
        return predict(self.denoiser(role), x, t, conditions, "flow", step=step)

    def instantaneous(self, batch: Batch, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The velocity at ``x_t``: the teacher's, or that of the data."""
        if not self.from_teacher:
            return eps - batch.data
        with torch.no_grad():
            return predict(self.teacher, x, t, batch.conditions, "flow")


@dataclass
class Shortcut(StepSized):
    """Shortcut models, algorithm 1: a step of 2d is two steps of d.

    The loss is eq. 5: flow matching at step size 0 for a part of the batch; for the rest, dyadic step sizes whose
    target is the mean of two steps of half the size by the target network (eq. 4). The smallest step is learnt from
    two Heun steps of instantaneous velocities, the target's own or the teacher's, and may be larger than the paper's,
    which is such a velocity itself (section 3.1).

    Args:
        finest: the number of the smallest steps, a power of two (the paper: 128).
        bootstrap: the share of the batch with dyadic steps (the paper: 1/4).
        target_decay: of the target's moving average (the paper: 0.999, over 800,000 updates).
    """

    finest: int = 8
    bootstrap: float = 0.75
    target_decay: float = 0.9

    limits: ClassVar[dict[str, Limit]] = {
        "finest": Limit(2, whole=True),
        "bootstrap": Limit(0, 1, above=True, below=True),
        "target_decay": DECAY,
    }

    def build(self) -> None:
        super().build()
        if self.finest & (self.finest - 1):
            raise ValueError(f"finest={self.finest}: a power of two from 2 on is needed")
        self.adapt({})
        self.nets["target"] = self.copy_of("student")

    def objective(self, batch: Batch, role: str) -> Tensor:
        # which samples bootstrap depends on their index, not on their place in a micro-batch
        share = batch.uniform("share") < self.bootstrap
        levels = math.log2(self.finest) + 1
        level = (batch.uniform("level") * levels).long()
        count = 2**level  # steps of size 1 / count
        k = (batch.uniform("k") * count).long() + 1
        tau = torch.where(share, self.tau_max * k / count, self.tau_max * batch.uniform("tau"))
        size = torch.where(share, self.tau_max / count, 0.0)
        (t, here), (_, there) = (known_fraction(self.teacher.process, v) for v in (tau, tau - size))
        eps = batch.normal("eps")
        x = noised(self.teacher.process, batch.data, eps, t)
        target = torch.empty_like(x)
        # each network sees only the samples that it is needed for
        for rows, function in (((~share).nonzero()[:, 0], self._plain), (share.nonzero()[:, 0], self._twice)):
            if len(rows):
                at = rows.to(x.device, non_blocking=True)
                chosen = dataclasses.replace(
                    batch,
                    index=batch.index[rows],
                    x=batch.data[at],
                    conditions=taken(batch.conditions, at, len(batch)),
                )
                target[at] = function(chosen, x[at], tau[rows], size[rows], eps[at])
        return squared(self.velocity("student", x, t, here - there, batch.conditions) - target)

    def _plain(self, batch: Batch, x: Tensor, tau: Tensor, size: Tensor, eps: Tensor) -> Tensor:
        return self.instantaneous(batch, x, known_fraction(self.teacher.process, tau)[0], eps)

    @torch.no_grad()
    def _twice(self, batch: Batch, x: Tensor, tau: Tensor, size: Tensor, eps: Tensor) -> Tensor:
        half = size / 2
        target = torch.empty_like(x)
        smallest = size * self.finest < 1.5 * self.tau_max
        for rows, function in ((smallest, self.taught), (~smallest, partial(self.two_steps, "target"))):
            if bool(rows.any()):
                at = rows.nonzero()[:, 0].to(x.device, non_blocking=True)
                conditions = taken(batch.conditions, at, len(batch))
                target[at] = function(x[at], tau[rows], half[rows], conditions)
        return target

    def taught(self, x: Tensor, tau: Tensor, half: Tensor, conditions: Any) -> Tensor:
        """The average velocity of two Heun steps of the teacher's, or of the target's own instantaneous velocities."""
        source, told = (
            (self.teacher, None) if self.from_teacher else (self.denoiser("target"), torch.zeros_like(half))
        )
        ends = [known_fraction(self.teacher.process, tau - k * half) for k in (0, 1, 2)]
        end = x
        for (a, _), (b, _) in itertools.pairwise(ends):
            end = teacher_step(source, end, a, b, conditions, told=told)
        (first, before), (last, after) = ends[0], ends[2]
        return (x / self.scale(first, x) - end / self.scale(last, x)) / column(before - after, x)

    def two_steps(self, role: str, x: Tensor, tau: Tensor, half: Tensor, conditions: Any) -> Tensor:
        """The average velocity of two steps (eq. 4)."""
        (t, before), (middle, between), (_, after) = (
            known_fraction(self.teacher.process, tau - k * half) for k in (0, 1, 2)
        )
        steps = before - between, between - after
        first = self.velocity(role, x, t, steps[0], conditions)
        z = x / self.scale(t, x) - column(steps[0], x) * first
        second = self.velocity(role, z * self.scale(middle, x), middle, steps[1], conditions)
        return (
            column(steps[0] / (before - after), x) * first + column(steps[1] / (before - after), x) * second
        )

    def after_update(self, step: int) -> None:
        follow(self.nets["target"], self.nets["student"], self.target_decay)


def taken(conditions: Any, rows: Tensor, total: int) -> dict[str, Any]:
    """The conditions of some samples of a batch, by their places (on the conditions' device)."""

    def take(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == total else value

    return {key: tree_map(take, value) for key, value in conditions.items()}
