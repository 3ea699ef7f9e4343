"""Denoisers: any callable network with the meaning of its input and output, conditions and guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .errors import unknown
from .prediction import canonical, coefficients
from .process import Process, TimeLike

TimeInput = str | Callable[[Tensor, Process], Tensor]

_TIME_INPUTS: dict[str, Callable[[Tensor, Process], Tensor]] = {
    "t": lambda t, process: t,
    "1000t": lambda t, process: 1000 * t,
    "1-t": lambda t, process: 1 - t,
    "sigma": lambda t, process: process.rho(t),
    "log_sigma": lambda t, process: -process.lam(t),
    "c_noise": lambda t, process: -process.lam(t) / 4,
    "lam": lambda t, process: process.lam(t),
}


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, ``out = null + scale (cond - null)`` (Ho & Salimans 2022, eq. 6).

    Attributes:
        scale: 1 is the conditional model alone; it then costs no second evaluation.
        null: the conditions that the unconditional evaluation sees instead; others are shared.
        interval: noise levels ``sigma / alpha`` within which guidance acts (Kynkaanniemi et al. 2024).
        rescale: ``phi`` of Lin et al. 2024 (eq. 15, 16): pulls each sample's standard deviation back.
        batched: one evaluation of a doubled batch, or two of the plain one (less memory).
    """

    scale: float
    null: Mapping[str, Any] = field(default_factory=dict)
    interval: tuple[float, float] = (0.0, float("inf"))
    rescale: float = 0.0
    batched: bool = True

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low < high:
            raise ValueError(f"interval={self.interval!r}: need 0 <= low < high, in units of sigma/alpha")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale={self.rescale!r} must lie in [0, 1]")
        if self.scale != 1 and not self.null:
            raise ValueError(
                f"guidance scale={self.scale!r} needs null={{...}}: the conditions of the unconditional "
                'evaluation, for instance null={"labels": 10}'
            )

    def acts(self, rho: float) -> bool:
        """Whether guidance acts at the noise level ``rho = sigma / alpha``."""
        return self.scale != 1 and self.interval[0] <= rho <= self.interval[1]


def _is_per_sample(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch


def select(conditions: Any, samples: slice, total: int) -> Any:
    """The part of nested conditions that belongs to some samples; shared values are kept whole."""

    def is_prompts(value: Any) -> bool:
        return isinstance(value, list) and len(value) == total and all(isinstance(v, str) for v in value)

    def part(value: Any) -> Any:
        return value[samples] if _is_per_sample(value, total) or is_prompts(value) else value

    return tree_map(part, conditions, is_leaf=is_prompts)


def as_conditions(
    conditions: Mapping[str, Any], device: torch.device, total: int | None = None
) -> dict[str, Any]:
    """Conditions as the network gets them: arrays become tensors on its device, the structure stays.

    Args:
        conditions: by name, of any nesting.
        device: where the network is.
        total: the number of samples of the whole call; flat lists of so many numbers become tensors too.
    """

    def is_labels(value: Any) -> bool:
        return isinstance(value, list) and len(value) == total and all(map(_is_number, value))

    def convert(value: Any) -> Any:
        if isinstance(value, np.ndarray) or is_labels(value):
            value = torch.as_tensor(value)
        return value.to(device) if isinstance(value, Tensor) else value

    return {key: tree_map(convert, value, is_leaf=is_labels) for key, value in conditions.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.generic))


def _matched(cond: Any, null: Any, batch: int, device: torch.device) -> tuple[Any, Any]:
    """Both with one value for each sample wherever either has, so that they can be stacked."""
    if _is_number(cond) and _is_number(null):  # one label for all
        return torch.full((batch,), cond, device=device), torch.full((batch,), null, device=device)
    a, spec = tree_flatten(cond)
    b, other = tree_flatten(null)
    if spec != other:
        return cond, null
    for i, (c, u) in enumerate(zip(a, b, strict=True)):
        if _is_per_sample(c, batch):
            b[i] = _spread(u, c)
        elif _is_per_sample(u, batch):
            a[i] = _spread(c, u)
        elif isinstance(c, Tensor) and isinstance(u, Tensor) and c.shape == u.shape and c.shape[:1] == (1,):
            a[i], b[i] = (v.expand(batch, *v.shape[1:]) for v in (c, u))
    return tree_unflatten(a, spec), tree_unflatten(b, spec)


