"""Maximum mean discrepancies of features: KID and CMMD."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsample.errors import unknown
from fastsample.metrics.frechet import FrechetEstimate
from fastsample.metrics.statistics import GROUPS

__all__ = ["KernelReference", "kernel_distance"]

_CMMD_SIGMA = 10.0
_BLOCK = 4096


def _polynomial(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _gaussian(x: Tensor, y: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(x, y).square() / (2 * _CMMD_SIGMA**2))


_KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"polynomial": _polynomial, "gaussian": _gaussian}


class KernelReference:
    """One side of a kernel distance; the sum over its own pairs is taken once.

    Args:
        features: (m, d), any float dtype, taken as exact.
        kernel: "polynomial" or "gaussian".

    Raises:
        ValueError: a wrong shape, fewer than two rows, an unknown kernel, values that are not finite.
    """

    def __init__(self, features: Tensor, kernel: str = "polynomial") -> None:
        if kernel not in _KERNELS:
            raise unknown("kernel", kernel, _KERNELS)
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"reference: [m, d] with m at least 2 is needed, got {tuple(features.shape)}")
        self.kernel, self.features = _KERNELS[kernel], _finite("reference", features)
        chunks = self.features.split(_BLOCK)
        self.own = 0.0  # over ordered pairs of different rows
        for i, a in enumerate(chunks):
            for b in chunks[i:]:
                block = self.kernel(a, b)
                self.own += float(block.sum() - block.diagonal().sum()) if a is b else 2 * float(block.sum())

    def distance(self, features: Tensor, index: Tensor | range | None = None) -> FrechetEstimate:
        """The discrepancy of samples to this reference; see :func:`kernel_distance`."""
        m, d = self.features.shape
        if features.ndim != 2 or features.shape[1] != d:
            raise ValueError(
                f"features, reference: [n, d] and [m, d] are needed, got {tuple(features.shape)} and {(m, d)}"
            )
        n = len(features)
        if n < 2 * GROUPS:
            raise ValueError(f"features: {n} samples are too few; at least {2 * GROUPS} are needed")
        x, y, k = _finite("features", features).to(self.features.device), self.features, self.kernel
        group = torch.as_tensor(range(n) if index is None else index, dtype=torch.int64) % GROUPS
        parts = [x[(group == g).to(x.device)] for g in range(GROUPS)]
        sizes = torch.tensor([len(p) for p in parts])
        within = torch.zeros(GROUPS, GROUPS, dtype=torch.float64)  # pairs of different samples
        across = torch.zeros(GROUPS, dtype=torch.float64)
        for g, a in enumerate(parts):
            for h in range(g, GROUPS):
                block = k(a, parts[h])
                total = block.sum() - (block.diagonal().sum() if g == h else 0)
                within[g, h] = within[h, g] = float(total)
            across[g] = sum(float(k(a, b).sum()) for b in y.split(_BLOCK))

        def statistic(pairs: Tensor, cross: Tensor, count: Tensor) -> Tensor:
            return pairs / (count * (count - 1)) + self.own / (m * (m - 1)) - 2 * cross / (count * m)

        whole = float(statistic(within.sum(), across.sum(), sizes.sum()))
        left = within.sum() - 2 * within.sum(1) + within.diagonal()
        without = statistic(left, across.sum() - across, sizes.sum() - sizes)
        return FrechetEstimate.jackknifed(whole, without, sizes, corrected=False)  # unbiased as it is


def kernel_distance(
    features: Tensor, reference: Tensor, index: Tensor | range | None = None, kernel: str = "polynomial"
) -> FrechetEstimate:
    """The unbiased squared maximum mean discrepancy to a reference set, with its jackknife error.

    With the polynomial kernel ``(x . y / d + 1)^3`` this is KID (Binkowski et al. 2018, section 4) over the whole
    sets instead of random subsets; with the Gaussian one of width 10 on normalised CLIP features it is CMMD
    (Jayasumana et al. 2024, eq. 4) without their factor 1000, and without the pairs of a sample with itself that
    their code keeps. Kernels are summed in blocks: memory is that of one block of a twentieth of the samples.

    Args:
        features: (n, d) of the samples, any float dtype.
        reference: (m, d), taken as exact.
        index: the samples' global indices; groups of the jackknife are ``index mod 20``.
        kernel: "polynomial" or "gaussian".

    Returns:
        The estimate; differences of two from the same noise are paired by
        :func:`fastsample.metrics.paired_difference`.

    Raises:
        ValueError: shapes that do not fit, too few samples for the groups, an unknown kernel, values that are
            not finite.
    """
    return KernelReference(reference, kernel).distance(features, index)


def _finite(name: str, values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name}: values that are not finite")
    return values.double()
