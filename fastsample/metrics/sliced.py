"""The sliced 2-Wasserstein distance of samples, by random projections (Bonneel et al. 2015)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsample.metrics.frechet import FrechetEstimate
from fastsample.metrics.statistics import GROUPS
from fastsample.noise import normal

__all__ = ["SlicedReference", "sliced_wasserstein"]


class SlicedReference:
    """One side of the distance: its projections, sorted once.

    Args:
        projections: ``[M, P]``, of ``project``.
    """

    def __init__(self, projections: Tensor) -> None:
        self._sorted = projections.double().sort(dim=0).values

    def distance(self, projections: Tensor, index: Tensor | range | None = None) -> FrechetEstimate:
        """The distance of samples to this reference, with its jackknife error and its bias left in.

        Args:
            projections: ``[N, P]`` of the samples, N at least 40.
            index: the samples' global indices; groups of the jackknife are ``index mod 20``.

        Raises:
            ValueError: too few samples, or an empty group.
        """
        n = len(projections)
        if n < 2 * GROUPS:
            raise ValueError(f"projections: {n} samples are too few; at least {2 * GROUPS} are needed")
        group = torch.as_tensor(range(n) if index is None else index, dtype=torch.int64) % GROUPS
        ordered, order = projections.double().to(self._sorted.device).sort(dim=0)
        members = group.to(order.device)[order]  # [N, P], the group of each sorted value
        sizes = torch.bincount(group, minlength=GROUPS)
        count = projections.shape[1]
        without = [
            # the others stay in order; each column loses the same number of values
            self._root(ordered.T[(members != g).T].reshape(count, n - int(sizes[g])).T)
            for g in range(GROUPS)
        ]
        leave_one_out = torch.tensor(without, dtype=torch.float64)
        return FrechetEstimate.jackknifed(self._root(ordered), leave_one_out, sizes, corrected=False)

    def _root(self, ordered: Tensor) -> float:
        return math.sqrt(float(_squared(ordered, self._sorted).mean()))


def project(samples: Tensor, projections: int = 256, seed: int = 0) -> Tensor:
    """Samples along random directions.

    Args:
        samples: (N, ...).
        projections, seed: the directions, the same for all sets of one shape.

    Returns:
        float64 ``[N, projections]``.
    """
    x = samples.flatten(1).double()
    directions = normal((projections, x.shape[1]), seed, torch.arange(projections), dtype=torch.float64)
    return x @ (directions / directions.norm(dim=1, keepdim=True)).to(x.device).T


def sliced_wasserstein(samples: Tensor, reference: Tensor, projections: int = 256, seed: int = 0) -> float:
    """The root mean square over random directions of the Wasserstein distance between the projections.

    Args:
        samples, reference: (N, ...) and (M, ...) of one shape of sample; N and M may differ.
        projections, seed: the random directions.

    Raises:
        ValueError: shapes that do not fit.
    """
    if samples.shape[1:] != reference.shape[1:] or min(len(samples), len(reference)) < 1:
        raise ValueError(
            "samples, reference: samples of one shape are needed, got "
            f"{tuple(samples.shape)} and {tuple(reference.shape)}"
        )
    x, y = (project(v.to(samples.device), projections, seed).sort(dim=0).values for v in (samples, reference))
    return math.sqrt(float(_squared(x, y).mean()))


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared 2-Wasserstein distances ``[P]`` between the columns of sorted ``[N, P]`` and ``[M, P]``.

    Quantile functions are constant between multiples of 1/N and of 1/M: the integral over the union of these
    intervals is exact.
    """
    n, m = len(a), len(b)
    if n == m:
        return (a - b).square().mean(0)
    edges = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique()  # in units of 1/(N M)
    left, width = edges[:-1], edges.diff().to(a) / (n * m)
    i, j = (left // m).to(a.device), (left // n).to(a.device)
    return width @ (a[i] - b[j]).square()
