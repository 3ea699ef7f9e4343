"""Solvers that draw noise: ancestral steps, SDE forms of DPM-Solver++, SA-Solver and ER-SDE-Solver.

They all discretise one family of reverse SDEs with the right marginals (Cui et al. 2023, eq. 11; Xue et al.
2023, eq. 6). Between ``s`` and ``t`` its exact solution, with ``rho = sigma / alpha``, is

    x_t = keep (sigma_t / sigma_s) x_s + alpha_t int x0 dK + sigma_t sqrt(1 - keep^2) z,

where ``keep`` in [0, 1] is the part of the noise of ``x_s`` that survives; the rest is replaced by fresh
noise ``z``. ``K`` rises from ``keep rho_t / rho_s`` at ``s`` to 1 at ``t``, so the weights of the
predictions sum to ``alpha_t (1 - keep rho_t / rho_s)``. ``keep = 1`` is the probability-flow ODE; methods
differ in ``keep`` and in how x0 is interpolated. The code carries ``log keep``, exact for short steps and
infinite without harm: where a step is infinite in lambda, all is replaced or all is denoised.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..builder import Builder, Expr, combine, intervals, zero
from ..errors import unknown
from ..process import Flow
from .exponential import History, reachable, update
from .first_order import step
from .integrals import _PANEL as PANEL
from .integrals import _gauss_legendre as gauss_legendre
from .integrals import lagrange, weights
from .registry import Claim, register

STOCHASTIC = Claim(order=None, stochastic=True)


# -- what all of them share -------------------------------------------------------------------------------


def check_noise(b: Builder, grid: Tensor, noisy: bool, **options: float) -> None:
    """Refuse negative amounts of noise, and noise on a grid along which noise grows.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    for name, value in options.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r} must be a number of at least 0")
    if noisy and not bool(b.lam(grid[-1]) > b.lam(grid[0])):
        name, value = next(iter(options.items()))
        raise ValueError(
            f"a solver with {name}={value!r} draws noise and cannot run towards more noise; set {name}=0, or "
            "reverse the grid"
        )


def move(
    b: Builder, x: Expr, s: Tensor, t: Tensor, log_keep: Tensor | None, m: Expr, noise: Expr | None = None
) -> Expr:
    """The step with one prediction ``m`` of x0 held; ``log_keep=None`` is the ODE's.

    Args:
        b, x, s, t: builder, state at ``s``, and the interval.
        log_keep: log of the part of the noise that is kept, at most 0.
        m: the prediction.
        noise: standard normal noise that replaces the rest.
    """
    if log_keep is None:
        return update(b, "x0", "lam", x, s, t, [(s, m)])
    moved = b.sigma(t) / b.sigma(s) * log_keep.exp() * x + _total(b, s, t, log_keep) * m
    return moved if noise is None else moved + b.sigma(t) * fresh(log_keep) * noise


def fresh(log_keep: Tensor) -> Tensor:
    """``sqrt(1 - keep^2)``, the standard deviation of the noise drawn, in units of sigma."""
    return torch.sqrt(-torch.expm1(2 * log_keep))


def _total(b: Builder, s: Tensor, t: Tensor, log_keep: Tensor) -> Tensor:
    """The weight of a constant prediction, ``alpha_t (1 - keep rho_t / rho_s)``."""
    return -b.alpha(t) * torch.expm1(log_keep - (b.lam(t) - b.lam(s)))


# -- ancestral: how much noise is kept, by the literature's two rules -------------------------------------


def ancestral_keep(h: Tensor, eta: float) -> Tensor:
    """``log keep`` of a step ``h`` in lambda: ``keep^2 = 1 - eta^2 (1 - e^{-2h})`` (DDIM's eq. 16 in rho).

    ``eta=1`` draws the posterior's variance, as DDPM does; larger ones at most all the noise (k-diffusion).
    """
    drawn = eta**2 * torch.expm1(-2 * h)
    # all of it: a constant, since the logarithm's derivative is infinite there
    return 0.5 * torch.log1p(drawn) if bool(drawn > -1) else torch.full_like(drawn, -math.inf)


