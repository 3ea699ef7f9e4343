"""Shared by all tests: each noise process in turn, and hypothesis without a deadline."""

from __future__ import annotations

import sys

import pytest
from hypothesis import HealthCheck, settings
from tables import PROCESSES

import fastsample as fs

# Wall time says little on a shared machine, and examples must not depend on the run.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")


@pytest.fixture(params=sorted(PROCESSES))
def process(request: pytest.FixtureRequest) -> fs.Process:
    """Each noise process in turn."""
    return PROCESSES[request.param]()


@pytest.fixture
def keep_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts ``sys.argv`` back: Hydra reads it, so ``main()`` sets it."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
