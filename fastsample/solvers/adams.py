"""Adams methods on the noise: LMS, DEIS and iPNDM-v by exact integrals; PNDM, PLMS and iPNDM by fixed
weights.

All work with the predicted noise, ``x_t = (alpha_t/alpha_s) x_s + alpha_t int eps drho`` with
``rho = sigma / alpha`` (Zhang & Chen 2023, eq. 11). The first group interpolates ``eps`` by a polynomial and
integrates it exactly on the grid as it is; the second keeps the weights of a uniform grid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..builder import Builder, Expr, combine, intervals
from .exponential import exp_adams, reachable, update
from .first_order import step
from .registry import Claim, register


@register("lms", Claim(order=4, moments="exact", space="eps", variable="rho"), grid="karras")
def lms(b: Builder, grid: Tensor, order: int = 4, corrector: bool = False) -> None:
    """Linear multistep in ``rho`` (k-diffusion's ``sample_lms``), with exact integrals.

    Args:
        b, grid: the builder and the times.
        order: the number of predictions that a step interpolates, at least 1; the first steps have fewer.
        corrector: correct each state with the evaluation that the next step needs anyway (UniC).
    """
    exp_adams(b, grid, order, "eps", "rho", corrector)


@register("ipndm_v", Claim(order=4, moments="exact", space="eps", variable="rho"), grid="karras")
def ipndm_v(b: Builder, grid: Tensor, order: int = 4) -> None:
    """iPNDM with Adams-Bashforth weights for variable steps (Zhang & Chen 2023; diff-sampler's ``ipndm_v``).

    Variable-step Adams-Bashforth in ``rho`` is the polynomial through the last predictions, integrated
    exactly: the same method as :func:`lms`. (diff-sampler's own formula for orders 3 and 4 has lost
    parentheses and is not that integral.)
    """
    lms(b, grid, order)


@register("deis", Claim(order=4, moments="exact", space="eps", variable="t"), grid="quadratic")
@register(
    "deis_tab", Claim(order=4, moments="exact", space="eps", variable="t"), grid="quadratic", variable="t"
)
@register(
    "deis_rhoab",
    Claim(order=4, moments="exact", space="eps", variable="rho"),
    grid="quadratic",
    variable="rho",
)
@register(
    "deis_logrho",
    Claim(order=4, moments="exact", space="eps", variable="lam"),
    grid="quadratic",
    variable="lam",
)
def deis(b: Builder, grid: Tensor, order: int = 4, variable: str = "t", corrector: bool = False) -> None:
    """DEIS (Zhang & Chen 2023, eq. 14, 15): a polynomial through the last predicted noises.

    ``deis`` and ``deis_tab`` are tAB (polynomial in the model's time), ``deis_rhoab`` is rhoAB (in ``rho``;
    the same as LMS) and ``deis_logrho`` is the form that diffusers has (in ``log rho = -lam``). The paper
    counts the polynomial's degree: tAB0..tAB3 are ``order=1..4`` here.

    Args:
        b, grid: the builder and the times.
        order: the number of predictions that a step interpolates, at least 1; the first steps have fewer.
        variable: the variable of the polynomial: "t", "rho" or "lam".
        corrector: correct each state with the evaluation that the next step needs anyway (UniC).
    """
    exp_adams(b, grid, order, "eps", variable, corrector)


@functools.cache
def adams_bashforth(order: int) -> tuple[float, ...]:
    """Weights of the last ``order`` values on a uniform grid, newest first: ``int_0^1 L_j(theta) dtheta``."""
    nodes = [-float(j) for j in range(order)]
    weights = []
    for j, node in enumerate(nodes):
        others = nodes[:j] + nodes[j + 1 :]
        basis = np.poly1d(others, r=True) / np.prod([node - other for other in others])
        weights.append(float(basis.integ()(1.0)))
    return tuple(weights)


Start = Callable[[Builder, Expr, Expr, Tensor, Tensor], Expr]


def _transfer(b: Builder, x: Expr, eps: Expr, s: Tensor, t: Tensor) -> Expr:
    """DDIM's step with a given noise (Liu et al. 2022, eq. 11), finite where sigma or alpha ends at zero."""
    return update(b, "eps", "rho", x, s, t, [(s, eps)])


def _pseudo(b: Builder, grid: Tensor, order: int, start: Start | None = None, start_steps: int = 0) -> None:
    """Adams-Bashforth with fixed weights on DDIM's transfer; ``start`` gives the noise of the first steps."""
    history: list[Expr] = []
    x = b.x
    for s, t in intervals(grid):
        if not reachable(b, "eps", s):
            history = []
            x = b.state(step(b, x, s, t), t)
            continue
        history = [b.eps(x), *history[: order - 1]]
        # a start evaluates at t, which needs noise and signal there
        if start is not None and len(history) <= start_steps and bool(torch.isfinite(b.lam(t))):
            eps = start(b, x, history[0], s, t)
        else:
            eps = combine(adams_bashforth(len(history)), history)
        x = b.state(_transfer(b, x, eps, s, t), t)


def _pseudo_euler(b: Builder, x: Expr, e1: Expr, s: Tensor, t: Tensor) -> Expr:
    """Improved Euler on the transfer (Liu et al. 2022, eq. 22)."""
    e2 = b.eps(b.state(_transfer(b, x, e1, s, t), t))
    return 0.5 * (e1 + e2)


def _pseudo_runge_kutta(b: Builder, x: Expr, e1: Expr, s: Tensor, t: Tensor) -> Expr:
    """The classical fourth-order rule on the transfer (Liu et al. 2022, eq. 13)."""
    middle = b.process.snap((s + t) / 2)
    e2 = b.eps(b.state(_transfer(b, x, e1, s, middle), middle))
    e3 = b.eps(b.state(_transfer(b, x, e2, s, middle), middle))
    e4 = b.eps(b.state(_transfer(b, x, e3, s, t), t))
    return (e1 + 2 * e2 + 2 * e3 + e4) / 6


@register("pndm", Claim(order=2, space="eps", variable="rho"))
def pndm(b: Builder, grid: Tensor) -> None:
    """PNDM (Liu et al. 2022, algorithm 2, "F-PNDM"): three pseudo-Runge-Kutta steps, then Adams-Bashforth 4.

    ``steps + 9`` evaluations. The weights are those of a uniform grid, so the method is of order 2, as the
    paper says, on grids that are uniform in some smooth coordinate, and of order 1 on others.
    """
    _pseudo(b, grid, 4, _pseudo_runge_kutta, 3)


@register("plms", Claim(order=2, space="eps", variable="rho"))
def plms(b: Builder, grid: Tensor) -> None:
    """PLMS: PNDM started by one pseudo improved Euler step ("S-PNDM" start; latent diffusion's sampler).

    ``steps + 1`` evaluations; the orders of the next two steps are 2 and 3, then 4. Order of convergence as
    for :func:`pndm`.
    """
    _pseudo(b, grid, 4, _pseudo_euler, 1)


@register("ipndm", Claim(order=2, space="eps", variable="rho"), grid="quadratic")
def ipndm(b: Builder, grid: Tensor, order: int = 4) -> None:
    """iPNDM (Zhang & Chen 2023, appendix): PNDM's weights started at order 1; ``steps`` evaluations.

    Order of convergence as for :func:`pndm`, except that on uniform grids in ``rho`` it is ``order``.

    Args:
        b, grid: the builder and the times.
        order: the number of predictions that a step combines, 1 to 4.

    Raises:
        ValueError: the order is not 1, 2, 3 or 4.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order={order!r} must be 1, 2, 3 or 4; for higher orders use 'ipndm_v'")
    _pseudo(b, grid, int(order))
