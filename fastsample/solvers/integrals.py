"""Coefficients generated from the integral that defines a multistep method.

The probability-flow ODE is exact in any of four spaces (``s`` to ``t``, Lagrange basis ``L_j`` in a variable u):

=====  ===========================================================================  ===========================
space  exact solution                                                               source
=====  ===========================================================================  ===========================
x0     ``x_t = (sigma_t/sigma_s) x_s + sigma_t int e^lam x0 dlam``                  Lu et al. 2022b, eq. 8
eps    ``x_t = (alpha_t/alpha_s) x_s + alpha_t int eps drho``, ``rho=sigma/alpha``  Zhang & Chen 2023, eq. 11
v      ``x_t / r_t = x_s / r_s + int v dphi``, ``r^2 = alpha^2 + sigma^2``          angle of Salimans & Ho 2022
flow   ``x_t / T_t = x_s / T_s + int (eps - x0) dtau``, ``T = alpha + sigma``       ``tau = sigma / T``
=====  ===========================================================================  ===========================

The last two are finite at both ends of any process. A node whose u is infinite drops out of the interpolation,
which is the limit of its Lagrange basis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import unknown
from ..process import Process

Variable = Callable[[Process, Tensor], Tensor]

# The interpolation variable as a function of the half log-SNR.
VARIABLES: dict[str, Variable] = {
    "lam": lambda process, lam: lam,
    "rho": lambda process, lam: (-lam).exp(),
    "phi": lambda process, lam: torch.atan((-lam).exp()),
    "tau": lambda process, lam: torch.sigmoid(-lam),
    "t": lambda process, lam: process.t_of_lam(lam),
    "logsat": lambda process, lam: _logsat(lam),
}

# "logsat" is the half log-SNR between noise levels of about 1/10 and 20 (for unit-variance data) and saturates
# beyond them: predictions there are nearly constant (noise) or nearly the state (data), not functions of lam.
_NOISE, _DATA = 0.05, 0.1


def _logsat(lam: Tensor) -> Tensor:
    # log((alpha + a sigma) / (sigma + d alpha)), divided through by the larger of alpha and sigma
    alpha, sigma = torch.exp(lam.clamp(max=0)), torch.exp(-lam.clamp(min=0))
    return torch.log((alpha + _NOISE * sigma) / (sigma + _DATA * alpha))


_NODES = 24
_PANEL = 6.0  # widest panel in lam: e^lam on it is exact to rounding with 24 nodes


@functools.cache
def _gauss_legendre(panels: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1], composite over equal panels."""
    x, w = np.polynomial.legendre.leggauss(_NODES)
    starts = np.arange(panels)[:, None] / panels
    nodes = (starts + (x + 1) / 2 / panels).ravel()
    return torch.from_numpy(nodes), torch.from_numpy(np.tile(w / 2 / panels, panels))


def lagrange(nodes: Sequence[Tensor], at: Tensor) -> Tensor:
    """The Lagrange basis polynomials of k ``nodes`` at the points ``at`` (...), as (k, ...)."""
    k = len(nodes)
    if k == 1:
        return torch.ones_like(at)[None]
    u = torch.stack(tuple(nodes))
    others = _others(k)
    over = (at - u.reshape(-1, *[1] * at.ndim))[others].prod(dim=1)
    under = (u[:, None] - u[others]).prod(dim=1)
    return over / under.reshape(-1, *[1] * at.ndim)


@functools.cache
def _others(k: int) -> Tensor:
    """Row j lists 0..k-1 without j."""
    return torch.tensor([[i for i in range(k) if i != j] for j in range(k)])


def _finite(value: Tensor) -> bool:
    return math.isfinite(float(value.detach()))


def scale(process: Process, space: str, s: Tensor, t: Tensor) -> Tensor:
    """The factor of ``x_s`` in the exact solution."""
    alpha, sigma = process.alpha, process.sigma
    if space == "x0":
        return sigma(t) / sigma(s)
    if space == "eps":
        return alpha(t) / alpha(s)
    if space == "v":
        return torch.hypot(alpha(t), sigma(t)) / torch.hypot(alpha(s), sigma(s))
    if space == "flow":
        return (alpha(t) + sigma(t)) / (alpha(s) + sigma(s))
    raise unknown("space", space, ("x0", "eps", "v", "flow"))


