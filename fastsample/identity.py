"""What tells one model from another: a hash of its weights, and one of its outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser
from .noise import normal

_VALUES = 64  # of each tensor, evenly spaced
_PROBE = 0xFFFFFFFD  # noise stream of the probe inputs; plans use 0 and their rows' numbers


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


def outputs_hash(denoiser: Denoiser, shape: tuple[int, ...], conditions: Mapping[str, Any]) -> str:
    """A hash of the network's outputs on three probe inputs.

    Args:
        denoiser: the model.
        shape: (B, ...) of the probes.
        conditions: for ``B`` samples.

    Raises:
        ValueError: the network answers equal inputs differently.
    """
    process, device = denoiser.process, denoiser.device
    bound = denoiser.bind(shape[0], conditions, device)
    noise = normal(shape, 0, torch.arange(shape[0], device=device), _PROBE)
    ends = torch.tensor([process.t_start, process.t_end], dtype=torch.float64)
    phi = process.phi(ends)
    inner = process.t_of_lam(-torch.tan(phi[1] + (phi[0] - phi[1]) * torch.tensor([0.3, 0.7])).log())
    digest = hashlib.sha256(process.fingerprint.encode())
    for t in (ends[0], *process.snap(inner)):
        told = denoiser.told(process.network_time(t)).to(device, denoiser.time_dtype(noise.dtype))

        def evaluate(t: Tensor = t, told: Tensor = told) -> bytes:
            x = noise * float(process.sigma(t))
            alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
            with torch.no_grad():
                out = bound(x, told.expand(shape[0]), sigma / alpha if alpha else float("inf"))
            return out.float().cpu().contiguous().numpy().tobytes()

        first = evaluate()
        if first != evaluate():
            raise ValueError(
                "the network answers the same input differently each time; switch dropout off (net.eval()) or "
                "fix its randomness"
            )
        digest.update(first)
    return digest.hexdigest()[:16]
