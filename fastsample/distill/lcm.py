"""Latent consistency models (Luo et al. 2023, arXiv:2310.04378; with LoRA: arXiv:2311.05556)."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import grids
from ..denoiser import Denoiser, _matched, as_conditions
from ..errors import unknown
from ..solvers.consistency import lcm_boundary
from .batch import Batch
from .consistency import METRICS, as_v
from .limits import COUNT, DECAY, POSITIVE, WEIGHT, Limit
from .method import Method, follow
from .prediction import column, noised, predict
from .teacher import ddim_step

log = logging.getLogger(__name__)


@dataclass
class LCM(Method):
    """Latent consistency distillation, algorithm 1: guidance is distilled too, and the student is told its scale.

    ``d(f_theta(z_{n+k}, w, c, t_{n+k}), f_target(z_n, w, c, t_n))``, where ``z_n`` is where DDIM gets over ``k``
    training times by the teacher guided with ``w ~ U[w_min, w_max]`` (the augmented ODE, eq. 9, 14 and 15), and
    ``f = c_skip z + c_out x_0`` (eq. 8) with the scalings of the solver "lcm".

    The student takes ``guidance=1 + w`` as a condition, a scale in the sense of :class:`fastsample.Guidance`, by
    default the middle one. A network with such an argument of its own (Flux) is used as it is; others get a
    zero-initialised adapter on their time embedding. The teacher's guidance says what its null conditions are;
    its own scale does not matter. A teacher without guidance is distilled as it is.

    Args:
        w_min, w_max: the range of w (the paper: 2 to 14); equal ones distil one scale, of which the student need
            not be told (LCM-LoRA).
        skip: k, training times from z_{n+k} to z_n (section 4.3: 20). The student has to add up ``train_steps / skip``
            of these links, along which errors add up, too: 50 are too many for thousands of updates. diffusers'
            LCMScheduler calls that number ``original_inference_steps`` and takes 50 unless told.
        substeps: DDIM steps over these times (the paper: 1): a chain of few links with a finer teacher.
        train_steps: N, the number of training times, laid on the process's own grid.
        target_decay: mu of the target's moving average (the paper: 0.999943, over 100,000 updates).
        metric: "l2" (the paper) or "pseudo_huber", whose force does not shrink with the error.
        space: what errors are measured in: "v", or "x0" (the paper), where the first link of the chain, which alone
            ties the student to the teacher, weighs next to nothing and the student drifts away.
        timestep_scaling: how fast ``f`` leaves the identity.
        at: the name of the network's time embedding, where it is not found by itself.
    """

    w_min: float = 2.0
    w_max: float = 14.0
    skip: int = 125
    substeps: int = 3
    train_steps: int = 1000
    target_decay: float = 0.95
    metric: str = "l2"
    space: str = "v"
    timestep_scaling: float = 10.0
    at: str | None = None

    learning_rate: ClassVar[float] = 2e-3
    converts: ClassVar[bool] = False
    limits: ClassVar[dict[str, Limit]] = {
        "w_min": WEIGHT,
        "w_max": WEIGHT,
        "skip": COUNT,
        "substeps": COUNT,
        "train_steps": COUNT,
        "target_decay": DECAY,
        "timestep_scaling": POSITIVE,
    }
    solver: ClassVar[str] = "lcm"

    def build(self) -> None:
        if self.metric not in METRICS:
            raise unknown("metric", self.metric, METRICS)
        if self.space not in ("v", "x0"):
            raise unknown("space", self.space, ("v", "x0"))
        if self.w_min > self.w_max:
            raise ValueError(f"w_min={self.w_min}, w_max={self.w_max}: need 0 <= w_min <= w_max")
        if self.skip >= self.train_steps:
            raise ValueError(
                f"skip={self.skip}, train_steps={self.train_steps}: need 1 <= skip < train_steps"
            )
        if self.substeps > self.skip:
            raise ValueError(
                f"substeps={self.substeps}, skip={self.skip}: a DDIM step is over one training time at least"
            )
        process = self.teacher.process
        # by training index: from the least noise to the most
        times = grids.make(process.grid, process, self.train_steps - 1, end="sigma_min").flip(0)
        # whole indices of discrete processes, without the grid's rounding
        self.times = torch.where((times - times.round()).abs() < 1e-9, times.round(), times)
        if self.count < 1:
            raise ValueError(
                f"skip={self.skip}: the network knows {len(self.times)} times only; take a smaller one"
            )
        guidance = self.teacher.guidance
        self.guided = guidance is not None and bool(guidance.null)
        if not self.guided:
            log.info("the teacher has no guidance (null conditions): its student is not told a scale")
        elif guidance is not None and guidance.rescale:
            raise ValueError(
                f"guidance.rescale={guidance.rescale}: LCM guides by the scale alone; use rescale=0"
            )
        self.told = self.guided and self.w_min < self.w_max
        if self.told:
            middle = 1 + (self.w_min + self.w_max) / 2
            self.give_number("student", "guidance", self.at, self.null({}, 2, self.teacher.device))
            self._meaning = self._meaning.replace(conditions={**self._meaning.conditions, "guidance": middle})
        self.nets["target"] = self.copy_of("student")

    @property
    def count(self) -> int:
        """The number of DDIM steps from the noisiest time on."""
        return len(self.times) // self.skip

    @property
    def solver_options(self) -> dict[str, Any]:
        # evenly chosen among the times of DDIM's steps, which are those that the student knows
        places = torch.arange(self.count, 0, -1) * self.skip - 1
        chosen = {
            str(n): [
                *self.times[places[torch.arange(n) * self.count // n]].tolist(),
                self.teacher.process.t_zero,
            ]
            for n in range(1, min(8, self.count) + 1)
        }
        return {"grids": chosen, "end": "zero", "timestep_scaling": self.timestep_scaling}

    def objective(self, batch: Batch, role: str) -> Tensor:
        n = ((batch.uniform("t", stratified=True) * self.count).long() + 1) * self.skip - 1
        path = [
            self.times[(n - self.skip * j // self.substeps).clamp(min=0)] for j in range(self.substeps + 1)
        ]
        t, s = path[0], path[-1]
        w = self.w_min + (self.w_max - self.w_min) * batch.uniform("w")
        x = noised(self.teacher.process, batch.data, batch.normal("eps"), t)
        before = x
        for i, j in itertools.pairwise(path):
            before = self.step(before, i, j, w, batch.conditions)
        told = {**batch.conditions, **({"guidance": (1 + w).to(x.device, x.dtype)} if self.told else {})}
        with torch.no_grad():
            target = self.end(self.denoiser("target"), before, s, told)
        error = self.end(self.denoiser("student"), x, t, told) - target
        return METRICS[self.metric](as_v(error, self.teacher.process, t) if self.space == "v" else error)

    @torch.no_grad()
    def step(self, x: Tensor, t: Tensor, s: Tensor, w: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """DDIM from times t to s (B,) by the teacher guided with w (B,): ``z + (1 + w) Psi(c) - w Psi(null)``."""
        process, guidance = self.teacher.process, self.teacher.guidance
        plain = self.teacher.replace(guidance=None)
        x0 = predict(plain, x, t, conditions)
        if self.guided and guidance is not None:
            low, high = guidance.interval
            level = process.rho(t)
            scale = torch.where((level >= low) & (level <= high), w, 0.0)
            null = predict(plain, x, t, {**conditions, **self.null(conditions, len(x), x.device)})
            x0 = x0 + column(scale, x) * (x0 - null)
        return ddim_step(process, x, x0, t, s)

    def null(self, conditions: Mapping[str, Any], batch: int, device: torch.device) -> dict[str, Any]:
        """The null conditions, shaped as those that they replace."""
        assert self.teacher.guidance is not None
        null = as_conditions(self.teacher.guidance.null, device)
        return {k: _matched(conditions.get(k, v), v, batch, device)[1] for k, v in null.items()}

    def end(self, denoiser: Denoiser, x: Tensor, t: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """``f(x_t, t)``: the end of the trajectory through ``x_t`` (eq. 8), as the solver "lcm" jumps to it."""
        process = denoiser.process
        skip, out = lcm_boundary(process, t, self.timestep_scaling)
        asked = torch.where(t == process.t_zero, process.t_end, t)
        return column(skip, x) * x + column(out, x) * predict(denoiser, x, asked, conditions)

    def after_update(self, step: int) -> None:
        follow(self.nets["target"], self.nets["student"], self.target_decay)
