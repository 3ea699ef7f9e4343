"""Scores that are functions of means over samples: Inception score and peak signal-to-noise ratio."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastsample.metrics.frechet import FrechetEstimate
from fastsample.metrics.statistics import GroupSums

__all__ = ["inception_score", "of_means", "psnr"]


def of_means(
    sums: GroupSums, function: Callable[[Tensor], float], *, corrected: bool = False
) -> FrechetEstimate:
    """A function of the means of per-sample values, with its jackknife error.

    Args:
        sums: of the values.
        function: of the means ``[w]``.
        corrected: remove the bias that a curved function has.

    Raises:
        ValueError: if a group is empty.
    """
    whole, without = sums.means()
    leave_one_out = torch.tensor([function(row) for row in without], dtype=torch.float64)
    return FrechetEstimate.jackknifed(function(whole), leave_one_out, sums.counts, corrected=corrected)


def score_terms(logits: Tensor) -> Tensor:
    """What the Inception score needs of each sample: p and sum p log p, ``[B, C + 1]`` of logits ``[B, C]``."""
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    return torch.cat([p, (p * log_p).sum(1, keepdim=True)], dim=1)


def score_of_means(means: Tensor) -> float:
    """exp E KL(p | E p), the Inception score (Salimans et al. 2016, eq. 1), of mean ``score_terms``."""
    q, entropy = means[:-1], means[-1]
    return math.exp(float(entropy - torch.xlogy(q, q).sum()))


def inception_score(logits: Tensor, index: Tensor | range | None = None) -> FrechetEstimate:
    """The Inception score of all samples together, its bias removed, with its jackknife error.

    The usual mean over ten splits has the bias of a tenth of the samples; ``plain`` is that of one split of all.

    Args:
        logits: ``[n, C]``, n at least 40.
        index: the samples' global indices; groups of the jackknife are ``index mod 20``.

    Raises:
        ValueError: if a group is empty.
    """
    sums = GroupSums(logits.shape[1] + 1)
    sums.update(score_terms(logits), range(len(logits)) if index is None else index)
    return of_means(sums, score_of_means, corrected=True)


def psnr(mean_square_error: Tensor | float) -> float:
    """Peak signal-to-noise ratio in decibels of images in [-1, 1], from their mean square error; infinite for 0."""
    mse = float(mean_square_error)
    return 10 * math.log10(4 / mse) if mse else math.inf
