"""Shared by all tests: one process and network for each kind of model, and hypothesis without a deadline."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, settings

import fastsample as fs

# Wall time says little on a shared machine, and examples must not depend on the run.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")

PROCESSES: dict[str, Callable[[], fs.Process]] = {
    "linear": fs.VP.linear,
    "scaled_linear": fs.VP.scaled_linear,
    "cosine": fs.VP.cosine,
    "zero_snr": lambda: fs.VP.scaled_linear().rescaled_zero_snr(),
    "ve": fs.VE,
    "edm": fs.EDM,
    "flow": fs.Flow,
    "flow_shift": lambda: fs.Flow(shift=3.0),
    "trigflow": fs.TrigFlow,
}


@pytest.fixture(params=sorted(PROCESSES))
def process(request: pytest.FixtureRequest) -> fs.Process:
    """Each noise process in turn."""
    return PROCESSES[request.param]()


@pytest.fixture
def one_thread() -> object:
    """One thread, for results that must not depend on how work is split."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
