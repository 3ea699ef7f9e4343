"""Launches, remembered by the form of an operator's or a function's arguments and made again without what led to
them.

To lay out tensors, choose tiles and name all arguments of a kernel takes the host several times as long as to launch
it, and gives the same for the same form: shapes, strides, types, alignment and numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import _runtime as runtime
from ._launch import Compiled, Launch, start

REMEMBERS = True
"""False builds every call anew, to compare."""
_CAPACITY = 4096  # forms of one operator
_ALIGNED = 256  # bytes, of each part of scratch memory
_NEW: Any = object()
_aten: Any = torch.ops.aten
# Of inference mode, in which these come undivided: another tensor of the same memory, or else a copy in order.
_ORDERED = frozenset({_aten.reshape.default, _aten.contiguous.default, _aten.flatten.using_ints})
# What allocates, or makes another tensor of the same memory: no work of a device's.
_HARMLESS = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.transpose.int,
        _aten.movedim.int,
        _aten.permute.default,
        _aten.unsqueeze.default,
        _aten.view.default,
        _aten._unsafe_view.default,
        _aten.expand.default,
        _aten.detach.default,
    }
)
F = TypeVar("F", bound=Callable[..., Any])


class Recorder(TorchDispatchMode):
    """What a body does: the buffers it allocates, the tensors it copies, its launches, and whether that is all."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []
        self.copies: list[tuple[Tensor, Any, Tensor]] = []  # of what, in which format, and the copy
        self.launches: list[tuple[Launch, Compiled | None, tuple[Any, ...]]] = []
        self.complete = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        copies = func is _aten.clone.default or (func in _ORDERED and made.data_ptr() != args[0].data_ptr())
        if copies:  # strides that a kernel cannot take
            order = None if func is _aten.clone.default else torch.contiguous_format
            self.copies.append((args[0], (kwargs or {}).get("memory_format", order), made))
        elif func not in _HARMLESS and func not in _ORDERED:
            self.complete = False
        return made

    def __enter__(self) -> Recorder:
        runtime.recording.recorder = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        runtime.recording.recorder = None
        super().__exit__(*error)


class _Replay:
    """The launches with places for tensors, by number: those of the arguments first, then outputs, copies and the parts
    of one piece of scratch memory, since PyTorch takes as long to allocate as to launch.

    Args:
        outputs: shape, type and strides of each.
        copies: of the arguments, by number, seen with which shape and strides; and the format of the copy.
        scratch: bytes.
        offsets: of the parts.
        launches: of each the kernel, what it compiled to, the grid, and its arguments with the places of tensors.
        single: whether the result is one tensor, not a tuple.
    """

    __slots__ = ("copies", "launches", "offsets", "outputs", "scratch", "single")

    def __init__(
        self,
        outputs: list[Any],
        copies: list[Any],
        scratch: int,
        offsets: list[int],
        launches: list[Any],
        single: bool,
    ) -> None:
        self.outputs, self.copies, self.launches, self.single = outputs, copies, launches, single
        self.scratch, self.offsets = scratch, offsets

    def watched(self) -> bool:
        """Whether a kernel has got hooks meanwhile, which Triton runs."""
        return any(kernel.pre_run_hooks for kernel, *_ in self.launches)

    def __call__(self, tensors: list[Tensor], addresses: list[int], stream: Any) -> Any:
        device = tensors[0].device
        outputs = [runtime.empty(shape, dtype, device, strides) for shape, dtype, strides in self.outputs]
        copies = [
            tensors[number].as_strided(shape, strides).clone(memory_format=layout)
            for number, shape, strides, layout in self.copies
        ]
        # Triton asks a tensor for its address, and the driver whether the device can read it; a number it takes as it
        # is. That all tensors are on the device is part of the form.
        addresses += [t.data_ptr() for t in (*outputs, *copies)]
        if self.scratch:
            scratch = runtime.empty((self.scratch,), torch.uint8, device)
            base = scratch.data_ptr()
            addresses += [base + offset for offset in self.offsets]
        for _, compiled, grid, values, places in self.launches:
            passed = values.copy()
            for place, number in places:
                passed[place] = addresses[number]
            start(compiled, grid, stream, passed)
        return outputs[0] if self.single else tuple(outputs)


