"""Rows as calls of ``fastsample_kernels.update``: the same states as the definition of a plan gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import interpret, net, random_plan, run_of
from torch import Tensor

import fastsample as fs
import fastsample_kernels as fk
from fastsample.fused import execute_fused

SHAPE = (3, 2, 4, 5)


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def wrapped(function: object = net) -> fs.Denoiser:
    return fs.wrap(function, fs.VP.linear(), prediction="v")  # type: ignore[arg-type]


@settings(max_examples=150)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_any_table(seed: int, hooked: bool, drawn_in_the_kernel: bool) -> None:
    plan, x = random_plan(seed, sized=False), start()
    expected = interpret(plan, x, net, seed=5, hook=torch.tanh if hooked else None)
    own, states = x.clone(), []
    hooks = (lambda x0, at: torch.tanh(x0),) if hooked else ()
    draws = (5, torch.arange(3)) if drawn_in_the_kernel else None
    run = run_of(wrapped(), x, 5, hooks=hooks, draws=draws)
    result = execute_fused(plan, own, run, trajectory=states)
    # noise of another implementation agrees to a few units in the last place of float32
    tolerance = 1e-5 if drawn_in_the_kernel and plan.stochastic else 1e-10
    for got, want in zip([*states, result], [*expected[1:], expected[-1]], strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert torch.equal(own, x), "the caller's input was overwritten"
    assert result.data_ptr() != own.data_ptr()


def test_a_network_that_overwrites_its_output() -> None:
    memory = torch.empty(SHAPE, dtype=torch.float64)

    def careless(x: Tensor, t: Tensor) -> Tensor:
        memory.copy_(net(x, t))
        return memory

    plan, x = fs.Sampler(wrapped(), "dpmpp_3m", 6).plan, start()
    got = execute_fused(plan, x, run_of(wrapped(careless), x))
    torch.testing.assert_close(got, interpret(plan, x, net)[-1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc", "exp_adams", "deis", "heun"])
def test_one_call_a_row(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    update = fk.update

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return update(*args, **kwargs)

    plan, x = fs.Sampler(wrapped(), solver, 6).plan, start()
    monkeypatch.setattr(fk, "update", counted)
    execute_fused(plan, x, run_of(wrapped(), x))
    assert calls <= len(plan.rows)


def test_where_the_kernel_does_not_run_it_says_why() -> None:
    sampler = fs.Sampler(wrapped(), "ddim", 3)
    with pytest.raises(ValueError, match=r"kernels=True cannot run here \(update: plain torch, because CPU"):
        sampler((2, 4), kernels=True)
    with pytest.raises(ValueError, match="differentiable"):
        sampler((2, 4), kernels=True, differentiable=True)
