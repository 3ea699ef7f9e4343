"""Maximum mean discrepancies of features (KID, CMMD) and the sliced Wasserstein distance of samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsample.errors import unknown
from fastsample.metrics.frechet import FrechetEstimate, jackknife
from fastsample.metrics.statistics import GROUPS
from fastsample.noise import normal

__all__ = ["kernel_distance", "sliced_wasserstein"]

_CMMD_SIGMA = 10.0


def _polynomial(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _gaussian(x: Tensor, y: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(x, y).square() / (2 * _CMMD_SIGMA**2))


_KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"polynomial": _polynomial, "gaussian": _gaussian}


def kernel_distance(
    features: Tensor, reference: Tensor, index: Tensor | range | None = None, kernel: str = "polynomial"
) -> FrechetEstimate:
    """The unbiased squared maximum mean discrepancy to a reference set, with its jackknife error.

    With the polynomial kernel ``(x . y / d + 1)^3`` this is KID (Binkowski et al. 2018, section 4) over the whole
    sets instead of random subsets; with the Gaussian one of width 10 on normalised CLIP features it is CMMD
    (Jayasumana et al. 2024, eq. 4) without their factor 1000. Kernels are summed in blocks: memory is that of
    one block of a twentieth of the samples.

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
    if kernel not in _KERNELS:
        raise unknown("kernel", kernel, _KERNELS)
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features, reference: [n, d] and [m, d] are needed, got {tuple(features.shape)} and "
            f"{tuple(reference.shape)}"
        )
    n, d = features.shape
    m = len(reference)
    if n < 2 * GROUPS or m < 2:
        raise ValueError(
            f"features: {n} samples are too few; at least {2 * GROUPS} are needed (and 2 references)"
        )
    x, y = features.double(), reference.to(features.device).double()
    for name, values in (("features", x), ("reference", y)):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name}: values that are not finite")
    group = torch.as_tensor(range(n) if index is None else index, dtype=torch.int64) % GROUPS
    parts = [x[(group == g).to(x.device)] for g in range(GROUPS)]
    sizes = torch.tensor([len(p) for p in parts])
    if int(sizes.min()) < 1:
        raise ValueError(f"index: a jackknife group is empty; give consecutive indices, at least {GROUPS}")
    k = _KERNELS[kernel]
    within = torch.zeros(
        GROUPS, GROUPS, dtype=torch.float64
    )  # sums over pairs, a sample with itself left out
    across = torch.zeros(GROUPS, dtype=torch.float64)
    for g, a in enumerate(parts):
        for h in range(g, GROUPS):
            block = k(a, parts[h])
            total = block.sum() - (block.diagonal().sum() if g == h else 0)
            within[g, h] = within[h, g] = float(total)
        across[g] = sum(float(k(a, b).sum()) for b in y.split(4096))
    own = 0.0
    chunks = y.split(4096)
    for i, a in enumerate(chunks):
        for b in chunks[i:]:
            block = k(a, b)
            own += float(block.sum() - block.diagonal().sum()) if a is b else 2 * float(block.sum())

    def statistic(pairs: Tensor, cross: Tensor, count: Tensor) -> Tensor:
        return pairs / (count * (count - 1)) + own / (m * (m - 1)) - 2 * cross / (count * m)

    whole = float(statistic(within.sum(), across.sum(), sizes.sum()))
    left = within.sum() - 2 * within.sum(1) + within.diagonal()
    without = statistic(left, across.sum() - across, sizes.sum() - sizes)
    value, se = jackknife(whole, without, sizes)
    return FrechetEstimate(value, se, whole, n, d, tuple(without.tolist()), tuple(sizes.tolist()))


def sliced_wasserstein(samples: Tensor, reference: Tensor, projections: int = 256, seed: int = 0) -> float:
    """The sliced 2-Wasserstein distance (Bonneel et al. 2015): the root mean square over random directions of the
    distance between the projections.

    Args:
        samples, reference: (N, ...) and (M, ...) of one shape of sample; unequal N and M are compared by
            quantiles.
        projections, seed: the random directions.

    Raises:
        ValueError: shapes that do not fit.
    """
    if samples.shape[1:] != reference.shape[1:] or min(len(samples), len(reference)) < 1:
        raise ValueError(
            "samples, reference: samples of one shape are needed, got "
            f"{tuple(samples.shape)} and {tuple(reference.shape)}"
        )
    x, y = samples.flatten(1).double(), reference.to(samples.device).flatten(1).double()
    directions = normal((projections, x.shape[1]), seed, torch.arange(projections), dtype=torch.float64)
    directions = (directions / directions.norm(dim=1, keepdim=True)).to(x.device)
    a, b = (torch.sort(v @ directions.T, dim=0).values for v in (x, y))
    if len(a) != len(b):
        count = max(len(a), len(b))
        at = ((torch.arange(count, dtype=torch.float64, device=x.device) + 0.5) / count).clamp(0, 1)
        a, b = (torch.quantile(v, at, dim=0) for v in (a, b))
    return float((a - b).square().mean().sqrt())