def _doubled(cond: Any, null: Any, batch: int) -> Any:
    """Null and conditional values stacked along the batch, or None where they cannot be."""
    a, spec_a = tree_flatten(null)
    b, spec_b = tree_flatten(cond)
    if spec_a != spec_b:
        return None
    leaves = []
    for u, c in zip(a, b, strict=True):
        if _is_per_sample(c, batch) and _is_per_sample(u, batch) and c.shape == u.shape:
            leaves.append(torch.cat([u, c]))
        elif u is c or (not isinstance(u, Tensor) and not isinstance(c, Tensor) and u == c):
            leaves.append(c)
        else:
            return None
    return tree_unflatten(leaves, spec_b)


def _spread(value: Any, like: Tensor) -> Any:
    """A number or a single sample's value, repeated for the batch; other shapes stay."""
    if isinstance(value, (int, float)):
        return torch.full_like(like, value)
    if isinstance(value, Tensor) and value.shape in (like.shape, like.shape[1:], (1, *like.shape[1:])):
        return value.to(like).expand_as(like)
    return value


@dataclass(frozen=True)
class Denoiser:
    """A network with its meaning; made by :func:`wrap`.

    Attributes:
        net: ``net(x, t, **conditions) -> tensor`` (or an object with ``.sample``, or a tuple that starts so).
        process: the noise process.
        prediction: what the output means.
        guidance: classifier-free guidance, or None.
        time_input: what the network is told of the time.
        learned_variance: whether the second half of the output's channels is a variance, which is dropped.
        dtype: the network's own precision; None hands the state over as it is.
        conditions: conditions that every call has (a call's own ones override them).
        sample_shape: the shape of one sample, where the model knows it.
        source: where it came from, for the record: an embedded model's name, or the settings that make it.
        encode: for text-to-image models, ``encode(prompts) -> conditions`` with a row for each prompt.
        decode: for latent models, ``decode(samples) -> images`` in [-1, 1].
    """

    net: Callable[..., Any]
    process: Process
    prediction: str
    guidance: Guidance | None = None
    time_input: TimeInput = "t"
    learned_variance: bool = False
    dtype: torch.dtype | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)
    sample_shape: tuple[int, ...] | None = None
    source: Any = None
    encode: Callable[[list[str]], Mapping[str, Any]] | None = None
    decode: Callable[[Tensor], Tensor] | None = None

    def replace(self, **changes: Any) -> Denoiser:
        """A copy with other settings."""
        return dataclasses.replace(self, **changes)

    def guided(self, scale: float, **settings: Any) -> Denoiser:
        """The same model under classifier-free guidance; settings as in :class:`Guidance`, others stay."""
        if self.guidance is None:
            return self.replace(guidance=Guidance(scale, **settings))
        return self.replace(guidance=dataclasses.replace(self.guidance, scale=scale, **settings))

    @property
    def device(self) -> torch.device:
        """The device of the network's parameters; the CPU when it has none."""
        if isinstance(self.net, torch.nn.Module):
            for tensor in (*self.net.parameters(), *self.net.buffers()):
                return tensor.device
        return torch.device("cpu")

    def told(self, t: Tensor) -> Tensor:
        """What the network is told at time ``t`` (float64 in and out)."""
        function = _TIME_INPUTS[self.time_input] if isinstance(self.time_input, str) else self.time_input
        told = function(t, self.process)
        if not isinstance(told, Tensor) or told.shape != t.shape:
            got = tuple(told.shape) if isinstance(told, Tensor) else type(told).__name__
            raise ValueError(f"time_input={function!r} gave {got} for times of shape {tuple(t.shape)}")
        return told

    def time_dtype(self, state: torch.dtype) -> torch.dtype:
        """The dtype of the network's time: integers for networks with a table, else that of the state."""
        levels = self.process.levels
        if levels is not None and self.time_input == "t" and bool((levels == levels.round()).all()):
            return torch.int64
        return (
            torch.float64 if state == torch.float64 and self.dtype in (None, torch.float64) else torch.float32
        )

    def bind(self, batch: int, conditions: Mapping[str, Any], device: torch.device) -> Bound:
        """The network with its conditions in place, for a batch of that size."""
        return Bound(self, batch, conditions, device)

    def __call__(self, x: Tensor, t: TimeLike, **conditions: Any) -> Tensor:
        """The predicted clean sample of ``x`` (B, ...) at time ``t`` (a number).

        Where the network knows only some times, ``t`` is moved to the nearest of them.
        """
        time = self.process.snap(t)
        if time.ndim:
            raise ValueError(f"t has shape {tuple(time.shape)}; give one number for the whole batch")
        alpha, sigma = self.process.alpha(time), self.process.sigma(time)
        p, q = coefficients(self.prediction, alpha, sigma, "x0")
        told = self.told(self.process.network_time(time))
        told = told.to(x.device, self.time_dtype(x.dtype)).expand(x.shape[0])
        bound = self.bind(x.shape[0], as_conditions(conditions, x.device, x.shape[0]), x.device)
        return float(p) * x + float(q) * bound(x, told, float(sigma / alpha))


