"""Are samples nearer to the training images than to images that the model has never seen?

Two numbers, both from Euclidean nearest neighbours in pixel space:

- ``ratio``: mean distance of a sample to its nearest training image over the mean distance to its nearest
  held-out image. Nearest neighbours come closer as the set grows, so the larger split is cut into disjoint
  parts of the smaller one's size and the distances are averaged over the parts. About 1 for a model that has
  learned the distribution; towards 0 for one that repeats its training set.
- ``copies``: the fraction of samples whose nearest training image is less than a third as far away as the
  second nearest (Yoon, Choi, Kwon & Ryu 2023, "Diffusion probabilistic models generalize when they fail to
  memorize", sec. 3).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fastsample.metrics.statistics import GROUPS

__all__ = ["Memorisation", "memorisation"]

_COPY_THRESHOLD = 1 / 3
_BLOCK = 1024


@dataclass(frozen=True)
class Memorisation:
    """Result of ``memorisation``.

    Attributes:
        ratio: size-matched nearest-neighbour distance to the training set over that to the held-out set.
        ratio_se: standard error of ``ratio`` over the samples (delete-a-group jackknife).
        copies: fraction of samples that are near-copies of one training image.
        n: number of samples.
    """

    ratio: float
    ratio_se: float
    copies: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """Plain Python values, for JSON."""
        return asdict(self)


def memorisation(samples: Tensor, train: Tensor, heldout: Tensor) -> Memorisation:
    """Nearest-neighbour memorisation of ``samples`` with respect to a training and a held-out set.

    Args:
        samples: generated images ``[N, ...]``, N at least 20.
        train: training images ``[T, ...]``, T at least 2, in the same units.
        heldout: images from the same source that the model was not trained on, ``[H, ...]``.

    Raises:
        ValueError: on shapes that do not agree or sets that are too small.
    """
    if samples.shape[1:] != train.shape[1:] or samples.shape[1:] != heldout.shape[1:]:
        raise ValueError(
            "samples, train, heldout: images of one shape are needed, got "
            f"{tuple(samples.shape[1:])}, {tuple(train.shape[1:])}, {tuple(heldout.shape[1:])}"
        )
    if len(samples) < GROUPS or len(train) < 2 or len(heldout) < 1:
        raise ValueError(
            f"samples, train, heldout: at least {GROUPS}, 2 and 1 images are needed, "
            f"got {len(samples)}, {len(train)}, {len(heldout)}"
        )
    x, a, b = (v.detach().to("cpu", torch.float64).flatten(1) for v in (samples, train, heldout))
    size = min(len(a), len(b))
    near_train, near_heldout, two = (
        torch.cat(parts)
        for parts in zip(*(_of_block(rows, a, b, size) for rows in x.split(_BLOCK)), strict=True)
    )
    first, second = two.unbind(1)

    if float(near_heldout.sum()) == 0:
        raise ValueError("heldout: every sample equals a held-out image, so the ratio is not defined")
    group = torch.arange(len(x)) % GROUPS
    leave_one_out = torch.stack(
        [near_train[group != g].sum() / near_heldout[group != g].sum() for g in range(GROUPS)]
    )
    se = (leave_one_out - leave_one_out.mean()).square().mean().mul(GROUPS - 1).sqrt()
    return Memorisation(
        ratio=float(near_train.sum() / near_heldout.sum()),
        ratio_se=float(se),
        copies=float((first < _COPY_THRESHOLD * second).double().mean()),
        n=len(x),
    )


def _of_block(x: Tensor, train: Tensor, heldout: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of some samples: the size-matched nearest distances to both splits, and the two nearest training images."""
    to_train, to_heldout = torch.cdist(x, train), torch.cdist(x, heldout)
    two = to_train.topk(2, largest=False).values
    return _matched_nearest(to_train, size), _matched_nearest(to_heldout, size), two


def _matched_nearest(distances: Tensor, size: int) -> Tensor:
    """Each row's least distance in a set of ``size`` images, averaged over disjoint parts of the columns."""
    parts = distances.shape[1] // size
    nearest = [distances[:, p::parts][:, :size].amin(dim=1) for p in range(parts)]
    return torch.stack(nearest).mean(0)
