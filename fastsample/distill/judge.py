"""A discriminator on the inner output of a network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .adapters import seeded

HEAD_WIDTH = 256


class Judging(nn.Module):
    """A network with a discriminator on one of its inner outputs: ``net(..., judge=True)`` gives logits (B,).

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
        net.get_submodule(at).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._read = output

    def forward(self, x: Tensor, t: Tensor, judge: bool = False, **conditions: Any) -> Any:
        try:
            out = self.net(x, t, **conditions)
            if not judge:
                return out
            assert self._read is not None
            return self.head(self._read.flatten(1))[:, 0]
        finally:
            self._read = None
