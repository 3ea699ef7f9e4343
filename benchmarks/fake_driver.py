"""Triton's driver for a machine without a GPU: kernels are compiled, and their launches noted instead of made."""

from __future__ import annotations

import atexit
import inspect
import itertools
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver


class FakeDriver:
    """A driver without a GPU; its launchers note what they are called with."""

    def __init__(self) -> None:
        self.device, self.stream = 100, 7
        self.calls: list[tuple[Any, ...]] = []
        functions = itertools.count(1000)
        number = 5 if "n_max_threads" in inspect.getsource(CompiledKernel._init_handles) else 4
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda *args: ("module", next(functions), 0, 0, 1024)[:number],
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: self.calls.append(args)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + device


def installed(fake: FakeDriver) -> tuple[Any, str, FakeDriver]:
    """Arguments of ``setattr`` that make it Triton's driver."""
    made = driver, "_active" if hasattr(driver, "_active") else "active", fake
    atexit.register(setattr, *made)  # for kernels that live until then, and are unloaded by the driver
    return made