class Bound:
    """A denoiser with its conditions prepared once, so that a step costs nothing but the network."""

    def __init__(
        self, denoiser: Denoiser, batch: int, conditions: Mapping[str, Any], device: torch.device
    ) -> None:
        self.denoiser, self.batch = denoiser, batch
        self.rows_per_sample = 0  # network rows so far, for each sample
        self.evaluations = 0
        self.cond = as_conditions({**denoiser.conditions, **conditions}, device)
        self.null: dict[str, Any] | None = None
        self.both: dict[str, Any] | None = None
        guidance = denoiser.guidance
        if guidance is None or guidance.scale == 1:
            return
        self.null = dict(self.cond)
        for key, null in as_conditions(guidance.null, device).items():
            if key not in self.cond:
                raise ValueError(
                    f"guidance has null={key!r} but the call has no condition {key!r}; pass {key}=..., or "
                    "use guidance=None for unconditional samples"
                )
            self.cond[key], self.null[key] = _matched(self.cond[key], null, batch, device)
        if guidance.batched:
            self.both = _doubled(self.cond, self.null, batch)
            if self.both is None:
                raise ValueError(
                    "the conditions and guidance.null cannot be stacked into one doubled batch (their shapes "
                    "or structures differ); use Guidance(..., batched=False)"
                )

    def _call(self, x: Tensor, t: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        denoiser = self.denoiser
        given = x if denoiser.dtype is None else x.to(denoiser.dtype)
        out = denoiser.net(given, t, **conditions)
        if not isinstance(out, Tensor):
            out = out.sample if hasattr(out, "sample") else out[0] if isinstance(out, (tuple, list)) else out
            if not isinstance(out, Tensor):
                raise TypeError(f"the network returned {type(out).__name__}; expected a tensor")
        if denoiser.learned_variance:
            out = out[:, : x.shape[1]]
        if out.shape != x.shape:
            doubled = out.ndim == x.ndim and out.ndim > 1 and out.shape[1] == 2 * x.shape[1]
            remedy = "wrap it with learned_variance=True" if doubled else "check sample_shape and the network"
            raise ValueError(
                f"the network returned shape {tuple(out.shape)} for an input of {tuple(x.shape)}; {remedy}"
            )
        return out

    def __call__(self, x: Tensor, t: Tensor, rho: float, step: Tensor | None = None) -> Tensor:
        """The network's (guided) output.

        Args:
            x: state (B, ...).
            t: (B,), what the network is told.
            rho: the noise level ``sigma / alpha``, for the guidance interval.
            step: (B,), a step size also told to the network as ``step``.
        """
        extra = {} if step is None else {"step": step}
        guidance = self.denoiser.guidance
        self.evaluations += 1
        if guidance is None or self.null is None or not guidance.acts(rho):
            self.rows_per_sample += 1
            return self._call(x, t, {**self.cond, **extra})
        self.rows_per_sample += 2
        # In the state's precision: the difference is amplified. The null output is used before the network is
        # called again, since a network may overwrite its output.
        if self.both is not None:
            if step is not None:
                extra = {"step": torch.cat([step, step])}
            both = self._call(torch.cat([x, x]), torch.cat([t, t]), {**self.both, **extra})
            null, cond = both.to(x.dtype).chunk(2)
            out = (1 - guidance.scale) * null
        else:
            out = (1 - guidance.scale) * self._call(x, t, {**self.null, **extra}).to(x.dtype)
            cond = self._call(x, t, {**self.cond, **extra}).to(x.dtype)
        out = out + guidance.scale * cond
        if guidance.rescale:
            dims = tuple(range(1, out.ndim))
            ratio = cond.std(dim=dims, keepdim=True) / out.std(dim=dims, keepdim=True)
            out = torch.lerp(out, out * ratio, guidance.rescale)
        return out


def wrap(
    net: Any,
    process: Process | None = None,
    prediction: str = "eps",
    *,
    guidance: Guidance | None = None,
    time_input: TimeInput = "t",
    quantize: bool | TimeLike = False,
    learned_variance: bool = False,
    dtype: torch.dtype | None = None,
    conditions: Mapping[str, Any] | None = None,
    sample_shape: tuple[int, ...] | None = None,
    encode: Callable[[list[str]], Mapping[str, Any]] | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Denoiser:
    """Give a network its meaning.

    Args:
        net: any callable ``net(x, t, **conditions)`` with ``x`` (B, ...) and ``t`` (B,); or a diffusers
            pipeline, alone, whose scheduler's config says the rest.
        process: the noise process that it was trained on, such as ``fs.VP.linear()``.
        prediction: "eps", "x0", "v", "flow" or "score".
        guidance: classifier-free guidance.
        time_input: what the network is told: "t" (the process's own units, the default), "1000t", "1-t",
            "sigma" (sigma/alpha), "log_sigma", "c_noise" (log sigma / 4), "lam" (half log-SNR), or a
            function ``(t, process) -> time`` on float64 tensors.
        quantize: for networks with a table of times: True for the integers 0..N-1 of a discrete process, or
            the times themselves. The solver's sigma is snapped too.
        learned_variance: drop the second half of the output's channels.
        dtype: the network's precision; by default that of its parameters. The state stays float32 or wider.
        conditions: conditions common to all calls.
        sample_shape: the shape of one sample, so that ``sampler(n=16)`` works.
        encode: for text-to-image models, ``encode(prompts) -> conditions`` with a row for each prompt; the
            harness asks for it.
        decode: for latent models, ``decode(samples) -> images`` in [-1, 1]; samplers leave samples as they are, the
            harness measures images.

    Raises:
        TypeError, ValueError: an argument that cannot be used; the message names it.
    """
    if process is None and hasattr(net, "scheduler"):
        from .integrations.pipelines import denoiser_of

        given = {
            "guidance": guidance,
            "learned_variance": learned_variance or None,
            "dtype": dtype,
            "conditions": conditions,
            "sample_shape": sample_shape,
            "quantize": quantize or None,
            "time_input": None if time_input == "t" else time_input,
            "encode": encode,
            "decode": decode,
        }
        return denoiser_of(net, **{k: v for k, v in given.items() if v is not None})
    if not callable(net):
        raise TypeError(
            f"net={net!r} is not callable; give a torch.nn.Module or a function net(x, t, **conditions)"
        )
    if not isinstance(process, Process):
        raise TypeError(f"process={process!r} must be a noise process such as fs.VP.linear() or fs.Flow()")
    if isinstance(time_input, str) and time_input not in _TIME_INPUTS:
        raise unknown("time_input", time_input, _TIME_INPUTS)
    if quantize is True:
        if process.t_start != round(process.t_start) or process.t_zero != -1:
            raise ValueError(
                f"quantize=True needs a process with integer times, not {process!r}; give the times that the "
                "network knows: quantize=[...]"
            )
        process = process.quantized(torch.arange(int(process.t_start) + 1))
    elif quantize is not False:
        process = process.quantized(quantize)
    if dtype is None and isinstance(net, torch.nn.Module):
        dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), None)
    return Denoiser(
        net,
        process,
        canonical(prediction),
        guidance=guidance,
        time_input=time_input,
        learned_variance=learned_variance,
        dtype=dtype,
        conditions=dict(conditions or {}),
        sample_shape=None if sample_shape is None else tuple(sample_shape),
        encode=encode,
        decode=decode,
    )
