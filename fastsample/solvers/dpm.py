"""DPM-Solver and DPM-Solver++: exponential integrators in the half log-SNR, single-step and multistep.

DPM-Solver (Lu et al. 2022a) integrates the noise ``eps``, DPM-Solver++ (Lu et al. 2022b) the clean sample
``x0``; the formulas are the same in the signed step ``z = h`` (eps) or ``z = -h`` (x0), ``h = lam_t -
lam_s``:

    x_t = scale x_s - A (e^z - 1) m_s - A sum_k z phi_{k+1}(z) h^k m^(k),  A = sigma_t (eps) or alpha_t (x0).

Where the published formulas are exact Lagrange integrals (``solver_type="heun"`` or ``"taylor"``, and the
inner stages) the generated weights are used.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ..builder import Builder, Expr
from ..errors import unknown
from .exponential import Corrector, History, increment, multistep, reachable, update
from .first_order import ddim, step
from .registry import Claim, register


def finite(b: Builder, *times: Tensor) -> bool:
    """Whether the half log-SNR is finite at all these times."""
    return all(bool(torch.isfinite(b.lam(t))) for t in times)


def usable(b: Builder, t: Tensor, nodes: History) -> History:
    """The nodes that a step to ``t`` can use: finite in lam; on an infinite step the one at its start."""
    if not finite(b, t, nodes[-1][0]):
        return nodes[-1:]
    return [node for node in nodes if finite(b, node[0])]


def signed_step(b: Builder, space: str, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """``(A, z)`` of the formulas above."""
    h = b.lam(t) - b.lam(s)
    return (b.alpha(t), -h) if space == "x0" else (b.sigma(t), h)


def _midpoint(b: Builder, nodes: History, s: Tensor, t: Tensor) -> History:
    """The line through two nodes, the last of them at s, taken at the middle of the step: one node at s."""
    (s1, m1), (_, m0) = nodes
    r = (b.lam(s1) - b.lam(s)) / (b.lam(t) - b.lam(s))
    return [(s, m0 + (m1 - m0) / (2 * r))]


def _lowered(setting: bool | None, steps: int) -> bool:
    """The official code lowers the order at the end of runs of fewer than 10 steps."""
    return steps < 10 if setting is None else setting


def exact_corrector(b: Builder, space: str) -> Corrector:
    """UniC (Zhao et al. 2023): the integral through the predictor's nodes and the one at the step's end."""

    def correct(s: Tensor, t: Tensor, nodes: History, used: int) -> Expr:
        return increment(b.process, space, "lam", s, t, nodes[-(used + 1) :])

    return correct


# -- multistep -----------------------------------------------------------------------------------------------


@register("dpm_solver_2m", Claim(order=2, moments="asymptotic", space="eps"), space="eps")
@register("dpmpp_2m", Claim(order=2, moments="asymptotic"), space="x0")
def dpm_2m(
    b: Builder,
    grid: Tensor,
    space: str = "x0",
    solver_type: str = "midpoint",
    lower_order_final: bool | None = None,
    corrector: bool = False,
) -> None:
    """DPM-Solver(++) 2M (Lu et al. 2022b, algorithm 2).

    Args:
        b, grid: the builder and the times.
        space: "x0" (``dpmpp_2m``) or "eps" (``dpm_solver_2m``).
        solver_type: "midpoint" (the paper's; ``(e^z - 1) / 2`` for ``z phi_2(z)``) or "heun" (the exact
            integral).
        lower_order_final: take the last step at order 1; None does so below 10 steps, as the official code.
        corrector: correct each state with the evaluation that the next step needs anyway (UniC).

    Raises:
        ValueError: an unknown ``solver_type``.
    """
    if solver_type not in ("midpoint", "heun"):
        raise unknown("solver_type", solver_type, ("midpoint", "heun"))

    def predict(s: Tensor, t: Tensor, nodes: History) -> Expr:
        nodes = usable(b, t, nodes)
        if len(nodes) == 2 and solver_type == "midpoint":
            nodes = _midpoint(b, nodes, s, t)
        return increment(b.process, space, "lam", s, t, nodes)

    multistep(
        b,
        grid,
        2,
        space,
        predict,
        exact_corrector(b, space) if corrector else None,
        lower_order_final=_lowered(lower_order_final, grid.numel() - 1),
    )


@register("dpm_solver_3m", Claim(order=2, moments="exact", space="eps"), space="eps", exact=False)
@register("dpmpp_3m", Claim(order=2, moments="exact"), space="x0", exact=False)
@register("dpm_solver_3m_exact", Claim(order=3, moments="exact", space="eps"), space="eps", exact=True)
@register("dpmpp_3m_exact", Claim(order=3, moments="exact"), space="x0", exact=True)
def dpm_3m(
    b: Builder,
    grid: Tensor,
    space: str = "x0",
    exact: bool = False,
    lower_order_final: bool | None = None,
    corrector: bool = False,
) -> None:
    """DPM-Solver(++) 3M.

    ``dpmpp_3m`` and ``dpm_solver_3m`` are the published form (the official code, which all others follow). It
    has half of the second-difference term that the Taylor expansion needs, and is of order 2.
    ``dpmpp_3m_exact`` and ``dpm_solver_3m_exact`` have the whole term, which is the exact integral, and are
    of order 3.

    Args:
        b, grid: the builder and the times.
        space: "x0" or "eps".
        exact: the whole second-difference term instead of half of it.
        lower_order_final: take the last two steps at orders 2 and 1; None does so below 10 steps, as the
            official code.
        corrector: correct each state with the evaluation that the next step needs anyway (UniC).
    """

    def predict(s: Tensor, t: Tensor, nodes: History) -> Expr:
        nodes = usable(b, t, nodes)
        if not exact and len(nodes) == 2:  # the official start and end
            nodes = _midpoint(b, nodes, s, t)
        whole = increment(b.process, space, "lam", s, t, nodes)
        if exact or len(nodes) < 3:
            return whole
        (s2, m2), (s1, m1), (_, m0) = nodes
        h = b.lam(t) - b.lam(s)
        r0, r1 = (b.lam(s) - b.lam(s1)) / h, (b.lam(s1) - b.lam(s2)) / h
        second = ((m0 - m1) / r0 - (m1 - m2) / r1) / (r0 + r1)  # h^2 m'' / 2
        a, z = signed_step(b, space, s, t)
        return whole + a * z * phi3(z) * second

    multistep(
        b,
        grid,
        3,
        space,
        predict,
        exact_corrector(b, space) if corrector else None,
        lower_order_final=_lowered(lower_order_final, grid.numel() - 1),
    )


def phi3(z: Tensor) -> Tensor:
    """``phi_3(z) = (e^z - 1 - z - z^2/2) / z^3``, without cancellation."""
    if bool(z.abs() > 1):
        return (torch.expm1(z) - z - z**2 / 2) / z**3
    terms = [z**k / math.factorial(k + 3) for k in range(18)]
    return torch.stack(terms[::-1]).sum()


# -- single-step ---------------------------------------------------------------------------------------------


@register("dpm_solver_1", Claim(order=1, moments="exact", space="flow", variable="tau"))
def dpm_solver_1(b: Builder, grid: Tensor) -> None:
    """DPM-Solver-1 (Lu et al. 2022a, eq. 3.7), which is DDIM."""
    ddim(b, grid)


@register("dpm_solver_2s", Claim(order=2, moments="asymptotic", space="eps"), space="eps")
@register("dpmpp_2s", Claim(order=2, moments="asymptotic"), space="x0")
def dpm_2s(
    b: Builder,
    grid: Tensor,
    space: str = "x0",
    solver_type: str = "midpoint",
    fixed: bool = False,
    r1: float = 0.5,
) -> None:
    """DPM-Solver-2 (Lu et al. 2022a, algorithm 1) and DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1).

    As in the official code ``steps`` counts evaluations: every second point of the grid is an inner stage,
    and an odd number of steps ends with one of order 1. ``steps`` evaluations; with ``fixed=True`` twice as
    many.

    Args:
        b, grid: the builder and the times.
        space: "x0" (``dpmpp_2s``) or "eps" (``dpm_solver_2s``).
        solver_type: "midpoint" (the paper's) or "heun" (the official code's "taylor", the exact integral).
        fixed: every interval of the grid is a step of two evaluations, with its stage at ``r1``.
        r1: with ``fixed``, where the inner stage lies, as a fraction of the interval in lam, in (0, 1).

    Raises:
        ValueError: an unknown ``solver_type``, or ``r1`` outside (0, 1) or without ``fixed``.
    """
    _singlestep(b, grid, 2, space, solver_type, False, fixed, (r1,), (0.5,))


@register("dpm_solver_3s", Claim(order=3, moments="asymptotic", space="eps"), space="eps")
@register("dpmpp_3s", Claim(order=3, moments="asymptotic"), space="x0")
def dpm_3s(
    b: Builder,
    grid: Tensor,
    space: str = "x0",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    fixed: bool = False,
    r1: float = 1 / 3,
    r2: float = 2 / 3,
) -> None:
    """DPM-Solver-3 (Lu et al. 2022a, algorithm 2; "DPM-Solver-fast") and DPM-Solver++(3S).

    As in the official code ``steps`` counts evaluations: a step of order 3 takes three intervals of the grid
    and has its two stages at the points inside. ``steps`` evaluations; with ``fixed=True`` three times as
    many.

    Order 3 needs the second stage at 2/3 of the step in lam; grids that are smooth in lam come close to it as
    they are refined.

    Args:
        b, grid: the builder and the times.
        space: "x0" (``dpmpp_3s``) or "eps" (``dpm_solver_3s``).
        solver_type: "midpoint" (the paper's: the second stage alone enters the result) or "heun" (the
            official code's "taylor": the exact integral through all three).
        lower_order_final: end with steps of order 2 and 1 where the number of steps is a multiple of 3, as
            the official code does; False keeps order 3. Other numbers of steps end with what remains.
        fixed: every interval of the grid is a step of three evaluations, with its stages at ``r1`` and
            ``r2``.
        r1, r2: with ``fixed``, where the stages lie, as fractions of the interval in lam, 0 < r1 < r2 < 1.

    Raises:
        ValueError: an unknown ``solver_type``, or stages out of order or given without ``fixed``.
    """
    _singlestep(b, grid, 3, space, solver_type, lower_order_final, fixed, (r1, r2), (1 / 3, 2 / 3))


def orders(steps: int, order: int, lower_order_final: bool) -> list[int]:
    """The orders of successive single steps with ``steps`` evaluations in all (the official arrangement)."""
    whole, rest = divmod(steps, order)
    if order == 3 and rest == 0 and lower_order_final:
        return [3] * (whole - 1) + [2, 1]
    return [order] * whole + ([rest] if rest else [])


def _singlestep(
    b: Builder,
    grid: Tensor,
    order: int,
    space: str,
    solver_type: str,
    lower_order_final: bool,
    fixed: bool,
    fractions: tuple[float, ...],
    usual: tuple[float, ...],
) -> None:
    if solver_type not in ("midpoint", "heun"):
        raise unknown("solver_type", solver_type, ("midpoint", "heun"))
    named = ", ".join(f"r{i}={r!r}" for i, r in enumerate(fractions, 1))
    if not fixed and fractions != usual:
        raise ValueError(f"{named} needs fixed=True; otherwise the stages are points of the grid")
    if any(not low < high for low, high in zip((0.0, *fractions), (*fractions, 1.0), strict=True)):
        raise ValueError(f"{named} must rise strictly between 0 and 1")
    times = list(grid.unbind())
    x = b.x
    if fixed:
        for s, t in itertools.pairwise(times):
            stages: list[Tensor] = []
            if finite(b, s, t):
                lam_s, lam_t = b.lam(s), b.lam(t)
                stages = [b.process.stage(lam_s + r * (lam_t - lam_s)) for r in fractions]
            x = _single(b, x, s, stages, t, space, solver_type)
        return
    first = 0
    for size in _finite_groups(b, times, orders(len(times) - 1, order, lower_order_final)):
        last = first + size
        x = _single(b, x, times[first], times[first + 1 : last], times[last], space, solver_type)
        first = last


def _finite_groups(b: Builder, times: list[Tensor], sizes: list[int]) -> list[int]:
    """Split off an infinite interval at either end: it is a step of order 1 on its own."""
    if not finite(b, times[0]) and sizes[0] > 1:
        sizes = [1, sizes[0] - 1, *sizes[1:]]
    if not finite(b, times[-1]) and sizes[-1] > 1:
        sizes = [*sizes[:-1], sizes[-1] - 1, 1]
    return sizes


def _single(
    b: Builder, x: Expr, s: Tensor, stages: list[Tensor], t: Tensor, space: str, solver_type: str
) -> Expr:
    """A step from s to t through inner stages (Lu et al. 2022a, algorithms 1 and 2, for any stage times)."""
    if not reachable(b, space, s):
        return b.state(step(b, x, s, t), t)
    # a stage that the network's table has moved onto its neighbour says nothing new
    inner = [u for u, before in zip(stages, [s, *stages], strict=False) if bool(u != before)]
    nodes: History = [(s, b.predict(x, space))]
    for u in inner:
        nodes.append((u, b.predict(b.state(update(b, space, "lam", x, s, u, nodes), u), space)))
    if solver_type == "midpoint":
        if len(nodes) == 2:
            nodes = _midpoint(b, nodes[::-1], s, t)
        elif len(nodes) == 3:
            nodes = [nodes[0], nodes[2]]
    return b.state(update(b, space, "lam", x, s, t, nodes), t)
