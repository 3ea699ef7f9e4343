"""``fs.tune``: what it reaches, for which models, and that it never ends worse than it began."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers_tuning import QUICK, error, mixture, model
from torch import Tensor, nn

import fastsample as fs
from fastsample.solvers import registry
from fastsample.tuning.fit import Budget
from fastsample.zoo.mixture import MixtureNet, digits_mixture

# RMSE to the exact solution of the digits mixture that tuned plans have to reach
LIMITS = {3: 0.111, 4: 0.085, 5: 0.055, 6: 0.041, 8: 0.030, 10: 0.020}


@pytest.mark.parametrize("steps", [4, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 6, 8, 10))])
def test_error_on_the_digits_mixture(steps: int) -> None:
    """At or below the limits and well below ``auto``, on 512 noises that the fit has not seen."""
    denoiser = fs.zoo.load("digits-mixture")
    noise = fs.noise.normal((512, 1, 8, 8), 0, torch.arange(512), dtype=torch.float64)
    exact = fs.Sampler(denoiser, steps=150)(noise=noise)  # to 4e-6, see the tests of auto
    plan = fs.tune(denoiser, steps, seed=0)
    tuned, auto = (
        float((s(noise=noise) - exact).square().mean().sqrt())
        for s in (fs.Sampler(denoiser, plan=plan), fs.Sampler(denoiser, steps=steps))
    )
    assert plan.nfe == steps
    assert tuned <= LIMITS[steps]
    assert tuned < 0.8 * auto


def test_the_reference_of_that_test_is_the_exact_solution() -> None:
    denoiser = fs.zoo.load("digits-mixture")
    noise = fs.noise.normal((8, 1, 8, 8), 0, torch.arange(8), dtype=torch.float64)
    exact = digits_mixture().reference(noise * float(denoiser.process.sigma(999.0)), denoiser.process)
    assert float((fs.Sampler(denoiser, steps=150)(noise=noise) - exact.x).abs().max()) < 1e-3


@pytest.mark.parametrize(
    ("process", "prediction"),
    [
        (fs.VP.linear(), "eps"),
        (fs.VP.cosine(), "x0"),
        (fs.VP.scaled_linear().rescaled_zero_snr(), "v"),
        (fs.VE(), "score"),
        (fs.EDM(), "x0"),
        (fs.Flow(shift=3.0), "flow"),
        (fs.TrigFlow(), "v"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_every_process_and_prediction(process: fs.Process, prediction: str, end: str) -> None:
    denoiser = model(process, prediction)
    solution = fs.Sampler(denoiser, steps=120, end=end)(n=256, seed=11)
    plan = fs.tune(denoiser, 4, end=end, **QUICK)
    before = error(denoiser, fs.Sampler(denoiser, steps=4, end=end), solution)
    after = error(denoiser, fs.Sampler(denoiser, plan=plan), solution)
    assert after < 0.8 * before


class Whole(nn.Module):
    """Sees whole indices only, without saying so, and passes no gradient."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return MixtureNet(mixture(), fs.VP.linear())(x.detach(), t.detach().round())


def python_float(x: Tensor, t: Tensor) -> Tensor:
    return MixtureNet(mixture(), fs.VP.linear())(x.detach(), torch.tensor(int(t[0].item())))


