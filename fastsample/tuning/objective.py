"""What tuning minimises: the distance between a plan's samples and the model's own solution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import unknown

OBJECTIVES = ("huber", "rmse")
Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """Mean over samples of a function of each sample's mean squared error ``e``.

    Attributes:
        kind: "rmse" is ``e``; "huber" is the pseudo-Huber loss ``2 c^2 (sqrt(1 + e / c^2) - 1)``, which grows
            with the root of ``e`` beyond ``c``: the few samples that end in another mode do not decide.
        c: the scale of "huber", in units of the samples.
        features: a function of samples (B, ...) whose outputs are compared instead of the samples.
    """

    kind: str = "huber"
    c: float = 1.0
    features: Features | None = None

    def __post_init__(self) -> None:
        if self.kind not in OBJECTIVES:
            raise unknown("objective", self.kind, OBJECTIVES)

    def seen(self, x: Tensor) -> Tensor:
        """What of the samples (B, ...) is compared, float64 (B, d)."""
        return (x if self.features is None else self.features(x)).flatten(1).double()

    def losses(self, e: Tensor) -> Tensor:
        """Each sample's loss from its mean squared error (B,)."""
        if self.kind == "rmse":
            return e
        return 2 * self.c**2 * (torch.sqrt(1 + e / self.c**2) - 1)

    def weights(self, e: Tensor) -> Tensor:
        """The derivative of :meth:`losses`: the weights of iteratively reweighted least squares."""
        return torch.ones_like(e) if self.kind == "rmse" else 1 / torch.sqrt(1 + e / self.c**2)


@dataclass(frozen=True)
class Errors:
    """The errors of a plan on some samples.

    Attributes:
        loss: the objective.
        rmse: over everything.
        median: over samples, of each sample's root mean square error.
        moments: the squares of ``match=``, where it is given.
    """

    loss: float
    rmse: float
    median: float
    moments: float | None = None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)
