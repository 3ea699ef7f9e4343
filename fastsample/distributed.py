"""The processes of a launched run (``torchrun``, ``accelerate launch``): who we are, and sums over all."""

from __future__ import annotations

import atexit
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor


def _state() -> Any:
    """accelerate's view of a launched run; None otherwise."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    # its functions take the group of their import as a default: imported later, they would keep the group, and
    # gloo's threads, alive past the end
    import torch.distributed.nn.functional
    from accelerate import PartialState

    # without the flag, accelerate takes launched processes on a CPU for as many runs of one process
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes != int(os.environ["WORLD_SIZE"]):
        raise RuntimeError(
            f"launched as {os.environ['WORLD_SIZE']} processes, but {state.num_processes} came together; "
            "see torchrun --help"
        )
    _leave_at_exit()
    return state


@cache
def _leave_at_exit() -> None:
    """A process that ends with its connections open can die of their threads (SIGABRT), its work all done."""
    from accelerate import PartialState

    atexit.register(PartialState().destroy_process_group)


def rank_and_size() -> tuple[int, int]:
    """This process and the number of processes; (0, 1) for a run that was not launched."""
    state = _state()
    return (0, 1) if state is None else (state.process_index, state.num_processes)


def device_of_rank() -> torch.device | None:
    """The device that the launcher gave to this process; None for a run that was not launched."""
    state = _state()
    return None if state is None else torch.device(state.device)


def resolve_device(device: str) -> torch.device:
    """``"auto"`` is CUDA where there is one; in a launched run, what the launcher gave to this process.

    Raises:
        ValueError: if the device does not exist here.
    """
    if device == "auto":
        own = device_of_rank()
        if own is not None:
            return own
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}: give 'auto', 'cpu' or 'cuda'") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={device!r} cannot be used here: this machine has no CUDA device; use device='cpu'"
        )
    try:
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used here: {error}") from error
    return resolved


def summed(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, the same bits on each, on the tensor's own device."""
    where = device_of_rank()
    if where is None:
        return values
    import torch.distributed as dist

    total = values.detach().clone().to(where)
    dist.all_reduce(total)
    return total.to(values.device)


def decided(value: int) -> int:
    """What the first process says, a truth value or a whole number."""
    rank, size = rank_and_size()
    return value if size == 1 else int(summed(torch.tensor([int(value) if rank == 0 else 0])).item())


def together() -> None:
    """Wait until all processes are here."""
    state = _state()
    if state is not None:
        state.wait_for_everyone()
