"""Writing plans: a solver is a function that does arithmetic on symbolic states.

    def ddim(b, grid):
        x = b.x
        for s, t in intervals(grid):
            x = b.state(b.sigma(t) / b.sigma(s) * x + (...) * b.x0(x), t)

States, predictions and noises are :class:`Expr`: linear combinations with float64 coefficients, which may
carry gradients with respect to the grid. :meth:`Builder.state` turns a combination into a row of the table.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .plan import Plan, Row
from .prediction import canonical, coefficients, require_signal
from .process import Process, TimeLike, as_time

Atom = tuple[str, int]
Scalar = float | int | Tensor
Number = float | Tensor


def _number(value: Scalar) -> Number:
    """A float, or a float64 scalar tensor where a gradient is wanted: floats are 20 times cheaper."""
    if isinstance(value, Tensor) and value.requires_grad:
        return as_time(value).reshape(())
    return float(value)


class Expr:
    """A linear combination of states ``("x", j)``, predictions ``("m", k)`` and noises ``("z", s)``."""

    __slots__ = ("terms",)

    def __init__(self, terms: dict[Atom, Number]) -> None:
        self.terms = terms

    def __add__(self, other: Expr) -> Expr:
        terms = dict(self.terms)
        for atom, c in other.terms.items():
            terms[atom] = terms[atom] + c if atom in terms else c
        # what cancels is gone, or corrected states would carry all their history
        return Expr({atom: c for atom, c in terms.items() if isinstance(c, Tensor) or c != 0.0})

    def __mul__(self, scale: Scalar) -> Expr:
        factor = _number(scale)
        return Expr({atom: c * factor for atom, c in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, scale: Scalar) -> Expr:
        return self * (1 / as_time(scale))

    def __neg__(self) -> Expr:
        return self * -1.0

    def __sub__(self, other: Expr) -> Expr:
        return self + -other

    def __repr__(self) -> str:
        return " ".join(f"{float(c):+.6g} {kind}{i}" for (kind, i), c in self.terms.items()) or "0"


def zero() -> Expr:
    """The empty combination."""
    return Expr({})


def combine(weights: Iterable[Scalar], expressions: Sequence[Expr]) -> Expr:
    """``sum_j w_j e_j``."""
    total = zero()
    for w, e in zip(weights, expressions, strict=True):
        total = total + w * e
    return total


def intervals(grid: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The consecutive pairs (from, to) of a grid."""
    points = grid.unbind()
    return itertools.pairwise(points)


