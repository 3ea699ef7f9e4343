"""What sampling costs beside time: floating-point operations of the network, memory, energy."""

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


class EnergyMeter:
    """The energy counter of an NVIDIA GPU, by NVML: all that the whole device uses, idle power and others included.

    Attributes:
        why: why there is none, None where there is one.
    """

    def __init__(self, device: torch.device) -> None:
        self.why: str | None = None
        self._handle: Any = None
        if device.type != "cuda":
            self.why = f"NVML measures NVIDIA GPUs, not {device.type}"
            return
        try:
            import pynvml
        except ImportError:
            self.why = "nvidia-ml-py is not installed: pip install 'fastsample[energy]'"
            return
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid  # NVML's order is not that of CUDA
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except pynvml.NVMLError as error:
            self.why = f"NVML does not count this device's energy ({error})"
            return
        self._handle = handle

    def joules(self) -> float | None:
        """So far, since the driver was loaded; None where there is no counter."""
        if self._handle is None:
            return None
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
