"""Multistep exponential integrators with exact Lagrange integrals, and the corrector that costs nothing.

The family behind DPM-Solver++ (x0 in lam), DEIS (eps in t or rho) and LMS (eps in rho), at any order, on any
strictly monotone grid. ``corrector=True`` re-uses the evaluation that the next step needs anyway, as UniC does
(Zhao et al. 2023, section 3.1): it raises the order by one at no cost.
"""

from __future__ import annotations

from torch import Tensor

from ..builder import Builder, Expr, combine, intervals
from .integrals import scale, weights
from .registry import Claim, register

History = list[tuple[Tensor, Expr]]


def update(
    b: Builder, space: str, variable: str, state: Expr, s: Tensor, t: Tensor, history: History
) -> Expr:
    """``x_t`` from ``x_s`` and the predictions in ``history`` (time, prediction), by the exact integrals."""
    w = weights(b.process, space, variable, [node for node, _ in history], s, t)
    return scale(b.process, space, s, t) * state + combine(w, [m for _, m in history])


def reachable(b: Builder, space: str, t: Tensor) -> bool:
    """Whether predictions in ``space`` at ``t`` can start a step: not x0 without noise, not eps without signal."""
    return bool(b.sigma(t) > 0) if space == "x0" else bool(b.alpha(t) > 0) if space == "eps" else True


@register("exp_adams", Claim(order=3, moments="exact"))
def exp_adams(
    b: Builder,
    grid: Tensor,
    order: int = 3,
    space: str = "x0",
    variable: str = "lam",
    corrector: bool = False,
    lower_order_final: bool = False,
) -> None:
    """Exponential Adams-Bashforth (with ``corrector``: predictor and free Adams-Moulton corrector).

    Args:
        b, grid: the builder and the times.
        order: number of predictions that a predictor step interpolates, at least 1.
        space: what is interpolated: "x0", "eps", "v" or "flow".
        variable: the variable of the polynomial: "lam", "rho", "phi", "tau" or "t".
        corrector: correct each state with the prediction at its end before stepping on.
        lower_order_final: let the order fall to 1 towards the last step.
    """
    if order < 1:
        raise ValueError(f"order={order!r} must be at least 1")
    n = grid.numel() - 1
    history: History = []
    x = b.x
    previous: tuple[Expr, Expr, Tensor] | None = None  # base state, predicted combination, its time
    for i, (s, t) in enumerate(intervals(grid)):
        # A start with no noise (or no signal) has no x0 (or eps) form; flow's first-order step has the same limit.
        here = space if reachable(b, space, s) else "flow"
        m = b.predict(x, here)
        base = x
        if here != space:
            history, previous = [], None
            moved = update(b, here, variable, base, s, t, [(s, m)])
        else:
            history.append((s, m))
            if corrector and previous is not None:
                state, predicted, start = previous
                nodes = history[-(order + 1) :]
                corrected = update(b, space, variable, state, start, s, nodes)
                # both share the factor of the base state, so the correction is in the predictions alone
                base = x + (corrected - predicted)
            keep = min(order, n - i) if lower_order_final else order
            moved = update(b, space, variable, base, s, t, history[-keep:])
            previous = (base, moved, s)
        x = b.state(moved, t)
        if len(history) > order:
            history = history[-order:]
