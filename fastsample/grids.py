"""Time grids: plain float64 arrays, made by functions.

A grid function gives ``steps + 1`` times from ``start`` (noisy) to the end. ``end="sigma_min"`` ends at the
least noisy time the network was trained at; ``end="zero"`` ends where sigma is zero. Grids in a coordinate
that reaches zero noise (uniform, quadratic, ..) go straight there; those in a logarithm place ``steps``
points down to sigma_min and append zero, as EDM does.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .errors import nearest, unknown
from .process import Process, TimeLike, as_time

if TYPE_CHECKING:
    from .denoiser import Denoiser

ENDS = ("zero", "sigma_min")
GridFunction = Callable[..., Tensor]
Grid = str | Tensor | np.ndarray | Sequence[float] | Callable[..., Any]

_GRIDS: dict[str, GridFunction] = {}


def register(name: str) -> Callable[[GridFunction], GridFunction]:
    """Make a function ``(process, steps, start, end, **options) -> times`` available by name."""

    def add(function: GridFunction) -> GridFunction:
        _GRIDS[name] = function
        return function

    return add


def names() -> list[str]:
    """The names that ``grid=`` understands."""
    return sorted(_GRIDS)


def get(name: str) -> GridFunction:
    """A grid function by name."""
    if name not in _GRIDS:
        raise unknown("grid", name, _GRIDS)
    return _GRIDS[name]


def options_of(function: Callable[..., Any], skip: int) -> list[str]:
    """The keyword options of a grid or solver function, after its ``skip`` fixed arguments."""
    return list(inspect.signature(function).parameters)[skip:]


def make(
    grid: Grid, process: Process, steps: int, *, start: float | None = None, end: str = "zero", **options: Any
) -> Tensor:
    """A grid as a checked float64 tensor (steps + 1,), strictly monotone in noise.

    Args:
        grid: a name, a function of the same signature, or the times themselves (then ``steps`` is implied).
        process: the noise process; where it is quantized the grid is snapped to its levels.
        steps: number of intervals.
        start: the first time; by default the process's noisiest.
        end: "zero" or "sigma_min".
        options: the grid function's own, such as ``rho=7``.

    Raises:
        ValueError: unknown name or option, wrong end, or a grid that is not strictly monotone.
    """
    if end not in ENDS:
        raise unknown("end", end, ENDS)
    if isinstance(grid, str) or callable(grid):
        if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
            raise ValueError(f"steps={steps!r} must be a whole number of at least 1")
        function = get(grid) if isinstance(grid, str) else grid
        allowed = options_of(function, 4)
        for option in options:
            if option not in allowed:
                raise ValueError(f"grid={grid!r} has no option {option!r}; {nearest(option, allowed)}")
        first = process.t_start if start is None else float(start)
        times = as_time(function(process, int(steps), first, end, **options))
    else:
        times = as_time(grid)
    return check(times, process)


def check(times: TimeLike, process: Process) -> Tensor:
    """A grid that is sound: one-dimensional, finite, within the process, strictly monotone; snapped.

    Raises:
        ValueError: naming the first offending entry.
    """
    grid = as_time(times)
    if grid.ndim != 1 or grid.numel() < 2:
        raise ValueError(
            f"grid has shape {tuple(grid.shape)}; give at least two times in a one-dimensional array"
        )
    if not bool(torch.isfinite(grid).all()):
        raise ValueError(f"grid has entries that are not finite: {grid.tolist()}")
    if process.levels is not None:
        snapped = process.snap(grid)
        # many points and few levels: points that fall on the same level are one point
        keep = torch.cat([torch.ones(1, dtype=torch.bool), snapped[1:] != snapped[:-1]])
        grid = snapped[keep]
        if grid.numel() < 2:
            raise ValueError(
                "after snapping to the network's times the grid is a single point; use other times"
            )
    lam = process.lam(grid.detach())
    if bool(torch.isnan(lam).any()):
        raise ValueError(f"grid reaches times where the process is undefined: {grid.tolist()}")
    rising, falling = lam[1:] > lam[:-1], lam[1:] < lam[:-1]
    if not (bool(rising.all()) or bool(falling.all())):
        wrong = (
            (~rising if int(rising.sum()) >= int(falling.sum()) else ~falling).nonzero().flatten().tolist()[0]
        )
        raise ValueError(
            f"grid must be strictly monotone in noise; entries {wrong} and {wrong + 1} are "
            f"{float(grid[wrong]):g} and {float(grid[wrong + 1]):g}"
        )
    return grid


def _between(process: Process, start: float, end: str, fraction: Tensor) -> Tensor:
    """Times at a fraction (1 to 0) of the way from the end to the start, in the uniform grids' coordinate."""
    last = process.t_zero if end == "zero" else process.t_end
    u = process.uniform_of_t(torch.tensor([start, last], dtype=torch.float64)).tolist()
    t = process.t_of_uniform(u[1] + (u[0] - u[1]) * fraction)
    t[0], t[-1] = start, last  # exactly
    return t


