"""Knowledge distillation on pairs: the denoising student (Luhman & Luhman 2021, arXiv:2101.02388)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import unknown
from ..sampler import Sampler
from .batch import Batch
from .consistency import METRICS
from .data import shuffled
from .limits import COUNT, Limit
from .method import Method
from .pairs import Pairs, make_pairs
from .prediction import column, predict


@dataclass
class OnPairs(Method):
    """What the methods on pairs (noise, the teacher's sample) share.

    Args:
        pairs: their number. With too few the student learns them by heart.
        pair_solver, pair_steps: the teacher's sampler.
        pair_plan: file of a plan that samples the pairs instead, such as one of ``fs.tune``: as near to the
            teacher's solution with a third of the evaluations.
    """

    pairs: int = 60_000
    pair_solver: str = "unipc"
    pair_steps: int = 16
    pair_plan: str | None = None

    uses_data: ClassVar[bool] = False
    converts: ClassVar[bool] = False

    limits: ClassVar[dict[str, Limit]] = {"pairs": COUNT, "pair_steps": COUNT}

    def build(self) -> None:
        self.made: Pairs | None = None
        self.pair_sampler()  # what cannot be used is found here, and not when the pairs are made

    def pair_sampler(self) -> Sampler:
        """What samples the pairs.

        Raises:
            ValueError: no such solver, or a plan that is not there, that the teacher cannot use or that draws noise.
        """
        if self.pair_plan is None:
            return Sampler(self.teacher, self.pair_solver, self.pair_steps, end="zero")
        if not Path(self.pair_plan).is_file():
            raise ValueError(
                f"pair_plan={str(self.pair_plan)!r}: there is no such file; give the file of a plan, as "
                "fastsample tune writes it"
            )
        sampler = Sampler(self.teacher, plan=self.pair_plan)
        if sampler.plan.stochastic:
            raise ValueError(
                f"pair_plan={self.pair_plan!r} draws noise; a pair is a noise and where it leads, which needs a "
                "deterministic plan"
            )
        return sampler

    def prepare(self, data: Any, folder: Path, *, seed: int = 0, progress: bool = False) -> None:
        sampler = self.pair_sampler()
        self.made = make_pairs(
            sampler,
            data,
            self.pairs,
            folder / "pairs",
            solver=self.pair_solver,
            seed=seed,
            progress=progress,
        )

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Noise, samples and conditions of a batch.

        Raises:
            ValueError: the pairs were not made.
        """
        if self.made is None:
            raise ValueError(
                "there are no pairs yet: call method.prepare(data, folder) before the first loss"
            )
        which = shuffled(batch.index, len(self.made), batch.seed)
        at = which.to(self.made.x0.device, non_blocking=True)
        conditions = {k: v[at] for k, v in self.made.conditions.items()}
        return self.made.noise(which), self.made.x0[at], conditions


def from_noise(method: Method, role: str, noise: Tensor, conditions: dict[str, Any]) -> Tensor:
    """A role's clean sample straight from noise, as one step of sampling gives it."""
    process = method.teacher.process
    t = torch.full((len(noise),), process.t_start, dtype=torch.float64)
    return predict(method.denoiser(role), column(process.sigma(t), noise) * noise, t, conditions)


@dataclass
class Knowledge(OnPairs):
    """The student's single step from noise is the teacher's whole trajectory (eq. 6).

    Args:
        metric: "pseudo_huber" or "l2" (the paper).
    """

    metric: str = "l2"

    steps: ClassVar[tuple[int, ...]] = (1,)

    @property
    def solver_options(self) -> dict[str, Any]:
        return {"end": "zero"}

    def build(self) -> None:
        super().build()
        if self.metric not in METRICS:
            raise unknown("metric", self.metric, METRICS)

    def objective(self, batch: Batch, role: str) -> Tensor:
        noise, x0, conditions = self.pair(batch)
        return METRICS[self.metric](from_noise(self, "student", noise, conditions) - x0)
