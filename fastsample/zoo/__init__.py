"""Embedded models and data, so that everything runs offline.

==================  ====================================================================================
name                model
==================  ====================================================================================
digits              class-conditional UNet trained on scikit-learn's digits (eps, DDPM linear betas)
digits-mixture      one Gaussian for each digit, with its exact score (eps, DDPM linear betas)
fashion-mnist       class-conditional UNet trained on Fashion-MNIST (velocity of a straight flow)
==================  ====================================================================================

Samples are of shape (1, 8, 8), of ``fashion-mnist`` (1, 28, 28), in [-1, 1]; all take the class as ``labels`` (0..9;
10 is the null class of guidance: ``load("digits").guided(2.0, null={"labels": 10})``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import unknown

if TYPE_CHECKING:
    from ..denoiser import Denoiser
    from ..process import Process

__all__ = ["MODELS", "Entry", "load", "names"]


def _network(weights: str, process: Process, prediction: str) -> Denoiser:
    import torch

    from ..denoiser import wrap
    from .unet import UNet
    from .weights import load_weights

    tensors, config = load_weights(weights)
    net = UNet(**config)
    net.load_state_dict(tensors)
    net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return wrap(net, process, prediction=prediction, sample_shape=net.sample_shape)


def _digits() -> Denoiser:
    from ..process import VP

    return _network("digits_unet", VP.linear(), "eps")


def _fashion_mnist() -> Denoiser:
    from ..process import Flow

    return _network("fashion_unet", Flow(), "flow")


def _digits_mixture() -> Denoiser:
    from ..denoiser import wrap
    from ..process import VP
    from .mixture import MixtureNet, digits_mixture

    process, mixture = VP.linear(), digits_mixture()
    return wrap(MixtureNet(mixture, process), process, prediction="eps", sample_shape=mixture.sample_shape)


@dataclass(frozen=True)
class Entry:
    """An embedded model and what goes with it.

    Attributes:
        make: the model.
        data: what it was trained on, by name for ``fastsample distill data=``.
        train, heldout: image sets to compare with, by name for ``fastsample bench train= heldout=``.
        metric: the Frechet distance with the extractor that was made for these images.
    """

    make: Callable[[], Denoiser]
    data: str
    train: str
    heldout: str | None
    metric: str


MODELS = {
    "digits": Entry(_digits, "digits", "digits:train", "digits:heldout", "fd-digits"),
    "digits-mixture": Entry(_digits_mixture, "digits", "digits:all", None, "fd-digits"),
    "fashion-mnist": Entry(
        _fashion_mnist, "fashion-mnist", "fashion-mnist:train", "fashion-mnist:heldout", "fd-fashion-mnist"
    ),
}


def names() -> list[str]:
    """The embedded models' names."""
    return sorted(MODELS)


def load(name: str) -> Denoiser:
    """An embedded model as a denoiser, on the CPU in float32 (the mixture: in the state's dtype).

    Raises:
        ValueError: unknown name (the message has the nearest one).
    """
    if name not in MODELS:
        raise unknown("name", name, MODELS)
    return MODELS[name].make().replace(source=name)
