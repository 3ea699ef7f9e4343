"""ReFlow (Liu et al. 2023, "Flow straight and fast", arXiv:2209.03003)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from .. import solvers
from ..sampler import Sampler
from .batch import Batch
from .knowledge import OnPairs, from_noise
from .limits import COUNT, DECAY, Limit
from .method import squared
from .pairs import Pairs, make_pairs
from .prediction import noised, predict, time_of_fraction


@dataclass
class ReFlow(OnPairs):
    """Straight paths between the teacher's pairs of noise and sample; then one step is distilled.

    A rectification fits the velocity ``noise - sample`` along the line between both (eq. 1 and algorithm 1), on
    any process: the line's point at flow time ``tau = sigma / (alpha + sigma)`` is ``x_t / (alpha + sigma)``
    with ``x_t = alpha sample + sigma noise``. The last share of the updates distils (section 2.2): one step
    from noise alone.

    Args:
        rectifications: k; from the second on, the pairs are those of the student of the one before.
        distilled: the share of the updates that distil one step; 0 leaves the flow, for more steps.
    """

    rectifications: int = 1
    distilled: float = 0.5

    limits: ClassVar[dict[str, Limit]] = {"rectifications": COUNT, "distilled": DECAY}
    solver: ClassVar[str] = "ddim"  # Euler's rule on straight lines

    @property
    def steps(self) -> tuple[int, ...]:  # type: ignore[override]
        """One where one step is distilled; else the flow's few steps."""
        return (1,) if self.distilled else (1, 2, 4)

    @property
    def solver_options(self) -> dict[str, Any]:
        return {"grid": "fraction", "end": "zero"}

    def build(self) -> None:
        super().build()
        if self.rectifications > 1:
            self.nets["previous"] = self.copy_of("student")
        self._stage = 0

    def prepare(self, data: Any, folder: Path, *, seed: int = 0, progress: bool = False) -> None:
        super().prepare(data, folder, seed=seed, progress=progress)
        self._stage, self._preparation = 0, (data, folder, seed, progress)

    def stage(self, step: int) -> tuple[int, bool]:
        """The rectification of an update (0, 1, ...), and whether it is the distillation after the last."""
        straightening = round(self.whole * (1 - self.distilled))
        if step >= straightening:
            return self.rectifications - 1, True
        return step * self.rectifications // straightening, False

    def _own_pairs(self, stage: int) -> Pairs:
        data, folder, seed, progress = self._preparation
        denoiser = self.denoiser("previous")
        plan = solvers.build(
            "ddim", denoiser.process, self.pair_steps, prediction=denoiser.prediction, **self.solver_options
        )
        return make_pairs(
            Sampler(denoiser, plan=plan),
            data,
            self.pairs,
            folder / f"pairs-{stage + 1}",
            seed=seed,
            progress=progress,
        )

    def objective(self, batch: Batch, role: str) -> Tensor:
        stage, distils = self.stage(batch.step)
        if stage != self._stage:
            self.made, self._stage = self._own_pairs(stage), stage
        noise, x0, conditions = self.pair(batch)
        if distils:
            return squared(from_noise(self, "student", noise, conditions) - x0)
        process = self.teacher.process
        t = process.snap(time_of_fraction(process, batch.uniform("t", stratified=True)))
        x = noised(process, x0, noise, t)
        velocity = predict(self.denoiser("student"), x, t, conditions, "flow")
        return squared(velocity - (noise - x0))

    def after_update(self, step: int) -> None:
        if self.rectifications > 1 and self.stage(step + 1)[0] > self.stage(step)[0]:
            self.nets["previous"].load_state_dict(self.nets["student"].state_dict())
