"""The Fréchet distance between Gaussians fitted to features, and how uncertain it is.

    FD(a, b) = |mu_a - mu_b|² + tr(S_a) + tr(S_b) - 2 tr (S_a S_b)^(1/2)

(Dowson & Landau 1982; Heusel et al. 2017, arXiv:1706.08500, eq. 6). With a factor S_b = L Lᵀ the last trace
is the sum of the square roots of the eigenvalues of the symmetric Lᵀ S_a L, which stays exact for covariances
of deficient rank and needs r x r matrices only, r the rank of S_b.

Computed from n samples the distance is too large by about c/n (Chong & Forsyth 2020, arXiv:1911.07023).
The delete-a-group jackknife removes that bias and gives the standard error; the bootstrap does not work here,
because resampling adds the very bias once more. The formulas for groups of unequal size are those of Busing,
Meijer & van der Leeden 1999, "Delete-m jackknife for unequal m", eqs. 4 to 8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastsample.metrics.statistics import Gaussian, GroupedMoments

__all__ = [
    "RELIABLE_RATIO",
    "Difference",
    "FrechetEstimate",
    "FrechetReference",
    "average",
    "estimate",
    "frechet_distance",
    "minimum_samples",
    "paired_difference",
]

RELIABLE_RATIO = 24
"""Samples per feature dimension from which estimate ± 2 standard errors covered the truth 95% of the time."""


def minimum_samples(dim: int) -> int:
    """Fewest samples for which a Fréchet distance in ``dim`` dimensions is computed at all: d + 1."""
    return dim + 1


class FrechetReference:
    """One side of the distance, factored once and used for many comparisons.

    Args:
        gaussian: the reference's moments, taken as exact (as is usual: FID is a distance *to this data set*).
    """

    def __init__(self, gaussian: Gaussian) -> None:
        self.gaussian = gaussian
        w, v = torch.linalg.eigh(gaussian.cov.to(torch.float64))
        keep = w > w[-1].clamp(min=0) * gaussian.dim * torch.finfo(torch.float64).eps
        self._factor = v[:, keep] * w[keep].sqrt()  # S = L Lᵀ, [d, r]
        self._trace = float(w[keep].sum())

    def distance(self, other: Gaussian) -> float:
        """Fréchet distance of ``other`` to the reference (squared-length units of the features).

        Raises:
            ValueError: if the dimensions differ.
        """
        if other.dim != self.gaussian.dim:
            raise ValueError(f"other: dimension {self.gaussian.dim} is needed, got {other.dim}")
        gram = self._factor.T @ other.cov @ self._factor
        root = torch.linalg.eigvalsh((gram + gram.T) / 2).clamp(min=0).sqrt().sum()
        shift = (other.mean - self.gaussian.mean).square().sum()
        return float(shift + other.cov.trace() + self._trace - 2 * root)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Fréchet distance between two Gaussians; covariances may be of deficient rank.

    Raises:
        ValueError: if the dimensions differ.
    """
    return FrechetReference(b).distance(a)


