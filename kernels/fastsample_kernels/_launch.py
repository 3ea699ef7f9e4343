"""A kernel launch as a value: run on tensors that hold data, or compiled ahead of time from tensors that do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any

import torch

from . import _runtime as runtime

_NUMBERS = frozenset({bool, int, float, type(None)})
_CAPACITY = 4096  # compiled kernels of one kernel and types; every shape has one
_dtype = attrgetter("dtype")
_data_ptr = torch.Tensor.data_ptr


Compiled = tuple[Any, Any, Any, Any]  # of Triton's class, which keeps it loaded; how it is run, and by what


def start(compiled: Compiled, grid: tuple[int, int, int], stream: Any, passed: Sequence[Any]) -> None:
    """The end of Triton's ``JITFunction.run``."""
    _, run, function, metadata = compiled
    run(*grid, stream, function, metadata, None, None, None, *passed)


def _picker(keys: Sequence[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """The items at these keys as a tuple, which ``itemgetter`` does not make of fewer than two."""
    if len(keys) > 1:
        return itemgetter(*keys)
    return lambda items: tuple([items[key] for key in keys])


class _Types:
    """Arguments of one kernel that have the same types: which of them Triton compiles for, and what it compiled.

    It compiles for the values of constexprs, for integers that are 1, multiples of 16 or above 32 bits, and for the
    type and the alignment of tensors. All integers count by value here, which tells more of them apart.
    """

    __slots__ = ("compiled", "tensors", "values")

    def __init__(self, params: Sequence[Any], types: Sequence[type]) -> None:
        tensors, values = [], []
        for i, (param, kind) in enumerate(zip(params, types, strict=True)):
            if kind in runtime.PLAIN_TENSORS:
                tensors.append(i)
            # Seeds are not to be compiled for, and are new in each call. Their type is the declared one.
            elif param.is_constexpr or (
                kind is not float and not (param.do_not_specialize and param.annotation_type)
            ):
                values.append(i)
        self.tensors = _picker(tensors)
        self.values = _picker(values)
        self.compiled: dict[Any, Compiled] = {}

    def add(self, key: Any, compiled: Any, launcher: runtime.Launcher) -> Compiled | None:
        if type(compiled) is not launcher.compiled:
            return None
        if len(self.compiled) >= _CAPACITY:
            self.compiled.clear()
        made = compiled, compiled.run, compiled.function, compiled.packed_metadata
        self.compiled[key] = made
        return made


class _Kernel:
    """What is known of one kernel."""

    __slots__ = ("arguments", "count", "kernel", "params", "passed", "types")

    def __init__(self, launcher: runtime.Launcher, kernel: Any) -> None:
        self.kernel = kernel  # it is found by its id, which must not become another's
        self.params = kernel.params
        self.count = len(self.params)
        self.arguments = _picker([p.name for p in self.params])
        passed = [i for i, p in enumerate(self.params) if launcher.constexprs or not p.is_constexpr]
        self.passed = None if len(passed) == self.count else _picker(passed)
        self.types: dict[tuple[type, ...], _Types | None] = {}

    def learn(self, launcher: runtime.Launcher, types: tuple[type, ...]) -> _Types | None:
        """How to tell arguments of these types apart; None where it is not known."""
        known = all(
            kind in launcher.constant if p.is_constexpr else kind in runtime.PLAIN_TENSORS or kind in _NUMBERS
            for p, kind in zip(self.params, types, strict=True)
        )
        self.types[types] = found = _Types(self.params, types) if known else None
        return found


_kernels: dict[int, _Kernel] = {}


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Args:
        kernel: the ``triton.jit`` function.
        grid: number of programs.
        args: all arguments of the kernel by name, constexprs included.
        num_warps, num_stages: compile options of Triton.
        options: further ones.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int
    num_stages: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> None:
        # Triton writes some 40 arguments into strings and compares options, each time, to find what it compiled:
        # that takes three to four times as long as all of this.
        launcher = runtime.launcher()
        known = None if launcher is None else self._known(launcher)
        compiled, passed = None, ()
        if launcher is None or known is None:
            self._run()
        else:
            args, passed, types = known
            driver, device, key = self._key(launcher, args, types)
            compiled = types.compiled.get(key)
            if compiled is None:
                compiled = types.add(key, self._run(), launcher)
            else:
                start(compiled, self.grid_of_three, driver.get_current_stream(device), passed)
        if runtime.recording.recorder is not None:
            runtime.recording.recorder.launches.append((self, compiled, passed))

    @property
    def grid_of_three(self) -> tuple[int, int, int]:
        x, y, z = (*self.grid, 1, 1)[:3]
        return x, y, z

    def _key(self, launcher: runtime.Launcher, args: tuple[Any, ...], types: _Types) -> tuple[Any, Any, Any]:
        """Driver, device, and what tells compiled kernels apart."""
        tensors = types.tensors(args)
        driver = launcher.driver.active
        device = driver.get_current_device()
        options = tuple([(name, type(value), value) for name, value in self.options.items()])
        key = (
            types.values(args),
            tuple(map(_dtype, tensors)),
            tuple([_data_ptr(t) % 16 == 0 for t in tensors]),
            (driver, device, self.num_warps, self.num_stages, options),
        )
        return driver, device, key

    def _known(self, launcher: runtime.Launcher) -> tuple[tuple[Any, ...], tuple[Any, ...], _Types] | None:
        """The arguments in order, those that a compiled kernel is called with, and their types; None where Triton
        has to launch.
        """
        if type(self.kernel) is not launcher.function or self.kernel.pre_run_hooks or not launcher.plain():
            return None
        if type(self.grid) is not tuple or not launcher.constant.issuperset(map(type, self.options.values())):
            return None
        kernel = _kernels.get(id(self.kernel))
        if kernel is None:
            kernel = _kernels[id(self.kernel)] = _Kernel(launcher, self.kernel)
        if len(self.args) != kernel.count:
            return None
        try:
            args = kernel.arguments(self.args)
        except KeyError:
            return None
        kinds = tuple(map(type, args))
        try:
            types = kernel.types[kinds]
        except KeyError:
            types = kernel.learn(launcher, kinds)
        if types is None:
            return None
        return args, args if kernel.passed is None else kernel.passed(args), types

    def _run(self) -> Any:
        """What Triton compiled and launched."""
        return self.kernel[self.grid](
            **self.args, num_warps=self.num_warps, num_stages=self.num_stages, **self.options
        )
