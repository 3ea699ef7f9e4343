"""What a distillation method is: a loss over roles."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import grids, solvers
from ..denoiser import Denoiser, as_conditions
from ..noise import normal
from ..plan import Plan
from ..prediction import canonical, coefficients
from .adapters import conditioned
from .batch import Batch
from .limits import Limit, check
from .prediction import noised, predict, radius, time_of_phi
from .weights import duplicate, moving, own_parameters

log = logging.getLogger(__name__)

AMPLIFICATION = 20.0
"""From this ``|dx_0 / dout|`` at the noisiest time on, students of eps-predicting teachers predict v."""
_CONVERSION = 1000
NO_SETTINGS = ("teacher", "student", "example_conditions")


@dataclass
class Method:
    """A distillation method; each one is a subclass in a file of its own.

    A method is a loss over *roles*: networks by name, of which "student" is always one. It is used by
    :class:`fastsample.distill.Trainer`, or in a training loop of one's own::

        method = fs.distill.ECT(teacher)
        optimizer = torch.optim.RAdam(method.nets["student"].parameters(), lr=1e-4)
        for step, (x, labels) in enumerate(batches):
            loss = method.loss(fs.distill.Batch.of(x, step, labels=labels)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.after_update(step)
        images = fs.Sampler(method.denoiser("student"), plan=method.plan(1))(n=16, seed=0)

    Args:
        teacher: the model to distil, of any process and prediction type.
        student: where the student starts; by default a copy of the teacher.
        prediction: what the student's network predicts; by default the teacher's own, or "v" where eps says
            too little about the clean sample at the noisiest time (``|dx_0 / dout|`` above 20).
        convert: updates that first teach the student the teacher's function in another prediction type (Meng
            et al. 2023, section 5.2 do so); by default a fifth of the training, at most 1,000, where the type
            changes and the method needs it.
        total: updates of the whole training, where a schedule depends on it; the trainer's ``steps``.
        lora: the student is LoRA matrices on the parameters of the network it starts from, which it shares:
            options of ``peft.LoraConfig``, such as ``{"r": 16, "target_modules": ["to_q", "to_v"]}``. It keeps
            the teacher's prediction type.
        example_conditions: conditions of two samples, where the network cannot be run without: some methods run it
            once to find its time embedding or its middle.

    Attributes:
        nets: all networks with a state, by role; those of ``trained`` have an optimiser.
        trained: the roles that are trained.
        solver, solver_options, grid: what the student samples with, of ``fs.solvers``.
        steps: the numbers of steps that the student is meant for.
        uses_data: whether clean samples are needed (else conditions alone).
        converts: whether a changed prediction type has to be learnt first.
        learning_rate, betas, schedule, power_ema: the trainer's defaults for the method, for a small network.
        limits: ranges of settings, by name; those of the classes above hold, too.
    """

    teacher: Denoiser
    student: Denoiser | None = None
    prediction: str | None = None
    convert: int | None = None
    total: int | None = None
    lora: Mapping[str, Any] | None = None
    example_conditions: Mapping[str, Any] | None = None

    limits: ClassVar[Mapping[str, Limit]] = {
        "convert": Limit(0, whole=True, optional=True),
        "total": Limit(1, whole=True, optional=True),
    }
    solver: ClassVar[str] = "consistency"
    steps: ClassVar[tuple[int, ...]] = (1, 2, 4)
    uses_data: ClassVar[bool] = True
    converts: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    betas: ClassVar[tuple[float, float]] = (0.9, 0.99)
    schedule: ClassVar[str] = "cosine"
    power_ema: ClassVar[tuple[float, ...]] = ()

    def __post_init__(self) -> None:
        for name in ("teacher", "student"):
            value = getattr(self, name)
            if not isinstance(value, Denoiser) and (value is not None or name == "teacher"):
                raise TypeError(
                    f"{name} is a {type(value).__name__}; wrap the network first: "
                    'fs.wrap(net, fs.VP.linear(), prediction="eps")'
                )
        start = self.teacher if self.student is None else self.student
        if not isinstance(start.net, nn.Module):
            raise TypeError(
                f"the teacher's network is a {type(start.net).__name__}, which cannot be copied and trained; "
                "give student=fs.wrap(module, ...)"
            )
        for kind in reversed(type(self).__mro__):
            check(self, vars(kind).get("limits", {}))
        self.nets: dict[str, nn.Module] = {}
        if start.process != self.teacher.process:
            raise ValueError(
                f"student: its process is {start.process!r}, the teacher's {self.teacher.process!r}; wrap the "
                "student's network with the teacher's process"
            )
        kept = start.prediction
        self.prediction = canonical(
            self.prediction or (kept if self.student or self.lora else self._preferred(start))
        )
        changed = self.prediction != kept
        if self.convert is None and not (changed and self.converts):
            self.convert = 0
        if changed:
            log.info("the student predicts %s (the teacher: %s)", self.prediction, kept)
        # the state is handed over as it is: mixed precision is the trainer's
        self._meaning = start.replace(prediction=self.prediction, guidance=None, dtype=None)
        if self.lora is None:
            self.nets["student"] = in_full(copy.deepcopy(start.net)).requires_grad_(True).train()
        else:
            from .lora import with_lora

            self.nets["student"] = with_lora(start.net, self.lora).train()
            self._meaning = self._meaning.replace(dtype=start.dtype)  # the base's precision stays
        self.build()
        if isinstance(self.teacher.net, nn.Module):
            self.teacher.net.requires_grad_(False).eval()
        if self.lora is not None:  # whatever the roles did to what they share
            start.net.requires_grad_(False)

    def _preferred(self, start: Denoiser) -> str:
        process = start.process
        if start.prediction not in ("eps", "score"):
            return start.prediction
        t = process.network_time(process.t_start)
        if not bool(process.alpha(t) > 0):
            return "v"
        _, q = coefficients(start.prediction, process.alpha(t), process.sigma(t), "x0")
        # where alpha = 1 (EDM) the state itself is as large: relative to it
        return "v" if float(q.abs() / radius(process, t)) > AMPLIFICATION else start.prediction

    # -- what a method fills in ------------------------------------------------------------------------------

    def build(self) -> None:
        """Make the other roles; the student is there."""

    def objective(self, batch: Batch, role: str) -> Tensor:
        """The loss of each sample (B,) for the network of a role."""
        raise NotImplementedError

    def after_update(self, step: int) -> None:
        """Called after each update, of which ``step`` were before."""

    def begin(self, total: int) -> None:
        """Called before a training of so many updates."""
        if self.total is None:
            self.total = total

    @property
    def whole(self) -> int:
        """The number of updates of the whole training.

        Raises:
            ValueError: it was not said.
        """
        if self.total is None:
            raise ValueError(
                f"{type(self).__name__} has a schedule over the whole training: call method.begin(total), or give "
                "total=, the number of updates"
            )
        return self.total

    def elapsed(self, step: int, total: int) -> float:
        """The share of the learning rate's fall that is over before an update."""
        return step / total

    def roles(self, step: int) -> tuple[str, ...]:
        """The roles updated in a step, in order."""
        return ("student",)

    @property
    def trained(self) -> tuple[str, ...]:
        """The roles that are trained."""
        return ("student",)

    def prepare(self, data: Any, folder: Path, *, seed: int = 0, progress: bool = False) -> None:
        """Make what training needs beforehand (pairs), in a folder where a second call finds it."""

    @property
    def solver_options(self) -> dict[str, Any]:
        """Options of the student's solver and its grid."""
        return {}

    @property
    def conversion(self) -> int:
        """The number of updates that teach the student its prediction type."""
        if self.convert is not None:
            return self.convert
        return _CONVERSION if self.total is None else min(_CONVERSION, self.total // 5)

    # -- what is common --------------------------------------------------------------------------------------

    def loss(self, batch: Batch, role: str = "student") -> Tensor:
        """The loss of each sample (B,), for the network of a role.

        Raises:
            ValueError: no such role, or no data where they are needed.
        """
        if role not in self.trained:
            raise ValueError(
                f"role={role!r} is not trained by {type(self).__name__}; {', '.join(self.trained)} are"
            )
        if batch.step < self.conversion:
            return self._conversion(batch)
        return self.objective(batch, role)

    def _conversion(self, batch: Batch) -> Tensor:
        """The teacher's function in the student's prediction type, at angles spread over all noise levels."""
        process = self.teacher.process
        t = self.time_of_angle(batch.uniform("conversion", stratified=True))
        t = process.snap(t)
        x = noised(process, batch.data, batch.normal("eps"), t)
        with torch.no_grad():
            target = predict(self.teacher, x, t, batch.conditions, "v")
        return squared(self.predict("student", x, t, batch, "v") - target)

    def time_of_angle(self, u: Tensor) -> Tensor:
        """Times (B,) for numbers in (0, 1): the angle ``atan2(sigma, alpha)`` from the least noise to the most."""
        process = self.teacher.process
        low, high = process.phi(process.t_end), process.phi(process.t_start)
        return time_of_phi(process, low + (high - low) * u)

    def denoiser(self, role: str = "student") -> Denoiser:
        """A role's network with its meaning."""
        return self._meaning.replace(net=self.nets[role])

    def predict(
        self, role: str, x: Tensor, t: Tensor, batch: Batch, space: str = "x0", step: Tensor | None = None
    ) -> Tensor:
        """The prediction of a role's network at times (B,), in any space."""
        return predict(self.denoiser(role), x, t, batch.conditions, space, step=step)

    def copy_of(self, role: str) -> nn.Module:
        """A copy that is not trained: targets, previous students, references."""
        return duplicate(self.nets[role]).requires_grad_(False).eval()

    def give_number(
        self, role: str, name: str, at: str | None, conditions: Mapping[str, Any] | None = None
    ) -> None:
        """Let a role's network be told a number ``name`` (B,), by an adapter where it has no such argument."""
        x, told, given = self.example(role, conditions or {})
        self.nets[role] = conditioned(self.nets[role], name, x, told, given, at)

    def example(self, role: str, conditions: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Two samples, their times and conditions, as a role's network takes them."""
        denoiser = self.denoiser(role)
        device, process = denoiser.device, denoiser.process
        x = normal((2, *self.sample_shape), 0, torch.arange(2, device=device))
        t = process.network_time(torch.tensor([process.t_start, process.t_end], dtype=torch.float64))
        told = denoiser.told(t).to(device, denoiser.time_dtype(x.dtype))
        known = self.example_conditions or {}
        given = as_conditions({**denoiser.conditions, **known, **conditions}, device)
        dtype = denoiser.dtype or next(self.nets[role].parameters()).dtype
        return x.to(dtype), told, given

    def state_dict(self) -> dict[str, Any]:
        """What was decided in the course of the training, for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample.

        Raises:
            ValueError: the teacher does not say.
        """
        if self.teacher.sample_shape is None:
            raise ValueError(
                "the teacher does not say the shape of a sample; wrap(..., sample_shape=(3, 32, 32))"
            )
        return self.teacher.sample_shape

    def plan(self, steps: int) -> Plan:
        """The plan that the student samples with.

        Raises:
            ValueError: a number of steps that the method has no plan for.
        """
        return student_plan(self.denoiser("student"), self.solver, steps, self.solver_options)

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own settings, as JSON values."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if f.name not in NO_SETTINGS}

    @contextmanager
    def training(self, role: str) -> Iterator[nn.Module]:
        """While one role is trained, the others let gradients through but collect none."""
        if self.trained == (role,):
            yield self.nets[role]
            return
        own = {name: own_parameters(self.nets[name]) for name in self.trained}
        for name, parameters in own.items():
            for p in parameters:
                p.requires_grad_(name == role)
        try:
            yield self.nets[role]
        finally:
            for parameters in own.values():
                for p in parameters:
                    p.requires_grad_(True)


def in_full(net: nn.Module) -> nn.Module:
    """The network in float32 where it is in half precision: small updates would be rounded away."""
    halves = any(p.dtype in (torch.float16, torch.bfloat16) for p in net.parameters())
    return net.float() if halves else net


def student_plan(denoiser: Denoiser, solver: str, steps: int, options: Mapping[str, Any]) -> Plan:
    """The plan of a student's solver; ``grids={"2": [...]}`` among the options names times by number of steps."""
    own = dict(options)
    given: Mapping[str, Any] = own.pop("grids", {})
    if str(steps) in given:
        of_grid = grids.options_of(grids.get(own["grid"]), 4) if "grid" in own else []
        own = {k: v for k, v in own.items() if k not in of_grid} | {"grid": given[str(steps)]}
        return solvers.build(solver, denoiser.process, prediction=denoiser.prediction, **own)
    return solvers.build(solver, denoiser.process, steps, prediction=denoiser.prediction, **own)


def squared(error: Tensor) -> Tensor:
    """Mean squared error of each sample (B,)."""
    return error.flatten(1).square().mean(dim=1)


def pseudo_huber(error: Tensor, c: float | None = None) -> Tensor:
    """``sqrt(|error|^2 + c^2) - c`` of each sample (B,), c = 0.00054 sqrt(d) (Song & Dhariwal 2024, eq. 8)."""
    flat = error.flatten(1)
    scale = 0.00054 * flat.shape[1] ** 0.5 if c is None else c
    return torch.sqrt(flat.square().sum(dim=1) + scale**2) - scale


def follow(average: nn.Module, net: nn.Module, decay: float) -> None:
    """One step of an exponential moving average; buffers are copied."""
    move(moving(average), moving(net), decay)


@torch.no_grad()
def move(average: tuple[Any, Any], net: tuple[Any, Any], decay: float) -> None:
    """The same for what :func:`fastsample.distill.weights.moving` gave: it need not be looked for in every update."""
    torch._foreach_lerp_(average[0], net[0], 1 - decay)
    for a, b in zip(average[1], net[1], strict=True):
        a.copy_(b)
