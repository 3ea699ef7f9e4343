"""Hooks: what may happen to a predicted clean sample before the solver uses it.

A hook is any callable ``(x0, at) -> x0`` on tensors of shape (B, ...); ``at`` says where the sampler stands.
The executor applies hooks at one place, whatever the prediction type or the solver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class At:
    """Where an evaluation stands.

    Attributes:
        row: the row of the plan.
        t, alpha, sigma: time and process there (floats).
        x: the state, (B, ...).
        samples: which samples of the whole call are in this batch (a call may run in several chunks).
    """

    row: int
    t: float
    alpha: float
    sigma: float
    x: Tensor
    samples: slice


Hook = Callable[[Tensor, At], Tensor]


@dataclass(frozen=True)
class Clip:
    """Clamp the predicted clean sample to the data's range (Ho et al. 2020's ``clip_denoised``)."""

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low={self.low!r} must be below high={self.high!r}")

    def __call__(self, x0: Tensor, at: At) -> Tensor:
        return x0.clamp(self.low, self.high)


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3).

    Each sample is clamped to the ``ratio`` quantile ``s`` of its absolute values and divided by ``s``, where
    ``s`` is at least ``floor`` and at most ``ceiling``.
    """

    ratio: float = 0.995
    floor: float = 1.0
    ceiling: float = float("inf")

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio!r} must lie in (0, 1]")
        if not 0 < self.floor <= self.ceiling:
            raise ValueError(f"floor={self.floor!r}, ceiling={self.ceiling!r}: need 0 < floor <= ceiling")

    def __call__(self, x0: Tensor, at: At) -> Tensor:
        # a quantile with linear interpolation; torch.quantile refuses more than 2^24 elements
        flat = x0.flatten(1).abs().sort(dim=1).values
        position = self.ratio * (flat.shape[1] - 1)
        low = int(position)
        high = min(low + 1, flat.shape[1] - 1)
        s = torch.lerp(flat[:, low], flat[:, high], position - low).clamp(self.floor, self.ceiling)
        s = s.reshape(-1, *[1] * (x0.ndim - 1))
        return torch.maximum(torch.minimum(x0, s), -s) / s


@dataclass(frozen=True)
class Inpaint:
    """Keep what is known: ``x0 = mask * known + (1 - mask) * x0``.

    ``mask`` (1 = known) and ``known`` broadcast against a sample, or have one entry a sample of the call.
    """

    mask: Tensor
    known: Tensor

    def __call__(self, x0: Tensor, at: At) -> Tensor:
        mask, known = (self._mine(v, x0, at).to(x0) for v in (self.mask, self.known))
        return torch.lerp(x0, known.expand_as(x0), mask.expand_as(x0))

    @staticmethod
    def _mine(value: Tensor, x0: Tensor, at: At) -> Tensor:
        per_sample = value.ndim == x0.ndim and value.shape[0] > 1
        return value[at.samples] if per_sample else value
