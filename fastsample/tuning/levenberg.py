"""Levenberg-Marquardt with finite-difference columns: few parameters, many residuals, no gradients needed.

The table of a plan has tens of numbers, its errors on a few hundred trajectories tens of thousands. Gauss and
Newton's step needs the sums ``J J^T`` and ``J r`` alone, which add up over batches and over processes, and a
column of ``J`` costs the rows of the plan behind the parameter that moves: an iteration is as cheap as a few
epochs of gradient descent, holds no graph, and works for networks that no gradient passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .objective import Errors

_REJECTIONS = 8  # dampings tried before an iteration gives up
_LONGEST = 0.3  # of one step of a parameter; parameters are relative
_SMALLEST, _LARGEST = 1e-6, 2e-2  # of the difference quotients' displacements
_FLOOR = 1e-5  # of the damping, against the largest curvature: what hardly matters moves little
_FLAT = 1e-3  # relative improvement that no longer counts


@dataclass(frozen=True)
class Linearised:
    """The objective around a point.

    Attributes:
        loss: at the point.
        hessian: Gauss-Newton's matrix (P, P).
        gradient: half the objective's gradient (P,).
        sensitivity: root mean square change of the samples for a unit of each parameter (P,).
        rmse: the samples' error at the point.
    """

    loss: float
    hessian: Tensor
    gradient: Tensor
    sensitivity: Tensor
    rmse: float


class Problem(Protocol):
    """What is minimised."""

    def linearise(self, theta: Tensor, displacements: Tensor) -> Linearised: ...

    def errors(self, theta: Tensor) -> Errors:
        """On the training samples; an infinite loss where there is no plan."""
        ...

    def heldout(self, theta: Tensor) -> float:
        """What the result is selected by."""
        ...

    def clip(self, theta: Tensor) -> Tensor: ...


@dataclass
class State:
    """Everything that an optimisation needs to go on; plain numbers.

    Attributes:
        theta: the current point.
        displacements: of the difference quotients.
        damping: Marquardt's factor.
        best, best_heldout: the point with the least held-out error, and that error.
        iteration: of how many iterations the point is the result.
        flat: iterations in a row without progress.
        stopped: why there are no more iterations; empty while there are.
        history: of each iteration the training loss and the held-out error.
        spent: network evaluations so far, of all processes and restarts.
    """

    theta: list[float]
    displacements: list[float]
    damping: float = 1e-3
    best: list[float] = field(default_factory=list)
    best_heldout: float = float("inf")
    iteration: int = 0
    flat: int = 0
    stopped: str = ""
    history: list[tuple[float, float]] = field(default_factory=list)
    spent: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def begin(problem: Problem, size: int, smallest: Tensor) -> State:
    """The state before the first iteration."""
    theta = torch.zeros(size, dtype=torch.float64)
    heldout = problem.heldout(theta)
    zeros = theta.tolist()
    displacements = torch.full((size,), 1e-4, dtype=torch.float64).maximum(smallest)
    return State(zeros, displacements.tolist(), best=zeros, best_heldout=heldout)


def iterate(
    problem: Problem,
    state: State,
    *,
    smallest: Tensor,
    relative: float,
    regularization: float,
    patience: int,
    iterations: int,
) -> None:
    """One iteration, in place.

    Args:
        problem: what is minimised.
        state: where it stands.
        smallest: the least displacement of each parameter's difference quotient.
        relative: a difference quotient moves the samples by this share of their error.
        regularization: weight of the squared distance from the start.
        patience: iterations without held-out progress before it stops.
        iterations: the most iterations.
    """
    theta = torch.tensor(state.theta, dtype=torch.float64)
    h = torch.tensor(state.displacements, dtype=torch.float64)
    local = problem.linearise(theta, h)
    wanted = relative * local.rmse / local.sensitivity.clamp(min=1e-12)
    h = torch.where(local.sensitivity > 0, wanted, 4 * h).clamp(min=_SMALLEST).maximum(smallest)
    h = h.minimum(torch.maximum(torch.tensor(_LARGEST, dtype=torch.float64), 10 * smallest))
    state.displacements = h.tolist()

    ridge = regularization * torch.eye(len(theta), dtype=torch.float64)
    scale = local.hessian.diagonal() + _FLOOR * local.hessian.diagonal().max()
    right = -(local.gradient + regularization * theta)
    old = local.loss + regularization * float(theta.square().sum())
    for _ in range(_REJECTIONS):
        matrix = local.hessian + ridge + state.damping * torch.diag(scale)
        step = torch.linalg.solve(matrix, right).clamp(-_LONGEST, _LONGEST)
        moved = problem.clip(theta + step)
        errors = problem.errors(moved)
        new = errors.loss + regularization * float(moved.square().sum())
        if new < old:
            break
        state.damping *= 4
    else:
        state.stopped = "no shorter step improves the training error"
        return
    state.theta = moved.tolist()
    state.damping = max(state.damping / 5, 1e-9)
    state.iteration += 1
    heldout = problem.heldout(moved)
    state.history.append((errors.loss, heldout))
    # a selection made elsewhere (a Frechet distance) may be negative
    progress = state.best_heldout - heldout > _FLAT * abs(state.best_heldout)
    if heldout < state.best_heldout:
        state.best, state.best_heldout = state.theta, heldout
    state.flat = 0 if progress else state.flat + 1
    if state.flat >= patience:
        state.stopped = f"no progress on held-out noise in {patience} iterations"
    elif state.iteration >= iterations:
        state.stopped = f"{iterations} iterations"


def minimise(problem: Problem, state: State, on_iteration: Callable[[State], bool], **settings: Any) -> State:
    """Iterate until it stops or ``on_iteration`` says so by returning True."""
    while not state.stopped and not on_iteration(state):
        iterate(problem, state, **settings)
    on_iteration(state)
    return state
