"""The sampler: shapes, seeds, chunks, memory, ends, inversion, contexts, threads, errors."""

from __future__ import annotations

import io
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import PROCESSES, interpret, net, random_plan
from torch import Tensor

import fastsample as fs
from fastsample.executor import Step, buffers_needed
from fastsample.noise import normal


def denoiser_of(process: fs.Process | None = None, function: Any = net, **options: Any) -> fs.Denoiser:
    options.setdefault("prediction", "v")
    return fs.wrap(function, process or fs.VP.linear(), **options)


def sampler_of(solver: str = "exp_adams", steps: int = 5, **options: Any) -> fs.Sampler:
    return fs.Sampler(denoiser_of(), solver, steps, **options)


# -- what comes in and out ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (2, 7), (1, 3, 5, 9), (2, 3, 4, 8, 6), (5, 1, 1, 1)])
def test_shapes(shape: tuple[int, ...]) -> None:
    out = sampler_of()(shape=shape)
    assert out.shape == shape
    assert out.dtype == torch.float32
    assert bool(torch.isfinite(out).all())


def test_it_is_the_plan_applied_to_the_noise() -> None:
    for seed in range(5):
        plan = random_plan(seed)
        got = fs.Sampler(denoiser_of(), plan=plan)(shape=(3, 4), seed=9, dtype=torch.float64, index=0)
        x = normal((3, 4), 9, torch.arange(3), dtype=torch.float64)
        x = x * float(fs.VP.linear().sigma(plan.t0))
        torch.testing.assert_close(got, interpret(plan, x, net, seed=9)[-1], rtol=1e-9, atol=1e-9)


def test_ways_to_begin_agree() -> None:
    sampler = sampler_of()
    shape, sigma = (3, 4), float(fs.VP.linear().sigma(999.0))
    noise = normal(shape, 7, torch.arange(3))
    before = noise.clone()
    drawn = sampler(shape=shape, seed=7)
    assert torch.equal(sampler(noise=noise), drawn)
    assert torch.equal(sampler(x=noise * sigma), drawn)
    known = fs.Sampler(denoiser_of(sample_shape=(4,)), "exp_adams", 5)
    assert torch.equal(known(n=3, seed=7), drawn)
    assert torch.equal(noise, before)


def test_noise_is_scaled_to_the_starting_sigma() -> None:
    for kind in ("edm", "ve", "linear", "flow"):
        process = PROCESSES[kind]()
        sampler = fs.Sampler(denoiser_of(process), "ddim", 3)
        _, trajectory = sampler(noise=torch.ones(2, 3), return_trajectory=True)
        torch.testing.assert_close(trajectory.x[0], torch.full((2, 3), float(process.sigma(process.t_start))))


def test_a_given_state_is_not_overwritten() -> None:
    x = torch.randn(3, 4)
    before = x.clone()
    for solver in ("ddim", "exp_adams"):
        out = sampler_of(solver)(x=x)
        assert torch.equal(x, before)
        assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    noise = torch.randn(3, 4)
    before = noise.clone()
    sampler_of("ddim")(noise=noise)
    assert torch.equal(noise, before)


