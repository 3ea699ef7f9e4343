"""Time grids: sound on every process, their formulas, snapping, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import PROCESSES

import fastsample as fs
from fastsample import grids

INDEX_GRIDS = {"linspace", "leading", "trailing"}
CONTINUOUS = sorted(set(grids.names()) - INDEX_GRIDS)


@settings(max_examples=200)
@given(
    st.sampled_from(sorted(PROCESSES)),
    st.sampled_from(CONTINUOUS),
    st.sampled_from([1, 2, 3, 5, 10, 37, 200]),
    st.sampled_from(["zero", "sigma_min"]),
)
def test_sound_on_every_process(kind: str, name: str, steps: int, end: str) -> None:
    process = PROCESSES[kind]()
    grid = grids.make(name, process, steps, end=end)
    assert grid.dtype == torch.float64
    assert grid.shape == (steps + 1,)
    assert float(grid[0]) == process.t_start, "the start is not exact"
    assert float(grid[-1]) == (process.t_zero if end == "zero" else process.t_end), "the end is not exact"
    assert bool((process.lam(grid).diff() > 0).all())


@pytest.mark.parametrize("name", sorted(INDEX_GRIDS))
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 50, 333, 999])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_index_grids(name: str, steps: int, end: str) -> None:
    if (name, steps, end) == ("leading", 1, "sigma_min"):
        pytest.skip("the one index of this grid is its end")
    process = fs.VP.linear()
    grid = grids.make(name, process, steps, end=end)
    assert bool((grid == grid.round()).all())
    assert float(grid[-1]) == (-1 if end == "zero" else 0)
    assert grid.numel() - 1 == steps or (end == "sigma_min" and grid.numel() - 1 == steps - 1)


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 50, 300])
def test_index_grids_are_those_of_diffusers(steps: int) -> None:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    process = fs.VP.linear()
    for spacing in ("leading", "trailing"):
        theirs = DDIMScheduler(timestep_spacing=spacing)
        theirs.set_timesteps(steps)
        ours = grids.make(spacing, process, steps)
        assert ours[:-1].tolist() == theirs.timesteps.tolist(), spacing
    theirs = DPMSolverMultistepScheduler(timestep_spacing="linspace")
    theirs.set_timesteps(steps)
    assert grids.make("linspace", process, steps)[:-1].tolist() == theirs.timesteps.tolist()


def test_formulas() -> None:
    n, i = 8, torch.arange(9, dtype=torch.float64)
    vp, edm = fs.VP.linear(), fs.EDM()
    make = grids.make
    close = torch.testing.assert_close
    close(make("uniform", vp, n, end="sigma_min"), 999 * (1 - i / n))
    close(make("power", vp, n, end="sigma_min", exponent=1.5), 999 * (1 - i / n) ** 1.5)
    close(make("quadratic", vp, n, end="sigma_min"), 999 * (1 - i / n) ** 2)
    phi = vp.phi(make("angle", vp, n, end="zero", exponent=1.5))
    close(phi, phi[0] * (1 - i / n) ** 1.5)
    rho = 7.0
    karras = (80 ** (1 / rho) + i / n * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    close(make("karras", edm, n, end="sigma_min"), karras)
    lam = vp.lam(make("logsnr", vp, n, end="sigma_min"))
    close(lam.diff(), lam.diff().mean().expand(n))
    close(make("exponential", vp, n), make("logsnr", vp, n))
    # Karras et al. 2022, algorithm 1: N steps are N levels and zero
    close(make("karras", edm, n)[:-1], make("karras", edm, n - 1, end="sigma_min"))
    u = make("uniform", fs.Flow(), n)
    close(make("uniform", fs.Flow(shift=3.0), n), 3 * u / (1 + 2 * u))
    from scipy.stats import beta

    close(make("beta", fs.Flow(), n), torch.from_numpy(beta.ppf(1 - i.numpy() / n, 0.6, 0.6)))


def test_sigmoid_is_dense_at_both_ends() -> None:
    widths = -grids.make("sigmoid", fs.Flow(), 10).diff()
    torch.testing.assert_close(widths, widths.flip(0))
    assert bool((widths[:5].diff() > 0).all())


def test_ays_is_the_published_schedule_at_ten_steps() -> None:
    process = fs.VP.scaled_linear()
    sigmas = process.rho(grids.make("ays", process, 10, end="sigma_min"))
    published = torch.tensor(grids.AYS_SIGMAS["sd15"], dtype=torch.float64)
    # the model's own ends are a little apart from the published ones, and the levels between move with them
    torch.testing.assert_close(sigmas, published, rtol=0.03, atol=0)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_starts_anywhere(name: str, process: fs.Process) -> None:
    start = process.t_end + 0.4 * (process.t_start - process.t_end)
    grid = grids.make(name, process, 6, start=start)
    assert float(grid[0]) == start
    assert bool((process.lam(grid).diff() > 0).all())


@pytest.mark.parametrize("given_grid", [[900.0, 500.0, 10.0], (900, 500, 10), np.array([900, 500, 10])])
def test_any_array(given_grid: object) -> None:
    process = fs.VP.linear()
    assert grids.make(given_grid, process, 2).tolist() == [900, 500, 10]  # type: ignore[arg-type]
    rising = torch.tensor([10.0, 500.0, 900.0])
    assert grids.make(rising, process, 2).tolist() == [10, 500, 900]


def test_a_function_is_a_grid() -> None:
    def halves(process: fs.Process, steps: int, start: float, end: str, factor: float = 0.5) -> list[float]:
        return [start * factor**i for i in range(steps + 1)]

    plan = fs.solvers.build("ddim", fs.EDM(), 3, grid=halves, factor=0.25)
    assert plan.grid == (80, 20, 5, 1.25)


def test_registered_grids_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "_GRIDS", dict(grids._GRIDS))

    @grids.register("three")
    def three(process: fs.Process, steps: int, start: float, end: str) -> list[float]:
        return [start, 3.0]

    assert "three" in grids.names()
    assert grids.make("three", fs.EDM(), 1).tolist() == [80, 3]


def test_gradients_pass_through_a_given_grid() -> None:
    grid = torch.tensor([900.0, 500.0, 10.0], dtype=torch.float64, requires_grad=True)
    assert grids.make(grid, fs.VP.linear(), 2).requires_grad


# -- quantized ------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.sampled_from(["uniform", "karras", "logsnr", "beta"]), st.integers(2, 40))
def test_snapped_grids_have_no_double_points(steps: int, name: str, every: int) -> None:
    levels = list(range(0, 1000, every))
    process = fs.VP.linear().quantized(levels)
    grid = grids.make(name, process, steps)
    assert set(grid.tolist()) <= {*levels, -1}
    assert bool((grid.diff() < 0).all())
    assert grid.numel() <= steps + 1


def test_a_snapped_grid_of_one_point_is_refused() -> None:
    process = fs.VP.linear().quantized([500])
    with pytest.raises(ValueError, match="single point"):
        grids.make([900.0, 100.0], process, 1)


# -- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "3", None])
def test_bad_steps(steps: object) -> None:
    with pytest.raises(ValueError, match=r"steps=.* must be a whole number of at least 1"):
        grids.make("uniform", fs.EDM(), steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ("kerras", {}, "grid='kerras' is unknown; did you mean 'karras'"),
        ("karras", {"end": "sigmamin"}, "end='sigmamin' is unknown; did you mean 'sigma_min'"),
        ("karras", {"roh": 5.0}, "no option 'roh'; did you mean 'rho'"),
        ("karras", {"rho": 0.0}, "rho=0.0"),
        ("power", {"exponent": -1.0}, "exponent=-1.0"),
        ("angle", {"exponent": 0.0}, "exponent=0.0"),
        ("beta", {"a": 0.0}, "a=0.0"),
        ("sigmoid", {"sharpness": 0.0}, "sharpness=0.0"),
        ("ays", {"model": "sd16"}, "model='sd16' is unknown; did you mean 'sd15'"),
        ("leading", {}, "for discrete processes"),
        ([80.0], {}, r"shape \(1,\)"),
        ([[80.0, 1.0]], {}, r"shape \(1, 2\)"),
        ([80.0, math.nan], {}, "not finite"),
        ([80.0, 1.0, 1.0], {}, "strictly monotone in noise; entries 1 and 2 are 1 and 1"),
        ([80.0, 1.0, 2.0, 0.5], {}, "strictly monotone in noise; entries 1 and 2 are 1 and 2"),
        ([1.0, 2.0, 1.5, 3.0], {}, "strictly monotone in noise; entries 1 and 2 are 2 and 1.5"),
        ([80.0, -1.0], {}, "t=-1.0 lies outside"),
    ],
)
def test_errors(grid: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grids.make(grid, fs.EDM(), 3, **options)  # type: ignore[arg-type]


def test_too_many_steps_for_the_indices() -> None:
    with pytest.raises(ValueError, match="steps=2000 exceeds the 1000 indices"):
        grids.make("leading", fs.VP.linear(), 2000)
    with pytest.raises(ValueError, match="steps=200 exceeds the 101 indices of the model from start=100"):
        grids.make("leading", fs.VP.linear(), 200, start=100.0)
