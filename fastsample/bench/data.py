"""Image sets that the metrics compare with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsample.errors import unknown
from fastsample.metrics import FeatureExtractor, FrechetReference, Gaussian, GroupedMoments, to_uint8

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
_DIGITS = ("digits:train", "digits:heldout", "digits:all")
_EMBEDDED: dict[str, tuple[str | None, str | None]] = {
    "digits": ("digits:train", "digits:heldout"),
    "digits-mixture": ("digits:all", None),
}


@dataclass(frozen=True)
class ImageSet:
    """Images, or only the moments of their features.

    Attributes:
        name: as the user wrote it.
        shape: (C, H, W).
        n: number of images; None if unknown (moments without a count).
        sha256: digest of the content.
        source: the images in memory, their files, or the moments.
    """

    name: str
    shape: tuple[int, ...]
    n: int | None
    sha256: str
    source: Tensor | tuple[Path, ...] | Gaussian

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 ``[B, C, H, W]`` in order."""
        if isinstance(self.source, Tensor):
            yield from self.source.split(size)
        elif isinstance(self.source, tuple):
            for start in range(0, len(self.source), size):
                yield torch.stack([_read(file, self.shape) for file in self.source[start : start + size]])
        else:
            raise ValueError(f"{self.name} holds moments only, no images")

    def reference(self, extractor: FeatureExtractor, cache: Path, batch: int) -> FrechetReference:
        """Moments of the images' features, kept in ``cache`` under the hashes of extractor and images."""
        if isinstance(self.source, Gaussian):
            return FrechetReference(self.source)
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
    return _EMBEDDED.get(model, (None, None)) if isinstance(model, str) else (None, None)


def load_images(source: str, shape: tuple[int, ...]) -> ImageSet:
    """An image set by its name.

    Args:
        source: "digits:train", "digits:heldout", "digits:all", a folder of images, or an ``.npz`` with ``mu``
            and ``sigma`` (made with the same extractor).
        shape: (C, H, W) that the images must have.

    Raises:
        ValueError: unknown, empty, or of another shape.
    """
    if source in _DIGITS:
        from fastsample.zoo.data import digits

        images = to_uint8(digits(source.split(":")[1])[0])  # type: ignore[arg-type]
        if tuple(images.shape[1:]) != shape:
            raise ValueError(f"{source}: its images are {tuple(images.shape[1:])}, the model's {shape}")
        return ImageSet(
            source, shape, len(images), hashlib.sha256(images.numpy().tobytes()).hexdigest(), images
        )
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        return _moments(path, shape)
    if not path.is_dir():
        if "/" in source or path.suffix:
            raise ValueError(f"{source}: no such folder or .npz file")
        raise unknown("images", source, _DIGITS)
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