def test_precision_of_the_state() -> None:
    sampler = sampler_of()
    assert sampler(shape=(2, 3), dtype=torch.float64).dtype == torch.float64
    assert sampler(noise=torch.randn(2, 3, dtype=torch.float64)).dtype == torch.float64
    assert sampler(noise=torch.randn(2, 3).bfloat16()).dtype == torch.float32
    assert sampler(x=torch.randn(2, 3).half()).dtype == torch.float32
    assert sampler(noise=torch.randn(2, 3), dtype=torch.float64).dtype == torch.float64
    torch.testing.assert_close(
        sampler(shape=(2, 3)).double(), sampler(shape=(2, 3), dtype=torch.float64), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("steps", [1, 1000])
def test_one_step_and_a_thousand(steps: int, process: fs.Process) -> None:
    sampler = fs.Sampler(denoiser_of(process), "ddim", steps, grid="uniform")
    assert sampler.plan.nfe == steps
    assert bool(torch.isfinite(sampler(shape=(2, 3))).all())


@pytest.mark.parametrize("kind", ["linear", "flow"])
def test_a_thousand_steps_of_high_order(kind: str) -> None:
    sampler = fs.Sampler(denoiser_of(PROCESSES[kind]()), "exp_adams", 1000, grid="uniform", corrector=True)
    assert bool(torch.isfinite(sampler(shape=(2, 3))).all())


# -- seeds, chunks --------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    st.sampled_from(["ddim", "exp_adams"]),
    st.sampled_from([0.0, 1.0]),
    st.integers(1, 9),
    st.sampled_from([(3,), (7,), (2, 5, 3), (3, 8, 8)]),
)
def test_a_sample_is_the_same_bits_in_any_chunk(
    solver: str, eta: float, batch_size: int, sample: tuple[int, ...]
) -> None:
    options = {"eta": eta} if solver == "ddim" else {"corrector": bool(eta)}
    sampler = sampler_of(solver, 4, **options)
    whole = sampler(shape=(9, *sample), seed=3)
    assert torch.equal(sampler(shape=(9, *sample), seed=3, batch_size=batch_size), whole)


@given(st.permutations(range(6)))
@settings(max_examples=20)
def test_a_sample_is_the_same_bits_in_any_order(order: list[int]) -> None:
    sampler = sampler_of("ddim", 4, eta=1.0)
    whole = sampler(shape=(6, 5), seed=3, index=100)
    index = torch.tensor(order) + 100
    assert torch.equal(sampler(shape=(6, 5), seed=3, index=index), whole[order])
    assert torch.equal(sampler(shape=(6, 5), seed=3, index=index.tolist()), whole[order])
    one = sampler(shape=(1, 5), seed=3, index=np.int64(100 + order[0]))
    assert torch.equal(one, whole[order[:1]])


def _rank(rank: int, world: int, path: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=world
    )
    torch.set_num_threads(1)
    mine = torch.arange(rank, 8, world)
    part = sampler_of("ddim", 4, eta=1.0)(shape=(len(mine), 6), seed=3, index=mine)
    parts = [torch.empty_like(part) for _ in range(world)]
    torch.distributed.all_gather(parts, part)
    if rank == 0:
        torch.save(torch.stack(parts, dim=1).flatten(0, 1), f"{path}/samples.pt")
    torch.distributed.destroy_process_group()


def test_a_sample_is_the_same_bits_on_any_rank(tmp_path: Path) -> None:
    mp.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    sharded = torch.load(tmp_path / "samples.pt", weights_only=True)
    assert torch.equal(sharded, sampler_of("ddim", 4, eta=1.0)(shape=(8, 6), seed=3))


def test_seeds_and_indices_differ() -> None:
    sampler = sampler_of("ddim", 3)
    base = sampler(shape=(2, 50), seed=0)
    assert not torch.equal(base, sampler(shape=(2, 50), seed=1))
    assert not torch.equal(base[0], base[1])
    assert torch.equal(sampler(shape=(1, 50), seed=0, index=1), base[1:])
    stochastic = sampler_of("ddim", 3, eta=1.0)
    x = torch.randn(2, 50)
    assert not torch.equal(stochastic(x=x, seed=0), stochastic(x=x, seed=1))


