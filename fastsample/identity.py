"""What tells one model from another: a hash of its weights, and its outputs on probe inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser
from .noise import normal

_VALUES = 64  # of each tensor, evenly spaced
_PROBE = 0xFFFFFFFD  # noise stream of the probe inputs; plans use 0 and their rows' numbers
_PROJECTION = 0xFFFFFFFC  # and of the directions their outputs are projected on
_DIRECTIONS = 8
# of the outputs' size
_TOLERANCE: dict[torch.dtype | None, float] = {torch.float16: 5e-3, torch.bfloat16: 2e-2}
_TOLERANCE_FLOAT = 1e-3  # what a TensorFloat-32 product is off by


def weights_hash(denoiser: Denoiser) -> str | None:
    """A hash of the network's weights (shapes and evenly spaced values, in their order); None if it is no module.

    Names do not count: a wrapper around a network changes them.
    """
    if not isinstance(denoiser.net, torch.nn.Module):
        return None
    digest = hashlib.sha256()
    for tensor in denoiser.net.state_dict().values():
        digest.update(str(tuple(tensor.shape)).encode())
        if tensor.numel():
            at = torch.linspace(0, tensor.numel() - 1, _VALUES).round().long().to(tensor.device)
            digest.update(tensor.detach().flatten()[at].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Probe:
    """What a model is known by, whatever machine and number of threads it runs on.

    Attributes:
        exact: a hash of the weights, process, prediction type and guidance: what has the same bits everywhere.
        outputs: of three probe inputs, the outputs' size (root mean square) and projections on random directions.
        tolerance: how far outputs may be off, as a share of their size: other kernels add in another order.
    """

    exact: str
    outputs: tuple[tuple[float, ...], ...]
    tolerance: float

    def differs(self, other: Probe) -> str | None:
        """What is different in ``other``, in words; None for the same model."""
        if self.exact != other.exact:
            return "its weights, process, prediction type or guidance are others"
        if [len(v) for v in self.outputs] != [len(v) for v in other.outputs]:
            return "its outputs are others"
        limit = max(self.tolerance, other.tolerance)
        for mine, theirs in zip(self.outputs, other.outputs, strict=True):
            size = max(mine[0], theirs[0])
            off = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
            if not off <= limit * size:
                return f"its outputs are others: off by {off / size:.2g} of their size, over {limit:.2g}"
        return None

    @property
    def digest(self) -> str:
        """A name for this model, of the exact numbers."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; :meth:`from_dict` is the inverse."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Probe:
        """The inverse of :meth:`to_dict`."""
        outputs = tuple(tuple(float(v) for v in row) for row in values["outputs"])
        return cls(str(values["exact"]), outputs, float(values["tolerance"]))


def probe(denoiser: Denoiser, shape: tuple[int, ...], conditions: Mapping[str, Any]) -> Probe:
    """What ``denoiser`` is known by.

    Args:
        denoiser: the model.
        shape: (B, ...) of the probes.
        conditions: for ``B`` samples.

    Raises:
        ValueError: the network answers equal inputs differently.
    """
    process, device = denoiser.process, denoiser.device
    guidance = {} if denoiser.guidance is None else dict(vars(denoiser.guidance))
    # the null conditions are seen in the outputs, and how two evaluations are batched changes nothing
    guidance = {k: v for k, v in guidance.items() if k not in ("null", "batched")}
    parts = f"{weights_hash(denoiser)} {process.fingerprint} {denoiser.prediction} {guidance}"
    bound = denoiser.bind(shape[0], conditions, device)
    noise = normal(shape, 0, torch.arange(shape[0], device=device), _PROBE)
    ends = torch.tensor([process.t_start, process.t_end], dtype=torch.float64)
    phi = process.phi(ends)
    inner = process.t_of_lam(-torch.tan(phi[1] + (phi[0] - phi[1]) * torch.tensor([0.3, 0.7])).log())
    outputs = []
    for t in (ends[0], *process.snap(inner)):
        told = denoiser.told(process.network_time(t)).to(device, denoiser.time_dtype(noise.dtype))

        def evaluate(t: Tensor = t, told: Tensor = told) -> Tensor:
            x = noise * float(process.sigma(t))
            alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
            with torch.no_grad():
                return bound(x, told.expand(shape[0]), sigma / alpha if alpha else float("inf"))

        out = evaluate()
        if not torch.equal(out, evaluate()):
            raise ValueError(
                "the network answers the same input differently each time; switch dropout off (net.eval()) or "
                "fix its randomness"
            )
        outputs.append(_projections(out.double().cpu()))
    exact = hashlib.sha256(parts.encode()).hexdigest()[:16]
    return Probe(exact, tuple(outputs), _TOLERANCE.get(denoiser.dtype, _TOLERANCE_FLOAT))


def _projections(out: Tensor) -> tuple[float, ...]:
    """The size of ``out`` (B, ...) and its projections on random directions, each of that size on average."""
    index = torch.arange(_DIRECTIONS * len(out))
    directions = normal((len(index), *out.shape[1:]), 0, index, _PROJECTION, dtype=torch.float64)
    values = directions.reshape(_DIRECTIONS, -1) @ out.flatten() / out.numel() ** 0.5
    return float(out.square().mean().sqrt()), *values.tolist()
