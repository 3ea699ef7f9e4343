"""Writing plans: arithmetic on symbolic states gives the table that the arithmetic says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tables import interpret, net

import fastsample as fs
from fastsample.builder import combine, intervals, zero

FLOATS = st.floats(-3, 3, allow_nan=False)


def builder(process: fs.Process | None = None, prediction: str = "v") -> fs.Builder:
    return fs.Builder(process or fs.VP.linear(), prediction, 900.0)


@given(FLOATS, FLOATS, FLOATS)
def test_expressions_are_linear(a: float, b: float, c: float) -> None:
    x, y = builder().x, builder().noise()
    e = a * x + y * b - (x - torch.tensor(c, dtype=torch.float64) * y) / 2 + -x
    assert e.terms.get(("x", 0), 0.0) == pytest.approx(a - 0.5 - 1)
    assert e.terms.get(("z", 1), 0.0) == pytest.approx(b + c / 2)


def test_what_cancels_is_gone() -> None:
    b = builder()
    assert (b.x - b.x).terms == {}
    assert repr(b.x - b.x) == "0"
    assert repr(2 * b.x - b.noise()) == "+2 x0 -1 z1"
    assert zero().terms == {}
    assert combine([1.0, -1.0], [b.x, b.x]).terms == {}
    with pytest.raises(ValueError, match="zip"):
        combine([1.0], [b.x, b.x])


def test_intervals() -> None:
    grid = torch.tensor([3.0, 2.0, 0.5])
    assert [(float(s), float(t)) for s, t in intervals(grid)] == [(3, 2), (2, 0.5)]


def test_a_table_is_what_was_written() -> None:
    b = builder()
    x0 = b.x0(b.x)
    mid = b.state(0.5 * b.x + 2 * x0, 500.0)
    eps = b.eps(mid)
    z = b.noise()
    b.state(mid - 3 * eps + 0.1 * x0 + 0.7 * z, 100.0)
    plan = b.finish("mine", 1, {"order": 2}, grid=[900.0, 100.0])
    assert [row.states for row in plan.rows] == [(0,), (0,), (2,)]
    assert [row.predictions for row in plan.rows] == [(), (0,), (0, 1)]
    assert [row.noises for row in plan.rows] == [(), (), (1,)]
    assert [row.evaluates for row in plan.rows] == [True, True, False]
    assert [row.space for row in plan.rows] == ["x0", "eps", None]
    assert plan.values[2].a == (1.0,)
    assert plan.values[2].b == (0.1, -3.0)
    assert plan.values[2].c == (0.7,)
    assert [v.t for v in plan.values] == [900.0, 500.0, 100.0]
    assert (plan.nfe, plan.steps, plan.t0, plan.grid) == (2, 1, 900.0, (900.0, 100.0))
    assert plan.options == {"order": 2}
    process = fs.VP.linear()
    for v in plan.values:
        assert (v.alpha, v.sigma) == (float(process.alpha(v.t)), float(process.sigma(v.t)))


def test_spaces_are_what_they_say() -> None:
    process = fs.VP.linear()
    for space in ("x0", "eps", "v", "flow"):
        b = builder(process)
        b.state(b.predict(b.x, space), 500.0)
        x = torch.randn(2, 3, dtype=torch.float64)
        got = interpret(b.finish("mine", 1), x, net)[-1]
        out = net(x, torch.full((2,), 900.0))
        alpha, sigma = process.alpha(900.0), process.sigma(900.0)
        x0, eps = alpha * x - sigma * out, sigma * x + alpha * out
        want = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[space]
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_evaluating_an_older_state_makes_a_row_for_it() -> None:
    b = builder()
    first = b.state(0.5 * b.x, 500.0)
    b.state(0.25 * b.x, 300.0)
    m = b.x0(first)  # not the newest state
    again = b.x0(first)  # the same state once more is another evaluation
    b.state(m + again, 100.0)
    plan = b.finish("mine", 1)
    assert [row.states for row in plan.rows] == [(0,), (0,), (1,), (1,), ()]
    assert plan.nfe == 2
    assert [plan.values[r].t for r in (2, 3)] == [500.0, 500.0]


def test_network_time_stays_in_the_trained_range() -> None:
    process = fs.Flow()
    b = fs.Builder(process, "flow", 0.0)
    b.predict(b.x, "flow")
    b.predict(b.state(b.x, 0.5), "flow")
    b.predict(b.state(b.x, 1.0), "flow", t_in=0.75, step=0.125)
    plan = b.finish("mine", 2)
    assert [v.t_in for v in plan.values] == [process.t_end, 0.5, 0.75]
    assert [row.sized for row in plan.rows] == [False, False, True]
    assert plan.values[2].step == 0.125
    assert plan.values[1].step is None


def test_network_time_is_a_level_where_the_network_has_a_table() -> None:
    b = builder(fs.VP.linear().quantized([20, 500, 999]))
    b.predict(b.state(b.x, -1.0), "eps")  # without noise: the nearest that the network knows
    assert b.finish("mine", 1).values[-1].t_in == 20


def test_only_states_can_be_evaluated() -> None:
    b = builder()
    for expression in (2 * b.x, b.x + b.noise(), zero()):
        with pytest.raises(ValueError, match=r"is not a state; make it one by builder\.state"):
            b.x0(expression)


def test_coefficients_that_are_not_finite_are_named() -> None:
    b = builder()
    m = b.x0(b.x)
    b.state(b.x + m / 0.0, 400.0)
    with pytest.raises(ValueError, match=r"solver 'mine': the coefficient 'b0' of row 1 \(t=400\) is inf"):
        b.finish("mine", 1)


def test_a_solver_that_writes_nothing_is_named() -> None:
    with pytest.raises(ValueError, match="solver 'mine' wrote no row"):
        builder().finish("mine", 1)


def test_gradients_reach_the_numbers() -> None:
    t = torch.tensor(500.3, dtype=torch.float64, requires_grad=True)
    b = builder()
    x = b.state(b.sigma(t) * b.x + b.alpha(t) * b.x0(b.x), t)
    b.state(x + 0.0 * b.eps(x), 100.0)
    numbers = b.finish("mine", 2).numbers
    assert numbers.requires_grad
    (gradient,) = torch.autograd.grad(numbers.sum(), t)
    assert math.isfinite(float(gradient))
    assert not builder_without_gradients().requires_grad


def builder_without_gradients() -> torch.Tensor:
    b = builder()
    b.state(b.sigma(500.0) * b.x, 500.0)
    return b.finish("mine", 1).numbers


def test_a_coefficient_of_zero_keeps_its_gradient() -> None:
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    b = builder()
    b.state(b.x + weight * b.x0(b.x), 500.0)
    plan = b.finish("mine", 1)
    assert plan.rows[-1].predictions == (0,)
    assert torch.autograd.grad(plan.numbers.sum(), weight)[0] == 1


def test_corrected_states_do_not_carry_their_history() -> None:
    plan = fs.solvers.build("exp_adams", fs.VP.linear(), 50, order=3, corrector=True)
    assert max(len(row.states) + len(row.predictions) for row in plan.rows) <= 6
