"""diffusers pipelines in one line: faster in place (:func:`accelerate`), or as a denoiser (:func:`denoiser_of`)."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..plan import Plan
from .schedules import read

# What a flow transformer is told of t: most 1000 t; these divide by 1000 in their pipelines.
_TOLD_T = ("FluxTransformer2DModel", "QwenImageTransformer2DModel")

# Networks whose samples are (channels, size, size) by their config.
_SQUARE = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "SD3Transformer2DModel")

_DECODED, _ENCODED = 8, 64  # latents and prompts at once

_HANDLE = "_fastsample_accelerated"  # the attribute that keeps the handle


@dataclass
class Accelerated:
    """What :func:`accelerate` did; printable, and undone by :meth:`undo`.

    Attributes:
        pipe: the pipeline or network.
        steps: evaluations of a call that gives no number; None keeps the pipeline's own default.
        kernels: the report of the kernels that were put in, None without.
        evaluations: calls of the network since the last call of the pipeline began.
        rows: samples that the network was given in them, the guidance's doubled ones included.
    """

    pipe: Any
    steps: int | None = None
    kernels: Any = None
    evaluations: int = 0
    rows: int = 0
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def plan(self) -> Plan | None:
        """The table of the last run; None before the first, and for networks."""
        return getattr(getattr(self.pipe, "scheduler", None), "plan", None)

    def undo(self) -> None:
        """Everything as it was."""
        while self._undo:
            self._undo.pop()()
        vars(self.pipe).pop(_HANDLE, None)

    def __str__(self) -> str:
        parts = [f"{type(self.pipe).__name__}: {self.steps or 'its own number of'} steps"]
        if self.plan is not None:
            parts.append(f"last run: {self.evaluations} evaluations, {self.rows} network rows\n{self.plan}")
        if self.kernels is not None:
            parts.append(str(self.kernels))
        return "\n".join(parts)


def accelerate(
    pipe: Any,
    solver: str | None = "auto",
    steps: int | None = 8,
    *,
    kernels: bool = False,
    attention: bool = False,
    plan: Plan | str | os.PathLike[str] | None = None,
    grid: Any = None,
    end: str = "zero",
    quantize: bool = False,
    guidance: float | None = None,
    **options: Any,
) -> Accelerated:
    """Make a diffusers pipeline sample in few steps, in place; a network gets the fused kernels.

    Args:
        pipe: a diffusers pipeline; or an ``nn.Module``, a student, a sampler or a denoiser, whose network gets the
            kernels and nothing else.
        solver: a solver's name; None keeps the pipeline's own scheduler.
        steps: the number of evaluations of calls that give no ``num_inference_steps``; a number in the call
            wins. None keeps the pipeline's own default.
        kernels: put ``fastsample_kernels`` into the network.
        attention: with the kernels, ours in the place of PyTorch's attention, too (its speed is unmeasured).
        plan: a plan or its file, instead of solver and steps: a tuned one, or ``student.plan(1)`` where the
            pipeline's network is the student's.
        grid, end, quantize: as for :class:`fastsample.integrations.diffusers.PlanScheduler`.
        guidance: the guidance scale that "auto" chooses by; by default that of each call.
        options: the solver's own.

    Returns:
        A handle: print it, ``handle.plan``, ``handle.evaluations``, ``handle.undo()``.

    Raises:
        TypeError: neither a pipeline nor something with a network that is a module.
        ValueError: a scheduler that is not understood, or settings that cannot be used.
    """
    pipe = _patchable(pipe)
    if hasattr(pipe, _HANDLE):
        unaccelerate(pipe)
    if isinstance(pipe, nn.Module):
        if plan is not None:
            raise ValueError(
                "plan= is for pipelines; a network samples with a plan by fs.Sampler(denoiser, plan=...)"
            )
        handle = Accelerated(pipe)
        _patch(handle, pipe, attention)
        vars(pipe)[_HANDLE] = handle
        return handle
    scheduler: Any = getattr(pipe, "scheduler", None)
    if not hasattr(scheduler, "config") or not callable(pipe):
        raise TypeError(
            f"pipe is a {type(pipe).__name__}; give a diffusers pipeline (with a scheduler), an nn.Module, or a "
            "student or denoiser of one"
        )
    if attention and not kernels:
        raise ValueError("attention=True is one of the kernels; give kernels=True, too")
    handle = Accelerated(pipe, steps)
    network = network_of(pipe)
    if solver is not None or plan is not None:
        from .diffusers import PlanScheduler

        if plan is not None:
            table = plan if isinstance(plan, Plan) else Plan.load(plan)
            if any(row.sized for row in table.rows):
                raise ValueError(
                    f"the plan of {table.solver!r} tells the network its step, which a pipeline cannot; call the "
                    "student itself, or distil by a method without it (such as consistency)"
                )
            handle.steps = table.nfe
            chosen = PlanScheduler.from_config(scheduler.config, plan=table)
        else:
            if _scales_noise(pipe):
                options = {"skip_start": True} | options if solver == "auto" else options
            chosen = PlanScheduler.from_config(
                scheduler.config,
                solver=solver,
                grid=grid,
                end=end,
                quantize=quantize,
                guidance=1.0 if guidance is None else guidance,
                options=options or None,
            )
        if steps is not None:
            _check(chosen, handle.steps)
        pipe.scheduler = chosen
        handle._undo.append(lambda: setattr(pipe, "scheduler", scheduler))
    hook = network.register_forward_pre_hook(functools.partial(_count, handle), with_kwargs=True)
    handle._undo.append(hook.remove)
    _replace_call(handle, guidance)
    if kernels:
        _patch(handle, network, attention)
    vars(pipe)[_HANDLE] = handle
    return handle


def unaccelerate(pipe: Any) -> None:
    """Undo :func:`accelerate`.

    Raises:
        ValueError: it was not accelerated.
    """
    pipe = _patchable(pipe)
    handle = getattr(pipe, _HANDLE, None)
    if handle is None:
        raise ValueError(f"this {type(pipe).__name__} was not accelerated")
    handle.undo()


def _patchable(pipe: Any) -> Any:
    """The network of a student, a sampler or a denoiser; all else as it is."""
    denoiser = getattr(pipe, "denoiser", pipe)
    return denoiser.net if isinstance(denoiser, Denoiser) else pipe


def network_of(pipe: Any) -> nn.Module:
    """The network that a pipeline samples with.

    Raises:
        ValueError: it has none of the known names.
    """
    for name in ("unet", "transformer", "prior"):
        network = getattr(pipe, name, None)
        if isinstance(network, nn.Module):
            return network
    raise ValueError(
        f"{type(pipe).__name__} has no unet and no transformer; wrap its network by hand (fs.wrap)"
    )


def _check(scheduler: Any, steps: int | None) -> None:
    """Write a plan now, so that bad settings are refused before the first call."""
    dynamic = read(scheduler.config["source"]).dynamic_shift
    scheduler.set_timesteps(steps, **({"mu": 1.0} if dynamic else {}))
    scheduler.plan = None


def _scales_noise(pipe: Any) -> bool:
    """Whether the pipeline multiplies its noise by the scheduler's ``init_noise_sigma``.

    Then the first row of ``auto``, which only scales pure noise, can be expressed by it.
    """
    prepare = getattr(type(pipe), "prepare_latents", None)
    return prepare is not None and "init_noise_sigma" in inspect.getsource(prepare)


def _count(handle: Accelerated, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    handle.evaluations += 1
    first = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
    handle.rows += first.shape[0] if isinstance(first, Tensor) else 1


def _replace_call(handle: Accelerated, guidance: float | None) -> None:
    """Give the pipeline a subclass of its class whose call knows the default number of steps."""
    pipe = handle.pipe
    original = type(pipe)
    signature = inspect.signature(original.__call__)
    scale = "true_cfg_scale" if "true_cfg_scale" in signature.parameters else "guidance_scale"

    @functools.wraps(original.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        own = {"num_inference_steps", "timesteps", "sigmas"} & given.keys()
        if handle.steps is not None and not own and "num_inference_steps" in signature.parameters:
            kwargs["num_inference_steps"] = handle.steps
        if guidance is None and scale in signature.parameters and hasattr(self.scheduler, "guidance"):
            default = signature.parameters[scale].default
            value = given.get(scale, default)
            self.scheduler.guidance = float(value) if isinstance(value, (int, float)) else 1.0
        handle.evaluations = handle.rows = 0
        return original.__call__(self, *args, **kwargs)

    pipe.__class__ = type(
        original.__name__,
        (original,),
        {"__call__": call, "__module__": original.__module__, "__doc__": original.__doc__},
    )
    handle._undo.append(lambda: setattr(pipe, "__class__", original))


def _patch(handle: Accelerated, network: nn.Module, attention: bool) -> None:
    import fastsample_kernels

    handle.kernels = fastsample_kernels.patch(network, attention=attention)
    # No lambda: copies and pickles of a network take their handle along, with this network become theirs.
    handle._undo.append(functools.partial(fastsample_kernels.unpatch, network))


def _decode(vae: Any, latents: Tensor) -> Tensor:
    """Images in [-1, 1] of latents, a few at a time: the decoder takes far more memory a sample than the network."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scaled = (latents / vae.config.scaling_factor + shift).to(vae.dtype)
    with torch.no_grad():
        images = torch.cat([vae.decode(part, return_dict=False)[0] for part in scaled.split(_DECODED)])
    return images.float().clamp(-1, 1)


