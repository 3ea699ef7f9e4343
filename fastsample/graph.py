"""A whole trajectory as one CUDA graph: no Python and no launches between the steps.

What may change from call to call lies in static buffers that are written before each replay: the starting
state, the noise of every stream, and the conditions. What must not change is part of the key under which a
graph is kept: shapes, dtypes, hooks, and every condition that is not a tensor. The network's parameters are
read where they lie, so they may change in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from .denoiser import Bound
from .executor import Run, execute, times_of
from .fused import execute_fused
from .plan import Plan

_WARM_UP = 3  # runs before the capture, in which libraries choose their algorithms and get their workspaces


def require(device: torch.device, **unusable: object) -> None:
    """Refuse what cannot be captured.

    Raises:
        ValueError: not a CUDA device, or an argument that needs the host between the steps.
    """
    if device.type != "cuda":
        raise ValueError(f"graph=True needs a CUDA device, but the state is on {device}; leave graph= out")
    asked = [name for name, value in unusable.items() if value]
    if asked:
        raise ValueError(
            f"graph=True cannot be used with {', '.join(asked)}, which need the host at each step"
        )


def capture(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """The static result of ``function`` and what computes it again.

    Raises:
        RuntimeError: something in it waits for the device or copies from the host.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = function()
    except RuntimeError as e:
        raise RuntimeError(
            f"graph=True: the trajectory cannot be captured ({e}); the network or a hook waits for the "
            "device (.item(), branches on values) or copies from the host; change it, or leave graph= out"
        ) from e
    return result, graph.replay


class Captured:
    """One captured trajectory with its static buffers."""

    def __init__(self, plan: Plan, x: Tensor, run: Run) -> None:
        self.x = x.clone()
        streams = {stream for row in plan.rows for stream in row.noises}
        self.noises = {stream: run.noise(stream, x) for stream in streams}
        self.network = _with_own_memory(run.network)
        self.times = times_of(plan, run, x)  # kept, since every replay reads them
        static = dataclasses.replace(
            run,
            network=self.network,
            noise=lambda stream, like: self.noises[stream],
            times=self.times,
            draws=None,
        )
        rows = execute if run.draws is None else execute_fused
        self.result, self.replay = capture(lambda: rows(plan, self.x, static))

    def __call__(self, x: Tensor, run: Run) -> Tensor:
        """The trajectory from ``x`` with the noise and the conditions of ``run``."""
        self.x.copy_(x)
        for stream, buffer in self.noises.items():
            buffer.copy_(run.noise(stream, x))
        for buffer, value in zip(_leaves(self.network), _leaves(run.network), strict=True):
            if isinstance(buffer, Tensor):
                buffer.copy_(value)
        self.replay()
        return self.result.clone()


def run_captured(kept: dict[Hashable, Captured], plan: Plan, x: Tensor, run: Run) -> Tensor:
    """Run a plan through a graph that is captured at its first use.

    Not for several threads at once: the buffers are shared.

    Args:
        kept: the graphs made so far.
        plan, x, run: as in :func:`fastsample.executor.execute`.
    """
    fixed = [
        (tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v if isinstance(v, Hashable) else repr(v)
        for v in _leaves(run.network)
    ]
    structure = str(tree_flatten(_conditions(run.network))[1])
    key: tuple[Hashable, ...] = (tuple(x.shape), x.dtype, x.device, run.draws is None, structure, *fixed)
    if run.hooks:  # which may treat each chunk of a call in its own way; the graph keeps them alive
        key += (run.samples.start, run.samples.stop, *map(id, run.hooks))
    if key not in kept:
        kept[key] = Captured(plan, x, run)
    return kept[key](x, run)


def _conditions(network: Bound) -> tuple[Any, Any, Any]:
    return network.cond, network.null, network.both


def _leaves(network: Bound) -> list[Any]:
    return tree_flatten(_conditions(network))[0]


def _with_own_memory(network: Bound) -> Bound:
    other = object.__new__(type(network))
    other.__dict__.update(network.__dict__)
    dense = torch.contiguous_format
    other.cond, other.null, other.both = tree_map(
        lambda v: v.clone(memory_format=dense) if isinstance(v, Tensor) else v, _conditions(network)
    )
    return other
