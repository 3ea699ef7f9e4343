"""What every kernel shares: where Triton can run and why not, forward-mode tangents, batching, allocation.

Version-dependent behaviour of PyTorch and Triton is handled in this file only. Triton itself is imported at
the first launch: the Triton functions of a kernel live in ``_<name>_kernels.py``, which its launcher imports.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads the variable when a kernel is defined, so a later change would not reach it either.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
MIN_CAPABILITY = (8, 0)
LOW_PRECISION = (torch.float16, torch.bfloat16)

_explainers: dict[str, Callable[..., Answer]] = {}


@functools.cache
def _asked(query: Callable[[int], tuple[int, int]], index: int) -> tuple[int, int]:
    """PyTorch takes microseconds to say what a device is, for every tensor of every call."""
    return query(index)


def capability(index: int) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return _asked(torch.cuda.get_device_capability, index)


def _why_not_device(device_type: str, index: int) -> str | None:
    """Why Triton cannot run on a device."""
    if not HAS_TRITON:
        return "triton is not installed"
    if device_type == "cpu":
        return None if INTERPRET else "CPU tensors run in plain torch (see TRITON_INTERPRET=1)"
    if device_type != "cuda" or torch.version.hip is not None:
        return f"no kernels for device {device_type!r}{' (ROCm)' if torch.version.hip else ''}"
    found = capability(index)
    if found < MIN_CAPABILITY:
        return f"compute capability {found} is below {MIN_CAPABILITY}"
    return None


def why_not(*tensors: Tensor | None) -> str | None:
    """Why Triton cannot run on these tensors, or None when it can.

    Devices: CUDA of compute capability 8.0 or newer, and the CPU under Triton's interpreter. Data types:
    float16, bfloat16, float32; float64 under the interpreter only.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        device = tensor.device
        reason = _why_not_device(device.type, device.index or 0)
        if reason is not None:
            return reason
        if tensor.dtype not in (*LOW_PRECISION, torch.float32) and not (
            INTERPRET and tensor.dtype == torch.float64
        ):
            return f"no kernels for {tensor.dtype}"
        if tensor.numel() == 0:
            return "a tensor is empty"
    return None


def reaches(device: torch.device) -> bool:
    """Whether Triton can run on a device."""
    return _why_not_device(device.type, device.index or 0) is None


def check_devices(name: str, tensor: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Refuse tensors on another device than ``tensor``, whose pointers a kernel would misread.

    Raises:
        ValueError: naming the first of them.
    """
    for other, t in others.items():
        if t is not None and t.device != tensor.device:
            raise ValueError(f"{other} is on {t.device}, {name} on {tensor.device}; move one to the other")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors; that of an H100 under the interpreter."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type that statistics and sums are kept in: float32, or float64 for float64 tensors."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of a floating-point type."""
    import triton.language as tl

    return {
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
        torch.float32: tl.float32,
        torch.float64: tl.float64,
    }[dtype]


# What torch.compiler.assume_constant_result does; that would import torch._dynamo, and with it Triton.
_CONSTANT = "_dynamo_marked_constant"
_rms_norm_eps: dict[tuple[torch.dtype, str], float] = {}


def rms_norm_eps(dtype: torch.dtype, device_type: str) -> float:
    """What PyTorch's RMSNorm adds to the mean square where it is given no eps: that of the tensor's type in some
    versions, of the type of the arithmetic in others, so it is measured.
    """
    if (dtype, device_type) not in _rms_norm_eps:
        device = device_type if device_type == "cpu" or torch.cuda.is_available() else "cpu"
        with torch.no_grad(), _disable_current_modes():  # compiling and exporting come here, too
            x = torch.full((1, 1), 2.0**-9, dtype=dtype, device=device)
            y = torch.nn.functional.rms_norm(x, (1,)).double().item()  # x / sqrt(x^2 + eps)
        measured = (2.0**-9 / y) ** 2 - 2.0**-18
        candidates = (torch.finfo(dtype).eps, torch.finfo(accumulator(dtype)).eps)
        _rms_norm_eps[dtype, device_type] = min(candidates, key=lambda eps: abs(measured - eps))
    return _rms_norm_eps[dtype, device_type]


rms_norm_eps.__dict__[_CONSTANT] = True


def tf32_allowed() -> bool:
    """Whether PyTorch may round float32 products to TF32."""
    matmul = torch.backends.cuda.matmul
    try:
        return matmul.fp32_precision == "tf32"  # where it exists, allow_tf32 may raise
    except AttributeError:  # before PyTorch 2.9
        return matmul.allow_tf32


tf32_allowed.__dict__[_CONSTANT] = True


def why_not_cudnn_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> str | None:
    """Why cuDNN's attention cannot take a call, without a mask; None when it can."""
    try:
        params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, is_causal, False)
        can = torch.backends.cuda.can_use_cudnn_attention(params)
    except (AttributeError, TypeError):
        return f"PyTorch {torch.__version__} does not say whether cuDNN can take it"
    return None if can else "cuDNN's attention cannot take it, or is turned off in torch.backends.cuda"


