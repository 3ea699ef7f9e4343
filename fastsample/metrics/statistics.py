"""Streaming first and second moments of features, kept in groups for the jackknife.

A set of N feature vectors is reduced to ``groups`` partial sums (n_g, sum x, sum x xᵀ) in float64, in one
pass and in memory that does not depend on N: ``8 * groups * d * (d + 1)`` bytes (0.7 GB at d = 2048, 0.7 MB
at d = 64). Sums of different machines or chunks are merged by addition.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GROUPS", "Gaussian", "GroupSums", "GroupedMoments", "Rows", "read_sealed", "write_sealed"]

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` with ``mu`` and ``sigma``, as EDM, ADM, pytorch-fid and clean-fid read it, atomically."""
        import numpy as np

        from fastsample.plan import write_atomically

        content = io.BytesIO()
        np.savez(content, mu=self.mean.numpy(), sigma=self.cov.numpy())
        write_atomically(path, content.getvalue())


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
        i = _checked_index(features, index)
        x = features.detach().to(self.sums.device, torch.float64)
        group = i % self.groups
        for g in group.unique().tolist():
            members = x[(group == g).to(x.device)]
            self.counts[g] += len(members)
            self.sums[g] += members.sum(0)
            self.outer[g].addmm_(members.T, members)

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Replace each partial sum by ``total`` of it: the sum over the processes of a launched run, say."""
        self.counts, self.sums, self.outer = map(total, (self.counts, self.sums, self.outer))

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
        write_sealed(
            path,
            _SCHEMA,
            {"counts": self.counts, "sums": self.sums.cpu(), "outer": self.outer.cpu()},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GroupedMoments:
        """Read what ``save`` wrote.

        Raises:
            ValueError: if the file is not one of these.
        """
        tensors = read_sealed(path, _SCHEMA)
        self = cls(tensors["sums"].shape[1], tensors["sums"].shape[0])
        self.counts, self.sums, self.outer = (tensors[k] for k in ("counts", "sums", "outer"))
        return self


class GroupSums:
    """Sums of per-sample values in groups: all that a function of means needs, in constant memory.

    Args:
        width: number w of values of a sample.
        groups: number of groups G; sample i belongs to group ``i mod groups``.
    """

    def __init__(self, width: int, groups: int = GROUPS) -> None:
        self.counts = torch.zeros(groups, dtype=torch.int64)
        self.sums = torch.zeros(groups, width, dtype=torch.float64)

    def update(self, values: Tensor, index: Tensor | range) -> None:
        """Add a batch.

        Args:
            values: ``[B, w]``.
            index: the samples' global indices, ``[B]`` integers.

        Raises:
            ValueError: on a wrong shape, or on non-finite values (the first such sample is named).
        """
        group = _checked_index(values, index) % len(self.counts)
        self.counts += torch.bincount(group, minlength=len(self.counts))
        self.sums.index_add_(0, group, values.detach().to("cpu", torch.float64))

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """As :meth:`GroupedMoments.reduce`."""
        self.counts, self.sums = total(self.counts), total(self.sums)

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean values ``[w]`` of all samples, and ``[G, w]`` of those without each group."""
        n, sums = self.counts.sum(), self.sums.sum(0)
        return sums / n, (sums - self.sums) / (n - self.counts)[:, None]


class Rows:
    """Values of the first n samples, kept as they are (float32), for statistics of pairs or ranks of samples.

    Args:
        n: number of samples kept; ``4 n w`` bytes.
        width: number w of values of a sample.
    """

    def __init__(self, n: int, width: int) -> None:
        self.values = torch.zeros(n, width)

    def update(self, values: Tensor, index: Tensor | range) -> None:
        """Keep what belongs to the first n samples of a batch.

        Args:
            values: ``[B, w]``.
            index: the samples' global indices, ``[B]`` integers.

        Raises:
            ValueError: on a wrong shape, or on non-finite values (the first such sample is named).
        """
        i = _checked_index(values, index)
        kept = i < len(self.values)
        self.values[i[kept]] = values.detach().to("cpu", torch.float32)[kept]

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """As :meth:`GroupedMoments.reduce`; rows of other processes are zero here."""
        self.values = total(self.values)


def _checked_index(values: Tensor, index: Tensor | range) -> Tensor:
    i = torch.as_tensor(index, dtype=torch.int64)
    if i.shape != values.shape[:1]:
        raise ValueError(f"index: one integer for each of {len(values)} rows is needed, got {tuple(i.shape)}")
    finite = torch.isfinite(values).all(dim=1).cpu()
    if not finite.all():
        raise ValueError(f"features: non-finite values, first at sample index {int(i[~finite][0])}")
    return i


def write_sealed(path: str | os.PathLike[str], schema: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors with a digest of their content, atomically."""
    from safetensors.torch import save

    from fastsample.plan import write_atomically

    ready = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(ready, metadata={"schema": schema, "sha256": _content_sha256(ready)}))


def read_sealed(path: str | os.PathLike[str], schema: str) -> dict[str, Tensor]:
    """Read what :func:`write_sealed` wrote.

    Raises:
        ValueError: if the file is not one of these, or its content was altered.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("schema") != schema:
                raise ValueError(
                    f"path: {path} does not hold {schema.split('.')[1].split('/')[0]} ({schema})"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"path: {path} is not a readable safetensors file ({error})") from error
    if metadata.get("sha256") != _content_sha256(tensors):
        raise ValueError(f"path: {path} was altered: its checksum does not match")
    return tensors


def _content_sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