class Builder:
    """Collects rows for one plan.

    Args:
        process: the noise process.
        prediction: what the network predicts.
        t0: the time of the input state.

    Attributes:
        x: the input state.
    """

    def __init__(self, process: Process, prediction: str, t0: TimeLike) -> None:
        self.process = process
        self.prediction = canonical(prediction)
        require_signal(prediction, process.alpha(t0))  # also for solvers that do not evaluate at the start
        self.x = Expr({("x", 0): 1.0})
        self.notes: list[str] = []
        self._t0 = as_time(t0)
        self._rows: list[dict[str, Any]] = []
        self._streams = 0

    # -- the process at a time, shortened --------------------------------------------------------------------

    def alpha(self, t: TimeLike) -> Tensor:
        return self.process.alpha(t)

    def sigma(self, t: TimeLike) -> Tensor:
        return self.process.sigma(t)

    def lam(self, t: TimeLike) -> Tensor:
        return self.process.lam(t)

    # -- rows ------------------------------------------------------------------------------------------------

    def time_of(self, state: Expr) -> Tensor:
        """The time of a state."""
        j = self._index(state)
        return self._t0 if j == 0 else self._rows[j - 1]["t"]

    def _index(self, state: Expr) -> int:
        if len(state.terms) == 1:
            ((kind, j), c) = next(iter(state.terms.items()))
            if kind == "x" and not isinstance(c, Tensor) and c == 1.0:
                return j
        raise ValueError(f"{state!r} is not a state; make it one by builder.state(expression, t)")

    def state(self, value: Expr, t: TimeLike) -> Expr:
        """A row: the combination ``value`` becomes the state at time ``t``."""
        self._rows.append({"value": value, "t": as_time(t)})
        return Expr({("x", len(self._rows)): 1.0})

    def noise(self) -> Expr:
        """Fresh standard normal noise; using the same expression twice re-uses the same noise."""
        self._streams += 1
        return Expr({("z", self._streams): 1.0})

    def predict(
        self,
        state: Expr,
        space: str,
        *,
        t_in: TimeLike | None = None,
        step: Scalar | None = None,
        sigma_data: float = 1.0,
    ) -> Expr:
        """Evaluate the network at a state and give its prediction ``m`` in ``space``.

        Args:
            state: a state (not a combination).
            space: "x0", "eps", "v" or "flow".
            t_in: the time told to the network, by default the state's own, kept to times it was trained at.
            step: a step size also told to the network (shortcut models).
            sigma_data: ``m`` is that of the data divided by ``sigma_data``.
        """
        j = self._index(state)
        t = self.time_of(state)
        if j == 0 or j != len(self._rows) or "net" in self._rows[-1]:
            self.state(state, t)  # an evaluation belongs to the newest row
        p, q = coefficients(self.prediction, self.alpha(t), self.sigma(t), space, sigma_data)
        told = self.process.network_time(t) if t_in is None else as_time(t_in)
        self._rows[-1]["net"] = {"space": space, "t_in": told, "p": p, "q": q, "step": step}
        return Expr({("m", len(self._rows) - 1): 1.0})

    def x0(self, state: Expr) -> Expr:
        """The predicted clean sample at a state."""
        return self.predict(state, "x0")

    def eps(self, state: Expr) -> Expr:
        """The predicted noise at a state."""
        return self.predict(state, "eps")

    # -- the plan --------------------------------------------------------------------------------------------

    def finish(
        self,
        solver: str,
        steps: int,
        options: dict[str, Any] | None = None,
        grid: Tensor | Sequence[float] = (),
    ) -> Plan:
        """The plan of all rows written so far.

        Args:
            solver, steps, options: what wrote the rows, for the record.
            grid: the times that the solver was given, where there is a grid; what inversion reverses.

        Raises:
            ValueError: no row was written, or a coefficient is not finite.
        """
        rows: list[Row] = []
        numbers: list[Number] = []
        for item in self._rows:
            terms = {a: c for a, c in item["value"].terms.items() if isinstance(c, Tensor) or c != 0.0}
            states, predictions, noises = (tuple(sorted(i for k, i in terms if k == kind)) for kind in "xmz")
            net = item.get("net")
            offset = len(numbers)
            for kind, indices in (("x", states), ("m", predictions), ("z", noises)):
                numbers += [terms[kind, i] for i in indices]
            numbers += [_number(v) for v in (item["t"], self.alpha(item["t"]), self.sigma(item["t"]))]
            sized = net is not None and net["step"] is not None
            if net is not None:
                numbers += [_number(net[k]) for k in ("t_in", "p", "q", *(("step",) if sized else ()))]
            rows.append(
                Row(
                    states,
                    predictions,
                    noises,
                    evaluates=net is not None,
                    space=net["space"] if net else None,
                    sized=sized,
                    offset=offset,
                )
            )
        return Plan(
            rows,
            _stack(numbers),
            solver=solver,
            options=options,
            prediction=self.prediction,
            process=repr(self.process),
            fingerprint=self.process.fingerprint,
            steps=steps,
            t0=float(self._t0.detach()),
            grid=as_time(grid).detach().tolist(),
            notes=self.notes,
        )


def _stack(numbers: Sequence[Number]) -> Tensor:
    if any(isinstance(n, Tensor) for n in numbers):
        return torch.stack([n if isinstance(n, Tensor) else as_time(n) for n in numbers])
    return torch.tensor(numbers, dtype=torch.float64)
