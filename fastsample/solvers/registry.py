"""The names of solvers, what each claims, and how a plan is built from a name."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .. import grids
from ..builder import Builder
from ..errors import nearest, unknown
from ..plan import Plan
from ..process import Process

SolverFunction = Callable[..., None]

_FAMILIES = (
    "first_order",
    "exponential",
    "adams",
    "dpm",
    "unipc",
    "runge_kutta",
    "sde",
    "restart",
    "analytic",
    "consistency",
)


@dataclass(frozen=True)
class Claim:
    """What a solver says of itself; the tests hold it to this.

    Attributes:
        order: order of convergence with exact start values (None: no deterministic order is claimed).
        moments: "exact" when polynomials up to the order are integrated exactly on any grid, "asymptotic" when
            only as the steps shrink, None when no moment condition is claimed.
        space: the quantity that is integrated ("x0", "eps", "v", "flow"), for the moment conditions.
        variable: the variable in which it is a polynomial ("lam", "rho", "t").
        stochastic: whether noise is drawn (at its default options).
        sized: whether the network must take a step size, ``net(x, t, step=...)``.
    """

    order: int | None
    moments: str | None = None
    space: str = "x0"
    variable: str = "lam"
    stochastic: bool = False
    sized: bool = False


@dataclass(frozen=True)
class Solver:
    """A registered solver.

    Attributes:
        name: its field name.
        function: ``(builder, grid, **options) -> None``; writes rows on the builder.
        claim: what it claims at its default options.
        grid, end: the defaults used when the caller names none (grid None: the process's own).
        preset: options fixed by this name (``dpmpp_3m`` is ``order=3``).
    """

    name: str
    function: SolverFunction
    claim: Claim
    grid: str | None = None
    end: str = "zero"
    preset: dict[str, Any] = field(default_factory=dict)


_SOLVERS: dict[str, Solver] = {}


def register(
    name: str, claim: Claim, *, grid: str | None = None, end: str = "zero", **preset: Any
) -> Callable[[SolverFunction], SolverFunction]:
    """Make ``function(builder, grid, **options)`` a solver by name; ``preset`` fixes some of its options."""

    def add(function: SolverFunction) -> SolverFunction:
        if name in _SOLVERS and _SOLVERS[name].function is not function:
            raise ValueError(f"a solver called {name!r} exists already")
        _SOLVERS[name] = Solver(name, function, claim, grid, end, preset)
        return function

    return add


def _load() -> None:
    for family in _FAMILIES:
        importlib.import_module(f"{__package__}.{family}")


def names() -> list[str]:
    """The names of all fixed-grid solvers."""
    _load()
    return sorted(_SOLVERS)


def get(name: str) -> Solver:
    """A solver by name.

    Raises:
        ValueError: unknown; the message has the nearest name.
    """
    _load()
    if name not in _SOLVERS:
        raise unknown("solver", name, _SOLVERS)
    return _SOLVERS[name]


def options(name: str) -> list[str]:
    """The options that a solver takes besides process and grid."""
    solver = get(name)
    return [o for o in grids.options_of(solver.function, 2) if o not in solver.preset]


def default_grid(solver: Solver, process: Process) -> str:
    """The grid used when none is named: the solver's published one, in processes whose time is bounded.

    Where time is sigma itself, grids that are even in time waste their points on noise: there it is the
    process's own.
    """
    return solver.grid if solver.grid is not None and process.grid == "uniform" else process.grid


def build(
    name: str,
    process: Process,
    steps: int | None = None,
    *,
    prediction: str = "eps",
    grid: grids.Grid | None = None,
    start: float | None = None,
    end: str | None = None,
    **settings: Any,
) -> Plan:
    """The plan of a solver on a grid.

    Args:
        name: a solver's name.
        process: the noise process.
        steps: number of grid intervals; may be left out when ``grid`` is an array.
        prediction: what the network predicts.
        grid: a grid's name, array or function; by default the solver's, else the process's own.
        start: the first time; by default the noisiest.
        end: "zero" or "sigma_min"; by default the solver's own.
        settings: options of the solver or of the grid function.

    Raises:
        ValueError: an unknown name or option, or numbers that cannot be used; the message names them.
    """
    solver = get(name)
    chosen = default_grid(solver, process) if grid is None else grid
    own = options(name)
    of_grid: list[str] = []
    if isinstance(chosen, str) or callable(chosen):
        function = grids.get(chosen) if isinstance(chosen, str) else chosen
        of_grid = grids.options_of(function, 4)
    for key in settings:
        if key not in own and key not in of_grid:
            raise ValueError(
                f"solver={name!r} with grid={chosen!r} has no option {key!r}; {nearest(key, own + of_grid)}"
            )
    if steps is None and (isinstance(chosen, str) or callable(chosen)):
        raise ValueError("steps is missing: give steps=10, or a grid as an array of times")
    times = grids.make(
        chosen,
        process,
        steps or (0 if steps == 0 else 1),
        start=start,
        end=solver.end if end is None else end,
        **{k: v for k, v in settings.items() if k in of_grid},
    )
    used = {k: v for k, v in settings.items() if k in own}
    return on_grid(solver, process, prediction, times, used)


def on_grid(solver: Solver, process: Process, prediction: str, times: Tensor, used: dict[str, Any]) -> Plan:
    """The plan of a solver on a checked grid."""
    builder = Builder(process, prediction, times[0])
    solver.function(builder, times, **solver.preset, **used)
    described = {k: v for k, v in used.items() if _is_json(v)}
    builder.notes += [f"option {k} is not recorded: it is not JSON" for k in used if k not in described]
    return builder.finish(solver.name, times.numel() - 1, described, times)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
