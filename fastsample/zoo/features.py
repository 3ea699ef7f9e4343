"""Small feature extractors, the eyes of the Fréchet distances ``fd-digits`` and ``fd-fashion-mnist``.

Each is a classifier trained on the "train" split; its features are the last hidden layer before the non-linearity,
each with zero mean and unit variance over the training images. There are so few of them that both splits have
at least 24 images a feature, below which the distance's jackknife error is unreliable.
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import FASHION_SHAPE, NUM_CLASSES, SAMPLE_SHAPE
from .weights import load_weights

NAME = "fd-digits"
NUM_FEATURES = 24
# name in torch-fidelity's registry -> weights file, shape of the images
EXTRACTORS = {
    NAME: ("digits_features", SAMPLE_SHAPE),
    "fd-fashion-mnist": ("fashion_features", FASHION_SHAPE),
}


class Classifier(nn.Module):
    """Convolutions, a layer of standardised features, a linear classifier.

    Args:
        channels: of the first two convolutions.
        num_features: of the last hidden layer.
        dropout: before it.
        image_size: height and width of the images.
        levels: further convolutions, each with twice the channels and half the size.
    """

    def __init__(
        self,
        channels: int = 32,
        num_features: int = NUM_FEATURES,
        dropout: float = 0.3,
        image_size: int = SAMPLE_SHAPE[-1],
        levels: int = 1,
    ) -> None:
        super().__init__()

        def convolution(a: int, b: int, stride: int = 1) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, stride=stride, padding=1), nn.BatchNorm2d(b), nn.GELU()]

        widths = [channels * 2**i for i in range(levels + 1)]
        size = image_size // 2**levels
        self.body = nn.Sequential(
            *convolution(1, channels),
            *convolution(channels, channels),
            *(m for a, b in itertools.pairwise(widths) for m in convolution(a, b, 2)),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(widths[-1] * size**2, num_features),
            nn.BatchNorm1d(num_features, affine=False),
        )
        self.classifier = nn.Linear(num_features, NUM_CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Images in [-1, 1] ``[B, 1, H, W]`` -> features ``[B, num_features]``."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits ``[B, 10]``."""
        return self.classifier(F.gelu(self.features(x)))


def to_unit_range(images: Tensor, shape: tuple[int, ...] = SAMPLE_SHAPE) -> Tensor:
    """Images as they would be read back from 8-bit files: float32 ``[N, *shape]`` in [-1, 1].

    Args:
        images: uint8 ``[N, C, H, W]`` with C = 1 or 3 (the mean of three is taken), or floats in [-1, 1]
            ``[N, 1, H, W]``, which are clipped and rounded to 8 bits.
        shape: (1, H, W) that the images must have.

    Raises:
        ValueError: another shape.
        TypeError: another dtype.
    """
    if images.ndim != 4 or images.shape[2:] != shape[1:]:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected [N, C, {shape[1]}, {shape[2]}]")
    if images.dtype == torch.uint8:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"uint8 images have {images.shape[1]} channels; expected 1 or 3")
        return images.to(torch.float32).mean(dim=1, keepdim=True) / 127.5 - 1
    if not images.is_floating_point():
        raise TypeError(f"images have dtype {images.dtype}; expected uint8, or floats in [-1, 1]")
    if images.shape[1] != 1:
        raise ValueError(f"float images have {images.shape[1]} channels; expected 1")
    return ((images.to(torch.float32).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def read_classifier(name: str = NAME) -> Classifier:
    """A trained classifier by its extractor's name, in evaluation mode on the CPU."""
    tensors, config = load_weights(EXTRACTORS[name][0])
    net = Classifier(**config)
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)


@functools.cache
def classifier(name: str = NAME) -> Classifier:
    """As :func:`read_classifier`, read once and shared."""
    return read_classifier(name)


def features(images: Tensor, batch_size: int = 1024, name: str = NAME) -> Tensor:
    """Features of the images for the Fréchet distance.

    Args:
        images: as in :func:`to_unit_range`; on any device.
        batch_size: images at a time.
        name: of the extractor, which decides the images' shape.

    Returns:
        Features, float64 ``[N, d]`` on the CPU.

    Raises:
        ValueError, TypeError: images of another shape or dtype.
    """
    net, shape = classifier(name), EXTRACTORS[name][1]
    return torch.cat([net.features(to_unit_range(x.cpu(), shape)).double() for x in images.split(batch_size)])


def logits(images: Tensor, name: str = NAME) -> Tensor:
    """Class logits, float32 ``[N, 10]`` on the CPU; images as in :func:`to_unit_range`."""
    return classifier(name)(to_unit_range(images.cpu(), EXTRACTORS[name][1]))


def register_with_torch_fidelity() -> list[str]:
    """Make the extractors known to torch-fidelity, once however often it is called.

    Returns:
        The names for ``torch_fidelity.calculate_metrics(feature_extractor=...)``; each is its one layer's too.
    """
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

    for name in EXTRACTORS:
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            register_feature_extractor(name, _extractor(name))
    return list(EXTRACTORS)


def _extractor(own: str) -> type:
    """The class that torch-fidelity takes."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    shape = EXTRACTORS[own][1]

    class FeatureExtractor(FeatureExtractorBase):
        """A classifier's features, float32, for uint8 images ``[B, 3, H, W]``."""

        def __init__(self, name: str, features_list: list[str], **kwargs: object) -> None:
            super().__init__(name, features_list)
            self.net = read_classifier(own)  # its own copy: torch-fidelity may move it to a GPU

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            if x.dtype != torch.uint8 or x.shape[1:] != (3, *shape[1:]):
                raise ValueError(
                    f"expected uint8 images [B, 3, {shape[1]}, {shape[2]}], got {x.dtype} {tuple(x.shape)}"
                )
            return (self.net.features(to_unit_range(x, shape)),)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return (own,)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return own

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            return torch.zeros(1, 3, *shape[1:], dtype=torch.uint8)

    return FeatureExtractor
