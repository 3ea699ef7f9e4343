"""The executor against an independent interpreter of plans, on random tables and awkward networks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import interpret, net, random_plan, run_of
from torch import Tensor

import fastsample as fs
from fastsample.executor import (
    Run,
    Step,
    buffers_needed,
    execute,
    execute_differentiable,
    locate_nonfinite,
)
from fastsample.memory import PeakBytes

SEEDS = st.integers(0, 10**6)
SHAPE = (3, 2, 4, 5)


def start(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def denoiser_of(function: object = net, **settings: object) -> fs.Denoiser:
    return fs.wrap(function, fs.VP.linear(), prediction="v", **settings)  # type: ignore[arg-type]


# -- any table ------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(SEEDS, st.booleans())
def test_any_table(seed: int, owned: bool) -> None:
    plan, x = random_plan(seed), start()
    expected = interpret(plan, x, net, seed=5)
    given_x, states = x.clone(), []
    result = execute(plan, given_x, run_of(denoiser_of(), x, 5), owned=owned, trajectory=states)
    torch.testing.assert_close(result, expected[-1], rtol=1e-10, atol=1e-10)
    for got, want in zip(states, expected[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    if not owned:
        assert torch.equal(given_x, x), "the caller's input was overwritten"
        assert result.untyped_storage().data_ptr() != given_x.untyped_storage().data_ptr()


@settings(max_examples=100)
@given(SEEDS)
def test_any_table_in_float32(seed: int) -> None:
    plan, x = random_plan(seed), start()
    expected = interpret(plan, x, net, seed=5)
    scale = max(float(s.abs().max()) for s in expected)
    result = execute(plan, x.float(), run_of(denoiser_of(), x, 5))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected[-1], rtol=0, atol=1e-4 * (1 + scale))


@settings(max_examples=100)
@given(SEEDS, st.booleans())
def test_any_table_with_a_hook(seed: int, owned: bool) -> None:
    def hook(x0: Tensor) -> Tensor:
        return x0.clamp(-0.5, 0.5)

    plan, x = random_plan(seed), start()
    expected = interpret(plan, x, net, seed=5, hook=hook)
    run = run_of(denoiser_of(), x, 5, hooks=(fs.hooks.Clip(-0.5, 0.5),))
    torch.testing.assert_close(execute(plan, x.clone(), run, owned=owned), expected[-1], rtol=1e-9, atol=1e-9)
    differentiable = execute_differentiable(plan, x, run)
    torch.testing.assert_close(differentiable, expected[-1], rtol=1e-9, atol=1e-9)


@settings(max_examples=100)
@given(SEEDS)
def test_differentiable_path_is_the_same_arithmetic(seed: int) -> None:
    plan, x = random_plan(seed), start()
    states: list[Tensor] = []
    result = execute_differentiable(plan, x, run_of(denoiser_of(), x, 5), trajectory=states)
    expected = interpret(plan, x, net, seed=5)
    for got, want in zip([*states, result], [*expected[1:], expected[-1]], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@settings(max_examples=60)
@given(SEEDS)
def test_step_sizes_are_told(seed: int) -> None:
    def sized(x: Tensor, t: Tensor, step: Tensor | None = None) -> Tensor:
        out = net(x, t)
        return out if step is None else out * step.reshape(-1, 1, 1, 1)

    plan, x = random_plan(seed, sized=True), start()
    expected = interpret(plan, x, sized)[-1]
    run = run_of(denoiser_of(sized), x)
    torch.testing.assert_close(execute(plan, x, run), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(execute_differentiable(plan, x, run), expected, rtol=1e-10, atol=1e-10)


# -- awkward networks -----------------------------------------------------------------------------------


class Static:
    """Writes every output to the same buffer, as a captured or compiled network may."""

    def __init__(self) -> None:
        self.out = torch.empty(SHAPE, dtype=torch.float64)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out.copy_(net(x, t))


def channels_last(x: Tensor, t: Tensor) -> Tensor:
    return net(x, t).to(memory_format=torch.channels_last)


def transposed(x: Tensor, t: Tensor) -> Tensor:
    return net(x, t).transpose(2, 3).contiguous().transpose(2, 3)


def interleaved(x: Tensor, t: Tensor) -> Tensor:
    return torch.stack([net(x, t), x], dim=-1)[..., 0]


def expanded(x: Tensor, t: Tensor) -> Tensor:
    return net(x, t).mean(dim=1, keepdim=True).expand_as(x)


def bf16(x: Tensor, t: Tensor) -> Tensor:
    return net(x, t).bfloat16()


def fp16(x: Tensor, t: Tensor) -> Tensor:
    return net(x, t).half()


def own_input(x: Tensor, t: Tensor) -> Tensor:
    return x


def view_of_input(x: Tensor, t: Tensor) -> Tensor:
    return x.flatten(1).view(x.shape)


AWKWARD = [channels_last, transposed, interleaved, expanded, bf16, fp16, own_input, view_of_input]


@pytest.mark.parametrize("network", AWKWARD, ids=lambda f: f.__name__)
@settings(max_examples=40)
@given(seed=SEEDS, owned=st.booleans())
def test_awkward_networks(network: object, seed: int, owned: bool) -> None:
    plan, x = random_plan(seed), start()
    expected = interpret(plan, x, network)  # type: ignore[arg-type]
    result = execute(plan, x.clone(), run_of(denoiser_of(network), x), owned=owned)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected[-1], rtol=1e-10, atol=1e-10)


@settings(max_examples=100)
@given(SEEDS)
def test_networks_that_overwrite_their_output(seed: int) -> None:
    plan, x = random_plan(seed), start()
    expected = interpret(plan, x, net)
    torch.testing.assert_close(
        execute(plan, x, run_of(denoiser_of(Static()), x)), expected[-1], rtol=1e-10, atol=1e-10
    )


def test_low_precision_outputs_are_combined_in_the_state_s_precision() -> None:
    plan = fs.solvers.build("exp_adams", fs.VP.linear(), 6, prediction="v", order=2)
    x = start(torch.float32)
    result = execute(plan, x, run_of(denoiser_of(bf16), x))
    expected = interpret(plan, x.double(), lambda s, t: bf16(s.float(), t.float()))[-1]
    assert result.dtype == torch.float32
    # the rounding of the states moves some outputs by one bf16 step, not more
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-2)


def test_non_contiguous_and_strange_shapes() -> None:
    plan = random_plan(3)
    for x in (start().transpose(1, 3), start()[:, :, ::2], start(shape=(1, 1)), start(shape=(5,))):
        before = x.clone()
        result = execute(plan, x, run_of(denoiser_of(), x))
        torch.testing.assert_close(result, interpret(plan, before, net)[-1], rtol=1e-10, atol=1e-10)
        assert torch.equal(x, before)


# -- memory ---------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(SEEDS)
def test_buffers_needed_is_what_is_allocated(seed: int) -> None:
    plan = random_plan(seed)
    x = torch.zeros(1, 1 << 16)
    out, noise = torch.zeros_like(x), torch.zeros_like(x)
    run = Run(denoiser_of(lambda x, t: out).bind(1, {}, x.device), lambda stream, like: noise)
    execute(plan, x, run, owned=True)  # so that what is cached on the plan is made
    with PeakBytes() as counter:
        execute(plan, x, run, owned=True)
    made = counter.peak // (x.numel() * x.element_size())
    assert made + 1 + plan.stochastic == buffers_needed(plan)


def test_buffers_of_known_solvers() -> None:
    def needed(solver: str, **options: object) -> int:
        return buffers_needed(fs.solvers.build(solver, fs.VP.linear(), 12, **options))

    assert needed("ddim") == 1  # in place
    assert needed("ddim", eta=1.0) == 2  # and the noise
    # order k: the state and k predictions, of which the newest may stay in the network's output
    assert needed("exp_adams", order=2) == 3
    assert needed("exp_adams", order=3) == 4


def test_thousand_steps_need_no_more_than_twelve() -> None:
    long = fs.solvers.build("exp_adams", fs.VP.linear(), 1000, order=3, corrector=True)
    short = fs.solvers.build("exp_adams", fs.VP.linear(), 12, order=3, corrector=True)
    assert buffers_needed(long) == buffers_needed(short)


# -- gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("hooked", [False, True])
def test_gradient_with_respect_to_the_numbers(seed: int, hooked: bool) -> None:
    plan = random_plan(seed)
    x = start(shape=(2, 3))
    # a smooth hook
    run = run_of(denoiser_of(), x, hooks=(lambda x0, at: torch.tanh(x0),) if hooked else ())

    def result(numbers: Tensor) -> Tensor:
        return execute_differentiable(plan.replace(numbers=numbers), x, run)

    assert torch.autograd.gradcheck(result, (plan.numbers.requires_grad_(True),), atol=1e-6)


@pytest.mark.parametrize(
    "process", [fs.VP.linear(), fs.EDM(), fs.Flow(), fs.TrigFlow()], ids=["vp", "edm", "flow", "trig"]
)
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("ddim", {}),
        ("exp_adams", {"order": 3, "corrector": True}),
        ("exp_adams", {"order": 2, "space": "eps"}),
    ],
)
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_gradient_with_respect_to_the_grid(
    process: fs.Process, solver: str, options: dict[str, object], end: str
) -> None:
    # a network without a time of its own: what is checked are the coefficients
    denoiser = fs.wrap(lambda x, t: torch.tanh(x), process, prediction="v")
    first = process.t_start if bool(torch.isfinite(process.lam(process.t_start))) else 0.9 * process.t_start
    grid = fs.grids.make("logsnr", process, 4, start=first, end=end)
    if process.t_zero == -1:
        grid[1:-1] = grid[1:-1].floor() + 0.4  # between the knots of the table
    x = start(shape=(2, 3))
    run = run_of(denoiser, x)
    function = fs.solvers.get(solver).function

    def result(inner: Tensor) -> Tensor:
        times = torch.cat([grid[:1], inner, grid[-1:]])
        builder = fs.Builder(process, "v", times[0])
        function(builder, times, **options)
        return execute_differentiable(builder.finish(solver, 4), x, run)

    inner = grid[1:-1].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(result, (inner,), eps=1e-6 * float(grid.max()), atol=1e-5)


def test_gradient_flows_through_the_time_that_the_network_is_told() -> None:
    plan = fs.solvers.build("ddim", fs.VP.linear(), 3, prediction="v")
    x = start(shape=(2, 3))
    numbers = plan.numbers.requires_grad_(True)
    execute_differentiable(plan.replace(numbers=numbers), x, run_of(denoiser_of(), x)).sum().backward()
    assert numbers.grad is not None
    for row in (row for row in plan.rows if row.evaluates):
        column = row.offset + row.columns.index("t_in")
        assert numbers.grad[column] != 0


def test_gradients_reach_the_input_and_the_network_also_by_checkpoints() -> None:
    plan = fs.solvers.build("exp_adams", fs.VP.linear(), 4, prediction="v")
    layer = torch.nn.Linear(3, 3, dtype=torch.float64)
    found = []
    for checkpoint in (False, True):
        x = start(shape=(2, 3)).requires_grad_(True)
        layer.zero_grad()
        run = run_of(denoiser_of(lambda x, t: torch.tanh(layer(x))), x)
        execute_differentiable(plan, x, run, checkpoint=checkpoint).square().sum().backward()
        found.append((x.grad, layer.weight.grad.clone()))
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-12, atol=1e-12)
        assert bool((plain != 0).any())


# -- hooks, callbacks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", [execute, execute_differentiable])
def test_callback_sees_each_evaluation(execution: object) -> None:
    plan = fs.solvers.build("exp_adams", fs.VP.linear(), 5, prediction="v")
    x, denoiser = start(), denoiser_of()
    seen: list[tuple[Step, Tensor, Tensor]] = []
    run = run_of(denoiser, x, callback=lambda step: seen.append((step, step.x.clone(), step.x0.clone())))
    execution(plan, x, run)  # type: ignore[operator]
    assert [step.nfe for step, _, _ in seen] == list(range(1, plan.nfe + 1))
    assert [step.row for step, _, _ in seen] == [r for r, row in enumerate(plan.rows) if row.evaluates]
    assert [step.t for step, _, _ in seen] == list(plan.times)
    for step, state, x0 in seen:
        torch.testing.assert_close(x0, denoiser(state, step.t), rtol=1e-9, atol=1e-9)
        assert step.alpha**2 + step.sigma**2 == pytest.approx(1)


def test_callback_does_not_change_the_result() -> None:
    for seed in range(20):
        plan, x = random_plan(seed), start()
        plain = execute(plan, x, run_of(denoiser_of(), x))
        watched = execute(plan, x, run_of(denoiser_of(), x, callback=lambda step: None))
        assert torch.equal(plain, watched)


def test_hooks_run_in_order_and_know_where_they_are() -> None:
    plan = fs.solvers.build("ddim", fs.VP.linear(), 3, prediction="v")
    x, order = start(), []

    def first(x0: Tensor, at: fs.hooks.At) -> Tensor:
        order.append(("first", at.row, at.t))
        return x0 + 1

    def second(x0: Tensor, at: fs.hooks.At) -> Tensor:
        order.append(("second", at.row, at.t))
        assert at.x.shape == x0.shape
        return 2 * x0

    hooked = execute(plan, x, run_of(denoiser_of(), x, hooks=(first, second)))
    assert order == [(name, r, plan.values[r].t) for r in range(3) for name in ("first", "second")]
    torch.testing.assert_close(
        hooked, interpret(plan, x, net, hook=lambda x0: 2 * (x0 + 1))[-1], rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_hooks_have_nothing_to_change_without_noise(prediction: str) -> None:
    # inversion from sigma = 0: the output says nothing of x0 there, so a hook can do nothing
    process = fs.Flow()
    plan = fs.solvers.build("ddim", process, grid=[0.0, 0.3, 0.6], prediction=prediction)
    calls: list[float] = []

    def hook(x0: Tensor, at: fs.hooks.At) -> Tensor:
        calls.append(at.sigma)
        return x0

    x = start()
    denoiser = fs.wrap(net, process, prediction=prediction)
    plain = execute(plan, x, run_of(denoiser, x))
    for execution in (execute, execute_differentiable):
        calls.clear()
        hooked = execution(plan, x, run_of(denoiser, x, hooks=(hook,)))
        torch.testing.assert_close(hooked, plain, rtol=1e-9, atol=1e-9)
        assert calls == [0.3]


def test_a_hook_of_the_wrong_shape_is_named() -> None:
    plan, x = fs.solvers.build("ddim", fs.VP.linear(), 2, prediction="v"), start()

    def flat(x0: Tensor, at: fs.hooks.At) -> Tensor:
        return x0.flatten(1)

    for execution in (execute, execute_differentiable):
        with pytest.raises(ValueError, match=r"hook .*flat.* returned \(3, 40\) for a clean sample of shape"):
            execution(plan, x, run_of(denoiser_of(), x, hooks=(flat,)))


# -- values that are not finite -------------------------------------------------------------------------


def broken(call: int, samples: list[int]) -> object:
    """A network whose output has NaN for some samples at one call."""
    calls = 0

    def network(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        out = net(x, t)
        if (calls - 1) % 5 == call:
            out[samples] = math.nan
        return out

    return network


def test_nan_is_located() -> None:
    plan = fs.solvers.build("exp_adams", fs.VP.linear(), 5, prediction="v")
    x = start(torch.float32)
    run = run_of(denoiser_of(broken(2, [1])), x)
    assert not bool(torch.isfinite(execute(plan, x, run)).all())
    message = str(locate_nonfinite(plan, x, run))
    row = [r for r, row in enumerate(plan.rows) if row.evaluates][2]
    assert f"the network's output is not finite at row {row} (t={plan.values[row].t:g}" in message
    assert "evaluation 3 of 5" in message
    assert "for samples [1]" in message
    assert "try the network in float32" in message


def test_samples_are_numbered_in_the_whole_call() -> None:
    plan = fs.solvers.build("ddim", fs.VP.linear(), 5, prediction="v")
    x = start(torch.float32)
    run = run_of(denoiser_of(broken(0, [0, 2])), x, samples=slice(10, 13))
    assert "for samples [10, 12]" in str(locate_nonfinite(plan, x, run))


def test_overflow_of_the_update_is_told_from_the_network() -> None:
    x = start(torch.float32)
    huge = fs.wrap(lambda x, t: torch.full_like(x, 3e38), fs.EDM(), prediction="eps")
    for steps, found in ((4, "the state is not finite at row 1"), (1, "the last update overflowed")):
        plan = fs.solvers.build("ddim", fs.EDM(), steps, prediction="eps")
        assert found in str(locate_nonfinite(plan, x, run_of(huge, x)))


def test_bad_input_is_told() -> None:
    plan, x = fs.solvers.build("ddim", fs.VP.linear(), 2, prediction="v"), start(torch.float32)
    x[0, 0] = math.inf
    assert "the input state is not finite" in str(locate_nonfinite(plan, x, run_of(denoiser_of(), x)))