def _total(process: Process, space: str, s: Tensor, t: Tensor) -> Tensor:
    """The weight of a constant prediction."""
    alpha, sigma = process.alpha, process.sigma
    if space == "x0":
        # by h where both ends are finite: the difference would lose digits on small steps
        h = process.lam(t) - process.lam(s)
        if _finite(h):
            return -alpha(t) * torch.expm1(-h)
        return alpha(t) - scale(process, space, s, t) * alpha(s)
    if space == "eps":
        h = process.lam(t) - process.lam(s)
        if _finite(h):
            return -sigma(t) * torch.expm1(h)
        return sigma(t) - scale(process, space, s, t) * sigma(s)
    if space == "v":
        return torch.hypot(alpha(t), sigma(t)) * (process.phi(t) - process.phi(s))
    top = alpha(t) + sigma(t)
    return sigma(t) - sigma(s) * top / (alpha(s) + sigma(s))


def _u(process: Process, variable: str, t: Tensor) -> Tensor:
    """The interpolation variable at a time (taken directly where that is exact at the ends)."""
    if variable == "t":
        return t
    if variable == "rho":
        return process.rho(t)
    if variable == "phi":
        return process.phi(t)
    if variable == "tau":
        return process.sigma(t) / (process.alpha(t) + process.sigma(t))
    return VARIABLES[variable](process, process.lam(t))


def weights(
    process: Process, space: str, variable: str, nodes: Sequence[Tensor], s: Tensor, t: Tensor
) -> list[Tensor]:
    """``W_j`` such that ``x_t = scale * x_s + sum_j W_j m_j`` is exact for polynomials of the predictions in u.

    Args:
        process: the noise process.
        space: what ``m`` is.
        variable: the interpolation variable u, one of ``VARIABLES``.
        nodes: the times of the predictions ``m_j``.
        s, t: the interval.

    Returns:
        One float64 scalar for each node; they sum to the weight of a constant prediction.
    """
    if variable not in VARIABLES:
        raise unknown("variable", variable, VARIABLES)
    u = [_u(process, variable, node) for node in nodes]
    usable = [j for j, value in enumerate(u) if _finite(value)]
    total = _total(process, space, s, t)
    result = [torch.zeros((), dtype=torch.float64) for _ in nodes]
    if len(usable) <= 1:
        result[usable[0] if usable else 0] = total
        return result
    basis = _integrals(process, space, variable, [u[j] for j in usable], s, t)
    if basis is None:  # infinite interval with no limit: constant interpolation by the node nearest to s
        nearest = min(usable, key=lambda j: abs(float((nodes[j] - s).detach())))
        result[nearest] = total
        return result
    # The integrals sum to one up to the quadrature's rounding; make constants exact.
    exact = total * basis / basis.sum()
    for j, weight in zip(usable, exact.unbind(), strict=True):
        result[j] = weight
    return result


def _integrals(
    process: Process, space: str, variable: str, u: list[Tensor], s: Tensor, t: Tensor
) -> Tensor | None:
    """Integrals of the Lagrange basis against the space's measure, up to a common factor."""
    lam_s, lam_t = process.lam(s), process.lam(t)
    finite = _finite(lam_s) and _finite(lam_t)
    convert = VARIABLES[variable]
    if space == "x0":
        if not finite:
            end = _u(process, variable, t)
            # As sigma_t -> 0 the measure concentrates at t: the extrapolated polynomial itself.
            return lagrange(u, end) if bool(torch.isposinf(lam_t)) and _finite(end) else None
        w, lam, width = _panels(lam_s, lam_t)
        measure = w * torch.exp((lam - lam_t) if bool(width > 0) else (lam - lam_s))
    elif space == "eps":
        if finite:
            w, lam, width = _panels(lam_s, lam_t)
            measure = w * torch.exp((lam_s - lam) if bool(width > 0) else (lam_t - lam))
        else:
            if bool(torch.isneginf(lam_s)) or bool(torch.isneginf(lam_t)) or variable == "lam":
                return None
            w, rho = _segment(process.rho(s), process.rho(t), 8)
            measure, lam = w, -rho.log()
    else:
        ends = (
            (process.phi(s), process.phi(t))
            if space == "v"
            else tuple(process.sigma(x) / (process.alpha(x) + process.sigma(x)) for x in (s, t))
        )
        if variable == "lam" and not finite:
            return None
        w, z = _segment(ends[0], ends[1], 4)
        lam = -torch.tan(z).log() if space == "v" else torch.log1p(-z) - z.log()
        measure = w
    return lagrange(u, convert(process, lam)) @ measure


def _panels(lam_s: Tensor, lam_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width = lam_t - lam_s
    x, w = _gauss_legendre(max(1, int(np.ceil(abs(float(width.detach())) / _PANEL))))
    return w, lam_s + width * x, width


def _segment(first: Tensor, last: Tensor, panels: int) -> tuple[Tensor, Tensor]:
    x, w = _gauss_legendre(panels)
    return w, first + (last - first) * x