def without_gradient(x: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        return MixtureNet(mixture(), fs.VP.linear())(x, t)


@pytest.mark.parametrize("net", [Whole(), python_float], ids=["rounds", "int"])
def test_networks_without_gradients_and_with_whole_times(net: Any) -> None:
    denoiser = fs.wrap(net, fs.VP.linear(), sample_shape=(2,))
    solution = fs.Sampler(denoiser, steps=120)(n=256, seed=11)
    plan = fs.tune(denoiser, 5, free=("grid", "time"), **QUICK)
    assert error(denoiser, fs.Sampler(denoiser, plan=plan), solution) < 0.95 * error(
        denoiser, fs.Sampler(denoiser, steps=5), solution
    )
    start = fs.Sampler(denoiser, steps=5).plan
    moved = max(abs(a - b) for a, b in zip(plan.times, start.times, strict=True))
    assert moved > 1.0  # beyond the rounding


def test_networks_with_a_table_of_times_are_told_what_they_know() -> None:
    denoiser = model(quantize=list(range(0, 1000, 5)))
    plan = fs.tune(denoiser, 5, **QUICK)
    assert all(v.t_in % 5 == 0 for row, v in zip(plan.rows, plan.values, strict=True) if row.evaluates)
    sampler = fs.Sampler(denoiser, plan=plan)
    assert error(denoiser, sampler) < 0.9 * error(denoiser, fs.Sampler(denoiser, steps=5))


def test_networks_in_16_bits() -> None:
    """Difference quotients as narrow as for float32 would drown in rounding."""
    float32 = fs.zoo.load("digits")
    net = float32.net.to(torch.bfloat16)
    denoiser = fs.wrap(net, float32.process, sample_shape=(1, 8, 8))
    settings = QUICK | {"trajectories": 64, "heldout": 64, "iterations": 6}
    plan = fs.tune(denoiser, 4, conditions=lambda index: {"labels": index % 10}, **settings)
    assert plan.options["record"]["heldout_rmse"] < 0.75 * plan.options["record"]["start_rmse"]


def test_never_worse_on_held_out_noise_than_the_start() -> None:
    for seed in range(4):
        net = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 3))
        with torch.no_grad():
            for i, p in enumerate(net.parameters()):
                p.copy_(fs.noise.normal(p.shape, seed, torch.arange(len(p)), i + 1) * 0.7)
        denoiser = fs.wrap(lambda x, t, net=net: net(x), fs.VP.linear(), "v", sample_shape=(3,))
        plan = fs.tune(denoiser, 3, **(QUICK | {"trajectories": 4, "patience": 20, "objective": "rmse"}))
        assert plan.options["record"]["heldout_rmse"] <= plan.options["record"]["start_rmse"]


def test_the_start_is_the_best_solver_unless_named() -> None:
    denoiser = model()
    ddim = fs.tune(denoiser, 4, start="ddim", **QUICK)
    assert ddim.options["start"] == "ddim"
    best = fs.tune(denoiser, 4, **QUICK)
    assert best.options["record"]["start_rmse"] < ddim.options["record"]["start_rmse"]
    again = fs.tune(denoiser, 4, start=best, **QUICK)
    assert again.options["start"] == "tuned"
    assert again.options["record"]["heldout_rmse"] <= best.options["record"]["heldout_rmse"] * 1.0001


def test_a_family_shares_its_trajectories() -> None:
    denoiser = model()
    plans = fs.tune(denoiser, [3, 5], **QUICK)
    assert {n: p.nfe for n, p in plans.items()} == {3: 3, 5: 5}
    assert plans[5].options["record"]["heldout_rmse"] < plans[3].options["record"]["heldout_rmse"]


def test_it_is_deterministic_and_the_seed_counts() -> None:
    denoiser = model()
    one, two, other = (fs.tune(denoiser, 3, seed=seed, **QUICK) for seed in (0, 0, 1))
    assert one == two
    assert one.values != other.values


def test_guidance_and_conditions() -> None:
    denoiser = fs.zoo.load("digits-mixture").guided(2.0, null={"labels": 10})
    seen: list[int] = []

    def conditions(index: Tensor) -> dict[str, Tensor]:
        seen.extend(index.tolist())
        return {"labels": index % 10}

    settings = QUICK | {"iterations": 3}
    called = fs.tune(denoiser, 4, conditions=conditions, **settings)
    assert set(seen) == set(range(160))
    given = fs.tune(denoiser, 4, conditions={"labels": torch.arange(160) % 10}, **settings)
    assert called.values == given.values
    assert called.options["record"]["heldout_rmse"] < 0.9 * called.options["record"]["start_rmse"]
    sampler = fs.Sampler(denoiser, plan=called)
    assert sampler(n=4, labels=torch.arange(4)).shape == (4, 1, 8, 8)


# -- what may change ------------------------------------------------------------------------------------


def test_only_the_grid() -> None:
    """The coefficients stay what the solver's formula writes on the tuned grid."""
    denoiser = model()
    start = fs.Sampler(denoiser, "dpmpp_2m", 5).plan
    plan = fs.tune(denoiser, 5, start="dpmpp_2m", free=("grid",), history=0, **QUICK)
    times = torch.tensor([plan.t0, *(v.t for v in plan.values)], dtype=torch.float64)
    assert not torch.equal(times.unique(), torch.tensor(start.grid, dtype=torch.float64).unique())
    grid = torch.unique(times).flip(0)
    again = registry.on_grid(registry.get("dpmpp_2m"), denoiser.process, "eps", grid, {})
    torch.testing.assert_close(plan.numbers, again.numbers, rtol=1e-9, atol=1e-12)
    assert bool((grid.diff() < 0).all())


