"""Streaming first and second moments of features, kept in groups for the jackknife.

A set of N feature vectors is reduced to ``groups`` partial sums (n_g, sum x, sum x xᵀ) in float64, in one
pass and in memory that does not depend on N: ``8 * groups * d * (d + 1)`` bytes (0.7 GB at d = 2048, 0.7 MB
at d = 64). Sums of different machines or chunks are merged by addition.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GROUPS", "Gaussian", "GroupedMoments"]

GROUPS = 20
"""Number of jackknife groups: the interval's t quantile is within 7% of the normal one."""

_SCHEMA = "fastsample.moments/1"


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a set of feature vectors.

    Attributes:
        mean: float64 ``[d]``.
        cov: float64 ``[d, d]``, normalised by ``n - 1``.
        n: number of vectors behind the numbers; None where a file of foreign statistics does not say.
    """

    mean: Tensor
    cov: Tensor
    n: int | None = None

    def __post_init__(self) -> None:
        d = self.mean.shape[0] if self.mean.ndim == 1 else -1
        if self.cov.shape != (d, d):
            raise ValueError(
                f"cov: a [d, d] matrix for a mean of [d] is needed, got mean {tuple(self.mean.shape)} "
                f"and cov {tuple(self.cov.shape)}"
            )
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.cov).all()):
            raise ValueError("mean/cov: non-finite values; check the features for NaN")

    @property
    def dim(self) -> int:
        """Feature dimension d."""
        return self.mean.shape[0]


class GroupedMoments:
    """Partial sums of feature vectors in ``groups`` groups; sample i belongs to group ``i mod groups``.

    The group depends on the sample's global index alone, so the sums do not depend on batch size, order or
    number of machines (beyond rounding). The jackknife needs groups that are exchangeable: do not let a
    sample's content depend on ``i mod groups`` (labels that cycle with the index, for example).

    Args:
        dim: feature dimension d.
        groups: number of groups G, at least 2.
        device: where the sums are kept; float64 products run there.
    """

    def __init__(self, dim: int, groups: int = GROUPS, device: torch.device | str = "cpu") -> None:
        if dim < 1:
            raise ValueError(f"dim: at least 1 is needed, got {dim}")
        if groups < 2:
            raise ValueError(f"groups: the jackknife needs at least 2, got {groups}")
        self.counts = torch.zeros(groups, dtype=torch.int64)
        self.sums = torch.zeros(groups, dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(groups, dim, dim, dtype=torch.float64, device=device)

    @property
    def dim(self) -> int:
        """Feature dimension d."""
        return self.sums.shape[1]

    @property
    def groups(self) -> int:
        """Number of groups G."""
        return self.sums.shape[0]

    @property
    def n(self) -> int:
        """Number of vectors seen."""
        return int(self.counts.sum())

    def update(self, features: Tensor, index: Tensor | range) -> None:
        """Add a batch.

        Args:
            features: ``[B, d]``, any float dtype (converted to float64 before any product).
            index: the samples' global indices, ``[B]`` integers.

        Raises:
            ValueError: on a wrong shape, or on non-finite features (the first such sample is named).
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features: shape [B, {self.dim}] is needed, got {tuple(features.shape)}")
        i = torch.as_tensor(index, dtype=torch.int64)
        if i.shape != features.shape[:1]:
            raise ValueError(
                f"index: one integer for each of {len(features)} rows is needed, got {tuple(i.shape)}"
            )
        x = features.detach().to(self.sums.device, torch.float64)
        finite = torch.isfinite(x).all(dim=1).cpu()
        if not finite.all():
            raise ValueError(f"features: non-finite values, first at sample index {int(i[~finite][0])}")
        group = i % self.groups
        for g in group.unique().tolist():
            members = x[(group == g).to(x.device)]
            self.counts[g] += len(members)
            self.sums[g] += members.sum(0)
            self.outer[g].addmm_(members.T, members)

    def merge(self, other: GroupedMoments) -> GroupedMoments:
        """Add the sums of another part of the same set (disjoint indices); returns self."""
        if (other.groups, other.dim) != (self.groups, self.dim):
            raise ValueError(
                f"other: {self.groups} groups of dimension {self.dim} are needed, "
                f"got {other.groups} of dimension {other.dim}"
            )
        self.counts += other.counts
        self.sums += other.sums.to(self.sums.device)
        self.outer += other.outer.to(self.outer.device)
        return self

    def gaussian(self, without: int | None = None) -> Gaussian:
        """Mean and covariance of all groups, or of all but group ``without``.

        Raises:
            ValueError: if fewer than two vectors remain.
        """
        n = self.n
        sums, outer = self.sums.sum(0), self.outer.sum(0)
        if without is not None:
            n -= int(self.counts[without])
            sums -= self.sums[without]
            outer -= self.outer[without]
        if n < 2:
            raise ValueError(f"a covariance needs at least 2 vectors, got {n}")
        mean = sums / n
        cov = outer.addr_(sums, mean, alpha=-1).div_(n - 1)
        return Gaussian(mean.cpu(), cov.cpu(), n)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sums as safetensors, atomically; ``load`` gives the same bits back."""
        from safetensors.torch import save

        from fastsample.plan import write_atomically

        tensors = {"counts": self.counts, "sums": self.sums.cpu(), "outer": self.outer.cpu()}
        write_atomically(path, save(tensors, metadata={"schema": _SCHEMA}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GroupedMoments:
        """Read what ``save`` wrote.

        Raises:
            ValueError: if the file is not one of these.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                if (file.metadata() or {}).get("schema") != _SCHEMA:
                    raise ValueError(f"path: {path} does not hold moments ({_SCHEMA})")
                counts, sums, outer = (file.get_tensor(k) for k in ("counts", "sums", "outer"))
        except SafetensorError as error:
            raise ValueError(f"path: {path} is not a readable safetensors file ({error})") from error
        self = cls(sums.shape[1], sums.shape[0])
        self.counts, self.sums, self.outer = counts, sums, outer
        return self