def _line(first: float, last: float, count: int) -> Tensor:
    return torch.linspace(0.0, 1.0, count, dtype=torch.float64) * (last - first) + first


def _with_zero(process: Process, steps: int, end: str, inner: Callable[[int], Tensor]) -> Tensor:
    """``inner(count)`` points down to sigma_min; the last of ``steps`` intervals goes to zero where asked."""
    if end == "sigma_min":
        return inner(steps + 1)
    return torch.cat([inner(steps), torch.tensor([process.t_zero], dtype=torch.float64)])


def _single(points: Callable[[int], Tensor], start: float) -> Callable[[int], Tensor]:
    """A one-point grid is its start, whatever the formula divides by."""
    return lambda count: torch.tensor([start], dtype=torch.float64) if count == 1 else points(count)


def _finite_lam(process: Process, t: float) -> float:
    """The half log-SNR at ``t``; at zero SNR that of a thousandth of the way to less noise."""
    lam = float(process.lam(t))
    return lam if math.isfinite(lam) else float(process.lam(t - 1e-3 * (process.t_start - process.t_end)))


@register("uniform")
def uniform(process: Process, steps: int, start: float, end: str) -> Tensor:
    """Uniform in the process's own time (for flows: before the shift)."""
    return _between(process, start, end, _line(1.0, 0.0, steps + 1))


@register("angle")
def angle(process: Process, steps: int, start: float, end: str, exponent: float = 1.0) -> Tensor:
    """In the angle ``phi = atan2(sigma, alpha)`` (TrigFlow's time; Lu & Song 2025, section 3).

    ``phi_i = phi_n + (phi_0 - phi_n) (1 - i/n)^exponent``: uniform, or finer towards the data for exponent > 1.
    """
    last = process.t_zero if end == "zero" else process.t_end
    first, final = float(process.phi(start)), float(process.phi(last))
    phi = final + (first - final) * _falling(steps, exponent)
    return _between_noise_levels(process, torch.tan(phi[1:-1]), start, last)


@register("fraction")
def fraction(process: Process, steps: int, start: float, end: str) -> Tensor:
    """Uniform in ``sigma / (alpha + sigma)``: a straight flow's time, on any process."""
    last = process.t_zero if end == "zero" else process.t_end
    alpha, sigma = process.alpha([start, last]), process.sigma([start, last])
    first, final = (sigma / (alpha + sigma)).tolist()
    tau = _line(first, final, steps + 1)[1:-1]
    return _between_noise_levels(process, tau / (1 - tau), start, last)


def _between_noise_levels(process: Process, rho: Tensor, start: float, last: float) -> Tensor:
    """The two ends and the times at noise levels ``sigma / alpha`` between them, within the trained times."""
    low, high = sorted((process.t_end, process.t_start))
    ends = torch.tensor([start, last], dtype=torch.float64)
    return torch.cat([ends[:1], process.t_of_rho(rho).clamp(low, high), ends[1:]])


@register("power")
def power(process: Process, steps: int, start: float, end: str, exponent: float = 1.5) -> Tensor:
    """``t_i = t_end + (t_start - t_end) (1 - i/n)^exponent``: finer towards the data for exponent > 1."""
    return _between(process, start, end, _falling(steps, exponent))