def test_only_the_told_times() -> None:
    denoiser = model()
    start = fs.Sampler(denoiser, steps=4).plan
    plan = fs.tune(denoiser, 4, start="auto", free=("time",), history=0, **QUICK)
    for row, v, w in zip(start.rows, start.values, plan.values, strict=True):
        assert v._replace(t_in=None) == w._replace(t_in=None)
        if row.evaluates:
            assert w.t_in is not None
    assert any(v.t_in != w.t_in for v, w in zip(start.values, plan.values, strict=True))


def test_coefficients_stay_within_the_bound() -> None:
    denoiser = model()
    plan = fs.tune(denoiser, 4, start="auto", free=("coefficients",), bound=0.05, **QUICK)
    start = fs.Sampler(denoiser, steps=4).plan
    largest = 0.0
    for row, v, other, w in zip(start.rows, start.values, plan.rows, plan.values, strict=True):
        for name in ("a", "b"):
            old = dict(zip(row.states if name == "a" else row.predictions, getattr(v, name), strict=True))
            new = dict(zip(other.states if name == "a" else other.predictions, getattr(w, name), strict=True))
            scale = max((abs(c) for c in old.values()), default=1.0)
            largest = max([largest, *(abs(c - old.get(k, 0.0)) / scale for k, c in new.items())])
    assert 0.03 < largest <= 0.05 + 1e-12


def test_consistency_keeps_constant_predictions_exact() -> None:
    """With the constraint, a network whose prediction (in the rows' space) is constant is solved as before."""
    denoiser = model()
    start = fs.Sampler(denoiser, "exp_adams", 5, space="x0", order=2).plan

    def end_of(plan: fs.Plan) -> Tensor:
        calls = iter([(v.p, v.q) for row, v in zip(plan.rows, plan.values, strict=True) if row.evaluates])

        def constant(x: Tensor, t: Tensor) -> Tensor:
            p, q = next(calls)
            return (0.37 - p * x) / q

        return fs.Sampler(fs.wrap(constant, fs.VP.linear(), sample_shape=(2,)), plan=plan)(
            n=8, dtype=torch.float64
        )

    kept = fs.tune(denoiser, 5, start=start, constraints=("consistency",), **QUICK)
    freed = fs.tune(denoiser, 5, start=start, **QUICK)
    torch.testing.assert_close(end_of(kept), end_of(start), rtol=1e-9, atol=1e-9)
    assert float((end_of(freed) - end_of(start)).abs().max()) > 1e-4


def test_rows_read_no_more_history_than_asked() -> None:
    plan = fs.tune(model(), 5, start="ddim", history=2, **(QUICK | {"iterations": 1}))
    made: list[int] = []
    for r, row in enumerate(plan.rows):
        assert set(row.predictions) <= set(made[-2:])
        made += [r] if row.evaluates else []
    assert max(len(row.predictions) for row in plan.rows) == 2


# -- objectives -----------------------------------------------------------------------------------------


def test_features_are_what_is_compared() -> None:
    denoiser = model()

    def first(x: Tensor) -> Tensor:
        return x[:, :1]

    solution = fs.Sampler(denoiser, steps=120)(n=256, seed=11)

    def errors(**settings: Any) -> list[float]:
        plan = fs.tune(denoiser, 3, **(QUICK | {"iterations": 20}), **settings)
        x = fs.Sampler(denoiser, plan=plan)(n=256, seed=11)
        return (x - solution).abs().median(0).values.tolist()

    whole, part = errors(), errors(features=first)
    assert part[0] < whole[0]
    assert part[1] > whole[1]


def test_selection_by_a_function_of_the_held_out_samples() -> None:
    values: list[float] = []

    def select(x: Tensor) -> float:
        assert x.shape == (64, 2)
        values.append([5.0, 4.0, 1.0, 3.0][min(len(values), 3)])
        return values[-1]

    denoiser = model()
    plan = fs.tune(denoiser, 3, select=select, **(QUICK | {"iterations": 3}))
    assert len(values) == 4

    def last(x: Tensor) -> float:
        values.append(-float(len(values)))
        return values[-1]

    stopped = fs.tune(denoiser, 3, select=last, **(QUICK | {"iterations": 2}))
    assert plan.values == stopped.values  # the second iteration had the least value


def test_relaxed_starts() -> None:
    """Another objective, with a result that is good without relaxing too; gradients are needed."""
    denoiser = model()
    relaxed = fs.tune(denoiser, 3, relax=0.1, **QUICK)
    assert relaxed.options["record"]["heldout_rmse"] < relaxed.options["record"]["start_rmse"]
    assert relaxed.values != fs.tune(denoiser, 3, **QUICK).values
    with pytest.raises(ValueError, match=r"relax=0\.1 needs a network that gradients pass"):
        fs.tune(fs.wrap(without_gradient, fs.VP.linear(), sample_shape=(2,)), 3, relax=0.1, **QUICK)


