"""Multistep exponential integrators with exact Lagrange integrals, and the corrector that costs nothing.

The family behind DPM-Solver++ (x0 in lam), DEIS (eps in t or rho) and LMS (eps in rho), at any order, on any
strictly monotone grid. ``corrector=True`` re-uses the evaluation that the next step needs anyway, as UniC
does (Zhao et al. 2023, section 3.1): it raises the order by one at no cost.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..builder import Builder, Expr, combine, intervals, zero
from ..process import Process, Scaled
from .integrals import scale, weights
from .registry import Claim, register

History = list[tuple[Tensor, Expr]]

# (s, t, nodes) -> the part of the step from s to t that is made of predictions. The nodes are (time,
# prediction) pairs, oldest first; a predictor's last node lies at s.
Predictor = Callable[[Tensor, Tensor, History], Expr]
# (s, t, nodes, used) -> the same for a step taken again with the prediction at t, which is the last node;
# ``used`` is the number of nodes that the predictor had.
Corrector = Callable[[Tensor, Tensor, History, int], Expr]


def increment(process: Process, space: str, variable: str, s: Tensor, t: Tensor, nodes: History) -> Expr:
    """What the predictions in ``nodes`` (time, prediction) add between s and t, by the exact integrals."""
    return combine(
        weights(process, space, variable, [node for node, _ in nodes], s, t), [m for _, m in nodes]
    )


def update(
    b: Builder, space: str, variable: str, state: Expr, s: Tensor, t: Tensor, history: History
) -> Expr:
    """``x_t`` from ``x_s`` and the predictions in ``history`` (time, prediction), by the exact integrals."""
    return scale(b.process, space, s, t) * state + increment(b.process, space, variable, s, t, history)


def reachable(b: Builder, space: str, t: Tensor) -> bool:
    """Whether ``space`` can start a step at ``t``: not x0 without noise, not eps without signal."""
    return bool(b.sigma(t) > 0) if space == "x0" else bool(b.alpha(t) > 0) if space == "eps" else True


def multistep(
    b: Builder,
    grid: Tensor,
    order: int,
    space: str,
    predictor: Predictor,
    corrector: Corrector | None = None,
    *,
    lower_order_final: bool = False,
    final_order: int = 1,
    skip_start: bool = False,
    sigma_data: float = 1.0,
) -> None:
    """The loop that all linear multistep methods share: ``x_t = scale x_s + predictor(s, t, nodes)``.

    The order rises from 1 with the history. A start with no noise (or no signal) has no x0 (or eps) form;
    there the first-order step in flow space, which has the same limit, is taken.

    Args:
        b, grid: the builder and the times.
        order: the number of predictions that a step uses, at least 1.
        space: the space of the predictions.
        predictor: what a step adds.
        corrector: what it adds when it is taken again with the prediction at its end; None does without.
        lower_order_final: let the order fall towards the last step, to ``final_order`` there.
        skip_start: do not evaluate at the first time: the first step takes the prediction there as zero, and
            the corrector mends it with the first evaluation, at its end.
        sigma_data: the space is that of the data divided by this scale.

    Raises:
        ValueError: the order is not a whole number of at least 1.
    """
    if isinstance(order, bool) or int(order) != order or order < 1:
        raise ValueError(f"order={order!r} must be a whole number of at least 1")
    process = b.process if sigma_data == 1 else Scaled(b.process, sigma_data)
    n = grid.numel() - 1
    history: History = []
    x = b.x
    previous: tuple[Tensor, Expr, int] | None = None  # the last step's start, what it added, its nodes
    for i, (s, t) in enumerate(intervals(grid)):
        if i == 0 and skip_start and n > 1:
            previous = (s, zero(), 0)
            x = b.state(scale(process, space, s, t) * x, t)
            continue
        if not reachable(b, space, s):
            history, previous = [], None
            x = b.state(update(b, "flow", "tau", x, s, t, [(s, b.predict(x, "flow"))]), t)
            continue
        history.append((s, b.predict(x, space, sigma_data=sigma_data)))
        base = x
        if corrector is not None and previous is not None:
            start, predicted, used = previous
            # both share the factor of the base state, so the correction is in the predictions alone
            base = x + (corrector(start, s, history, used) - predicted)
        keep = min(order, n - i + final_order - 1) if lower_order_final else order
        nodes = history[-keep:]
        added = predictor(s, t, nodes)
        x = b.state(scale(process, space, s, t) * base + added, t)
        previous = (s, added, len(nodes))
        history = history[-order:]


@register("exp_adams", Claim(order=3, moments="exact"))
def exp_adams(
    b: Builder,
    grid: Tensor,
    order: int = 3,
    space: str = "x0",
    variable: str = "lam",
    corrector: bool = False,
    lower_order_final: bool = False,
    final_order: int = 1,
    skip_start: bool = False,
    sigma_data: float = 1.0,
) -> None:
    """Exponential Adams-Bashforth (with ``corrector``: predictor and free Adams-Moulton corrector).

    Args:
        b, grid: the builder and the times.
        order: number of predictions that a predictor step interpolates, at least 1.
        space: what is interpolated: "x0", "eps", "v" or "flow".
        variable: the variable of the polynomial: "lam", "logsat" (lam saturated at both ends), "rho", "phi",
            "tau" or "t".
        corrector: correct each state with the prediction at its end before stepping on.
        lower_order_final: let the order fall towards the last step, to ``final_order`` there.
        skip_start: save the evaluation at the first time, where all is noise and the best prediction of the
            normalised data is its mean, zero ("v" space only); steps - 1 evaluations.
        sigma_data: the data's standard deviation, for "v" and "flow" space: EDM's F (Karras et al. 2022,
            eq. 8) is "v" of the data divided by it.

    Raises:
        ValueError: ``skip_start`` in another space than "v", where a prediction of zero has no such meaning.
    """
    if skip_start and space != "v":
        raise ValueError(f"skip_start=True needs space='v', got space={space!r}")
    process = b.process if sigma_data == 1 else Scaled(b.process, sigma_data)

    def predict(s: Tensor, t: Tensor, nodes: History) -> Expr:
        return increment(process, space, variable, s, t, nodes)

    def correct(s: Tensor, t: Tensor, nodes: History, used: int) -> Expr:
        return increment(process, space, variable, s, t, nodes)

    multistep(
        b,
        grid,
        order,
        space,
        predict,
        correct if corrector else None,
        lower_order_final=lower_order_final,
        final_order=final_order,
        skip_start=skip_start,
        sigma_data=sigma_data,
    )
