"""UniPC: predictor and free corrector of any order (Zhao et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..builder import Builder, Expr
from ..errors import unknown
from .dpm import signed_step, usable
from .exponential import History, increment, multistep
from .registry import Claim, register

_VARIANTS = ("bh1", "bh2", "vary_coeff")


@register("unipc", Claim(order=4, moments="exact"))
def unipc(
    b: Builder,
    grid: Tensor,
    order: int = 3,
    variant: str = "bh2",
    predict_x0: bool = True,
    corrector: bool = True,
    lower_order_final: bool = True,
) -> None:
    """UniPC (Zhao et al. 2023, algorithms 1 to 4; the official multistep code).

    Its linear system for the weights, ``sum_j rho_j r_j^(k-1) = z phi_{k+1}(z) k! / B(h)``, makes the step
    exact for polynomials, so ``B(h)`` matters only where the official code puts 1/2 for a single unknown
    ``rho``: the predictor of order 2 and the corrector of order 1.

    Args:
        b, grid: the builder and the times.
        order: the number of predictions that the predictor uses, at least 1; the corrector's order is one
            more.
        variant: "bh1" (``B = z``), "bh2" (``B = e^z - 1``), or "vary_coeff" (no shortcut: exact weights).
        predict_x0: integrate the clean sample (as DPM-Solver++) instead of the noise (as DPM-Solver).
        corrector: use UniC, which costs no evaluation.
        lower_order_final: let the order fall to 1 towards the last step.

    Raises:
        ValueError: an unknown variant or an order below 1.
    """
    if variant not in _VARIANTS:
        raise unknown("variant", variant, _VARIANTS)
    space = "x0" if predict_x0 else "eps"

    def half(s: Tensor, t: Tensor, slope: Expr) -> Expr:
        """``-A B(h) slope / 2``: the official code's shortcut."""
        a, z = signed_step(b, space, s, t)
        return slope * (-0.5 * a * (z if variant == "bh1" else torch.expm1(z)))

    def predict(s: Tensor, t: Tensor, nodes: History) -> Expr:
        nodes = usable(b, t, nodes)
        if len(nodes) != 2 or variant == "vary_coeff":
            return increment(b.process, space, "lam", s, t, nodes)
        (s1, m1), (_, m0) = nodes
        r = (b.lam(s1) - b.lam(s)) / (b.lam(t) - b.lam(s))
        return increment(b.process, space, "lam", s, t, [(s, m0)]) + half(s, t, (m1 - m0) / r)

    def correct(s: Tensor, t: Tensor, nodes: History, used: int) -> Expr:
        nodes = nodes[-(used + 1) :]
        known = usable(b, t, nodes[:-1])
        if len(known) != 1 or not torch.isfinite(b.lam(t) - b.lam(s)) or variant == "vary_coeff":
            return increment(b.process, space, "lam", s, t, nodes)
        (_, m0), (_, m1) = nodes[-2:]
        return increment(b.process, space, "lam", s, t, [(s, m0)]) + half(s, t, m1 - m0)

    multistep(
        b, grid, order, space, predict, correct if corrector else None, lower_order_final=lower_order_final
    )