def flow_keep(b: Builder, s: Tensor, t: Tensor, eta: float) -> Tensor:
    """``log keep`` of the rectified-flow form, which steps down to ``tau_t (1 + eta (tau_t / tau_s - 1))``.

    ``tau = sigma / (alpha + sigma)`` is the flow's own time; the noise of the lower time is then mixed up
    again.
    """
    tau_s, tau_t = (b.sigma(u) / (b.alpha(u) + b.sigma(u)) for u in (s, t))
    ratio = 1 + eta * (tau_t / tau_s - 1)
    if not bool(ratio > 0):
        return torch.full_like(ratio, -math.inf)
    return torch.log(ratio * (1 - tau_t) / (1 - ratio * tau_t))


FORMS = ("rho", "flow")


def _form(b: Builder, form: str | None) -> str:
    if form is None:
        return "flow" if isinstance(b.process, Flow) else "rho"
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    return form


def _kept(b: Builder, s: Tensor, t: Tensor, eta: float, form: str) -> Tensor | None:
    if eta == 0:
        return None
    return flow_keep(b, s, t, eta) if form == "flow" else ancestral_keep(b.lam(t) - b.lam(s), eta)


VARIANCES = ("fixed_small", "fixed_large")


@register("ddpm", STOCHASTIC)
def ddpm(b: Builder, grid: Tensor, variance: str = "fixed_small") -> None:
    """DDPM's ancestral sampling (Ho, Jain & Abbeel 2020, algorithm 2), on any grid. Weak order 1.

    The mean is that of ``x_t`` given ``x_s`` and the predicted ``x_0`` (eq. 7); the last step to zero noise
    draws none.

    Args:
        b, grid: the builder and the times.
        variance: "fixed_small" is the variance of that posterior (eq. 7), right if the data were one point;
            "fixed_large" is right if they were unit normal, which on VP is the forward variance ``beta_t``
            (section 3.2).
    """
    if variance not in VARIANCES:
        raise unknown("variance", variance, VARIANCES)
    check_noise(b, grid, True, eta=1.0)
    x = b.x
    for s, t in intervals(grid):
        m = b.x0(x)
        kept = ancestral_keep(b.lam(t) - b.lam(s), 1.0)
        noise = b.noise()
        if variance == "fixed_small" or not bool(b.sigma(t) > 0):
            x = b.state(move(b, x, s, t, kept, m, noise), t)
            continue
        square_s, square_t = (b.alpha(u) ** 2 + b.sigma(u) ** 2 for u in (s, t))
        large = square_t * (1 - b.alpha(s) ** 2 * square_t / (b.alpha(t) ** 2 * square_s))
        x = b.state(move(b, x, s, t, kept, m) + torch.sqrt(large.clamp(min=0)) * noise, t)


@register("euler_ancestral", STOCHASTIC)
def euler_ancestral(
    b: Builder, grid: Tensor, eta: float = 1.0, s_noise: float = 1.0, form: str | None = None
) -> None:
    """Euler's method with ancestral noise (k-diffusion ``sample_euler_ancestral``); weak order 1.

    Args:
        b, grid: the builder and the times.
        eta: how much of the posterior's noise is drawn; 0 is Euler (DDIM), 1 ancestral.
        s_noise: factor of the noise drawn.
        form: "rho" steps down in sigma/alpha (k-diffusion), "flow" in the flow's own time (the form used with
            rectified flows); by default "flow" on flows and "rho" on every other process.
    """
    check_noise(b, grid, eta > 0, eta=eta, s_noise=s_noise)
    chosen = _form(b, form)
    x = b.x
    for s, t in intervals(grid):
        kept = _kept(b, s, t, eta, chosen)
        if kept is None:
            x = b.state(step(b, x, s, t), t)
        else:
            x = b.state(move(b, x, s, t, kept, b.x0(x), s_noise * b.noise()), t)


