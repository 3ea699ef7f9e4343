"""Embedded models and data, so that everything runs offline.

==================  ====================================================================================
name                model
==================  ====================================================================================
digits              class-conditional UNet trained on scikit-learn's digits (eps, DDPM linear betas)
digits-mixture      one Gaussian for each digit, with its exact score (eps, DDPM linear betas)
==================  ====================================================================================

Both have samples of shape (1, 8, 8) in [-1, 1] and take the class as ``labels`` (0..9; 10 is the null class
of guidance: ``load("digits").guided(2.0, null={"labels": 10})``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import unknown

if TYPE_CHECKING:
    from ..denoiser import Denoiser

__all__ = ["load", "names"]


def _digits() -> Denoiser:
    import torch

    from ..denoiser import wrap
    from ..process import VP
    from .unet import UNet
    from .weights import load_weights

    tensors, config = load_weights("digits_unet")
    net = UNet(**config)
    net.load_state_dict(tensors)
    net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return wrap(net, VP.linear(), prediction="eps", sample_shape=net.sample_shape)


def _digits_mixture() -> Denoiser:
    from ..denoiser import wrap
    from ..process import VP
    from .mixture import MixtureNet, digits_mixture

    process, mixture = VP.linear(), digits_mixture()
    return wrap(MixtureNet(mixture, process), process, prediction="eps", sample_shape=mixture.sample_shape)


_MODELS: dict[str, Callable[[], Denoiser]] = {"digits": _digits, "digits-mixture": _digits_mixture}


def names() -> list[str]:
    """The embedded models' names."""
    return sorted(_MODELS)


def load(name: str) -> Denoiser:
    """An embedded model as a denoiser, on the CPU in float32 (the mixture: in the state's dtype).

    Raises:
        ValueError: unknown name (the message has the nearest one).
    """
    if name not in _MODELS:
        raise unknown("name", name, _MODELS)
    return _MODELS[name]().replace(source=name)