@dataclass(frozen=True)
class FrechetEstimate:
    """A Fréchet distance, or another statistic of the samples, with its jackknife error.

    Attributes:
        value: the estimate; a bias-corrected distance may be slightly negative where the truth is near zero.
        se: its standard error.
        plain: the statistic as usually reported, bias included.
        n: number of samples.
        dim: dimension d of the features whose covariance was fitted; None for statistics that fit none.
        leave_one_out: plain statistic without group g, for each group; with ``sizes`` all that paired
            differences need, so that no covariance has to be kept.
        sizes: number of samples in each group.
        corrected: whether the bias is removed from ``value``; else it is ``plain`` (statistics whose very
            definition depends on the number of samples).
    """

    value: float
    se: float
    plain: float
    n: int
    dim: int | None
    leave_one_out: tuple[float, ...]
    sizes: tuple[int, ...]
    corrected: bool = True

    def scaled(self, factor: float) -> FrechetEstimate:
        """The same in other units."""
        leave_one_out = tuple(factor * v for v in self.leave_one_out)
        scaled = {name: factor * getattr(self, name) for name in ("value", "se", "plain")}
        return replace(self, leave_one_out=leave_one_out, **scaled)

    @property
    def reliable(self) -> bool:
        """Whether n/d is at least ``RELIABLE_RATIO``; below, the interval may be too narrow."""
        return self.dim is None or self.n >= RELIABLE_RATIO * self.dim

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, for JSON; ``from_dict`` reads them back."""
        return {
            "value": self.value,
            "se": self.se,
            "plain": self.plain,
            "n": self.n,
            "dim": self.dim,
            "reliable": self.reliable,
            "leave_one_out": list(self.leave_one_out),
            "sizes": list(self.sizes),
            "corrected": self.corrected,
        }

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> FrechetEstimate:
        """The inverse of ``to_dict``."""
        fields = {name: d[name] for name in ("value", "se", "plain", "n", "dim", "corrected")}
        return cls(leave_one_out=tuple(d["leave_one_out"]), sizes=tuple(d["sizes"]), **fields)

    @classmethod
    def jackknifed(
        cls,
        plain: float,
        leave_one_out: Tensor,
        sizes: Tensor,
        *,
        dim: int | None = None,
        corrected: bool = True,
    ) -> FrechetEstimate:
        """The estimate from the whole statistic and those without each group.

        Args:
            plain: of all samples.
            leave_one_out: ``[G]``, without each group.
            sizes: ``[G]``, the groups' sizes.
            dim, corrected: as the attributes.

        Raises:
            ValueError: if a group is empty.
        """
        if bool((sizes == 0).any()):
            raise ValueError(
                f"sample: a jackknife group is empty; at least one sample in each of {len(sizes)} is needed "
                "(give consecutive indices)"
            )
        value, se = jackknife(plain, leave_one_out.double(), sizes)
        n = int(sizes.sum())
        everything = tuple(leave_one_out.tolist()), tuple(sizes.tolist())
        return cls(value if corrected else plain, se, plain, n, dim, *everything, corrected)


@dataclass(frozen=True)
class Difference:
    """An estimated difference ``value`` with standard error ``se``."""

    value: float
    se: float

    @property
    def significant(self) -> bool:
        """Whether the difference is beyond two standard errors."""
        return abs(self.value) > 2 * self.se


def estimate(sample: GroupedMoments, reference: FrechetReference | Gaussian) -> FrechetEstimate:
    """Bias-corrected Fréchet distance of a sample to a fixed reference, with its standard error.

    One leave-one-out covariance is in memory at a time; the reference is factored once.

    Args:
        sample: grouped moments of the generated samples' features.
        reference: the other side, taken as exact.

    Raises:
        ValueError: if there are no more samples than dimensions (the number needed is named), if a group is
            empty, or if the dimensions differ.
    """
    if not isinstance(reference, FrechetReference):
        reference = FrechetReference(reference)
    n, d = sample.n, sample.dim
    if n < minimum_samples(d):
        raise ValueError(
            f"sample: {n} samples are too few for a Fréchet distance in {d} dimensions; at least "
            f"{minimum_samples(d)} are needed, {RELIABLE_RATIO * d} for a reliable interval"
        )
    plain = reference.distance(sample.gaussian())
    leave_one_out = [reference.distance(sample.gaussian(without=g)) for g in range(sample.groups)]
    return FrechetEstimate.jackknifed(
        plain, torch.tensor(leave_one_out, dtype=torch.float64), sample.counts, dim=d
    )


def paired_difference(a: FrechetEstimate, b: FrechetEstimate) -> Difference:
    """The statistic of a less that of b, for two samples from the same noise, measured against one reference.

    Both lose the same group at a time, so that what they share cancels: the standard error is that of the
    difference (several times smaller than for independent samples).

    Raises:
        ValueError: if the two were not made with the same number of samples in the same groups.
    """
    if (a.sizes, a.dim) != (b.sizes, b.dim):
        raise ValueError(
            "a, b: paired samples have the same groups and dimension, got "
            f"n={a.n}, d={a.dim} and n={b.n}, d={b.dim}"
        )
    delta = torch.tensor(a.leave_one_out, dtype=torch.float64) - torch.tensor(
        b.leave_one_out, dtype=torch.float64
    )
    value, se = jackknife(a.plain - b.plain, delta, torch.tensor(a.sizes))
    return Difference(value if a.corrected else a.plain - b.plain, se)


def average(differences: Sequence[Difference]) -> Difference:
    """Mean over independent seeds, with the standard error of the mean.

    Raises:
        ValueError: if there is nothing to average.
    """
    if not differences:
        raise ValueError("differences: at least one is needed")
    count = len(differences)
    value = math.fsum(x.value for x in differences) / count
    return Difference(value, math.sqrt(math.fsum(x.se**2 for x in differences)) / count)


def jackknife(whole: float, leave_one_out: Tensor, sizes: Tensor) -> tuple[float, float]:
    """Delete-m_j jackknife: bias-corrected value and standard error (Busing et al. 1999, eqs. 4 and 8)."""
    groups = len(sizes)
    n = sizes.sum().double()
    h = n / sizes
    value = groups * whole - ((1 - sizes / n) * leave_one_out).sum()
    pseudo = h * whole - (h - 1) * leave_one_out
    variance = ((pseudo - value).square() / (h - 1)).mean()
    return float(value), float(variance.sqrt())
