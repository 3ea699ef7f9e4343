"""Plans: a sampler as an immutable float64 table of numbers.

Row ``r`` of a plan computes a state from earlier states, predictions and fresh noise, and may evaluate the
network there:

    x_{r+1} = sum_j a_j x_j + sum_k b_k m_k + sum_s c_s z_s
    m_r     = p x_{r+1} + q net(x_{r+1}, t_in[, step])                         (rows that evaluate)

``x_0`` is the state handed in, ``m_k`` the prediction of row ``k`` and ``z_s`` standard normal noise of
stream ``s``. Nothing in the table depends on the data.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .prediction import SPACES, canonical

SCHEMA = 1

_TIME = ("t", "alpha", "sigma")
_EVALUATION = ("t_in", "p", "q")


@dataclass(frozen=True)
class Row:
    """What a row reads; its numbers lie in the plan's ``numbers`` from ``offset`` on.

    Attributes:
        states: the states ``x_j`` that are read (0 is the input, ``r + 1`` the state of row ``r``).
        predictions: the predictions ``m_k`` that are read, by the row that made them.
        noises: the noise streams that are read.
        evaluates: whether the network is evaluated at the new state.
        space: what ``m`` is: "x0", "eps", "v" or "flow" (None for rows that do not evaluate).
        sized: whether the network is also told a step size.
        offset: position of the row's numbers: a.., b.., c.., t, alpha, sigma[, t_in, p, q[, step]].
    """

    states: tuple[int, ...]
    predictions: tuple[int, ...]
    noises: tuple[int, ...]
    evaluates: bool
    space: str | None
    sized: bool
    offset: int

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the row's numbers, in their order."""
        read = [f"a{j}" for j in self.states] + [f"b{k}" for k in self.predictions]
        read += [f"c{s}" for s in self.noises] + list(_TIME)
        if self.evaluates:
            read += list(_EVALUATION) + (["step"] if self.sized else [])
        return tuple(read)


class RowValues(NamedTuple):
    """A row's numbers by name; Python floats, or 0-dim tensors when the plan is being differentiated."""

    a: tuple[Any, ...]
    b: tuple[Any, ...]
    c: tuple[Any, ...]
    t: Any
    alpha: Any
    sigma: Any
    t_in: Any
    p: Any
    q: Any
    step: Any