# -- stopping, counting, using --------------------------------------------------------------------------


def test_budgets() -> None:
    assert Budget.parse(None) == Budget()
    assert Budget.parse(90) == Budget(90.0)
    assert Budget.parse("5 min") == Budget(300.0)
    assert Budget.parse("2e4 evaluations") == Budget(None, 20000)
    for bad in ("soon", -3, "5 parsecs", 0):
        with pytest.raises(ValueError, match="budget"):
            Budget.parse(bad)
    denoiser = model()
    small = fs.tune(denoiser, 4, budget="5000 evaluations", **QUICK)
    full = fs.tune(denoiser, 4, **QUICK)
    assert "budget spent" in " ".join(small.notes)
    assert small.options["record"]["evaluations"] < full.options["record"]["evaluations"]


def test_evaluations_are_counted() -> None:
    rows = 0

    def net(x: Tensor, t: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return MixtureNet(mixture(), fs.VP.linear())(x, t)

    plan = fs.tune(fs.wrap(net, fs.VP.linear(), sample_shape=(2,)), 4, **QUICK)
    probes = 6 * 2 + 64 * 40  # the hash of the model and the search for the resolution of its times
    assert plan.options["record"]["evaluations"] <= rows <= plan.options["record"]["evaluations"] + probes
    assert plan.options["record"]["evaluations_per_batch"] == pytest.approx(
        plan.options["record"]["evaluations"] / (4 * 160)
    )


def test_the_plan_says_what_was_done_and_what_changed() -> None:
    denoiser = model()
    plan = fs.tune(denoiser, 4, start="auto", **QUICK)
    text = str(plan)
    assert "tuned from auto: error on held-out noise" in text
    assert "times that on the noise it was fitted to" in text
    assert "times sampling the trajectories once" in text
    table = fs.tuning.changes(fs.Sampler(denoiser, steps=4).plan, plan)
    assert len(table.splitlines()) == len(plan.rows) + 1
    assert " -> " in table
    with pytest.raises(ValueError, match="rows"):
        fs.tuning.changes(fs.Sampler(denoiser, steps=7).plan, plan)


def test_another_model_is_warned_of_once(tmp_path: Any) -> None:
    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.scale * MixtureNet(mixture(), fs.VP.linear())(x, t)

    one, other = (fs.wrap(Scaled(s), fs.VP.linear(), sample_shape=(2,)) for s in (1.0, 0.9))
    fs.tune(one, 3, folder=tmp_path, **(QUICK | {"iterations": 1}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fs.Sampler(one, plan=tmp_path / "tuned-3.json")
    with pytest.warns(UserWarning, match="tuned for a model with other weights"):
        fs.Sampler(other, plan=tmp_path / "tuned-3.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fs.Sampler(other, plan=tmp_path / "tuned-3.json")
    with pytest.raises(ValueError, match="written for VP"):
        fs.Sampler(model(fs.EDM()), plan=tmp_path / "tuned-3.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0 must be a whole number"),
        ({"steps": []}, r"steps=\[\]"),
        ({"steps": 100, "reference_steps": 50}, "needs more than reference_steps=50"),
        ({"trajectories": 0}, "trajectories=0"),
        ({"objective": "rms"}, "did you mean 'rmse'"),
        ({"free": ["grids"]}, "did you mean 'grid'"),
        ({"free": []}, "nothing to tune"),
        ({"constraints": ["consistent"]}, "did you mean 'consistency'"),
        ({"start": "ddpm"}, "start='ddpm' draws noise"),
        ({"start": "dim"}, "did you mean 'ddim'"),
        ({"bound": 0.0}, "bound=0.0 must be positive"),
        ({"relax": -1.0}, "relax=-1.0"),
        ({"history": -1}, "history=-1"),
        ({"dtype": torch.float16}, "cannot hold the state"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fs.tune(model(), **({"steps": 3, **QUICK} | settings))


def test_a_model_without_a_shape_and_one_that_is_random() -> None:
    with pytest.raises(ValueError, match="sample_shape="):
        fs.tune(fs.wrap(lambda x, t: x, fs.VP.linear()), 3)
    noisy = fs.wrap(lambda x, t: x + torch.rand_like(x), fs.VP.linear(), sample_shape=(2,))
    with pytest.raises(ValueError, match="switch dropout off"):
        fs.tune(noisy, 3)
