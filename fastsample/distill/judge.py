"""A discriminator on the inner output of a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .adapters import seeded

HEAD_WIDTH = 256


class Judging(nn.Module):
    """A network with a discriminator on one of its inner outputs, which judges what passes while it listens.

    Args:
        net: the network.
        at: the name of the module that is read.
        features: an example of its output.
    """

    def __init__(self, net: nn.Module, at: str, features: Tensor) -> None:
        super().__init__()
        self.net, self.at = net, at
        size = features[0].numel()
        with seeded("judge"):
            head = nn.Sequential(
                nn.LayerNorm(size), nn.Linear(size, HEAD_WIDTH), nn.SiLU(), nn.Linear(HEAD_WIDTH, 1)
            )
        self.head = head.to(features.device, features.dtype)
        self._read: Tensor | None = None
        self._logits: list[Tensor] | None = None
        net.get_submodule(at).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._read = output

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """The logits (B,) of all passes within, in a list."""
        self._logits = []
        try:
            yield self._logits
        finally:
            self._logits = None

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Any:
        try:
            out = self.net(x, t, **conditions)
            if self._logits is not None:
                assert self._read is not None
                self._logits.append(self.head(self._read.flatten(1))[:, 0])
            return out
        finally:
            self._read = None