def test_global_random_state_is_neither_read_nor_changed() -> None:
    sampler = sampler_of("ddim", 3, eta=1.0)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sampler(shape=(2, 5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(sampler(shape=(2, 5)), first)


# -- memory ---------------------------------------------------------------------------------------------


class Widening(torch.nn.Module):
    """Makes ``width`` copies of its input, and so a known amount of memory."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.largest = width, 0

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.largest = max(self.largest, x.shape[0])
        return x.unsqueeze(1).repeat(1, self.width, 1).sum(1) / self.width


def test_memory_is_measured() -> None:
    from fastsample.memory import network_bytes

    x = torch.zeros(1, 1 << 14)
    need = network_bytes(denoiser_of(function=Widening(20)), x, {}, 500.0, 1.0)
    wide = 20 * x.numel() * 4
    assert wide < need < 1.2 * wide


def test_memory_budget_sets_the_chunks() -> None:
    model = Widening(20)
    sampler = fs.Sampler(denoiser_of(function=model), "exp_adams", 4)
    elements, samples = 1 << 12, 16
    whole = sampler(shape=(samples, elements))
    assert model.largest == samples
    model.largest = 0
    one = 4 * elements * (20 + 1 + 1 + buffers_needed(sampler.plan))
    assert torch.equal(sampler(shape=(samples, elements), memory=5 * one), whole)
    assert 4 <= model.largest <= 5
    with pytest.raises(ValueError, match=r"memory=1000 bytes do not hold one sample, which needs about"):
        sampler(shape=(samples, elements), memory=1000)


def test_memory_counts_guidance_where_it_acts() -> None:
    model = Widening(20)
    guidance = fs.Guidance(2.0, {"labels": 0}, interval=(0.5, 2.0))  # not at the start
    plain = fs.Sampler(denoiser_of(function=model), "ddim", 8)
    guided = fs.Sampler(denoiser_of(function=model, guidance=guidance), "ddim", 8)
    budget = 10 * 4 * (1 << 12) * 24
    model.largest = 0
    plain(shape=(40, 1 << 12), memory=budget, labels=torch.zeros(40))
    wide, model.largest = model.largest, 0
    guided(shape=(40, 1 << 12), memory=budget, labels=torch.zeros(40))
    # the doubled batch is no larger than the plain one
    assert model.largest <= wide


# -- starts and ends ------------------------------------------------------------------------------------


def test_strength_and_start() -> None:
    assert fs.Sampler(denoiser_of(), "ddim", 5, strength=0.5).plan.t0 == 499.5
    assert fs.Sampler(denoiser_of(), "ddim", 5, start=300).plan.t0 == 300
    assert sampler_of(strength=1.0).plan == sampler_of().plan
    shifted = fs.Sampler(denoiser_of(fs.Flow(shift=3.0)), "ddim", 5, strength=0.5)
    assert shifted.plan.t0 == pytest.approx(float(fs.Flow(shift=3.0).t_of_uniform(0.5)), rel=1e-3)


def test_image_to_image_keeps_the_image_at_little_noise() -> None:
    image = torch.rand(2, 3, 8, 8) * 2 - 1

    def exact(x: Tensor, t: Tensor) -> Tensor:
        return image[: x.shape[0]]

    sampler = fs.Sampler(denoiser_of(function=exact, prediction="x0"), "ddim", 5, strength=0.3)
    begin = sampler.noised(image, seed=4)
    process, t = fs.VP.linear(), sampler.plan.t0
    noise = normal(image.shape, 4, torch.arange(2))
    torch.testing.assert_close(begin, float(process.alpha(t)) * image + float(process.sigma(t)) * noise)
    assert torch.equal(sampler.noised(image[1:], seed=4, index=1), begin[1:])
    torch.testing.assert_close(sampler(x=begin), image, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_ends(end: str, process: fs.Process) -> None:
    plan = fs.Sampler(denoiser_of(process), "ddim", 5, end=end).plan
    assert plan.values[-1].t == (process.t_zero if end == "zero" else process.t_end)
    assert (plan.values[-1].sigma == 0) is (end == "zero")


@pytest.mark.parametrize("solver", ["ddim", "exp_adams", "dpm_solver_2s", "heun"])
@pytest.mark.parametrize("kind", ["linear", "edm", "flow", "trigflow"])
def test_inverse_runs_the_same_grid_backwards(solver: str, kind: str) -> None:
    process = PROCESSES[kind]()
    # x0 = x / (alpha + sigma): a network whose flow is smooth everywhere
    denoiser = fs.wrap(lambda x, t: 0 * x, process, "flow")
    forward = fs.Sampler(denoiser, solver, 30, end="sigma_min", grid="logsnr")
    backward = forward.inverse()
    assert backward.plan.grid == forward.plan.grid[::-1]
    # a step from or to an infinite log-SNR has one stage only
    assert abs(backward.plan.nfe - forward.plan.nfe) <= 1
    x = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(backward(x=forward(x=x)), x, rtol=1e-6, atol=1e-6)


def test_inverse_converges_on_a_real_network() -> None:
    errors = []
    for steps in (20, 80):
        forward = fs.Sampler(
            denoiser_of(fs.Flow(), prediction="flow"), "exp_adams", steps, end="sigma_min", order=2
        )
        x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        errors.append(float((forward.inverse()(x=forward(x=x)) - x).abs().max()))
    assert errors[1] < errors[0] / 8


def test_inverse_of_a_plan_that_ends_without_noise() -> None:
    sampler = sampler_of("ddim", 5)
    inverse = sampler.inverse()
    assert sampler.plan.grid[-1] == -1
    assert inverse.plan.grid == (0.0, *sampler.plan.grid[:-1][::-1])
    linspace = sampler_of("ddim", 9, grid="linspace", end="sigma_min")
    assert linspace.inverse().plan.grid == linspace.plan.grid[::-1]


def test_what_has_no_inverse() -> None:
    with pytest.raises(ValueError, match="draws noise and has no inverse"):
        sampler_of("ddim", 5, eta=1.0).inverse()
    with pytest.raises(ValueError, match="cannot be reversed"):
        fs.Sampler(denoiser_of(), plan=random_plan(2, noises=False)).inverse()


# -- ready plans ----------------------------------------------------------------------------------------


def test_plans_from_objects_and_files(tmp_path: Path) -> None:
    sampler = sampler_of()
    sampler.plan.save(tmp_path / "plan.json")
    for plan in (sampler.plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        again = fs.Sampler(denoiser_of(), plan=plan)
        assert again.plan == sampler.plan
        assert torch.equal(again(shape=(2, 3)), sampler(shape=(2, 3)))


def test_plans_of_another_model_are_refused() -> None:
    plan = sampler_of().plan
    with pytest.raises(ValueError, match=r"written for VP\.linear.*process is EDM"):
        fs.Sampler(denoiser_of(fs.EDM()), plan=plan)
    with pytest.raises(ValueError, match="prediction='v', but the denoiser predicts 'eps'"):
        fs.Sampler(denoiser_of(prediction="eps"), plan=plan)


def test_a_plan_fits_the_same_schedule_in_float32() -> None:
    """What other libraries store is a float32 product; a neighbouring schedule is another process still."""
    plan = sampler_of().plan
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32)
    rounded = fs.VP.from_alphas_cumprod(torch.cumprod(1 - betas, dim=0))
    assert rounded.fingerprint != fs.VP.linear().fingerprint
    assert fs.Sampler(denoiser_of(rounded), plan=plan).plan == plan
    for other in (fs.VP.linear(beta_end=0.0201), fs.VP.linear(num_train_steps=500), fs.VP.cosine()):
        with pytest.raises(ValueError, match="written for"):
            fs.Sampler(denoiser_of(other), plan=plan)


def test_unknown_solvers_are_answered_with_adaptive_methods_too() -> None:
    with pytest.raises(ValueError, match="did you mean 'dpm_adaptive'"):
        sampler_of("dpm_adaptiv")


def test_list_options_are_recorded() -> None:
    plan = fs.Sampler(denoiser_of(), "restart", 4, restarts=[(0.1, 0.5, 1, 3)]).plan
    assert plan.options == {"restarts": [[0.1, 0.5, 1, 3]]}
    assert fs.Plan.from_json(plan.to_json()) == plan


def test_a_continuous_plan_is_refused_by_a_network_with_a_table() -> None:
    plan = sampler_of(grid=[900.5, 300.0, -1.0], steps=2).plan
    with pytest.raises(ValueError, match=r"row 0 of the plan evaluates at t=900.5, which is none"):
        fs.Sampler(denoiser_of(quantize=True), plan=plan)
    fs.Sampler(denoiser_of(quantize=True), plan=sampler_of("ddim", 9, grid="linspace").plan)


@pytest.mark.parametrize(
    "beside",
    [{"steps": 5}, {"grid": "karras"}, {"start": 3.0}, {"end": "zero"}, {"strength": 0.5}, {"eta": 0.0}],
)
def test_a_plan_stands_alone(beside: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"plan= already says {next(iter(beside))}"):
        fs.Sampler(denoiser_of(), plan=sampler_of().plan, **beside)
    with pytest.raises(ValueError, match="plan= already says the solver"):
        fs.Sampler(denoiser_of(), "ddim", plan=sampler_of().plan)


# -- looking on -----------------------------------------------------------------------------------------


def test_trajectory() -> None:
    sampler = sampler_of("ddim", 4)
    out, trajectory = sampler(shape=(5, 3), return_trajectory=True)
    assert trajectory.x.shape == (len(sampler.plan.rows) + 1, 5, 3)
    assert trajectory.t.tolist() == [999.0, *(v.t for v in sampler.plan.values)]
    assert torch.equal(trajectory.x[-1], out)
    assert torch.equal(out, sampler(shape=(5, 3)))
    _, chunked = sampler(shape=(5, 3), return_trajectory=True, batch_size=2)
    assert torch.equal(chunked.x, trajectory.x)
    _, kept = sampler(shape=(5, 3), return_trajectory=True, differentiable=True)
    torch.testing.assert_close(kept.x, trajectory.x, rtol=1e-5, atol=1e-5)


def test_callback_in_chunks() -> None:
    sampler, seen = sampler_of("exp_adams", 3), []
    sampler(shape=(5, 2), batch_size=2, callback=lambda step: seen.append((step.samples, step.nfe)))
    assert seen == [(slice(a, b), k) for a, b in ((0, 2), (2, 4), (4, 5)) for k in (1, 2, 3)]


def test_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal; elsewhere there is no bar
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    sampler, steps = sampler_of("ddim", 3), []

    def note(step: Step) -> None:
        steps.append(step.nfe)

    plain = sampler(shape=(4, 2))
    assert written.getvalue() == ""
    assert torch.equal(sampler(shape=(4, 2), progress=True, batch_size=2, callback=note), plain)
    assert "6/6" in written.getvalue()
    assert steps == [1, 2, 3] * 2


# -- contexts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_contexts(context: Any) -> None:
    layer = torch.nn.Linear(4, 4)
    sampler = fs.Sampler(denoiser_of(function=lambda x, t: torch.tanh(layer(x))), "exp_adams", 4)
    expected = sampler(shape=(3, 4))
    x = torch.randn(3, 4)
    from_x = sampler(x=x)
    with context():
        inside = sampler(shape=(3, 4))
        given_inside = torch.empty(3, 4).copy_(x)
        assert torch.equal(sampler(x=given_inside), from_x)
        assert torch.equal(sampler(noise=given_inside), sampler(noise=x))
    assert torch.equal(inside, expected)
    assert not inside.requires_grad
    assert not inside.is_inference()
    inside.add_(1)  # an ordinary tensor


def test_differentiable() -> None:
    layer = torch.nn.Linear(4, 4)
    sampler = fs.Sampler(denoiser_of(function=lambda x, t: torch.tanh(layer(x))), "exp_adams", 4)
    x = torch.randn(3, 4, requires_grad=True)
    out = sampler(x=x, differentiable=True)
    torch.testing.assert_close(out, sampler(x=x.detach()), rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    whole = x.grad.clone()
    x.grad = None
    sampler(x=x, differentiable=True, batch_size=2).square().sum().backward()
    torch.testing.assert_close(x.grad, whole, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not sampler(x=x, differentiable=True).requires_grad


def test_threads_share_a_sampler() -> None:
    sampler = sampler_of("exp_adams", 6)
    expected = [sampler(shape=(2, 3), seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda seed: sampler(shape=(2, 3), seed=seed), list(range(8)) * 4))
    assert all(torch.equal(a, b) for a, b in zip(results, expected * 4, strict=True))


# -- errors ---------------------------------------------------------------------------------------------


def test_nan_from_the_network_is_located_in_the_call() -> None:
    def broken(x: Tensor, t: Tensor, bad: Tensor) -> Tensor:
        out = net(x, t)
        return torch.where((bad & (t < 500)).reshape(-1, 1), math.nan, out)

    sampler = fs.Sampler(denoiser_of(function=broken), "ddim", 4)
    bad = torch.tensor([False, False, False, True, False])
    row = next(r for r, v in enumerate(sampler.plan.values) if v.t < 500)
    message = rf"output is not finite at row {row} \(t={sampler.plan.values[row].t:g}.*samples \[3\]"
    with pytest.raises(fs.NonFiniteError, match=message):
        sampler(shape=(5, 3), bad=bad, batch_size=2)
    with pytest.raises(fs.NonFiniteError, match=message):
        sampler(shape=(5, 3), bad=bad, differentiable=True)
    assert bool(sampler(shape=(5, 3), bad=bad, check=False)[3].isnan().all())
    with pytest.raises(fs.NonFiniteError, match="input state is not finite"):
        sampler(x=torch.full((2, 3), math.inf), bad=bad[:2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sampler_of("dpmp_2m"), "solver='dpmp_2m' is unknown; did you mean 'dpmpp_2m'"),
        (lambda: sampler_of(steps=0), "steps=0 must be a whole number of at least 1"),
        (lambda: sampler_of(steps=-3), "steps=-3"),
        (lambda: sampler_of(steps=2.5), "steps=2.5"),  # type: ignore[arg-type]
        (lambda: sampler_of(grid="kerras"), "did you mean 'karras'"),
        (lambda: sampler_of(end="zeros"), "did you mean 'zero'"),
        (lambda: sampler_of(order=0), "order=0"),
        (lambda: sampler_of(ordr=2), "no option 'ordr'; did you mean 'order'"),
        (lambda: sampler_of("ddim", eta=2.0), "eta=2.0"),
        (lambda: sampler_of(grid=[900.0, 950.0, 3.0], steps=2), "strictly monotone"),
        (lambda: sampler_of(grid=[900.0, 3.0], steps=5), "steps=5 but the grid has 1 intervals"),
        (lambda: sampler_of(start=1000.0), r"start=1000.0 lies outside.*\(0, 999\]"),
        (lambda: sampler_of(strength=0.0), r"strength=0.0 must lie in \(0, 1\]"),
        (lambda: sampler_of(strength=0.5, start=3.0), "not both"),
        (
            lambda: fs.Sampler(fs.wrap(net, fs.VP.scaled_linear().rescaled_zero_snr()), "ddim", 5),
            "zero signal-to-noise",
        ),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_network_must_be_wrapped() -> None:
    with pytest.raises(TypeError, match=r"denoiser is a function; wrap the network first: fs\.wrap"):
        fs.Sampler(net, "ddim", 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "exactly one of shape=, n=, noise= and x=, got none"),
        ({"shape": (2, 3), "n": 2}, "got shape and n"),
        ({"n": 2}, "sample_shape"),
        ({"shape": (0, 3)}, r"shape=\(0, 3\)"),
        ({"shape": ()}, r"shape=\(\)"),
        ({"shape": (2, 1.5)}, "whole numbers"),
        ({"noise": [1.0, 2.0]}, "noise= must be a floating-point tensor"),
        ({"x": torch.arange(4)}, "x= must be a floating-point tensor"),
        ({"shape": (2, 3), "index": [1]}, r"index has shape \(1,\)"),
        ({"shape": (2, 3), "batch_size": 0}, "batch_size=0"),
        ({"shape": (2, 3), "batch_size": 1.5}, "batch_size=1.5"),
        ({"shape": (2, 3), "batch_size": 1, "memory": 10**9}, "not both"),
        ({"shape": (2, 3), "dtype": torch.bfloat16}, "dtype=torch.bfloat16 cannot hold the state"),
        ({"shape": (2, 3), "seed": 2**65}, "64 bits"),
    ],
)
def test_bad_calls(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler_of("ddim", 2)(**call)


def test_samples_of_the_wrong_shape() -> None:
    sampler = fs.Sampler(denoiser_of(sample_shape=(1, 8, 8)), "ddim", 2)
    with pytest.raises(ValueError, match=r"samples of shape \(3, 8, 8\), but the model's are \(1, 8, 8\)"):
        sampler(shape=(4, 3, 8, 8))


def test_numpy_integers_are_integers() -> None:
    sampler = sampler_of("ddim", 2)
    shape = tuple(np.array([2, 3]))
    assert torch.equal(
        sampler(shape=shape, seed=np.int64(4), batch_size=np.int64(1)), sampler(shape=(2, 3), seed=4)
    )
