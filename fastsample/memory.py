"""How much memory one evaluation takes, measured on any device by watching every tensor that is made."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .denoiser import Denoiser
from .process import as_time


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of live storages made inside the context; ``peak`` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # in-place operations and views give back memory that was there before
        before = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in before:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = storage.nbytes()
        self.live += self._seen[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._seen.pop(key, 0)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_iter(values) if isinstance(value, Tensor)]


def network_bytes(
    denoiser: Denoiser, like: Tensor, conditions: dict[str, Any], t_in: float, rho: float
) -> int:
    """Peak bytes that one evaluation of one sample makes besides its input.

    Args:
        denoiser: the model.
        like: a state of one sample (1, ...), for shape, dtype and device.
        conditions: the conditions of one sample.
        t_in: the time that the network is told, in the process's units.
        rho: the noise level ``sigma / alpha``, on which guidance depends.
    """
    x = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    told = denoiser.told(as_time(t_in)).to(x.device, denoiser.time_dtype(x.dtype)).expand(1)
    with torch.no_grad(), PeakBytes() as counter:
        denoiser.bind(1, conditions, x.device)(x, told, rho)
    return counter.peak
