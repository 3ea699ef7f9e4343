"""A training batch and its randomness, which is a function of (seed, global sample index, name) alone."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..noise import normal, philox

_HALF = 2.0**-33


def stream(name: str) -> int:
    """The noise stream of a name: a 32-bit number."""
    return zlib.crc32(name.encode())


@dataclass(frozen=True)
class Batch:
    """Samples of one update, or a part of them.

    Attributes:
        index: int64 (B,) on the CPU, the samples' global indices: ``step * size + position``.
        shape: of one sample.
        x: clean samples (B, ...), or None for methods that need no data.
        conditions: handed to the networks; tensors hold one value a sample.
        seed: of all randomness.
        step: the number of updates before this one.
        size: samples of the whole update, over all processes and micro-batches.
        device, dtype: of what is drawn.
    """

    index: Tensor
    shape: tuple[int, ...]
    x: Tensor | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    step: int = 0
    size: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, x: Tensor, step: int = 0, seed: int = 0, **conditions: Any) -> Batch:
        """The batch of a plain training loop: clean samples (B, ...), the update's number and a seed."""
        index = torch.arange(step * len(x), (step + 1) * len(x))
        return cls(
            index, tuple(x.shape[1:]), x, conditions, seed, step, len(x), device=x.device, dtype=x.dtype
        )

    def __len__(self) -> int:
        return self.index.numel()

    @property
    def data(self) -> Tensor:
        """The clean samples.

        Raises:
            ValueError: there are none.
        """
        if self.x is None:
            raise ValueError(
                "this method is trained on data: give data=... to the trainer, or x= to the batch"
            )
        return self.x

    def normal(self, name: str) -> Tensor:
        """Standard normal noise (B, ...); another one for each name."""
        return normal(
            (len(self), *self.shape),
            self.seed,
            self.index.to(self.device, non_blocking=True),
            stream(name),
            dtype=self.dtype,
        )

    def uniform(self, name: str, *, stratified: bool = False) -> Tensor:
        """Uniform numbers in (0, 1), float64 (B,) on the CPU.

        Args:
            name: which draw.
            stratified: one number in each of ``size`` equal intervals, which evens out each update.
        """
        words = philox(self.seed, torch.zeros_like(self.index), stream(name), self.index)[0]
        u = words.double() * 2.0**-32 + _HALF
        if not stratified:
            return u
        size = self.size or len(self)
        return (self.index % size + u) / size

    def gaussian(self, name: str, *, stratified: bool = False) -> Tensor:
        """Standard normal numbers, float64 (B,) on the CPU: times of lognormal noise levels."""
        return torch.special.ndtri(self.uniform(name, stratified=stratified))