@register("dpmpp_2s_ancestral", STOCHASTIC)
def dpmpp_2s_ancestral(
    b: Builder, grid: Tensor, eta: float = 1.0, s_noise: float = 1.0, form: str | None = None
) -> None:
    """DPM-Solver++(2S) down to less noise, then ancestral noise (k-diffusion); weak order 2.

    Two evaluations a step, one where the step is infinite in lambda. Arguments as in ``euler_ancestral``.
    """
    check_noise(b, grid, eta > 0, eta=eta, s_noise=s_noise)
    chosen = _form(b, form)
    x = b.x
    for s, t in intervals(grid):
        if not reachable(b, "x0", s):
            x = b.state(step(b, x, s, t), t)
            continue
        m = b.x0(x)
        kept = _kept(b, s, t, eta, chosen)
        # the deterministic step goes to rho_t keep; lambda of that level, and of the stage halfway
        h = b.lam(t) - b.lam(s) if kept is None else b.lam(t) - b.lam(s) - kept
        m = _midpoint(b, x, s, m, h, 0.5)[0]
        x = b.state(move(b, x, s, t, kept, m, None if kept is None else s_noise * b.noise()), t)


def _midpoint(
    b: Builder,
    x: Expr,
    s: Tensor,
    m: Expr,
    h: Tensor,
    r: float,
    keep: Callable[[Tensor], Tensor] | None = None,
    noise: Expr | None = None,
) -> tuple[Expr, Tensor | None]:
    """DPM-Solver++(2S)'s combined prediction of a step ``h`` in lambda, by a stage at ``lam_s + r h``.

    Returns:
        The combination, and ``log keep`` up to the stage (None where there is no stage: infinite steps, and
        stages that a quantized network's times round to ``s``).
    """
    if not bool(torch.isfinite(h)):
        return m, None
    mid = b.process.stage(b.lam(s) + r * h)
    reached = b.lam(mid) - b.lam(s)
    # the stage may have been snapped: the ratio that it really has
    ratio = reached / h
    if not bool(torch.isfinite(reached)) or not bool(ratio > 0):
        return m, None
    kept = None if keep is None else keep(reached)
    stage = b.x0(b.state(move(b, x, s, mid, kept, m, noise), mid))
    weight = 1 / (2 * ratio)
    return (1 - weight) * m + weight * stage, kept


@register("dpmpp_sde", STOCHASTIC)
def dpmpp_sde(b: Builder, grid: Tensor, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5) -> None:
    """DPM-Solver++ (stochastic), two stages a step (k-diffusion ``sample_dpmpp_sde``); weak order 2.

    The stage and the full step share the Brownian path: the step's noise is the stage's, carried on by the
    SDE, plus that of the rest of the step. (k-diffusion's Brownian tree runs in sigma, which has the same
    correlation in the limit of small steps.)

    Args:
        b, grid: the builder and the times.
        eta: how much of the posterior's noise is drawn (as in ``euler_ancestral``).
        s_noise: factor of the noise drawn.
        r: where the stage lies in the step, in lambda, in (0, 1].
    """
    check_noise(b, grid, eta > 0, eta=eta, s_noise=s_noise)
    if not 0 < r <= 1:
        raise ValueError(f"r={r!r} must lie in (0, 1]; 0.5 is the midpoint")
    x = b.x
    for s, t in intervals(grid):
        if not reachable(b, "x0", s):
            x = b.state(step(b, x, s, t), t)
            continue
        m, h = b.x0(x), b.lam(t) - b.lam(s)
        if eta == 0:
            x = b.state(move(b, x, s, t, None, _midpoint(b, x, s, m, h, r)[0]), t)
            continue
        first = s_noise * b.noise()
        kept = ancestral_keep(h, eta)
        m, at_stage = _midpoint(b, x, s, m, h, r, lambda reached: ancestral_keep(reached, eta), first)
        if at_stage is None:
            x = b.state(move(b, x, s, t, kept, m, first), t)
            continue
        rest = (kept - at_stage).clamp(max=0)
        noise = rest.exp() * fresh(at_stage) * first + fresh(rest) * (s_noise * b.noise())
        x = b.state(move(b, x, s, t, kept, m) + b.sigma(t) * noise, t)