def _falling(steps: int, exponent: float) -> Tensor:
    """``(1 - i/n)^exponent``."""
    if not exponent > 0:
        raise ValueError(f"exponent={exponent!r} must be positive")
    return _line(1.0, 0.0, steps + 1) ** exponent


@register("quadratic")
def quadratic(process: Process, steps: int, start: float, end: str) -> Tensor:
    """Quadratic in time (Song, Meng & Ermon 2021, DDIM, appendix D.2)."""
    return power(process, steps, start, end, 2.0)


@register("logsnr")
def logsnr(process: Process, steps: int, start: float, end: str) -> Tensor:
    """Uniform in the half log-SNR (Lu et al. 2022, DPM-Solver, section 3.3)."""
    first, last = _finite_lam(process, start), float(process.lam(process.t_end))

    def points(count: int) -> Tensor:
        t = process.t_of_lam(_line(first, last, count))
        t[0], t[-1] = start, process.t_end
        return t

    return _with_zero(process, steps, end, _single(points, start))


@register("exponential")
def exponential(process: Process, steps: int, start: float, end: str) -> Tensor:
    """Geometric in ``sigma / alpha`` (k-diffusion's ``get_sigmas_exponential``): the points of logsnr."""
    return logsnr(process, steps, start, end)


@register("karras")
def karras(process: Process, steps: int, start: float, end: str, rho: float = 7.0) -> Tensor:
    """Uniform in ``(sigma / alpha)^(1/rho)`` (Karras et al. 2022, eq. 5)."""
    if not rho > 0:
        raise ValueError(f"rho={rho!r} must be positive")
    high, low = math.exp(-_finite_lam(process, start)), float(process.rho(process.t_end))

    def points(count: int) -> Tensor:
        t = process.t_of_rho(_line(high ** (1 / rho), low ** (1 / rho), count) ** rho)
        t[0], t[-1] = start, process.t_end
        return t

    return _with_zero(process, steps, end, _single(points, start))


@register("logistic")
def logistic(
    process: Process,
    steps: int,
    start: float,
    end: str,
    power: float = 0.7,
    center: float = 0.7,
    first_step: float = 1.0,
    last_step: float = 1.0,
    floor: float = 0.01,
) -> Tensor:
    """Uniform in ``r^p / (r^p + c^p)`` with ``r = sigma / alpha``: a logistic function of the log-SNR.

    Densest around the noise level ``center``, where images form; finite at both ends of every process. The
    first and the last interval are ``first_step`` and ``last_step`` times as long as the others. An end with
    less noise than ``floor`` is spaced as if it had that: nothing is to be seen below it.
    """
    for name, value in (
        ("power", power),
        ("center", center),
        ("first_step", first_step),
        ("last_step", last_step),
        ("floor", floor),
    ):
        if not value > 0:
            raise ValueError(f"{name}={value!r} must be positive")
    ends = torch.tensor([start, process.t_zero if end == "zero" else process.t_end], dtype=torch.float64)
    spaced = process.lam(ends)
    spaced[1] = min(float(spaced[1]), max(-math.log(floor), float(spaced[0]) + 1.0))
    z = torch.sigmoid(-power * (spaced + math.log(center))).tolist()
    position = (first_step + torch.arange(steps - 1, dtype=torch.float64)) / (
        steps - 2 + first_step + last_step
    )
    inner = process.t_of_lam(-torch.logit(z[0] + (z[1] - z[0]) * position) / power - math.log(center))
    return torch.cat([ends[:1], inner, ends[1:]])


@register("beta")
def beta(process: Process, steps: int, start: float, end: str, a: float = 0.6, b: float = 0.6) -> Tensor:
    """Quantiles of a Beta distribution over time, dense at both ends (Lee et al. 2024, "Beta sampling")."""
    from scipy.stats import beta as distribution

    if not (a > 0 and b > 0):
        raise ValueError(f"a={a!r}, b={b!r} must be positive")
    quantiles = distribution.ppf(np.linspace(1.0, 0.0, steps + 1), a, b)
    return _between(process, start, end, torch.from_numpy(quantiles))


