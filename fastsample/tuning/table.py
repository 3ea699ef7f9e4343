"""A plan as a function of few free parameters: its grid, its coefficients, the times told to the network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import unknown
from ..plan import Plan, Row
from ..process import Process, as_time
from ..solvers import registry

FREE = ("grid", "coefficients", "time")
CONSTRAINTS = ("consistency",)


def densified(plan: Plan, history: int) -> Plan:
    """The same sampler, with rows that also read (by zero) up to ``history`` of the newest predictions."""
    rows: list[Row] = []
    numbers: list[float] = []
    made: list[int] = []
    for r, (row, v) in enumerate(zip(plan.rows, plan.values, strict=True)):
        b = dict(zip(row.predictions, v.b, strict=True))
        for k in made[-history:] if history else ():
            b.setdefault(k, 0.0)
        b = dict(sorted(b.items()))
        rows.append(Row(row.states, tuple(b), row.noises, row.evaluates, row.space, row.sized, len(numbers)))
        numbers += [*v.a, *b.values(), *v.c, v.t, v.alpha, v.sigma]
        if row.evaluates:
            numbers += [v.t_in, v.p, v.q, *((v.step,) if row.sized else ())]
            made.append(r)
    return _with(plan, rows, numbers)


def _with(plan: Plan, rows: Sequence[Row], numbers: Sequence[float]) -> Plan:
    return Plan(
        rows,
        torch.tensor(numbers, dtype=torch.float64),
        solver=plan.solver,
        options=plan.options,
        prediction=plan.prediction,
        process=plan.process,
        fingerprint=plan.fingerprint,
        steps=plan.steps,
        t0=plan.t0,
        grid=plan.grid,
        notes=plan.notes,
    )


class Table:
    """Free parameters ``theta`` (P,), zero at the starting plan, and the plan that they make.

    The solver's grid moves by the logarithms of its intervals in the angle ``phi = atan2(sigma, alpha)``, so
    it stays monotone; the solver's formula writes the coefficients anew for each grid. Coefficients are then
    changed by ``theta`` times the largest of their row, and the time told to the network by ``theta`` in the
    half log-SNR.

    Attributes:
        start: the plan at zero.
        names: what each parameter is.
        coarse: parameters that move a time, which some networks see in whole units only.
    """

    def __init__(
        self,
        plan: Plan,
        process: Process,
        *,
        history: int = 4,
        free: Sequence[str] = FREE,
        constraints: Sequence[str] = (),
        bound: float = 1.0,
    ) -> None:
        """
        Args:
            plan: a deterministic plan on ``process``.
            process: the noise process.
            history: each row may read so many of the newest predictions.
            free: of "grid", "coefficients" and "time".
            constraints: "consistency": every row stays exact for constant predictions.
            bound: of each coefficient's change, relative to the largest of its row.

        Raises:
            ValueError: an argument that cannot be used.
        """
        if plan.stochastic:
            raise ValueError(f"start={plan.solver!r} draws noise; tuning needs a deterministic plan")
        for argument, given, known in (("free", free, FREE), ("constraints", constraints, CONSTRAINTS)):
            for name in given:
                if name not in known:
                    raise unknown(argument, name, known)
        if not free:
            raise ValueError(f"free=(): nothing to tune; give some of {', '.join(FREE)}")
        if not bound > 0:
            raise ValueError(f"bound={bound!r} must be positive")
        if isinstance(history, bool) or int(history) != history or history < 0:
            raise ValueError(f"history={history!r} must be a whole number of at least 0")
        self._process, self._plan, self._history, self._bound = process, plan, int(history), float(bound)
        self.start = densified(plan, self._history)
        self.names: list[str] = []
        self._increments: list[float] = []
        if "grid" in free and self._rewritable():
            phi = process.phi(as_time(plan.grid))
            self._phi = phi[0], phi[-1]
            self._increments = (phi[:-1] - phi[1:]).abs().log().tolist()
            self.names += [f"interval {i}" for i in range(len(self._increments))]
        groups = list(self._groups("consistency" in constraints)) if "coefficients" in free else []
        self._changes: list[list[tuple[int, float]]] = []  # of each parameter: (number, its change)
        for r, indices, names, scale, balanced in groups:
            vectors = _balanced(len(indices)) if balanced else torch.eye(len(indices)).tolist()
            for i, vector in enumerate(vectors):
                self._changes.append([(j, scale * c) for j, c in zip(indices, vector, strict=True) if c])
                self.names.append(f"row {r} {names[i] if not balanced else f'weights {i}'}")
        self._told: list[int] = []
        if "time" in free:
            for r, row in enumerate(self.start.rows):
                if row.evaluates:
                    self._told.append(row.offset + row.columns.index("t_in"))
                    self.names.append(f"row {r} t_in")
        self.coarse = torch.tensor(
            [name.startswith("interval") or name.endswith("t_in") for name in self.names]
        )
        self._bases: dict[tuple[float, ...], Plan] = {}

    def __len__(self) -> int:
        return len(self.names)

    def _rewritable(self) -> bool:
        """Whether the solver's formula, on the plan's grid, writes this very plan."""
        plan = self._plan
        if plan.solver not in registry.names() or len(plan.grid) < 3 or plan.solver == "auto":
            return False
        again = self._rewritten(as_time(plan.grid))
        return again.rows == plan.rows and again.values == plan.values

    def _rewritten(self, times: Tensor) -> Plan:
        plan = self._plan
        return registry.on_grid(
            registry.get(plan.solver), self._process, plan.prediction, times, plan.options
        )

    def _groups(self, consistent: bool) -> list[tuple[int, list[int], list[str], float, bool]]:
        """For each row its coefficients' positions, names and scale; and whether their sum is kept."""
        groups = []
        for r, row in enumerate(self.start.rows):
            v, columns = self.start.values[r], row.columns
            na, nb = len(row.states), len(row.predictions)
            for kind, first, count, numbers in (("a", 0, na, v.a), ("b", na, nb, v.b)):
                scale = max((abs(c) for c in numbers), default=0.0)
                if not scale or (consistent and (kind == "a" or count < 2)):
                    continue
                names = list(columns[first : first + count])
                indices = [row.offset + i for i in range(first, first + count)]
                groups.append((r, indices, names, scale, consistent))
        return groups

    def clip(self, theta: Tensor) -> Tensor:
        """``theta`` within the bound on the coefficients' changes."""
        low = len(self._increments)
        high = low + len(self._changes)
        inside = theta.clone()
        inside[low:high] = theta[low:high].clamp(-self._bound, self._bound)
        return inside

    def plan(self, theta: Tensor) -> Plan:
        """The plan at ``theta`` (P,).

        Raises:
            ValueError: the table is not finite (two times fell together).
        """
        flat = theta.tolist()
        ng, nc = len(self._increments), len(self._changes)
        base = self._base(tuple(flat[:ng]))
        numbers = base.numbers.tolist()
        for change, amount in zip(self._changes, flat[ng : ng + nc], strict=True):
            for j, c in change:
                numbers[j] += amount * c
        moved = [(j, amount) for j, amount in zip(self._told, flat[ng + nc :], strict=True) if amount]
        if moved:
            process = self._process
            lam = process.lam(as_time([numbers[j] for j, _ in moved])) + as_time([by for _, by in moved])
            noisiest, cleanest = process.lam(as_time([process.t_start, process.t_end]))
            told = process.network_time(process.t_of_lam(lam.clamp(noisiest, cleanest)))
            for (j, _), t in zip(moved, told.tolist(), strict=True):
                numbers[j] = t
        return _with(base, base.rows, numbers)

    def _base(self, moves: tuple[float, ...]) -> Plan:
        if not any(moves):
            return self.start
        if moves not in self._bases:
            lengths = torch.tensor([math.exp(i + m) for i, m in zip(self._increments, moves, strict=True)])
            first, last = self._phi
            fractions = (lengths.double().cumsum(0) / lengths.double().sum())[:-1]
            phi = first + (last - first) * fractions
            inner = self._process.snap(self._process.t_of_lam(-torch.tan(phi).log()))
            ends = as_time(self._plan.grid)[[0, -1]]
            times = torch.cat([ends[:1], inner, ends[1:]])
            if not bool((times.diff() != 0).all()):
                raise ValueError("two times of the grid fell together")
            rewritten = densified(self._rewritten(times), self._history)
            if rewritten.rows != self.start.rows:
                raise ValueError("the solver writes another structure on this grid")
            self._bases.clear()
            self._bases[moves] = rewritten
        return self._bases[moves]


def _balanced(count: int) -> list[list[float]]:
    """An orthonormal basis of the changes of ``count`` numbers that keep their sum (Helmert's)."""
    vectors = []
    for i in range(1, count):
        norm = math.sqrt(i * (i + 1))
        vectors.append([1 / norm] * i + [-i / norm] + [0.0] * (count - i - 1))
    return vectors