def hooked(module: torch.nn.Module) -> bool:
    """Whether calling the module runs hooks, its own or those of all modules."""
    every = torch.nn.modules.module
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
    )


class _Recording(threading.local):
    """What notes the launches and buffers of an operator in this thread, if anything does."""

    recorder: Any = None


recording = _Recording()


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, strides: Sequence[int] | None = None
) -> Tensor:
    """Every output and every scratch buffer of a kernel is allocated here (tests poison it)."""
    if strides is None:
        made = torch.empty(tuple(shape), dtype=dtype, device=device)
    else:
        made = torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype, device=device)
    if recording.recorder is not None:
        recording.recorder.buffers.append(made)
    return made


def on_device(tensor: Tensor) -> Any:
    """Context: Triton launches on the current device, which must be the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device_of(tensor)


# -- launches ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launcher:
    """What the end of Triton's ``JITFunction.run`` needs, to launch a compiled kernel without the rest of it.

    Attributes:
        driver: Triton's configuration of drivers.
        function, compiled: Triton's classes of a kernel, and of one that is compiled for given arguments.
        constant: the types whose values a constexpr can be told apart by.
        constexprs: whether a compiled kernel is called with its constexprs, too.
        plain: whether nothing, such as a profiler or a debugging option, wants to watch or to change launches.
    """

    driver: Any
    function: Any
    compiled: Any
    constant: frozenset[type]
    constexprs: bool
    plain: Callable[[], bool]


_RUN = (
    "kernel.run(grid_0,grid_1,grid_2,stream,kernel.function,kernel.packed_metadata,launch_metadata,"
    "{0}.launch_enter_hook,{0}.launch_exit_hook,*{1})"
)


def _plain_by_environment() -> bool:
    from triton.compiler import CompiledKernel

    hooks = CompiledKernel.launch_enter_hook, CompiledKernel.launch_exit_hook
    return hooks == (None, None) and os.environ.get("TRITON_DEBUG", "0") != "1"


def _plain_by_knobs(knobs: Any) -> Callable[[], bool]:
    def plain() -> bool:
        runtime = knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        return not (
            getattr(enter, "calls", enter)  # a hook, or from Triton 3.5 on a chain of them
            or getattr(leave, "calls", leave)
            or runtime.debug
            or getattr(runtime, "add_stages_inspection_hook", None)
            or getattr(knobs.compilation, "instrumentation_mode", None)
        )

    return plain


@functools.cache
def launcher() -> Launcher | None:
    """None where kernels are interpreted, and where this version of Triton launches them in an unknown way."""
    if INTERPRET or not HAS_TRITON:
        return None
    try:
        from triton import language
        from triton.compiler import CompiledKernel
        from triton.runtime import driver, jit

        run = "".join(inspect.getsource(jit.JITFunction.run).split())
        if _RUN.format("knobs.runtime", "bound_args.values()") in run:  # from 3.4 on
            constexprs, plain = True, _plain_by_knobs(importlib.import_module("triton.knobs"))
        elif _RUN.format("self.CompiledKernel", "bound_args.values()") in run:  # 3.3
            constexprs, plain = True, _plain_by_environment
        elif _RUN.format("self.CompiledKernel", "non_constexpr_vals") in run:  # 3.2
            constexprs, plain = False, _plain_by_environment
        else:
            return None
        constant = frozenset({bool, int, str, type(None), language.dtype})
        return Launcher(driver, jit.JITFunction, CompiledKernel, constant, constexprs, plain)
    except (ImportError, AttributeError, OSError):
        return None


# -- forward-mode derivatives --------------------------------------------------------------------------------


def _within_vmap() -> bool:
    """Whether the innermost function transform is vmap."""
    functorch: Any = torch._C._functorch
    top = functorch.peek_interpreter_stack()
    return top is not None and top.key() == functorch.TransformType.Vmap


# The compiler keeps the stack as it traces, but cannot read it. This is what torch.compiler.assume_constant_result
# sets; the decorator itself would import the compiler, and with it Triton.
_within_vmap._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unpack_duals(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None] | None]:
    """Primals and tangents; ``(tensors, None)`` where no tensor carries a tangent.

    Operators made by ``torch.library.custom_op`` drop tangents silently, so wrappers take them off before the
    operator and put them back after it (:func:`make_dual`).
    """
    if forward_ad._current_level < 0:
        return list(tensors), None
    # outside vmap(jvp(f)), batched tensors pass
    if _within_vmap() and any(t is not None and torch._C._functorch.is_batchedtensor(t) for t in tensors):
        raise NotImplementedError(
            "forward-mode derivative of a vmapped kernel, jvp(vmap(f)): put vmap outside, vmap(jvp(f)), or run the "
            "plain modules there (unpatch the model)"
        )
    pairs = [(None, None) if t is None else forward_ad.unpack_dual(t) for t in tensors]
    if all(tangent is None for _, tangent in pairs):
        return list(tensors), None
    return [primal for primal, _ in pairs], [tangent for _, tangent in pairs]


def make_dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """The tensor with its tangent."""
    return forward_ad.make_dual(primal, tangent)


def refuse_duals(name: str, *tensors: Tensor | None) -> None:
    """Raise where forward-mode tangents reach an operator that has no forward-mode rule.

    Raises:
        NotImplementedError: some tensor carries a tangent (a derivative of the backward pass was asked for).
    """
    if unpack_duals(tensors)[1] is not None:
        raise NotImplementedError(
            f"forward-mode derivative of {name}: second derivatives are not implemented in the kernels; "
            "run the plain modules there (unpatch the model)"
        )


# -- reverse mode --------------------------------------------------------------------------------------------


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> Any:
    raise NotImplementedError(
        "this derivative of a fused kernel (a second one) is not implemented; run the plain modules there "
        "(unpatch the model)"
    )


def differentiable(
    operator: Any,
    backward: Callable[..., Any] = _no_second_derivative,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """The operator with a reverse-mode rule, also inside ``torch.func`` transforms.

    Args:
        operator: made by ``torch.library.custom_op``, with a vmap rule.
        backward, setup_context: as for ``register_autograd``; without them the operator refuses to be
            differentiated.

    Returns:
        The function to call instead of the operator. ``register_autograd`` serves eager and compiled code but
        fails under ``torch.func.grad`` (torch 2.6 to 2.14 at least), where only an ``autograd.Function``
        works.
    """
    setup = setup_context or (lambda ctx, inputs, output: None)
    operator.register_autograd(backward, setup_context=setup)

    @functools.wraps(operator._init_fn)  # torch.compile counts the parameters
    def forward(*args: Any) -> Any:
        return operator(*args)

    namespace = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    function: Any = type("Transformed", (torch.autograd.Function,), namespace)

    @functools.wraps(operator._init_fn)
    def call(*args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        return operator(*args) if watched() or not only_result(args) else operator._init_fn(*args)

    return call


PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})


def plain_tensor(t: Tensor) -> bool:
    """Whether the memory of a tensor holds its numbers: not a subclass, nor a view that negates."""
    return type(t) in PLAIN_TENSORS and not t.is_neg()


def watched() -> bool:
    """Whether a compiler, a tracer or a mode needs to see operators. Half of the time to launch a kernel goes through
    the dispatcher, which these need."""
    if torch.compiler.is_compiling():
        return True
    own = recording.recorder is not None
    return torch._C._len_torch_dispatch_stack() > own or torch._C._get_tracing_state() is not None


def transformed() -> bool:
    """Whether a function transform or a forward-mode derivative is under way."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def only_result(args: tuple[Any, ...]) -> bool:
    """Whether nothing but the result for these arguments matters: no gradient and no subclass."""
    grad = torch.is_grad_enabled()
    return all(
        plain_tensor(a) and not (grad and a.requires_grad) for a in args if isinstance(a, torch.Tensor)
    )


