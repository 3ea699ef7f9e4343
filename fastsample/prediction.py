"""Prediction types: what a network's output means, as pairs of scalars.

For ``x_t = alpha x_0 + sigma eps`` every linear prediction type gives ``x_0 = p x_t + q out`` and
``eps = p' x_t + q' out`` with numbers that depend on (alpha, sigma) alone:

========  =====================================================  =========================================
name      the network predicts                                   source
========  =====================================================  =========================================
eps       the noise                                              Ho et al. 2020
x0        the clean sample                                       Karras et al. 2022 (D)
v         ``alpha eps - sigma x_0``                              Salimans & Ho 2022, appendix D
flow      ``eps - x_0``, the velocity of a rectified flow        Lipman et al. 2023; Esser et al. 2024
score     ``-eps / sigma``, the gradient of the log-density      Song et al. 2021
========  =====================================================  =========================================
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import unknown

Pair = tuple[Tensor, Tensor]
Coefficients = tuple[Pair, Pair]


def _eps(alpha: Tensor, sigma: Tensor) -> Coefficients:
    zero = torch.zeros_like(alpha)
    return (1 / alpha, -sigma / alpha), (zero, zero + 1)


def _x0(alpha: Tensor, sigma: Tensor) -> Coefficients:
    zero = torch.zeros_like(alpha)
    return (zero, zero + 1), (1 / sigma, -alpha / sigma)


def _v(alpha: Tensor, sigma: Tensor) -> Coefficients:
    square = alpha**2 + sigma**2
    return (alpha / square, -sigma / square), (sigma / square, alpha / square)


def _flow(alpha: Tensor, sigma: Tensor) -> Coefficients:
    total = alpha + sigma
    return (1 / total, -sigma / total), (1 / total, alpha / total)


def _score(alpha: Tensor, sigma: Tensor) -> Coefficients:
    return (1 / alpha, sigma**2 / alpha), (torch.zeros_like(alpha), -sigma)


_PREDICTIONS: dict[str, Callable[[Tensor, Tensor], Coefficients]] = {
    "eps": _eps,
    "x0": _x0,
    "v": _v,
    "flow": _flow,
    "score": _score,
}
_ALIASES = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
    "velocity": "flow",
}

# A solver's own quantity m as m = c_x0 * x_0 + c_eps * eps.
SPACES = ("x0", "eps", "v", "flow")


def names() -> list[str]:
    """The prediction types."""
    return sorted(_PREDICTIONS)


def canonical(prediction: str) -> str:
    """The canonical name of a prediction type; the names of other libraries' configs are understood.

    Raises:
        ValueError: unknown name (the message has the nearest one).
    """
    name = _ALIASES.get(prediction, prediction)
    if name not in _PREDICTIONS:
        raise unknown("prediction", prediction, _PREDICTIONS)
    return name


def require_signal(prediction: str, alpha: Tensor) -> None:
    """Refuse predictions that say nothing about the clean sample where alpha is zero.

    Raises:
        ValueError: eps or score at zero signal-to-noise ratio.
    """
    if canonical(prediction) in ("eps", "score") and not bool((alpha > 0).all()):
        raise ValueError(
            f"prediction={prediction!r} cannot be used at zero signal-to-noise ratio (alpha = 0): the output "
            "says nothing about the clean sample there; use a model with v, x0 or flow prediction, or start "
            "at less noise (strength=0.99)"
        )


def coefficients(prediction: str, alpha: Tensor, sigma: Tensor, space: str, sigma_data: float = 1.0) -> Pair:
    """``(p, q)`` such that ``m = p x_t + q out``, where ``m`` is the quantity that a solver works with.

    Args:
        prediction: what the network predicts.
        alpha, sigma: the process at the time of evaluation, float64 scalars (or tensors of one shape).
        space: ``"x0"``, ``"eps"``, ``"v"`` (``(alpha eps - sigma x_0) / sqrt(alpha^2 + sigma^2)``, the
            velocity along the angle) or ``"flow"`` (``eps - x_0``).
        sigma_data: the data's standard deviation: ``m`` is that of the data divided by it, so that
            ``sigma_data < 1`` moves "v" from the symmetric one towards ``x0`` (EDM's F, Karras et al. 2022).

    Raises:
        ValueError: the output carries no information on the clean sample (eps or score where alpha is zero),
            or ``x0`` prediction is asked for its noise where sigma is zero.
    """
    name = canonical(prediction)
    if space not in SPACES:
        raise unknown("space", space, SPACES)
    require_signal(name, alpha)
    if name == "x0" and space != "x0" and not bool((sigma > 0).all()):
        raise ValueError("an x0-prediction has no noise estimate where sigma = 0; start from sigma > 0")
    (p0, q0), (pe, qe) = _PREDICTIONS[name](alpha, sigma)
    p0, q0, alpha = p0 / sigma_data, q0 / sigma_data, alpha * sigma_data
    if space == "x0":
        return p0, q0
    if space == "eps":
        return pe, qe
    if space == "flow":
        return pe - p0, qe - q0
    radius = torch.sqrt(alpha**2 + sigma**2)
    return (alpha * pe - sigma * p0) / radius, (alpha * qe - sigma * q0) / radius
