"""A kernel launch as a value: run on tensors that hold data, or compiled ahead of time from tensors that do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Args:
        kernel: the ``triton.jit`` function.
        grid: number of programs.
        args: all arguments of the kernel by name, constexprs included.
        num_warps, num_stages: compile options of Triton.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int
    num_stages: int

    def __call__(self) -> None:
        self.kernel[self.grid](**self.args, num_warps=self.num_warps, num_stages=self.num_stages)
