"""Progressive distillation (Salimans & Ho 2022, arXiv:2202.00512)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import grids
from ..errors import unknown
from .batch import Batch
from .limits import COUNT, Limit
from .method import Method, squared
from .prediction import column, noised, predict, radius
from .teacher import ddim_coefficients, ddim_step

WEIGHTINGS = ("step", "snr")


@dataclass
class Progressive(Method):
    """One DDIM step of the student is two of the teacher, which is then the student; algorithm 2.

    Args:
        first: steps of the first student, a power of two; it is taught by twice as many of the teacher.
        last: steps of the last one. Students of 2 and 1 steps are trained twice as long as the others (section 5).
        grid: the times, by name of ``fs.grids``; by default the process's own, at which the teacher's first steps are
            better than at even angles (those of the paper's cosine schedule).
        weighting: "step" measures the error of the state that a step arrives at; "snr" that of the clean sample, times
            ``max(snr, 1)`` (the paper, eq. 9). The clean samples of a teacher that predicts eps are far off at the
            noisiest times, where they hardly count in short steps; by "snr" their errors outweigh all others.
    """

    first: int = 16
    last: int = 1
    grid: str | None = None
    weighting: str = "step"

    solver: ClassVar[str] = "ddim"

    @property
    def steps(self) -> tuple[int, ...]:  # type: ignore[override]
        """The last stage's: what it forgets of the others is not to be sampled with."""
        return (self.last,)

    @property
    def grid_name(self) -> str:
        """The name of the grid."""
        return self.grid or self.teacher.process.grid

    @property
    def solver_options(self) -> dict[str, Any]:
        return {"grid": self.grid_name, "end": "zero"}

    limits: ClassVar[dict[str, Limit]] = {"first": COUNT, "last": COUNT}

    def build(self) -> None:
        for name in ("first", "last"):
            value = getattr(self, name)
            if value & (value - 1):
                raise ValueError(f"{name}={value}: a power of two is needed")
        if self.weighting not in WEIGHTINGS:
            raise unknown("weighting", self.weighting, WEIGHTINGS)
        if self.last > self.first:
            raise ValueError(f"last={self.last} is more than first={self.first}")
        finest = grids.make(self.grid_name, self.teacher.process, 2 * self.first, end="zero")
        if len(finest) != 2 * self.first + 1:
            raise ValueError(
                f"first={self.first}: the network knows too few times; it is taught by {2 * self.first} steps, and "
                f"the grid has {len(finest) - 1}"
            )
        self.nets["previous"] = self.copy_of("student")

    @property
    def stages(self) -> list[int]:
        """The students' numbers of steps, one a stage."""
        steps = [self.first]
        while steps[-1] > self.last:
            steps.append(steps[-1] // 2)
        return steps

    def stage(self, step: int) -> int:
        """The stage of an update."""
        return min(len(self.stages) - 1, int(self._staged(step, self.whole)))

    def _staged(self, step: int, total: int) -> float:
        """The number of stages that are over before an update; 0 until the prediction type is learnt."""
        shares = [2 if k <= 2 else 1 for k in self.stages]
        done = (step - self.conversion) / max(1, total - self.conversion) * sum(shares)
        for stage, share in enumerate(shares):
            if done < share:
                return stage + max(0.0, done / share)
            done -= share
        return float(len(shares))

    def elapsed(self, step: int, total: int) -> float:
        """Each stage is a training of its own, whose learning rate starts anew (section 3 and algorithm 2)."""
        return step / self.conversion if step < self.conversion else self._staged(step, total) % 1

    def objective(self, batch: Batch, role: str) -> Tensor:
        stage = self.stage(batch.step)
        steps = self.stages[stage]
        process = self.teacher.process
        times = grids.make(self.grid_name, process, 2 * steps, end="zero").flip(0)
        i = 2 * (batch.uniform("t", stratified=True) * steps).long()
        t, middle, s = times[i + 2], times[i + 1], times[i]
        x = noised(process, batch.data, batch.normal("eps"), t)
        previous = self.teacher if stage == 0 else self.denoiser("previous")
        target = self.target(previous, x, t, middle, s, batch.conditions)
        weight = self.weight(t, s).to(x.device, x.dtype, non_blocking=True)
        return weight * squared(self.predict("student", x, t, batch) - target)

    def weight(self, t: Tensor, s: Tensor) -> Tensor:
        """The weight (B,) of the clean sample's squared error in a step from t to s."""
        process = self.teacher.process
        if self.weighting == "snr":
            # kept finite where the paper's schedule ends
            return ((process.alpha(t) / process.sigma(t)) ** 2).clamp(min=1, max=1e4)
        # relative to the scale of the state: the same for each process
        _, of_clean = ddim_coefficients(process, t, s)
        return of_clean**2 / radius(process, s) ** 2

    @torch.no_grad()
    def target(
        self, previous: Any, x: Tensor, t: Tensor, middle: Tensor, s: Tensor, conditions: Any
    ) -> Tensor:
        """The clean sample with which one step from t to s arrives where two steps do (appendix G)."""
        process = self.teacher.process
        half = ddim_step(process, x, predict(previous, x, t, conditions), t, middle)
        end = ddim_step(process, half, predict(previous, half, middle, conditions), middle, s)
        of_state, of_clean = ddim_coefficients(process, t, s)
        return (end - column(of_state, x) * x) / column(of_clean, x)

    def after_update(self, step: int) -> None:
        if step + 1 < self.whole and self.stage(step + 1) > self.stage(step):
            self.nets["previous"].load_state_dict(self.nets["student"].state_dict())