@register("sigmoid")
def sigmoid(process: Process, steps: int, start: float, end: str, sharpness: float = 3.0) -> Tensor:
    """Logistic in time, ``sigmoid(k (1 - 2 i/n))`` rescaled to [0, 1]: dense at both ends."""
    if not sharpness > 0:
        raise ValueError(f"sharpness={sharpness!r} must be positive")
    s = torch.sigmoid(sharpness * _line(1.0, -1.0, steps + 1))
    return _between(process, start, end, (s - s[-1]) / (s[0] - s[-1]))


# -- the index grids of discrete models ----------------------------------------------------------------------


def _discrete(process: Process, name: str) -> None:
    if process.t_zero != -1.0:
        raise ValueError(
            f"grid={name!r} is for discrete processes with indices 0..N-1, not {process!r}; use 'uniform'"
        )


def _to_end(process: Process, evaluated: Tensor, end: str) -> Tensor:
    last = process.t_zero if end == "zero" else process.t_end
    return torch.cat([evaluated, torch.tensor([last], dtype=torch.float64)])


@register("linspace")
def linspace(process: Process, steps: int, start: float, end: str) -> Tensor:
    """``linspace`` spacing: ``steps + 1`` rounded indices from ``start`` to 0, without the last."""
    _discrete(process, "linspace")
    return _to_end(process, _line(start, 0.0, steps + 1).round()[:-1], end)


@register("leading")
def leading(process: Process, steps: int, start: float, end: str, offset: int = 0) -> Tensor:
    """``leading`` spacing: multiples of ``N // steps`` from index ``offset`` (DDIM's original grid).

    With ``end="sigma_min"`` it has one interval fewer where index 0 is among them.
    """
    _discrete(process, "leading")
    count = round(start) + 1
    if steps > count:
        raise ValueError(f"steps={steps} exceeds the {count} indices of the model from start={start:g} on")
    indices = (torch.arange(steps, dtype=torch.float64) * (count // steps) + offset).flip(0)
    if end == "sigma_min" and indices[-1] <= 0:
        indices = indices[:-1]
    return _to_end(process, indices, end)


@register("trailing")
def trailing(process: Process, steps: int, start: float, end: str) -> Tensor:
    """``trailing`` spacing: ``round((N) (1 - i/steps)) - 1`` (Lin et al. 2024, table 2)."""
    _discrete(process, "trailing")
    indices = (torch.arange(steps, 0, -1, dtype=torch.float64) * (start + 1) / steps).round() - 1
    if end == "sigma_min" and indices[-1] <= 0:
        indices = indices[:-1]
    return _to_end(process, indices, end)


# -- Align Your Steps ----------------------------------------------------------------------------------------

# Noise levels sigma/alpha of the optimised 10-step schedules that Sabour et al. 2024 ("Align Your Steps",
# quickstart guide) publish; other numbers of steps are interpolated in log sigma, as the guide does.
AYS_SIGMAS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


@register("ays")
def ays(process: Process, steps: int, start: float, end: str, model: str = "sd15") -> Tensor:
    """Align Your Steps (Sabour et al. 2024): the published levels of ``model`` ("sd15", "sdxl", "svd")."""
    if model not in AYS_SIGMAS:
        raise unknown("model", model, AYS_SIGMAS)
    levels = np.log(np.asarray(AYS_SIGMAS[model])[::-1])
    low, high = float(process.rho(process.t_end).log()), -_finite_lam(process, start)

    def points(count: int) -> Tensor:
        raw = np.interp(np.linspace(1, 0, count), np.linspace(0, 1, len(levels)), levels)
        # the published shape between the model's own ends
        scaled = low + (raw - levels[0]) * (high - low) / (levels[-1] - levels[0])
        t = process.t_of_lam(torch.from_numpy(-scaled))
        t[0], t[-1] = start, process.t_end
        return t

    return _with_zero(process, steps, end, _single(points, start))


# -- fitted to a model ---------------------------------------------------------------------------------------


def gits(
    denoiser: Denoiser, steps: int, sample_shape: Sequence[int] | None = None, **settings: Any
) -> Tensor:
    """A grid fitted to a model without training; see :func:`fastsample.gits.fit`."""
    from .gits import fit

    return fit(denoiser, steps, sample_shape, **settings)
