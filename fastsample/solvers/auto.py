"""``solver="auto"``: one rule that picks solver, order, grid and end from the plan's inputs alone."""

from __future__ import annotations

from typing import Any

from .. import grids
from ..plan import Plan
from ..process import Process
from .registry import build

# Below this noise level the start is an image with noise, not noise: its prediction is worth an evaluation.
_PURE_NOISE = 10.0

# Guidance up to here leaves the model as smooth as it was.
_MILD_GUIDANCE = 1.5


def _order(n: int, guidance: float) -> tuple[int, bool]:
    """The predictor's order and whether to correct, for ``n`` evaluations.

    Guidance multiplies the differences between predictions that high orders extrapolate: the stronger it is,
    the more evaluations it takes before a higher order pays, and with very few the corrector, which is
    implicit, may run away.
    """
    if guidance <= _MILD_GUIDANCE:
        return (2 if 6 <= n <= 11 else 3), True
    if n <= 3:
        return 2, False
    if n < guidance / 2:
        return 1, False
    if n <= min(2 + 2 * guidance, 14):
        return 1, True
    return (2 if n < max(12, 5 * guidance) else 3), True


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
        options: override the choice, such as ``order=2`` or ``sigma_data=1.0``; ``skip_start=False`` evaluates
            pure noise too.

    Raises:
        ValueError: as :func:`fastsample.solvers.build`.
    """
    first = process.t_start if start is None else float(start)
    # flows are trained down to zero noise; a discrete model's last index is its cleanest state
    stop = end or ("sigma_min" if process.t_zero < 0 else "zero")
    named = grid is None or isinstance(grid, str) or callable(grid)
    if named and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps={steps!r} must be a whole number of at least 1")
    n = steps if steps is not None and named else 1
    skip = options.get("skip_start", grid is None and float(process.rho(first)) >= _PURE_NOISE)
    few = n < 12
    order, corrector = _order(n, guidance)
    spacing: dict[str, float] = {}
    if grid is None:
        # Constants fitted on analytic and trained models beside each other, at 3 to 50 evaluations: few steps
        # stay away from the data end, many crowd neither end.
        spacing = {
            "power": 0.67 if few else max(0.5, 0.7 - 0.007 * n),
            "center": 0.7 if few else min(1.5, 0.45 + 0.05 * n),
            "first_step": min(1.0, 8 / n) if few else 6 / n,
            "last_step": max(0.5, 1.6 - 0.08 * n),
        }
    times = grids.make(
        "logistic" if grid is None else grid, process, n + bool(skip), start=first, end=stop, **spacing
    )
    chosen: dict[str, Any] = {
        "order": order,
        "space": "v",
        "variable": "logsat",
        "sigma_data": 0.5,
        "corrector": corrector,
        "lower_order_final": True,
        "final_order": 1 if few else 2,
        "skip_start": skip,
    } | options
    plan = build("exp_adams", process, prediction=prediction, grid=times, **chosen)
    where = "given" if grid is not None else ", ".join(f"{k} {v:.3g}" for k, v in spacing.items())
    notes = [
        f"auto: order {chosen['order']} in {chosen['space']} (sigma_data {chosen['sigma_data']}) over "
        f"{chosen['variable']}, {'with' if chosen['corrector'] else 'without'} corrector"
        + (f"; for guidance {guidance:g}" if guidance > _MILD_GUIDANCE else ""),
        f"grid: {'logistic, ' if grid is None else ''}{where}; end {stop}"
        + ("; pure noise is not evaluated" if chosen["skip_start"] else ""),
    ]
    return plan.replace(notes=notes, steps=times.numel() - 1 - bool(chosen["skip_start"]))
