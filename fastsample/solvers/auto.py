"""``solver="auto"``: one rule that picks solver, order, grid and end from the plan's inputs alone."""

from __future__ import annotations

from typing import Any

from .. import grids
from ..plan import Plan
from ..process import Process
from .registry import build

# Below this noise level the start is an image with noise, not noise: its prediction is worth an evaluation.
_PURE_NOISE = 10.0


def auto(
    process: Process,
    steps: int | None,
    *,
    prediction: str = "eps",
    guidance: float = 1.0,
    grid: grids.Grid | None = None,
    start: float | None = None,
    end: str | None = None,
    **options: Any,
) -> Plan:
    """The plan that measured best for these inputs; it says in ``plan.notes`` what was chosen.

    A multistep exponential integrator for EDM's F (Karras et al. 2022, eq. 8: the velocity along the angle
    between noise and data of standard deviation ``sigma_data``), interpolated in a log-SNR that saturates at
    both ends, with the corrector that re-uses the next evaluation, on a grid that is uniform in a logistic
    function of the log-SNR. Pure noise is not evaluated: the best prediction of F there is zero, and the
    corrector mends it.

    Args:
        process, prediction: what the network means.
        steps: evaluations (never more).
        guidance: the classifier-free guidance scale.
        grid, start, end: as in :func:`fastsample.solvers.build`; by default chosen here.
        options: override the choice, such as ``order=2`` or ``sigma_data=1.0``.
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps={steps!r} must be a whole number of at least 1")
    first = process.t_start if start is None else float(start)
    ends = "sigma_min" if end is None and process.t_zero != 0.0 else end or "zero"
    chosen: dict[str, Any] = {
        "order": 3,
        "space": "v",
        "variable": "logsat",
        "sigma_data": 0.6,
        "corrector": True,
        "lower_order_final": True,
    }
    notes = []
    if grid is None:
        skip = float(process.rho(first)) >= _PURE_NOISE
        chosen["skip_start"] = skip
        times = grids.make("logistic", process, (steps or 0) + skip, start=first, end=ends)
        notes.append(f"grid: logistic in the log-SNR, end={ends}" + ("; pure noise is not evaluated" if skip else ""))
    else:
        times = grids.make(grid, process, steps or 1, start=first, end=ends)
    chosen |= options
    plan = build("exp_adams", process, prediction=prediction, grid=times, **chosen)
    notes.insert(
        0,
        f"auto: order {chosen['order']} in space {chosen['space']!r} (sigma_data={chosen['sigma_data']}), "
        f"variable {chosen['variable']!r}, corrector={chosen['corrector']}",
    )
    return plan.replace(notes=notes, steps=times.numel() - 1 - bool(chosen.get("skip_start")))