def _replay_of(recorder: Recorder, inputs: Sequence[Tensor], result: Any) -> _Replay | None:
    """None where something else than launches on these tensors was done."""
    device = inputs[0].device
    if not recorder.complete or any(t.device != device for t in (*inputs, *recorder.buffers)):
        return None
    single = isinstance(result, Tensor)
    results = (result,) if single else result
    if not isinstance(results, tuple):
        return None
    outputs, forms, scratch = [], [], list(recorder.buffers)
    for t in results:
        own = [b for b in scratch if b is t or (t.numel() and b.data_ptr() == t.data_ptr())]
        if len(own) != 1 or t.numel() != own[0].numel():
            return None
        scratch = [b for b in scratch if b is not own[0]]
        outputs.append(own[0])
        forms.append((tuple(t.shape), t.dtype, None if t is own[0] else t.stride()))
    copies = []
    for source, layout, _ in recorder.copies:
        of = [i for i, t in enumerate(inputs) if (t.data_ptr(), t.dtype) == (source.data_ptr(), source.dtype)]
        if not of:
            return None
        copies.append((of[0], tuple(source.shape), source.stride(), layout))
    offsets = [0]
    for b in scratch:
        offsets.append(offsets[-1] + -(-b.numel() * b.element_size() // _ALIGNED) * _ALIGNED)
    # Inputs that share an address share it in every call of this form.
    numbers: dict[tuple[int, torch.dtype], int] = {}
    for number, t in enumerate((*inputs, *outputs, *(made for *_, made in recorder.copies), *scratch)):
        if t.numel():
            numbers.setdefault((t.data_ptr(), t.dtype), number)
    launches = []
    for launch, compiled, passed in recorder.launches:
        if compiled is None:
            return None
        values, places = list(passed), []
        for place, value in enumerate(passed):
            if isinstance(value, Tensor):
                found = numbers.get((value.data_ptr(), value.dtype))
                if found is None:
                    return None
                values[place] = None
                places.append((place, found))
        launches.append((launch.kernel, compiled, launch.grid_of_three, values, places))
    return _Replay(forms, copies, offsets[-1], offsets[:-1], launches, single)


class _Memory:
    """The launches of a body by the form of its arguments.

    Args:
        body: a function of tensors and of what can be hashed, that returns new tensors, or None to refuse.
        state: what else its launches depend on.
    """

    __slots__ = ("body", "known", "state")

    def __init__(self, body: Callable[..., Any], state: Callable[[], Any] | None) -> None:
        self.body, self.state = body, state
        self.known: dict[Any, _Replay | None] = {}

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], whole: bool) -> Any:
        """The body's result. That of a whole function may have a gradient, or be made without a kernel."""
        if not REMEMBERS or runtime.recording.recorder is not None:
            return self.body(*args, **kwargs)
        grad = whole and torch.is_grad_enabled()
        tensors: list[Tensor] = []
        form: list[tuple[Any, ...]] = []
        for a in (*args, *kwargs.values()) if kwargs else args:
            if not isinstance(a, Tensor):
                form.append((type(a), a))
            elif runtime.plain_tensor(a) and not (grad and a.requires_grad):
                tensors.append(a)
                form.append((a.shape, a.stride(), a.dtype, a.device))
            else:
                return self.body(*args, **kwargs)
        if not tensors or (whole and not runtime.reaches(tensors[0].device)):
            return self.body(*args, **kwargs)
        launcher = runtime.launcher()  # which imports Triton
        if launcher is None or not launcher.plain():
            return self.body(*args, **kwargs)
        addresses = [t.data_ptr() for t in tensors]
        driver = launcher.driver.active
        device = driver.get_current_device()
        shared = None
        if len(set(addresses)) < len(addresses):
            shared = tuple(map(addresses.index, addresses))
        key = (
            tuple(form),
            tuple(kwargs),
            tuple([a % 16 == 0 for a in addresses]),
            shared,
            device,
            driver,
            torch.is_inference_mode_enabled(),
            None if self.state is None else self.state(),
        )
        try:
            replay = self.known.get(key, _NEW)
        except TypeError:  # an argument that cannot be hashed
            return self.body(*args, **kwargs)
        if replay is _NEW:
            return self._met(key, tensors, device, args, kwargs)
        if replay is None or replay.watched():
            return self.body(*args, **kwargs)
        return replay(tensors, addresses, driver.get_current_stream(device))

    def _met(self, key: Any, tensors: list[Tensor], device: int, args: Any, kwargs: Any) -> Any:
        """The result for a form that is new."""
        if len(self.known) >= _CAPACITY:
            self.known.clear()
        with Recorder() as recorder:
            result = self.body(*args, **kwargs)
        index = tensors[0].device.index
        here = index is None or index == device
        self.known[key] = _replay_of(recorder, tensors, result) if here else None
        return result


def replayed(state: Callable[[], Any] | None = None) -> Callable[[F], F]:
    """Let an operator's body, a function of tensors, None and numbers that returns new tensors, make its launches
    again where it is called with arguments of a form that it has met.

    Args:
        state: what else its launches depend on.
    """

    def decorate(body: F) -> F:
        memory = _Memory(body, state)

        @functools.wraps(body)
        def call(*args: Any) -> Any:
            return memory(args, {}, False)

        return call  # type: ignore[return-value]

    return decorate


def remembered(function: F) -> F:
    """The same for a function that calls operators, whose arguments need not be looked at again then: what it refuses,
    chooses and returns depends on their form alone. Where more than its result matters, gradients say, it runs itself.
    """
    memory = _Memory(function, None)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if runtime.watched() or runtime.transformed():
            return function(*args, **kwargs)
        return memory(args, kwargs, True)

    return call  # type: ignore[return-value]
