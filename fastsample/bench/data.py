"""Image sets that the metrics compare with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsample.errors import unknown
from fastsample.metrics import FeatureExtractor, FrechetReference, Gaussian, GroupedMoments, to_uint8
from fastsample.zoo import MODELS

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
_NAMED = (
    "digits:train",
    "digits:heldout",
    "digits:all",
    "fashion-mnist:train",
    "fashion-mnist:heldout",
)


@dataclass(frozen=True)
class Embedded:
    """Images whose moments are embedded for one extractor; they themselves are read where they are needed.

    Attributes:
        extractor: its sha256.
        gaussian: the moments.
        read: reads the images, uint8 ``[N, C, H, W]``.
    """

    extractor: str
    gaussian: Gaussian
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class ImageSet:
    """Images, or only the moments of their features.

    Attributes:
        name: as the user wrote it.
        shape: (C, H, W).
        n: number of images; None if unknown (moments without a count).
        sha256: digest of the content.
        source: the images in memory, their files, or their moments alone.
    """

    name: str
    shape: tuple[int, ...]
    n: int | None
    sha256: str
    source: Tensor | tuple[Path, ...] | Gaussian | Embedded

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 ``[B, C, H, W]`` in order."""
        if isinstance(self.source, Tensor):
            yield from self.source.split(size)
        elif isinstance(self.source, tuple):
            for start in range(0, len(self.source), size):
                yield torch.stack([_read(file, self.shape) for file in self.source[start : start + size]])
        elif isinstance(self.source, Embedded):
            yield from self.source.read().split(size)
        else:
            raise ValueError(f"{self.name} holds moments only, no images")

    def reference(self, extractor: FeatureExtractor, cache: Path, batch: int) -> FrechetReference:
        """Moments of the images' features, kept in ``cache`` under the hashes of extractor and images."""
        if isinstance(self.source, Gaussian):
            return FrechetReference(self.source)
        if isinstance(self.source, Embedded) and self.source.extractor == extractor.sha256:
            return FrechetReference(self.source.gaussian)
        file = cache / f"{extractor.sha256[:16]}-{self.sha256[:16]}.safetensors"
        if file.exists():
            try:
                return FrechetReference(GroupedMoments.load(file).gaussian())
            except ValueError:
                file.unlink()  # damaged: made again below
        moments = GroupedMoments(extractor.dim(self.shape))
        seen = 0
        for images in self.batches(batch):
            moments.update(extractor(images), range(seen, seen + len(images)))
            seen += len(images)
        moments.save(file)
        return FrechetReference(moments.gaussian())


def embedded_data(model: Any) -> tuple[str | None, str | None]:
    """The training and the held-out images of an embedded model; None where there are none."""
    entry = MODELS.get(model) if isinstance(model, str) else None
    return (None, None) if entry is None else (entry.train, entry.heldout)


def embedded_metrics(model: Any) -> list[str]:
    """The Frechet metric that goes with an embedded model; none for others."""
    return [MODELS[model].metric] if isinstance(model, str) and model in MODELS else []


def load_images(source: str, shape: tuple[int, ...]) -> ImageSet:
    """An image set by its name.

    Args:
        source: "digits:train", "digits:heldout", "digits:all", "fashion-mnist:train", "fashion-mnist:heldout", a
            folder of images, or an ``.npz`` with ``mu`` and ``sigma`` (made with the same extractor).
        shape: (C, H, W) that the images must have.

    Raises:
        ValueError: unknown, empty, or of another shape.
    """
    if source in _NAMED:
        made = _fashion(source) if source.startswith("fashion") else _digits(source)
        if made.shape != shape:
            raise ValueError(f"{source}: its images are {made.shape}, the model's {shape}")
        return made
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        return _moments(path, shape)
    if not path.is_dir():
        if "/" in source or path.suffix:
            raise ValueError(f"{source}: no such folder or .npz file")
        raise unknown("images", source, _NAMED)
    files = tuple(sorted(f for f in path.rglob("*") if f.suffix.lower() in _SUFFIXES))
    if len(files) < 2:
        raise ValueError(
            f"{source}: at least 2 images ({', '.join(sorted(_SUFFIXES))}) are needed, found {len(files)}"
        )
    _read(files[0], shape)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)}\0".encode())
        digest.update(file.read_bytes())
    return ImageSet(source, shape, len(files), digest.hexdigest(), files)


def _digits(name: str) -> ImageSet:
    from fastsample.zoo.data import digits, images_hash

    images = to_uint8(digits(name.split(":")[1])[0])  # type: ignore[arg-type]
    return ImageSet(name, tuple(images.shape[1:]), len(images), images_hash(images), images)


def _fashion(name: str) -> ImageSet:
    from fastsample.zoo.data import FASHION_SHAPE, fashion_mnist, images_hash
    from fastsample.zoo.weights import load_weights

    split = name.split(":")[1]
    tensors, config = load_weights("fashion_moments")
    n, sha256 = config[split]["n"], config[split]["sha256"]

    def read() -> Tensor:
        images = to_uint8(fashion_mnist(split)[0])  # type: ignore[arg-type]
        if images_hash(images) != sha256:
            raise ValueError(f"{name}: the images on this disk are others than those of the embedded moments")
        return images

    gaussian = Gaussian(tensors[f"{split}.mean"], tensors[f"{split}.cov"], n)
    return ImageSet(name, FASHION_SHAPE, n, sha256, Embedded(config["extractor"], gaussian, read))


def _moments(path: Path, shape: tuple[int, ...]) -> ImageSet:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, cov = (torch.from_numpy(np.asarray(arrays[key], np.float64)) for key in ("mu", "sigma"))
    except KeyError as error:
        raise ValueError(f"{path}: the arrays mu and sigma are needed") from error
    return ImageSet(str(path), shape, None, digest, Gaussian(mean, cov))


def _read(file: Path, shape: tuple[int, ...]) -> Tensor:
    from PIL import Image

    with Image.open(file) as image:
        array = np.array(image.convert("L" if shape[0] == 1 else "RGB"))
    tensor = torch.from_numpy(array)
    tensor = tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{file}: the image is {tuple(tensor.shape)}, the model's are {shape}; resize beforehand"
        )
    return tensor
