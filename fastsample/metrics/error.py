"""Error of samples against a reference solution from the same noise."""

from __future__ import annotations

from torch import Tensor

__all__ = ["rmse"]


def rmse(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """Root-mean-square error over everything, and the median over samples of each sample's own.

    A few samples that end in another mode dominate the first number and leave the second alone.

    Args:
        samples: ``[N, ...]``, N at least 1.
        reference: the same shape; row i started from the same noise as row i of ``samples``.

    Raises:
        ValueError: if the shapes differ or there are no samples.
    """
    if samples.shape != reference.shape or samples.shape[:1] in ((), (0,)):
        raise ValueError(
            "samples, reference: equal, non-empty shapes [N, ...] are needed, "
            f"got {tuple(samples.shape)} and {tuple(reference.shape)}"
        )
    square = (samples.double() - reference.to(samples.device).double()).square().flatten(1).mean(1)
    return float(square.mean().sqrt()), float(square.sqrt().quantile(0.5))