# -- autocast ------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("fastsample_kernels", "FRAGMENT")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's type, as PyTorch casts the arguments of its matrix products; as they are without."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def autocasts(operator: Any, count: int) -> None:
    """Give an operator the autocast rule that casts its first ``count`` arguments, all tensors.

    The other operators have the rule of an operator without one: their arithmetic is float32 whatever the tensors
    are, and types stay. (``register_autocast`` casts all tensors, and to a fixed type.)
    """
    for device in ("CPU", "CUDA"):
        key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

        def kernel(_: Any, *args: Any, key: Any = key) -> Any:
            cast = autocast(*args[:count])
            with torch._C._ExcludeDispatchKeyGuard(key):
                return operator(*cast, *args[count:])

        _LIBRARY.impl(operator._qualname.split("::")[1], kernel, f"Autocast{device}", with_keyset=True)


# -- vmap ----------------------------------------------------------------------------------------------------


def fold(tensor: Tensor | None, dim: int | None, size: int, inner: int | None = None) -> Tensor | None:
    """A vmapped tensor with the mapped dimension folded into the batch: (B, ...) -> (size * B, ...).

    Args:
        tensor: as the operator would see it, with the mapped dimension at ``dim`` (None: not mapped).
        dim: position of the mapped dimension.
        size: of the mapped dimension.
        inner: the batch B of the call; given for tensors that all of the batch shares, (C,), which then
            become (size * B, C) where they are mapped and stay as they are otherwise.
    """
    if tensor is None or (inner is not None and dim is None):
        return tensor
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    if inner is not None:
        mapped = mapped[:, None].expand(size, inner, *mapped.shape[1:])
    return mapped.reshape(size * mapped.shape[1], *mapped.shape[2:])


