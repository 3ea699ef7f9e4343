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
    shared = {id(p) for p in _base(net)}
    return [p for p in net.parameters() if id(p) not in shared]


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


def _base(net: nn.Module) -> list[nn.Parameter]:
    return [p for module in net.modules() for p in vars(module).get(_BASE, ())]


def _shared_state(net: nn.Module) -> dict[str, Tensor]:
    shared = {id(p) for p in _base(net)}
    named = net.named_parameters(remove_duplicate=False) if shared else ()
    return {name: p.detach() for name, p in named if id(p) in shared}
