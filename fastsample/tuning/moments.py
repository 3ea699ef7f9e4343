"""Moments of features that a plan's samples shall have: the Frechet distance as a sum of squares."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from .objective import Features

LARGEST = 512
_LEAST = 1e-3  # of the largest eigenvalue: directions without variance in the data weigh no more


@dataclass(frozen=True)
class Moments:
    """The mean and covariance that features of the samples shall have.

    Near the target ``(m, S)``, with ``S = V diag(l) V^T``, the squared Frechet distance of ``(m + dm, S + dS)`` is
    ``|dm|^2 + sum_ij (V^T dS V)_ij^2 / (2 (l_i + l_j))`` to second order (the Bures metric; Bhatia, Jain & Lim
    2019, arXiv:1712.01504): a sum of squares, as least squares needs.

    Args:
        features: a function of samples (B, ...), with outputs (B, d).
        mean, cov: the data's (d,) and (d, d).
        weight: how much the squares count beside the trajectories' squared error, each in units of the least that a
            training-free solver has at that number of steps.

    Raises:
        ValueError: shapes that do not fit, more than 512 features, a weight that is not positive.
    """

    features: Features
    mean: Tensor
    cov: Tensor
    weight: float = 1.0

    def __post_init__(self) -> None:
        d = len(self.mean)
        if self.mean.ndim != 1 or self.cov.shape != (d, d):
            raise ValueError(
                f"match: mean (d,) and cov (d, d) are needed, got {tuple(self.mean.shape)} and "
                f"{tuple(self.cov.shape)}"
            )
        if d > LARGEST:
            raise ValueError(
                f"match: {d} features are more than {LARGEST}, and their moments' derivatives would not fit in "
                "memory; decide by the distance with select= instead"
            )
        if not self.weight > 0:
            raise ValueError(f"match: weight={self.weight!r} must be positive; without match= it is none")

    @property
    def key(self) -> list[str | float]:
        """What tells two targets apart."""
        content = torch.cat([self.mean.flatten(), self.cov.flatten()]).double().cpu().numpy().tobytes()
        return [hashlib.sha256(content).hexdigest()[:16], self.weight]

    def of(self, x: Tensor) -> Tensor:
        """Features of samples, float64 (B, d)."""
        found = self.features(x).double()
        if found.shape != (len(x), len(self.mean)):
            raise ValueError(
                f"match: features gave shape {tuple(found.shape)} for {len(x)} samples, and the mean has "
                f"{len(self.mean)} entries; (B, d) is needed"
            )
        return found

    def residual(self, sums: Tensor) -> Tensor:
        """The residual (d + d^2,), from the sums of :func:`summed_moments`."""
        n, first, second = split(sums, len(self.mean))
        mean = first / n
        return self._weighted(mean - self.mean.to(mean), second / n - torch.outer(mean, mean), self.cov)

    def jacobian(self, sums: Tensor, changes: Tensor) -> Tensor:
        """The residual's derivatives (P, d + d^2), from the sums and those of :func:`summed_changes` (P, ...)."""
        d = len(self.mean)
        n, first, _ = split(sums, d)
        mean, dmean, dsecond = (
            first / n,
            changes[:, :d] / n,
            changes[:, d:].reshape(-1, d, d) / n,
        )
        cross = dmean[:, :, None] * mean
        return self._weighted(dmean, dsecond - cross - cross.transpose(1, 2), torch.zeros_like(self.cov))

    def _weighted(self, dmean: Tensor, cov: Tensor, target: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(self.cov.double())
        values = values.clamp(min=_LEAST * float(values[-1]))
        scale = (2 * (values[:, None] + values)).rsqrt()
        difference = vectors.T @ (cov - target.to(cov)) @ vectors * scale
        return torch.cat([dmean, difference.flatten(-2)], dim=-1)


def split(sums: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number, sum (d,) and sum of outer products (d, d)."""
    return sums[0], sums[1 : 1 + d], sums[1 + d :].reshape(d, d)


def summed_moments(f: Tensor) -> Tensor:
    """Number, sum and sum of outer products of features (B, d), in one vector: adds up over batches."""
    return torch.cat([f.new_tensor([len(f)]), f.sum(0), (f.T @ f).flatten()]).cpu()


def summed_changes(f: Tensor, df: Tensor) -> Tensor:
    """The derivatives of sum and sum of outer products for features (B, d) that change by ``df`` (B, d)."""
    product = df.T @ f
    return torch.cat([df.sum(0), (product + product.T).flatten()]).cpu()