def batched(operator: Any, kinds: str) -> None:
    """Give an operator the vmap rule that makes the mapped dimension a part of the batch.

    Args:
        operator: made by ``torch.library.custom_op``; every output has a batch axis first, and its first
            argument is a tensor with one.
        kinds: one letter an argument: ``n`` a tensor with a batch axis first (or None), ``p`` a tensor that
            is (C,) or (batch, C) (or None), ``-`` not a tensor.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, ...]:
        size, dims = info.batch_size, in_dims
        batch = args[0].shape[0] if dims[0] is None else args[0].movedim(dims[0], 0).shape[1]
        folded = []
        for kind, dim, arg in zip(kinds, dims, args, strict=True):
            shared = kind == "p" and arg is not None and arg.ndim - (dim is not None) == 1
            folded.append(arg if kind == "-" else fold(arg, dim, size, batch if shared else None))
        outputs = operator(*folded)
        # An output that was not asked for has no elements, and no batch.
        dims = tuple(0 if out.numel() else None for out in outputs)
        mapped = zip(dims, outputs, strict=True)
        return tuple(out if dim is None else out.unflatten(0, (size, -1)) for dim, out in mapped), dims

    operator.register_vmap(rule)


# -- explain -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a call would run.

    Attributes:
        kernel: the function's name.
        reason: why the kernel cannot take the call and plain torch runs; None where it can.
        how: the kernel's tiles and passes.
    """

    kernel: str
    reason: str | None
    how: str

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{self.kernel}: plain torch, because {self.reason}"
        return f"{self.kernel}: Triton, {self.how}"


def explains(name: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Register the function that answers :func:`explain` and :func:`supported` for the kernel ``name``."""

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        _explainers[name] = function
        return function

    return register


def _answer(kernel: str | Callable[..., Any], args: Any, kwargs: Any) -> Answer:
    name = kernel if isinstance(kernel, str) else getattr(kernel, "__name__", repr(kernel))
    if name not in _explainers:
        raise ValueError(f"kernel={name!r} is not one of {', '.join(sorted(_explainers))}")
    return _explainers[name](*args, **kwargs)


def explain(kernel: str | Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """What a call would run: the kernel with its tiles, or plain torch and why.

    Args:
        kernel: the function or its name, e.g. ``group_norm`` or ``"group_norm"``.
        *args, **kwargs: those of the call that the question is about. Nothing is computed.

    Raises:
        ValueError: no such kernel, or arguments that the call itself would refuse.
    """
    return str(_answer(kernel, args, kwargs))


def supported(kernel: str | Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether a call would run the kernel; arguments and errors as of :func:`explain`, which says why not."""
    return _answer(kernel, args, kwargs).reason is None
