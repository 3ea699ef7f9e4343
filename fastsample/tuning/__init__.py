"""Tuned solvers: the numbers of a plan fitted to a model's own high-accuracy trajectories."""

from __future__ import annotations

from .fit import tune
from .moments import Moments
from .report import changes

__all__ = ["Moments", "changes", "tune"]