def _encode(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """The conditions of a Stable Diffusion 1.x or 2.x network."""
    with torch.no_grad():
        embeds = [
            pipe.encode_prompt(prompts[i : i + _ENCODED], pipe.unet.device, 1, False)[0]
            for i in range(0, len(prompts), _ENCODED)
        ]
    return {"encoder_hidden_states": torch.cat(embeds).cpu()}


# -- a pipeline's network as a denoiser ----------------------------------------------------------------------


class Network(nn.Module):
    """A diffusers network as ``net(x, t, **conditions)``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        names = list(inspect.signature(module.forward).parameters)
        self._state, self._has_dict = names[0], "return_dict" in names

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        extra = {"return_dict": False} if self._has_dict else {}
        out = self.module(**{self._state: x}, timestep=t, **conditions, **extra)
        return out if isinstance(out, Tensor) else out[0]


def denoiser_of(pipe: Any, **settings: Any) -> Denoiser:
    """A diffusers pipeline's network with the meaning that its scheduler's config gives.

    Args:
        pipe: a pipeline with a ``unet`` or a ``transformer``. Its conditions are keywords of the sampler's
            call: ``encoder_hidden_states=...``, ``class_labels=...``.
        settings: as for :func:`fastsample.wrap`; they win over what the pipeline says. Prompts are encoded for
            Stable Diffusion 1.x and 2.x, latents decoded where the pipeline has an AutoencoderKL.

    Raises:
        ValueError: a pipeline that is not understood.
    """
    from ..denoiser import wrap

    network = network_of(pipe)
    meaning = read(pipe.scheduler.config)
    config: Mapping[str, Any] = network.config  # type: ignore[assignment]
    inner = Network(network)
    found: dict[str, Any] = {}
    if meaning.flow:
        found["time_input"] = "t" if type(network).__name__ in _TOLD_T else "1000t"
    channels, out = config.get("in_channels"), config.get("out_channels")
    if channels is not None and out == 2 * channels:
        found["learned_variance"] = True
    size = config.get("sample_size")
    if isinstance(size, int) and channels is not None and type(network).__name__ in _SQUARE:
        found["sample_shape"] = (channels, size, size)
        if type(getattr(pipe, "vae", None)).__name__ == "AutoencoderKL":
            found["decode"] = functools.partial(_decode, pipe.vae)
    if type(network).__name__ == "UNet2DConditionModel" and config.get("addition_embed_type") is None:
        found["encode"] = functools.partial(_encode, pipe)
    return wrap(inner, meaning.process, meaning.prediction, **(found | settings))
