"""Prediction types: every conversion against the definition it comes from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsample import prediction
from fastsample.prediction import SPACES, coefficients

LEVELS = st.floats(1e-3, 20.0)


def outputs(alpha: float, sigma: float, x0: float, eps: float) -> dict[str, float]:
    """What an exact network of each type says of (x0, eps)."""
    return {
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "flow": eps - x0,
        "score": -eps / sigma,
    }


def quantities(alpha: float, sigma: float, x0: float, eps: float) -> dict[str, float]:
    """What each space stands for."""
    radius = math.hypot(alpha, sigma)
    return {"x0": x0, "eps": eps, "v": (alpha * eps - sigma * x0) / radius, "flow": eps - x0}


@given(LEVELS, LEVELS, st.floats(-2, 2), st.floats(-2, 2))
def test_conversions_are_exact_for_exact_outputs(alpha: float, sigma: float, x0: float, eps: float) -> None:
    x = alpha * x0 + sigma * eps
    size = abs(alpha) + abs(sigma) + 1 / min(alpha, sigma)
    for name, out in outputs(alpha, sigma, x0, eps).items():
        for space, expected in quantities(alpha, sigma, x0, eps).items():
            p, q = coefficients(
                name,
                torch.tensor(alpha, dtype=torch.float64),
                torch.tensor(sigma, dtype=torch.float64),
                space,
            )
            assert float(p * x + q * out) == pytest.approx(expected, abs=1e-12 * size**2)


@pytest.mark.parametrize("name", ["v", "flow", "x0"])
@pytest.mark.parametrize("space", SPACES)
def test_finite_without_signal(name: str, space: str) -> None:
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    p, q = coefficients(name, zero, one, space)
    x0, eps = 0.3, -1.2
    out = outputs(0.0, 1.0, x0, eps)[name]
    assert float(p * eps + q * out) == pytest.approx(quantities(0.0, 1.0, x0, eps)[space])


@pytest.mark.parametrize("name", ["v", "flow", "eps", "score"])
@pytest.mark.parametrize("space", SPACES)
def test_finite_without_noise(name: str, space: str) -> None:
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    assert all(bool(torch.isfinite(c)) for c in coefficients(name, one, zero, space))


@pytest.mark.parametrize("name", ["eps", "score"])
def test_eps_at_zero_snr_is_refused_with_the_remedy(name: str) -> None:
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"zero signal-to-noise.*v, x0 or flow.*strength"):
        coefficients(name, zero, one, "x0")


def test_x0_has_no_noise_estimate_without_noise() -> None:
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    assert coefficients("x0", one, zero, "x0") == (0, 1)
    with pytest.raises(ValueError, match="sigma = 0"):
        coefficients("x0", one, zero, "flow")


def test_names_and_aliases() -> None:
    assert prediction.names() == ["eps", "flow", "score", "v", "x0"]
    for alias, name in {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "velocity": "flow"}.items():
        assert prediction.canonical(alias) == name
    with pytest.raises(ValueError, match=r"prediction='epsilom' is unknown; did you mean 'eps'"):
        prediction.canonical("epsilom")
    one = torch.ones((), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"space='x1' is unknown; did you mean 'x0'"):
        coefficients("eps", one, one, "x1")


def test_differentiable_in_alpha_and_sigma() -> None:
    for name in prediction.names():
        for space in SPACES:
            levels = tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.6, 0.7))
            assert torch.autograd.gradcheck(
                lambda a, s, name=name, space=space: (
                    sum(c * w for c, w in zip(coefficients(name, a, s, space), (1.0, 2.0), strict=True))
                    + 0 * a
                ),
                levels,
            )