# -- multistep, constant tau in a step --------------------------------------------------------------------


def _moments(ch: Tensor, powers: int) -> list[Tensor]:
    """``int_0^1 v^k dK`` for k = 0 .. powers - 1, where ``K = e^{-ch (1 - v)}`` and v runs over the step."""
    v, measure = _measure(ch)
    return [(measure * v**k).sum() for k in range(powers)]


def _measure(ch: Tensor) -> tuple[Tensor, Tensor]:
    """Points in [0, 1] and weights of ``dK = ch e^{-ch (1 - v)} dv``, exact to rounding."""
    v, w = _panels(ch)
    return v, w * ch * torch.exp(-ch * (1 - v))


def _panels(width: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on [0, 1] for exponentials of exponent up to ``width``."""
    return gauss_legendre(max(1, math.ceil(abs(float(width.detach())) / PANEL)))


TYPES = ("midpoint", "heun")


@register("dpmpp_1_sde", STOCHASTIC, order=1, exact=True)
@register("dpmpp_2m_sde", STOCHASTIC, order=2, exact=True)
@register("dpmpp_3m_sde", STOCHASTIC, order=3, exact=False, solver_type="heun")
@register("dpmpp_3m_sde_exact", STOCHASTIC, order=3, exact=True, solver_type="heun")
def dpmpp_multistep_sde(
    b: Builder,
    grid: Tensor,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    order: int = 2,
    exact: bool = True,
) -> None:
    """The SDE forms of DPM-Solver++ 1, 2M and 3M (Lu et al. 2022b, section 4; k-diffusion).

    Without noise they have the order of the name; noise within a step limits the weak order to 2 (Buckwar &
    Winkler 2006). ``dpmpp_3m_sde`` is the published form, whose second-difference term is half of what its
    own integral gives; ``dpmpp_3m_sde_exact`` has the whole.

    Args:
        b, grid: the builder and the times.
        eta: k-diffusion's, ``keep = e^{-eta h}``: 0 is the ODE, 1 the reverse SDE (``eta = tau^2`` of
            SA-Solver).
        s_noise: factor of the noise drawn.
        solver_type: of order 2, "midpoint" (fixed weight) or "heun" (the exact integral).
        lower_order_final: take the last step with order 1 and the one before with at most 2 (diffusers does
            below 15 steps; k-diffusion only the last one, to zero noise).
        order, exact: fixed by the name.
    """
    check_noise(b, grid, eta > 0, eta=eta, s_noise=s_noise)
    if solver_type not in TYPES:
        raise unknown("solver_type", solver_type, TYPES)
    n = grid.numel() - 1
    history: History = []
    x = b.x
    for i, (s, t) in enumerate(intervals(grid)):
        if not reachable(b, "x0", s):
            x, history = b.state(step(b, x, s, t), t), []
            continue
        m, h = b.x0(x), b.lam(t) - b.lam(s)
        history = [*history, (s, m)][-order:]
        kept = -eta * h if eta > 0 else None
        x_t = move(b, x, s, t, kept, m, None if kept is None else s_noise * b.noise())
        # nodes at infinite lambda drop out, and infinite steps hold m
        nodes = [(u, p) for u, p in history if bool(torch.isfinite(b.lam(u)))]
        used = min(order, len(nodes), n - i if lower_order_final else order) if bool(torch.isfinite(h)) else 1
        if used > 1:
            x_t = x_t + b.alpha(t) * _differences(b, h, (1 + eta) * h, nodes[-used:], solver_type, exact)
        x = b.state(x_t, t)


def _differences(b: Builder, h: Tensor, ch: Tensor, nodes: History, solver_type: str, exact: bool) -> Expr:
    """The terms in the first and second divided differences of x0 in ``v``, the fraction of the step."""
    (t0, m0), (t1, m1) = nodes[-1], nodes[-2]
    r0 = (b.lam(t0) - b.lam(t1)) / h
    d0 = (m0 - m1) / r0
    if len(nodes) == 2:
        weight = -0.5 * torch.expm1(-ch) if solver_type == "midpoint" else _moments(ch, 2)[1]
        return weight * d0
    t2, m2 = nodes[-3]
    r1 = (b.lam(t1) - b.lam(t2)) / h
    d1 = (m1 - m2) / r1
    second = (d0 - d1) / (r0 + r1)
    _, first_moment, second_moment = _moments(ch, 3)
    return first_moment * (d0 + r0 * second) + (1.0 if exact else 0.5) * second_moment * second


@register("sa_solver", STOCHASTIC)
def sa_solver(
    b: Builder,
    grid: Tensor,
    tau: float = 1.0,
    predictor_order: int = 2,
    corrector_order: int = 2,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    lower_order_final: bool = True,
    rescale: bool = False,
) -> None:
    """SA-Solver: stochastic Adams predictor and corrector (Xue et al. 2023, eq. 14 to 18), exact integrals.

    Weak order 2 (with little noise the orders of the two). One evaluation a step (mode PEC): the corrector
    re-uses the evaluation and the noise of its step. ``tau=0`` is the deterministic predictor-corrector of
    ``exp_adams``.

    Args:
        b, grid: the builder and the times.
        tau: the noise, constant within a step; 0 is the ODE, 1 the reverse SDE.
        predictor_order, corrector_order: number of predictions that they interpolate; the corrector's
            includes the new one, and 0 switches it off. The authors take 3 and 4: better from 20 steps on.
        s_tmin, s_tmax: steps that start at noise levels sigma/alpha outside these draw no noise.
        s_noise: factor of the noise drawn.
        lower_order_final: let the orders fall towards the last step, as the authors' code does.
        rescale: the authors' change of order-2 weights for few steps (appendix D), which diffusers has too.
    """
    check_noise(b, grid, tau > 0, tau=tau, s_noise=s_noise)
    if predictor_order < 1:
        raise ValueError(f"predictor_order={predictor_order!r} must be at least 1")
    if corrector_order < 0:
        raise ValueError(f"corrector_order={corrector_order!r} must be at least 0 (no corrector)")
    n = grid.numel() - 1
    history: History = []
    x = b.x
    previous: tuple[Tensor, float, list[Tensor], History] | None = None
    for i, (s, t) in enumerate(intervals(grid)):
        if not reachable(b, "x0", s):
            x, history, previous = b.state(step(b, x, s, t), t), [], None
            continue
        m = b.x0(x)
        base = x
        history.append((s, m))
        if previous is not None and corrector_order:
            # state and noise of the step are the same in both, so the correction is in the predictions alone
            start, tau_start, used_weights, used = previous
            count = min(corrector_order, n - i + 2) if lower_order_final else corrector_order
            nodes = history[-count:]
            new = _tau_weights(b, nodes, start, s, tau_start, rescale)
            base = x + (combine(new, [p for _, p in nodes]) - combine(used_weights, [p for _, p in used]))
        level = float(b.process.rho(s).detach())
        tau_here = tau if s_tmin <= level <= s_tmax else 0.0
        count = min(predictor_order, n - i) if lower_order_final else predictor_order
        nodes = history[-count:]
        w = _tau_weights(b, nodes, s, t, tau_here, rescale)
        predicted = combine(w, [p for _, p in nodes])
        if tau_here:
            kept = -(tau_here**2) * (b.lam(t) - b.lam(s))
            drift = b.sigma(t) / b.sigma(s) * kept.exp() * base + predicted
            x_t = drift + b.sigma(t) * fresh(kept) * (s_noise * b.noise())
        else:
            x_t = b.sigma(t) / b.sigma(s) * base + predicted
        x = b.state(x_t, t)
        previous = (s, tau_here, w, nodes)
        history = history[-max(predictor_order, corrector_order) :]


def _tau_weights(b: Builder, nodes: History, s: Tensor, t: Tensor, tau: float, rescale: bool) -> list[Tensor]:
    """``alpha_t int L_j dK`` for constant tau, one weight for each node (Xue et al. 2023, eq. 15, 18)."""
    times = [u for u, _ in nodes]
    lam = [b.lam(u) for u in times]
    usable = [j for j, u in enumerate(lam) if bool(torch.isfinite(u))]
    h, c = b.lam(t) - b.lam(s), 1 + tau**2
    finite = bool(torch.isfinite(h))
    if not tau and not (rescale and finite and len(usable) == 2 == len(nodes)):
        return weights(b.process, "x0", "lam", times, s, t)
    total = _total(b, s, t, -(tau**2) * h)
    if not finite or len(usable) <= 1:
        # nothing of x_s is left, or nothing to interpolate: hold the prediction at s
        held = min(range(len(times)), key=lambda j: abs(float((times[j] - s).detach())))
        return [total if j == held else torch.zeros_like(total) for j in range(len(times))]
    if rescale and len(usable) == 2 == len(nodes):
        # int (lam - lam_s) dK replaced by its leading term
        linear = b.alpha(t) * c * h**2 / 2
        newer = (linear + (b.lam(s) - lam[0]) * total) / (lam[1] - lam[0])
        return [total - newer, newer]
    v, measure = _measure(c * h)
    basis = lagrange([lam[j] for j in usable], b.lam(s) + h * v)
    integrals = [(measure * p).sum() for p in basis]
    norm = sum(integrals[1:], integrals[0])  # one up to rounding: makes constants exact
    result = [torch.zeros_like(total) for _ in nodes]
    for j, integral in zip(usable, integrals, strict=True):
        result[j] = total * integral / norm
    return result


# -- ER-SDE -----------------------------------------------------------------------------------------------

# The noise scale functions of Cui et al. 2023 (table 1 and appendix A.8) as log phi of log rho.
_LOG10 = math.log(10.0)
_FAR = 700.0  # stands for an infinite log rho: e^700 is still a number
NOISE_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "ode": lambda u: u,
    "sde": lambda u: 2 * u,
    "sde_1": lambda u: u + torch.log(torch.exp(-torch.exp(-u)) + 10),
    "sde_2": lambda u: 1.5 * u,
    "sde_3": lambda u: 2.5 * u,
    "sde_4": lambda u: 0.9 * u + torch.log(softplus(1.5 * u + 2 * _LOG10) / _LOG10),
    "sde_5": lambda u: u + torch.logaddexp(torch.exp(0.3 * u), torch.full_like(u, _LOG10)),
}


@register("er_sde", STOCHASTIC, exact=False)
@register("er_sde_exact", STOCHASTIC, exact=True)
def er_sde(
    b: Builder,
    grid: Tensor,
    order: int = 3,
    noise_scale: str = "sde_5",
    s_noise: float = 1.0,
    exact: bool = False,
) -> None:
    """ER-SDE-Solver (Cui et al. 2023, eq. 15, 17 and algorithms 1 to 3; on any process through rho =
    sigma/alpha).

    ``keep = (phi(rho_t) / rho_t) / (phi(rho_s) / rho_s)``, x0 is a Taylor polynomial in rho. As published
    (``er_sde``), order 3 takes its first derivative from a backward difference, which is right to order 1
    only; ``er_sde_exact`` corrects it by the second difference. The integrals of 1/phi are exact
    (Gauss-Legendre) where the authors' code sums 100 points. The step to zero noise is of order 1, as in
    their code.

    Args:
        b, grid: the builder and the times.
        order: 1 to 3.
        noise_scale: phi: "ode", "sde" (rho^2, the reverse SDE) or "sde_1" to "sde_5". Where phi grows slower
            than rho ("sde_4" at very high noise) no noise can be drawn and the step is the ODE's.
        s_noise: factor of the noise drawn.
        exact: fixed by the name.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order={order!r} must be 1, 2 or 3")
    if noise_scale not in NOISE_SCALES:
        raise unknown("noise_scale", noise_scale, NOISE_SCALES)
    check_noise(b, grid, False, s_noise=s_noise)
    if noise_scale != "ode" and not bool(b.lam(grid[-1]) > b.lam(grid[0])):
        raise ValueError(
            f"noise_scale={noise_scale!r} draws noise and cannot run towards more noise; use "
            "noise_scale='ode', or reverse the grid"
        )
    log_phi = NOISE_SCALES[noise_scale]
    history: History = []
    x = b.x
    kept: Tensor | None
    for s, t in intervals(grid):
        if not reachable(b, "x0", s):
            x, history = b.state(step(b, x, s, t), t), []
            continue
        m = b.x0(x)
        history = [*history, (s, m)][-order:]
        kept, phi = _er_keep(b, s, t, log_phi), log_phi
        if noise_scale == "ode" or not bool(kept < 0):
            kept, phi = None, NOISE_SCALES["ode"]
        x_t = move(b, x, s, t, kept, m, None if kept is None else s_noise * b.noise())
        if bool(torch.isfinite(b.lam(t) - b.lam(s))):
            used = [(u, p) for u, p in history if bool(torch.isfinite(b.lam(u)))]
            x_t = x_t + b.alpha(t) * _taylor(b, s, t, phi, used, exact)
        x = b.state(x_t, t)


