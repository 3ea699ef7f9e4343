"""What the solver tests share: an exact problem, its ODE solution, and an interpreter of plans of its own.

Nothing here uses the package's executor, denoiser or integrals, so that an error there cannot hide itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import fastsample as fs
from fastsample.plan import Plan, RowValues
from fastsample.process import Process

PROCESSES = {
    "vp": (fs.VP.linear, "eps"),
    "vp_cosine": (fs.VP.cosine, "v"),
    "edm": (fs.EDM, "x0"),
    "ve": (fs.VE, "score"),
    "flow": (fs.Flow, "flow"),
    "trigflow": (fs.TrigFlow, "v"),
}


def deterministic() -> list[str]:
    """All solvers that draw no noise at their default options, for any network (none that takes a step size)."""
    claims = {name: fs.solvers.get(name).claim for name in fs.solvers.names()}
    return [name for name, claim in claims.items() if not claim.stochastic and not claim.sized]


def unlowered(name: str) -> dict[str, bool]:
    """Settings that keep the claimed order up to the last step, where the solver may lower it."""
    return {"lower_order_final": False} if "lower_order_final" in fs.solvers.options(name) else {}


# -- the problem ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """A two-dimensional Gaussian mixture with diagonal covariances; x (B, 2) float64.

    Attributes:
        means, variances: (K, 2).
        log_weights: (K,).
    """

    means: Tensor
    variances: Tensor
    log_weights: Tensor

    def x0(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """``E[x_0 | x_t = x]``."""
        spread = alpha**2 * self.variances + sigma**2
        rest = x[:, None] - alpha * self.means
        logits = self.log_weights - 0.5 * (rest**2 / spread + spread.log()).sum(-1)
        posterior = self.means + alpha * self.variances / spread * rest
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        return (weights[..., None] * posterior).sum(1) / weights.sum(-1, keepdim=True)

    def output(self, prediction: str, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """What a perfect network of that prediction type says (sigma > 0)."""
        x0 = self.x0(x, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        return {
            "x0": x0,
            "eps": eps,
            "v": alpha * eps - sigma * x0,
            "flow": eps - x0,
            "score": -eps / sigma,
        }[prediction]

    def network(self, process: Process, prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
        """The same as a network of (x, t)."""

        def net(x: Tensor, t: Tensor) -> Tensor:
            first = t.reshape(-1)[0].double()
            return self.output(prediction, x, float(process.alpha(first)), float(process.sigma(first)))

        return net

    def solve(self, process: Process, x: Tensor, times: list[float]) -> list[Tensor]:
        """The probability-flow ODE from ``times[0]`` through the others, to about 1e-13.

        In the angle ``phi`` with ``y = x / sqrt(alpha^2 + sigma^2)`` the ODE is ``dy/dphi = v`` (Salimans &
        Ho 2022, appendix D), regular at both ends.
        """

        def slope(phi: float, y: np.ndarray) -> np.ndarray:
            alpha, sigma = math.cos(phi), math.sin(phi)
            state = torch.from_numpy(y).reshape(x.shape)
            return self.output("v", state, alpha, sigma).numpy().ravel()

        def radius(t: float) -> float:
            return math.hypot(float(process.alpha(t)), float(process.sigma(t)))

        phis = [float(process.phi(t)) for t in times]
        y = (x / radius(times[0])).numpy().ravel()
        states = [x]
        for start, stop, t in zip(phis[:-1], phis[1:], times[1:], strict=True):
            if stop != start:
                y = solve_ivp(slope, (start, stop), y, method="DOP853", rtol=3e-14, atol=1e-14).y[:, -1]
            states.append(torch.from_numpy(y.copy()).reshape(x.shape) * radius(t))
        return states


def mixture() -> Mixture:
    """Three unequal components: curved trajectories without stiffness."""
    return Mixture(
        means=torch.tensor([[1.0, 0.3], [-0.8, 0.6], [0.1, -1.1]], dtype=torch.float64),
        variances=torch.tensor([[0.15, 0.30], [0.25, 0.10], [0.20, 0.20]], dtype=torch.float64),
        log_weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log(),
    )


# -- the interpreter -----------------------------------------------------------------------------------------

# (row, what the row computed) -> what is used instead
StateHook = Callable[[int, RowValues, Tensor], Tensor]
Predict = Callable[[int, RowValues, Tensor], Tensor]


def interpret(plan: Plan, x: Tensor, predict: Predict, replace: StateHook | None = None) -> list[Tensor]:
    """The states of all rows, straight from the definition in ``fastsample.plan``; no noise."""
    states, predictions = [x], {}
    for r, (row, v) in enumerate(zip(plan.rows, plan.values, strict=True)):
        assert not row.noises, "a stochastic plan has no deterministic solution"
        state = torch.zeros_like(x)
        for j, a in zip(row.states, v.a, strict=True):
            state = state + a * states[j]
        for k, b in zip(row.predictions, v.b, strict=True):
            state = state + b * predictions[k]
        if replace is not None:
            state = replace(r, v, state)
        states.append(state)
        if row.evaluates:
            predictions[r] = predict(r, v, state)
    return states[1:]


def network_prediction(plan: Plan, problem: Mixture) -> Predict:
    """Predictions ``m = p x + q net`` with the problem's exact network."""

    def predict(r: int, v: RowValues, state: Tensor) -> Tensor:
        out = problem.output(plan.prediction, state, v.alpha, v.sigma)
        return v.p * state + v.q * out

    return predict


def space_prediction(space: str, x0: Tensor, eps: Tensor, alpha: float, sigma: float) -> Tensor:
    """``m`` in a solver's space from clean sample and noise."""
    return {
        "x0": x0,
        "eps": eps,
        "v": (alpha * eps - sigma * x0) / math.hypot(alpha, sigma),
        "flow": eps - x0,
    }[space]


def lam_grid(process: Process, lam: Tensor | np.ndarray | list[float]) -> Tensor:
    """Times at the given half log-SNRs."""
    return process.t_of_lam(torch.as_tensor(np.asarray(lam), dtype=torch.float64))
