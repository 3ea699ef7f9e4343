"""Measures of sample quality and their uncertainty."""

from __future__ import annotations

from fastsample.metrics.error import rmse
from fastsample.metrics.extractors import FeatureExtractor, metric_names, parse_metric, to_uint8
from fastsample.metrics.frechet import (
    Difference,
    FrechetEstimate,
    FrechetReference,
    average,
    estimate,
    frechet_distance,
    paired_difference,
)
from fastsample.metrics.kernel import KernelReference, kernel_distance
from fastsample.metrics.manifold import Manifold, precision, recall
from fastsample.metrics.memorisation import Memorisation, memorisation
from fastsample.metrics.scores import inception_score
from fastsample.metrics.sliced import SlicedReference, sliced_wasserstein
from fastsample.metrics.statistics import Gaussian, GroupedMoments

__all__ = [
    "Difference",
    "FeatureExtractor",
    "FrechetEstimate",
    "FrechetReference",
    "Gaussian",
    "GroupedMoments",
    "KernelReference",
    "Manifold",
    "Memorisation",
    "SlicedReference",
    "average",
    "estimate",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "memorisation",
    "metric_names",
    "paired_difference",
    "parse_metric",
    "precision",
    "recall",
    "rmse",
    "sliced_wasserstein",
    "to_uint8",
]
