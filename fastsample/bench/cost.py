"""What sampling costs beside time: floating-point operations of the network, memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastsample.denoiser import Denoiser


def network_flops(denoiser: Denoiser, shape: tuple[int, ...], conditions: Mapping[str, Any]) -> int:
    """Floating-point operations of one network row, by PyTorch's counter (matrix products and convolutions).

    Args:
        denoiser: its network is run once, without guidance.
        shape: (C, H, W) of one sample.
        conditions: for one sample.
    """
    from torch.utils.flop_counter import FlopCounterMode

    process, device = denoiser.process, denoiser.device
    bound = denoiser.replace(guidance=None).bind(1, conditions, device)
    x = torch.zeros(1, *shape, device=device)
    told = denoiser.told(process.network_time(process.t_end)).to(device, denoiser.time_dtype(x.dtype))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bound(x, told.expand(1), float(process.rho(process.t_end)))
    return counter.get_total_flops()


class PeakMemory:
    """The most device memory allocated between two looks at it; None where the device does not say."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int | None:
        """So far."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None
