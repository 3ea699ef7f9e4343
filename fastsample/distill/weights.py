"""What of a network is its own: all of it, or only what is trained on top of another network's parameters."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

_BASE = "_fastsample_base"
M = TypeVar("M", bound=nn.Module)


def sharing(net: M) -> M:
    """A copy whose modules are its own and whose parameters are those of ``net``, which are frozen.

    It costs no memory for weights, and moving either network to a device moves both.
    """
    base = list(net.parameters())
    result = copy.deepcopy(net.requires_grad_(False), {id(p): p for p in base})
    vars(result)[_BASE] = base  # no submodule and no parameter: a list on the side
    return result


def duplicate(net: M) -> M:
    """A copy of a network; shared parameters stay the same objects."""
    return copy.deepcopy(net, {id(p): p for p in _base(net)})


def own_parameters(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not shared."""
    modules = _modules(net)
    shared = {id(p) for module in modules for p in vars(module).get(_BASE, ())}
    found = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
    return [p for key, p in found.items() if key not in shared]


def moving(net: nn.Module) -> tuple[list[nn.Parameter], list[Tensor]]:
    """What of a network an average follows: its own parameters and its buffers."""
    return own_parameters(net), [b for m in _modules(net) for b in m._buffers.values() if b is not None]


def own_state(net: nn.Module) -> dict[str, Tensor]:
    """The state without the shared parameters."""
    shared = _shared_state(net)
    return {k: v for k, v in net.state_dict().items() if k not in shared}


def load_own(net: nn.Module, state: dict[str, Any]) -> None:
    """The inverse of :func:`own_state`.

    Raises:
        RuntimeError: names or shapes do not fit.
    """
    net.load_state_dict({**_shared_state(net), **state})


def _modules(net: nn.Module) -> list[nn.Module]:
    """``net.modules()`` without their names, whose making costs more than a small network's update may."""
    seen: dict[int, nn.Module] = {}
    waiting = [net]
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen[id(module)] = module
            waiting.extend(m for m in reversed(module._modules.values()) if m is not None)
    return list(seen.values())


def _base(net: nn.Module) -> list[nn.Parameter]:
    return [p for module in _modules(net) for p in vars(module).get(_BASE, ())]


def _shared_state(net: nn.Module) -> dict[str, Tensor]:
    shared = {id(p) for p in _base(net)}
    named = net.named_parameters(remove_duplicate=False) if shared else ()
    return {name: p.detach() for name, p in named if id(p) in shared}