class Plan:
    """An immutable sampler: the structure (``rows``) and its numbers (``numbers``, float64).

    Attributes:
        rows: the structure of each row.
        numbers: float64 (n,), all coefficients; a copy, since plans do not change. They may carry a gradient
            while a solver is tuned: make a plan of them by :meth:`replace` in each iteration.
        t0: the time of the input state ``x_0``.
        solver, options: what wrote the table.
        prediction: the network's prediction type that ``p`` and ``q`` were written for.
        process, fingerprint: the noise process, in words and as a hash.
        steps: number of grid intervals.
        grid: the times that the solver was given; empty where there was no grid.
        notes: sentences that say what was chosen and why (``auto``), printed with the plan.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        numbers: Tensor,
        *,
        solver: str,
        prediction: str,
        process: str,
        fingerprint: str,
        steps: int,
        t0: float,
        grid: Sequence[float] = (),
        options: dict[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.rows = tuple(rows)
        self._numbers = numbers.clone() if numbers.requires_grad else numbers.detach().clone()
        self.solver = solver
        self._options = json.dumps(options or {})
        self.prediction = canonical(prediction)
        self.process, self.fingerprint = process, fingerprint
        self.steps, self.t0, self.notes = int(steps), float(t0), tuple(notes)
        self.grid = tuple(map(float, grid))
        self._check()
        self._frozen = True

    def __setattr__(self, name: str, value: object) -> None:
        if getattr(self, "_frozen", False):
            raise AttributeError(f"a Plan is immutable; make another one to change {name!r} (plan.replace)")
        super().__setattr__(name, value)

    @property
    def numbers(self) -> Tensor:
        """All coefficients, float64 (n,)."""
        return self._numbers.clone()

    @property
    def options(self) -> dict[str, Any]:
        """The options that the solver was given, as JSON keeps them."""
        return json.loads(self._options)

    def _check(self) -> None:
        if not self.rows:
            raise ValueError(f"solver {self.solver!r} wrote no row; a plan has at least one")
        expected = 0
        for r, row in enumerate(self.rows):
            if row.offset != expected:
                raise ValueError(f"row {r}: its numbers start at {row.offset}, expected {expected}")
            expected += len(row.columns)
            if any(not 0 <= j <= r for j in row.states):
                raise ValueError(f"row {r} reads states {row.states}, of which only 0..{r} exist")
            for k in row.predictions:
                if not (0 <= k < r and self.rows[k].evaluates):
                    raise ValueError(f"row {r} reads prediction {k}, which no earlier row makes")
            if row.evaluates and row.space not in SPACES:
                raise ValueError(f"row {r}: space={row.space!r}, must be one of {', '.join(SPACES)}")
        numbers = self._numbers.detach()
        if numbers.dtype != torch.float64 or numbers.shape != (expected,):
            raise ValueError(
                f"numbers must be float64 of shape ({expected},), got {numbers.dtype} {tuple(numbers.shape)}"
            )
        bad = (~torch.isfinite(numbers)).nonzero().flatten().tolist()
        if bad:
            r = max(i for i, row in enumerate(self.rows) if row.offset <= bad[0])
            columns, offset = self.rows[r].columns, self.rows[r].offset
            t = float(numbers[offset + columns.index("t")])
            raise ValueError(
                f"solver {self.solver!r}: the coefficient {columns[bad[0] - offset]!r} of row {r} (t={t:g}) "
                f"is {float(numbers[bad[0]])}; two grid points may be too close, or the grid reaches an end "
                "that this solver has no limit for"
            )

    # -- what it says of itself ------------------------------------------------------------------------------

    @property
    def nfe(self) -> int:
        """Network evaluations for each sample: the rows that evaluate."""
        return sum(row.evaluates for row in self.rows)

    @property
    def end_sigma(self) -> float:
        """The noise left in the result."""
        return self.values[-1].sigma

    @property
    def stochastic(self) -> bool:
        """Whether any row draws noise."""
        return any(row.noises for row in self.rows)

    @cached_property
    def values(self) -> tuple[RowValues, ...]:
        """Every row's numbers as Python floats."""
        return self._split(self._numbers.tolist())

    def tensors(self) -> tuple[RowValues, ...]:
        """Every row's numbers as 0-dim views of ``numbers`` (for differentiation)."""
        return self._split(self._numbers.unbind())

    def _split(self, flat: Sequence[Any]) -> tuple[RowValues, ...]:
        result = []
        for row in self.rows:
            na, nb, nc = len(row.states), len(row.predictions), len(row.noises)
            n = row.offset
            a, b, c = (
                tuple(flat[i:j])
                for i, j in ((n, n + na), (n + na, n + na + nb), (n + na + nb, n + na + nb + nc))
            )
            rest = list(flat[n + na + nb + nc : n + len(row.columns)])
            rest += [None] * (len(_TIME) + len(_EVALUATION) + 1 - len(rest))
            result.append(RowValues(a, b, c, *rest))
        return tuple(result)

    @property
    def times(self) -> tuple[float, ...]:
        """The times at which the network is evaluated."""
        return tuple(v.t for row, v in zip(self.rows, self.values, strict=True) if row.evaluates)

    def replace(self, numbers: Tensor | None = None, **metadata: Any) -> Plan:
        """The same structure with other numbers or other metadata."""
        keep = {k: getattr(self, k) for k in _METADATA}
        return Plan(self.rows, self._numbers if numbers is None else numbers, **(keep | metadata))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return self.rows == other.rows and self.values == other.values and self._meta == other._meta

    def __hash__(self) -> int:
        return hash((self.rows, self.values))

    @property
    def _meta(self) -> tuple[Any, ...]:
        return tuple(getattr(self, k) for k in _METADATA)

    def __repr__(self) -> str:
        return (
            f"Plan(solver={self.solver!r}, steps={self.steps}, nfe={self.nfe}, process={self.process}, "
            f"prediction={self.prediction!r})"
        )

    def __str__(self) -> str:
        """The table, one line a row."""
        options = "".join(f" {k}={v}" for k, v in self.options.items() if not isinstance(v, dict))
        head = [f"{self.solver}{options}: {self.steps} steps, {self.nfe} evaluations, on {self.process}"]
        head += [f"  {note}" for note in self.notes]
        head.append(f"{'row':>4} {'t':>10} {'sigma/alpha':>11}  update")
        lines = []
        for r, (row, v) in enumerate(zip(self.rows, self.values, strict=True)):
            terms = [f"{c:+.5g} x{j}" for j, c in zip(row.states, v.a, strict=True)]
            terms += [f"{c:+.5g} m{k}" for k, c in zip(row.predictions, v.b, strict=True)]
            terms += [f"{c:+.5g} z{s}" for s, c in zip(row.noises, v.c, strict=True)]
            noise = f"{v.sigma / v.alpha:11.5g}" if v.alpha else f"{'inf':>11}"
            line = f"{r:>4} {v.t:>10.5g} {noise}  x{r + 1} = {' '.join(terms)}"
            if row.evaluates:
                net = f"net(x{r + 1}, {v.t_in:.5g}{f', {v.step:.5g}' if row.sized else ''})"
                line += f";  m{r} = {v.p:+.5g} x{r + 1} {v.q:+.5g} {net}  [{row.space}]"
            lines.append(line)
        return "\n".join(head + lines)

    # -- JSON ------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The plan as JSON; :meth:`from_json` gives an equal plan, bit for bit."""
        rows = []
        for row, v in zip(self.rows, self.values, strict=True):
            item: dict[str, Any] = {
                "x": dict(zip(map(str, row.states), v.a, strict=True)),
                "m": dict(zip(map(str, row.predictions), v.b, strict=True)),
                "z": dict(zip(map(str, row.noises), v.c, strict=True)),
                "t": v.t,
                "alpha": v.alpha,
                "sigma": v.sigma,
            }
            if row.evaluates:
                item["net"] = {"space": row.space, "t_in": v.t_in, "p": v.p, "q": v.q}
                if row.sized:
                    item["net"]["step"] = v.step
            rows.append(item)
        meta = dict(zip(_METADATA, self._meta, strict=True))
        return json.dumps({"schema": SCHEMA, "format": "fastsample.plan", **meta, "rows": rows}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from its JSON.

        Raises:
            ValueError: not a plan, a newer schema, or a damaged table; the message says which.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as e:
            raise ValueError(f"not a plan: invalid JSON ({e})") from e
        if not isinstance(data, dict) or data.get("format") != "fastsample.plan":
            raise ValueError('not a plan: the JSON has no "format": "fastsample.plan"')
        if data.get("schema") != SCHEMA:
            raise ValueError(
                f"plan schema {data.get('schema')!r} is not understood (this version reads {SCHEMA}); "
                "upgrade fastsample"
            )
        rows: list[Row] = []
        numbers: list[float] = []
        try:
            for item in data["rows"]:
                net = item.get("net")
                x, m, z = ({int(k): float(c) for k, c in item[key].items()} for key in ("x", "m", "z"))
                row = Row(
                    tuple(x),
                    tuple(m),
                    tuple(z),
                    evaluates=net is not None,
                    space=net["space"] if net else None,
                    sized=bool(net and "step" in net),
                    offset=len(numbers),
                )
                numbers += [*x.values(), *m.values(), *z.values()]
                numbers += [float(item[k]) for k in _TIME]
                if net:
                    numbers += [float(net[k]) for k in (*_EVALUATION, *(("step",) if row.sized else ()))]
                rows.append(row)
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise ValueError(f"damaged plan: {e!r} in row {len(rows)}") from e
        try:
            meta = {k: data[k] for k in _METADATA}
            return cls(rows, torch.tensor(numbers, dtype=torch.float64), **meta)
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise ValueError(f"damaged plan: {e!r}") from e

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON atomically: the file is either the old one or the whole new one."""
        write_atomically(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """A plan from a JSON file."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as e:
            raise ValueError(f"{os.fspath(path)}: {e}") from e


_METADATA = ("solver", "options", "prediction", "process", "fingerprint", "steps", "t0", "grid", "notes")


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write to a temporary file beside ``path``, flush it to disk, then rename it into place."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # not mkstemp: the file shall have the permissions that any new file has
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are private; these are like any other
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_copy(row: Row, values: RowValues) -> bool:
    """Whether the row only names an existing state (evaluations of the input, for instance)."""
    return len(row.states) == 1 and not row.predictions and not row.noises and values.a[0] == 1.0
