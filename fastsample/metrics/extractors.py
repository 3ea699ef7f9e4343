"""Metric names and the feature extractors behind them.

A Fréchet metric's name says which features and how many samples: ``fid-50k`` (torch-fidelity's Inception, the
only one called FID), ``fd-digits-2k``, or ``fd-NAME-N`` with any NAME registered with torch-fidelity
(``torch_fidelity.register_feature_extractor``). Every extractor sees uint8 RGB images; features leave as
float64.
"""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsample.errors import unknown
from fastsample.metrics import dinov2

__all__ = ["FeatureExtractor", "MetricName", "metric_name", "metric_names", "parse_metric", "to_uint8"]

_INCEPTION = "inception-v3-compat"
_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_SHA256_PREFIX = "6726825d"  # torch.hub's convention: the file's name carries it
_DOWNLOAD_TIMEOUT_S = 20.0


def to_uint8(images: Tensor) -> Tensor:
    """Quantise images in [-1, 1] to uint8 by ``clamp(127.5 x + 128)``, truncated (the convention of EDM)."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class MetricName:
    """A metric name taken apart.

    Attributes:
        base: name without the number of samples, ``"fid"`` or ``"fd-digits"``.
        extractor: the extractor's name in torch-fidelity's registry.
        n: number of samples if the name carries it.
    """

    base: str
    extractor: str
    n: int | None = None

    def with_n(self, n: int) -> str:
        """The full name, which carries the number of samples.

        Raises:
            ValueError: if the name already carries another number.
        """
        if self.n is not None and self.n != n:
            raise ValueError(
                f"metrics: {metric_name(self.base, self.n)!r} asks for {self.n} samples but n={n}; "
                f"write {self.base!r}, or n={self.n}"
            )
        return metric_name(self.base, n)


def metric_name(base: str, n: int) -> str:
    """``metric_name("fid", 50_000) == "fid-50k"``; thousands are abbreviated where that is exact."""
    return f"{base}-{n // 1000}k" if n % 1000 == 0 and n else f"{base}-{n}"


def metric_names() -> list[str]:
    """Base names of the Fréchet metrics that can be asked for here."""
    return sorted(frechet_metrics())


def parse_metric(name: str) -> MetricName:
    """Resolve a metric's name.

    Args:
        name: a base name (see ``metric_names``), with or without the number of samples (``-2048``, ``-2k``).

    Raises:
        ValueError: if there is no such metric (the nearest name is given).
    """
    bases = frechet_metrics()
    base, n = split_name(name, bases)
    return MetricName(base, bases[base], n)


def split_name(name: str, bases: Mapping[str, Any]) -> tuple[str, int | None]:
    """A metric's name without its number of samples, and that number.

    Raises:
        ValueError: if ``bases`` has no such name (the nearest is given).
    """
    if name in bases:
        return name, None
    match = re.fullmatch(r"(.+)-([1-9]\d*)(k?)", name)
    if match and match[1] in bases:
        return match[1], int(match[2]) * (1000 if match[3] else 1)
    raise unknown("metrics", name, bases)


def frechet_metrics() -> dict[str, str]:
    """The extractor's name in torch-fidelity's registry for each Fréchet metric."""
    return _bases()


def _bases() -> dict[str, str]:
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    from fastsample.zoo.features import register_with_torch_fidelity

    register_with_torch_fidelity()
    bases = {"fid": _INCEPTION}
    for name in FEATURE_EXTRACTORS_REGISTRY:
        if name != _INCEPTION:
            bases[name if name.startswith("fd-") else f"fd-{name}"] = name
    return bases


class FeatureExtractor:
    """Images in, float64 features out.

    Args:
        name: the extractor's name in torch-fidelity's registry.
        device: where it runs.
        weights: file with its weights (dinov2-*: folder, see :mod:`fastsample.metrics.dinov2`); None takes the
            extractor's own (cached or downloaded once).

    Attributes:
        sha256: digest of the extractor's name and weights.

    Raises:
        FileNotFoundError: if the weights cannot be had; the message says where to put them.
        ValueError: if the weights file is not the one expected.
    """

    def __init__(
        self, name: str, *, device: torch.device | str = "cpu", weights: str | os.PathLike[str] | None = None
    ) -> None:
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

        from fastsample.zoo.features import register_with_torch_fidelity

        register_with_torch_fidelity()
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            raise unknown("name", name, FEATURE_EXTRACTORS_REGISTRY)
        cls = FEATURE_EXTRACTORS_REGISTRY[name]
        layer = cls.get_default_feature_layer_for_metric("fid")
        options: dict[str, Any] = {}
        if name == _INCEPTION:
            options["feature_extractor_weights_path"] = os.fspath(_inception_weights(weights))
        elif weights is not None and not name.startswith(dinov2.PREFIX):
            if not Path(weights).is_file():
                raise FileNotFoundError(
                    f"weights: {weights} does not exist; give the file of {name}'s weights"
                )
            options["feature_extractor_weights_path"] = os.fspath(weights)
        try:
            if name.startswith(dinov2.PREFIX):
                module = dinov2.load(name, [layer], weights)
            else:
                module = cls(name, [layer], **options)
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            raise FileNotFoundError(
                f"the weights of {name} are not here and could not be downloaded ({error}); "
                f"give a local copy with weights=FILE (weights.{name}=FILE on the command line)"
            ) from error
        self.name = name
        self.device = torch.device(device)
        self._module = module.requires_grad_(False).eval().to(self.device)
        digest = hashlib.sha256(f"{name}/{layer}".encode())
        for key, tensor in sorted(self._module.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.sha256 = digest.hexdigest()

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of uint8 images.

        Args:
            images: uint8 ``[B, C, H, W]`` with C = 3, or C = 1 (repeated to RGB).

        Returns:
            float64 ``[B, d]`` on the extractor's device.

        Raises:
            ValueError: on another dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"images: uint8 [B, 1 or 3, H, W] is needed, got {images.dtype} {tuple(images.shape)}; "
                "see metrics.to_uint8"
            )
        (features,) = self._module(images.to(self.device).expand(-1, 3, -1, -1).contiguous())
        return features.flatten(1).to(torch.float64)

    @torch.inference_mode()
    def logits(self, features: Tensor) -> Tensor:
        """Class logits without bias, what the Inception score is made of, from the features of Inception.

        Args:
            features: ``[B, 2048]``, as the call returns them.

        Returns:
            float64 ``[B, 1008]``.

        Raises:
            ValueError: of another extractor.
        """
        if self.name != _INCEPTION:
            raise ValueError(f"{self.name} has no logits; the Inception score takes {_INCEPTION}")
        return features @ self._module.fc.weight.T.double()

    def dim(self, image_shape: tuple[int, ...]) -> int:
        """Feature dimension d for images of shape (C, H, W)."""
        return self(torch.zeros(1, *image_shape, dtype=torch.uint8)).shape[1]


def inception_file() -> Path:
    """Where torch-fidelity looks for the Inception weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE


