"""CUDA graphs of whole trajectories; without a GPU, with a stand-in for the capture."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tables import net
from torch import Tensor

import fastsample as fs
from fastsample import graph


def labelled(x: Tensor, t: Tensor, labels: Tensor, gain: float = 1.0) -> Tensor:
    return gain * net(x, t) * (1 + 0.1 * labels.to(x.dtype)).reshape(-1, *[1] * (x.ndim - 1))


def samplers() -> dict[str, fs.Sampler]:
    process = fs.VP.linear()
    guidance = fs.Guidance(2.0, null={"labels": 10})
    return {
        "deterministic": fs.Sampler(fs.wrap(net, process, "v"), "dpmpp_2m", 6),
        "stochastic": fs.Sampler(fs.wrap(net, process, "v"), "ddim", 5, eta=1.0),
        "hooked": fs.Sampler(fs.wrap(net, process, "v"), "exp_adams", 5, hooks=(fs.hooks.Clip(),)),
        "guided": fs.Sampler(fs.wrap(labelled, process, "v", guidance=guidance), "exp_adams", 5),
    }


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Stands in for the capture: the same static buffers, read again at each replay; counts the captures."""
    made: list[Tensor] = []

    def stand_in(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        result = function().clone()
        made.append(result)
        return result, lambda: result.copy_(function())

    monkeypatch.setattr(graph, "capture", stand_in)
    monkeypatch.setattr("fastsample.sampler.require", lambda *args, **kwargs: None)
    return made


def labels_of(name: str, values: list[int]) -> dict[str, Any]:
    return {"labels": torch.tensor(values)} if name == "guided" else {}


@pytest.mark.parametrize("name", list(samplers()))
def test_replays_follow_seed_noise_state_and_conditions(name: str, captures: list[Tensor]) -> None:
    sampler = samplers()[name]
    for call in (
        {"shape": (3, 4), "seed": 1, **labels_of(name, [1, 2, 3])},
        {"shape": (3, 4), "seed": 2, **labels_of(name, [1, 2, 3])},
        {"shape": (3, 4), "seed": 2, "index": 7, **labels_of(name, [3, 2, 9])},
        {"noise": torch.ones(3, 4), **labels_of(name, [4, 4, 4])},
        {"x": torch.ones(3, 4), "seed": 3, **labels_of(name, [4, 4, 5])},
    ):
        first = sampler(graph=True, **call)
        assert torch.equal(first, sampler(**call))
        kept = first.clone()
        sampler(graph=True, shape=(3, 4), seed=99, **labels_of(name, [0, 0, 0]))
        assert torch.equal(first, kept), "a result is not to be overwritten by the next replay"
    assert len(captures) == 1


def test_what_a_graph_reads_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay reads memory, not the tensors of the run that was captured; those may be gone by then."""
    seen: list[weakref.ref[Tensor]] = []

    def watched(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.extend(weakref.ref(part if part._base is None else part._base) for part in (t, labels))
        return net(x, t)

    monkeypatch.setattr(graph, "capture", lambda function: (function().clone(), lambda: None))
    monkeypatch.setattr("fastsample.sampler.require", lambda *args, **kwargs: None)
    sampler = fs.Sampler(fs.wrap(watched, fs.VP.linear(), "v"), "dpmpp_2m", 3)
    sampler(shape=(2, 4), labels=torch.arange(2), graph=True)
    gc.collect()
    assert len(seen) == 6
    assert all(reference() is not None for reference in seen)


def test_a_given_state_is_not_overwritten(captures: list[Tensor]) -> None:
    x = torch.ones(3, 4)
    samplers()["deterministic"](graph=True, x=x)
    assert torch.equal(x, torch.ones(3, 4))


def test_shapes_and_fixed_conditions_have_their_own_graphs(captures: list[Tensor]) -> None:
    sampler = samplers()["guided"]
    labels = torch.arange(5)
    calls: list[tuple[dict[str, Any], int]] = [
        ({"shape": (5, 4)}, 1),
        ({"shape": (5, 6)}, 2),
        ({"shape": (5, 4), "dtype": torch.float64}, 3),
        ({"shape": (5, 4), "gain": 0.5}, 4),
        ({"shape": (5, 4), "gain": 1.0}, 5),
        ({"shape": (5, 4), "gain": 0.5}, 5),
        ({"shape": (5, 4), "batch_size": 2}, 7),  # chunks of two, and of one
    ]
    for call, count in calls:
        assert torch.equal(sampler(graph=True, labels=labels, **call), sampler(labels=labels, **call))
        assert len(captures) == count


@pytest.mark.parametrize("name", list(samplers()))
def test_rows_by_the_update_function(
    name: str, captures: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph of them is another than one without; the noise is drawn outside."""
    monkeypatch.setattr("fastsample.fused.require", lambda x: None)  # plain torch does, too
    sampler = samplers()[name]
    for seed in (1, 2):
        call = {"shape": (3, 4), "seed": seed, **labels_of(name, [1, 2, 3])}
        plain = sampler(**call)
        assert torch.equal(sampler(graph=True, **call), plain)
        torch.testing.assert_close(sampler(graph=True, kernels=True, **call), plain, rtol=1e-5, atol=1e-5)
    assert len(captures) == 2


def test_hooks_that_know_their_samples(captures: list[Tensor]) -> None:
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0]).reshape(4, 1).expand(4, 3)
    inpaint = fs.hooks.Inpaint(mask, torch.arange(4.0).reshape(4, 1).expand(4, 3))
    sampler = fs.Sampler(fs.wrap(net, fs.VP.linear(), "v"), "ddim", 4)
    call = {"shape": (4, 3), "hooks": (inpaint,), "batch_size": 2}
    assert torch.equal(sampler(graph=True, **call), sampler(**call))


def test_not_finite_values_are_located(captures: list[Tensor]) -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((t < 500).reshape(-1, 1), torch.nan, x)

    sampler = fs.Sampler(fs.wrap(broken, fs.VP.linear(), "v"), "ddim", 4)
    with pytest.raises(fs.NonFiniteError, match="the network's output is not finite at row"):
        sampler(shape=(2, 3), graph=True)


def test_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="graph=True needs a CUDA device, but the state is on cpu"):
        samplers()["deterministic"](shape=(2, 3), graph=True)


@pytest.mark.parametrize("name", ["callback", "progress", "return_trajectory", "differentiable"])
def test_what_needs_the_host_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"graph=True cannot be used with {name}"):
        graph.require(torch.device("cuda"), **{"callback": None, name: True})


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(samplers()))
def test_on_a_gpu_graphs_are_the_eager_run(name: str) -> None:
    sampler = samplers()[name]
    for seed in (1, 2):
        call = {"shape": (3, 4), "seed": seed, "device": "cuda", **labels_of(name, [seed, 2, 3])}
        assert torch.equal(sampler(graph=True, **call), sampler(**call))


@pytest.mark.gpu
def test_on_a_gpu_a_network_that_synchronises_is_named() -> None:
    def waits(x: Tensor, t: Tensor) -> Tensor:
        return x * float(t[0])

    sampler = fs.Sampler(fs.wrap(waits, fs.VP.linear(), "v"), "ddim", 3)
    with pytest.raises(RuntimeError, match="graph=True: the trajectory cannot be captured"):
        sampler(shape=(2, 3), device="cuda", graph=True)
