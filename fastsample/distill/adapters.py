"""One more number for an existing network: a zero-initialised adapter on its time embedding."""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 128
# What a network raises on inputs or conditions that it cannot take; AttributeError: it looks into one that is None.
REFUSALS = (TypeError, LookupError, RuntimeError, ValueError, AttributeError, AssertionError)
_PROBES = 2


class Conditioned(nn.Module):
    """A network that is also told a number, ``net(x, t, NAME=number (B,) or one for all, **conditions)``.

    The number is embedded (sines and cosines, two layers) and added to the network's own time embedding. The
    last layer starts at zero, so that the network starts as it was (Zhang et al. 2023, ControlNet, for the
    idea; Frans et al. 2025, section 3, and Meng et al. 2023, section 4.1, for step sizes and guidance).

    Args:
        net: any module ``net(x, t, **conditions)``.
        name: the keyword of the number.
        at: names of the modules whose outputs (B, E) are the time embedding; :func:`time_embedding` finds
            them.
        width: E.
        scale: the number is multiplied by this before it is embedded.
    """

    def __init__(
        self, net: nn.Module, name: str, at: Sequence[str], width: int, scale: float = 1000.0
    ) -> None:
        super().__init__()
        self.net = net
        self.name, self.at, self.width, self.scale = name, tuple(at), width, scale
        first = next(net.parameters())
        with seeded(name):
            self.adapter = nn.Sequential(nn.Linear(WIDTH, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.adapter[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.adapter[2].bias)  # type: ignore[arg-type]
        self.adapter.to(first.device, first.dtype)
        self._added: Tensor | None = None
        for module in self.at:
            net.get_submodule(module).register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self._added is None:
            return output
        return output + self._added.to(output.dtype)

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Any:
        number = conditions.pop(self.name, None)
        if number is None:
            return self.net(x, t, **conditions)
        dtype = next(self.adapter.parameters()).dtype
        number = torch.as_tensor(number, device=x.device).float().expand(len(x))
        half = WIDTH // 2
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=x.device) / half)
        angles = self.scale * number.reshape(-1, 1) * frequencies
        self._added = self.adapter(torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype))
        try:
            return self.net(x, t, **conditions)
        finally:
            self._added = None


@contextmanager
def seeded(name: str) -> Iterator[None]:
    """New layers get the same weights in every process, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(name.encode()))
        yield


def conditioned(
    net: Any,
    name: str,
    x: Tensor,
    t: Tensor,
    conditions: Mapping[str, Any],
    at: str | Sequence[str] | None = None,
) -> nn.Module:
    """The network with an adapter for ``name``; as it is when it has one, or takes the argument itself.

    Args:
        net: the network.
        name: the keyword of the number.
        x, t, conditions: an example of its arguments, to find the time embedding by running it.
        at: the time embedding's module, where it is not to be found.

    Raises:
        TypeError: it is no module.
        ValueError: no time embedding was found, or ``at`` is none.
    """
    if isinstance(net, Conditioned) and net.name == name:
        return net
    if name in inspect.signature(getattr(net, "forward", net)).parameters:
        return net
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"net is a {type(net).__name__}; step sizes are told through an adapter inside a torch.nn.Module: "
            f"give student= a network of your own that takes {name}="
        )
    seen = outputs(net, x, t, conditions)
    if at is None:
        names = time_embedding(net, seen)
    else:
        names = [at] if isinstance(at, str) else list(at)
        missing = [n for n in names if n not in seen]
        if missing:
            raise ValueError(f"at={missing[0]!r}: no module of that name ran with a tensor as its output")
    widths = {seen[n][0].shape[-1] for n in names}
    if len(widths) != 1 or any(seen[n][0].ndim != 2 for n in names):
        raise ValueError(f"at={names}: the modules' outputs must be (B, E), with one E")
    return Conditioned(net, name, names, widths.pop())


def time_embedding(net: nn.Module, seen: Mapping[str, Sequence[Tensor]]) -> list[str]:
    """The names of the modules that make the time embedding, by what their outputs depend on.

    It is the first module with parameters whose output (B, E) changes with t but not with x, taken as far
    out as that holds, and all others of its kind (transformers with one in each block).

    Raises:
        ValueError: there is none.
    """

    def is_candidate(name: str) -> bool:
        outputs = seen.get(name)
        if not name or outputs is None or outputs[0].ndim != 2:
            return False
        base, other_x, other_t = outputs
        changes = not torch.equal(base, other_t)
        return (
            changes and torch.equal(base, other_x) and any(True for _ in net.get_submodule(name).parameters())
        )

    candidates = [name for name in seen if is_candidate(name)]
    if not candidates:
        raise ValueError(
            "the network's time embedding was not found (a module whose output (B, E) depends on t alone); "
            "name it: at='time_embedding'"
        )

    def outermost(name: str) -> str:
        parts = name.split(".")
        return next(n for i in range(1, len(parts) + 1) if (n := ".".join(parts[:i])) in candidates)

    first = outermost(candidates[0])
    kind, leaf = type(net.get_submodule(first)), first.rpartition(".")[2]
    width = seen[first][0].shape[-1]
    return [
        name
        for name in dict.fromkeys(map(outermost, candidates))
        if isinstance(net.get_submodule(name), kind)
        and name.rpartition(".")[2] == leaf
        and seen[name][0].shape[-1] == width
    ]


def outputs(net: nn.Module, x: Tensor, t: Tensor, conditions: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """Each module's output, in order of execution, for (x, t), another x, and another t."""
    seen: dict[str, list[Tensor]] = {}
    training = net.training
    net.eval()  # no dropout: outputs differ by the inputs alone
    try:
        for a, b in ((x, t), (x.flip(0) * 0.5 + 0.1, t), (x, t.flip(0))):
            with torch.no_grad(), _recording(net, seen):
                net(a, b, **conditions)
    except REFUSALS as error:
        given = ", ".join(conditions) or "none"
        raise ValueError(
            f"the network cannot be run on two samples {tuple(x.shape)} (conditions: {given}): {error}; give what it "
            "needs: example_conditions={'labels': torch.tensor([0, 1])}, those of two samples"
        ) from error
    finally:
        net.train(training)
    return {name: outputs for name, outputs in seen.items() if len(outputs) == _PROBES + 1}


def bottleneck(net: nn.Module, seen: Mapping[str, Sequence[Tensor]]) -> str:
    """The name of the module with the smallest output per channel that depends on x: a UNet's middle.

    Of several, the one in the middle of the execution; in networks of one width (transformers), so too.

    Raises:
        ValueError: no module has an output of three dimensions or more.
    """
    parts = {
        name: values[0].shape[2:].numel() if values[0].ndim > 3 else values[0].shape[1]
        for name, values in seen.items()
        if name and values[0].ndim >= 3 and not torch.equal(values[0], values[1])
    }
    if not parts:
        raise ValueError("the network has no inner output of shape (B, C, ...); name one: at='middle'")
    narrowest = [name for name, size in parts.items() if size == min(parts.values())]
    outer = [n for n in narrowest if not any(n.startswith(f"{m}.") for m in narrowest)]
    return outer[len(outer) // 2]


@contextmanager
def _recording(net: nn.Module, seen: dict[str, list[Tensor]]) -> Iterator[None]:
    def recorder(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen.setdefault(name, []).append(output.detach())

        return hook

    handles = [module.register_forward_hook(recorder(name)) for name, module in net.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