def _inception_weights(path: str | os.PathLike[str] | None) -> Path:
    """The checked Inception weights file: given, cached, or downloaded."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    cached = inception_file()
    remedy = (
        f"get {URL_INCEPTION_V3} on a machine with network, put it at {cached}, or pass its path "
        "(weights=FILE; inception_weights=FILE on the command line)"
    )
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"weights: {path} does not exist; {remedy}")
    file = cached if path is None else Path(path)
    if not file.is_file():
        _download(URL_INCEPTION_V3, file, remedy)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    found = digest.hexdigest()
    if not found.startswith(_INCEPTION_SHA256_PREFIX):
        raise ValueError(
            f"weights: {file} has sha256 {found[:16]}..., but {_INCEPTION_SHA256_PREFIX}... is expected "
            f"(a damaged or different file); delete it and {remedy}"
        )
    # torch-fidelity unpickles the file without restrictions: refuse beforehand what is not plain tensors
    torch.load(file, map_location="cpu", weights_only=True)
    return file


def _download(url: str, file: Path, remedy: str) -> None:
    import shutil
    import tempfile
    import urllib.request

    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT_S) as response,
            tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part,
        ):
            try:
                shutil.copyfileobj(response, part)
                part.close()
                os.replace(part.name, file)
            except BaseException:
                os.unlink(part.name)
                raise
    except OSError as error:  # URLError and timeouts are OSErrors
        raise FileNotFoundError(
            f"fid: the Inception weights could not be downloaded ({error}); {remedy}"
        ) from error
