"""Moving averages of the weights: several at once, and any other length afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .limits import DECAY, Limit
from .method import move
from .weights import duplicate, moving

_WIDTH = Limit(0, 0.29, above=True, below=True)


def as_decays(name: str, values: Any, count: int | None = None) -> tuple[float, ...]:
    """Numbers in [0, 1)."""
    several = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if not several or (count or len(values)) != len(values) or not all(DECAY.holds(v) for v in values):
        example = "(0.9, 0.99)" if count == 2 else "(0.99, 0.999)"
        raise ValueError(f"{name}={values!r}: give {count or 'some'} numbers in [0, 1), such as {example}")
    return tuple(values)


def as_widths(values: Sequence[float]) -> tuple[float, ...]:
    """Relative widths of power-function averages, checked, as a tuple.

    Raises:
        ValueError: not a sequence of numbers that are widths.
    """
    if not isinstance(values, Sequence) or not all(_WIDTH.holds(v) for v in values):
        raise ValueError(f"power_ema={values!r}: give some numbers in (0, 0.29), such as (0.05, 0.1)")
    return tuple(values)


class Averages:
    """Exponential moving averages of one network at several rates.

    Args:
        net: the network.
        decays: of the averages, ascending; near the start shorter, ``min(decay, (1 + n) / (10 + n))``.
    """

    def __init__(self, net: nn.Module, decays: Sequence[float]) -> None:
        self.decays = as_decays("ema", decays)
        self.nets = {str(d): duplicate(net).eval().requires_grad_(False) for d in self.decays}
        self.follow(net)

    def follow(self, net: nn.Module) -> None:
        """Look again for what is averaged: after the networks' parameters were replaced (sharded)."""
        self._from, self._parts = moving(net), {name: moving(own) for name, own in self.nets.items()}

    def update(self, step: int) -> None:
        """After an update of the network, of which ``step`` were before."""
        for decay in self.decays:
            move(self._parts[str(decay)], self._from, min(decay, (1 + step) / (10 + step)))


def gamma_of_std(std: float) -> float:
    """The exponent of the power-function average of a relative width (Karras et al. 2024, eq. 123)."""
    if not _WIDTH.holds(std):
        raise ValueError(
            f"std={std!r} must lie in (0, 0.29): the width of the average, relative to the training"
        )
    import numpy as np

    s = std**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


class PowerAverages:
    """Power-function averages, from whose snapshots any other width can be made (Karras et al. 2024, EDM2).

    Args:
        net: the network.
        stds: relative widths (the paper: 0.05 and 0.1).
    """

    def __init__(self, net: nn.Module, stds: Sequence[float] = (0.05, 0.1)) -> None:
        self.gammas = {f"{std:g}": gamma_of_std(std) for std in stds}
        self.nets = {name: duplicate(net).eval().requires_grad_(False) for name in self.gammas}
        self.follow(net)

    def follow(self, net: nn.Module) -> None:
        """Look again for what is averaged, as in :class:`Averages`."""
        self._from, self._parts = moving(net), {name: moving(own) for name, own in self.nets.items()}

    def update(self, step: int) -> None:
        """After an update of the network, of which ``step`` were before (eq. 2: ``beta = (1 - 1/t)^(gamma + 1)``)."""
        for name, gamma in self.gammas.items():
            move(self._parts[name], self._from, (1 - 1 / (step + 1)) ** (gamma + 1))


def _inner(t: Tensor, g: Tensor, u: Tensor, h: Tensor) -> Tensor:
    """Inner products of power functions that end at t and u (Karras et al. 2024, appendix C.2)."""
    ratio = t / u
    exponent = torch.where(t < u, h, -g)
    return (g + 1) * (h + 1) * ratio**exponent / ((g + h + 1) * torch.maximum(t, u))


def weights_of(snapshots: Sequence[tuple[int, float]], step: int, std: float) -> Tensor:
    """How much of each snapshot (step, std) makes the average of another width at ``step`` (least squares)."""
    t = torch.tensor([s for s, _ in snapshots], dtype=torch.float64)
    g = torch.tensor([gamma_of_std(w) for _, w in snapshots], dtype=torch.float64)
    end = torch.tensor(float(step), dtype=torch.float64)
    gamma = torch.tensor(gamma_of_std(std), dtype=torch.float64)
    gram = _inner(t[:, None], g[:, None], t[None], g[None])
    right = _inner(t, g, end, gamma)
    return torch.linalg.lstsq(gram, right[:, None], driver="gelsd").solution[:, 0]


def reconstructed(folder: Path, step: int, std: float) -> dict[str, Tensor]:
    """The average of relative width ``std`` at an update, from the snapshots ``STEP-STD.safetensors`` of a folder.

    Raises:
        ValueError: no snapshots.
    """
    from safetensors.torch import load_file

    found = sorted(folder.glob("*-*.safetensors"))
    keys = [(int(f.stem.split("-")[0]), float(f.stem.split("-")[1])) for f in found]
    kept = [(f, k) for f, k in zip(found, keys, strict=True) if k[0] <= step]
    if not kept:
        raise ValueError(f"{folder} has no snapshots up to step {step}; train with snapshot_every=")
    weights = weights_of([k for _, k in kept], step, std).tolist()
    total: dict[str, Tensor] = {}
    for (file, _), weight in zip(kept, weights, strict=True):
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point():
                part = weight * tensor.double()
                total[name] = total[name] + part if name in total else part
            else:
                total[name] = tensor
    return {k: v.float() if v.dtype == torch.float64 else v for k, v in total.items()}
