"""One dropout mask for several passes of a network."""

from __future__ import annotations

import torch


class Draws:
    """What torch's own generators (the CPU's and a device's) will draw next; each pass after :meth:`again` draws it.

    Args:
        device: that the network runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._module = None if device.type == "cpu" else getattr(torch, device.type)
        self._device, self._other = device, None
        if self._module is not None:
            self._other = self._module.get_rng_state(device)

    def again(self) -> None:
        """Put the generators back to where they were."""
        torch.set_rng_state(self._cpu)
        if self._module is not None:
            self._module.set_rng_state(self._other, self._device)