def _er_keep(b: Builder, s: Tensor, t: Tensor, log_phi: Callable[[Tensor], Tensor]) -> Tensor:
    """``log keep = log(phi_t / rho_t) - log(phi_s / rho_s)``, with the limits of both ends."""
    u_s, u_t = ((-b.lam(u)).clamp(-_FAR, _FAR) for u in (s, t))
    return (log_phi(u_t) - u_t) - (log_phi(u_s) - u_s)


def _taylor(
    b: Builder, s: Tensor, t: Tensor, log_phi: Callable[[Tensor], Tensor], nodes: History, exact: bool
) -> Expr:
    """The terms in the first and second derivative of x0: ``int (rho - rho_s)^k / k! dK``, k = 1, 2."""
    if len(nodes) < 2:
        return zero()
    rho = [b.process.rho(u) for u, _ in reversed(nodes)]
    m = [p for _, p in reversed(nodes)]
    # by parts: int (K - 1) drho and int (rho - rho_s) (K - 1) drho from rho_t up to rho_s
    lam_s, h = b.lam(s), b.lam(t) - b.lam(s)
    v, w = _panels(h)
    level = -(lam_s + h * v)
    value = level.exp()
    integrand = w * h * value * torch.expm1(log_phi(-b.lam(t)) - log_phi(level))
    slope = (m[0] - m[1]) / (rho[0] - rho[1])
    if len(nodes) == 2:
        return integrand.sum() * slope
    before = (m[1] - m[2]) / (rho[1] - rho[2])
    curve = 2 * (slope - before) / (rho[0] - rho[2])
    if exact:
        slope = slope + (rho[0] - rho[1]) / 2 * curve
    return integrand.sum() * slope + (integrand * (value - rho[0])).sum() * curve
