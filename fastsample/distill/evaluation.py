"""What a student is worth while it is trained: its distance to the data, at each of its numbers of steps."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..metrics import FeatureExtractor, FrechetReference, GroupedMoments, estimate, parse_metric, to_uint8
from ..metrics.frechet import FrechetEstimate, minimum_samples
from .data import Data
from .student import Student
from .weights import own_state

_SEED = 0x5EED  # of the evaluation's noise and conditions: others than those of the training
_DECODED = 16  # latents at once: a decoder takes far more memory a sample than the network


@dataclass
class Evaluation:
    """The Frechet distance of a student's samples to the training data.

    Args:
        metric: "fd-digits", "fid", ...; None measures nothing.
        samples: how many are drawn.
        data: what is compared with, and where the conditions come from.
        device: of the extractor.
        batch_size: samples at once.
        decode: for latent models, ``decode(samples) -> images`` in [-1, 1]; images are compared and shown.

    Raises:
        ValueError: an unknown metric, or too few samples for it.
    """

    metric: str | None
    samples: int
    data: Data
    device: torch.device
    batch_size: int = 500
    decode: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        self.extractor: FeatureExtractor | None = None
        if self.metric is None:
            return
        if not _is_image(self.image_shape):
            what, remedy = (
                ("samples", "fs.wrap(..., decode=function) says how samples become images, ")
                if self.decode is None
                else ("decoded samples", "")
            )
            raise ValueError(
                f"metric={self.metric!r} is for images with 1 or 3 channels, not for {what} of {self.image_shape}; "
                f"{remedy}metric=None trains without one"
            )
        self.extractor = FeatureExtractor(parse_metric(self.metric).extractor, device=self.device)
        self.dim = self.extractor.dim(self.image_shape)
        if self.samples < minimum_samples(self.dim):
            raise ValueError(
                f"samples={self.samples}: {self.metric} has {self.dim} features and needs at least "
                f"{minimum_samples(self.dim)}"
            )
        moments = GroupedMoments(self.dim)
        total = len(self.data)
        for first in range(0, total, self.batch_size):
            index = range(first, min(total, first + self.batch_size))
            x, _ = self.data.rows(index, self.device)
            moments.update(self.extractor(self._bytes(x)), index)
        self.reference = FrechetReference(moments.gaussian())

    @functools.cached_property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of one image: of a decoded sample for latent models."""
        if self.decode is None:
            return self.data.shape
        return tuple(self._images(self.data.rows([0], self.device)[0]).shape[1:])

    @torch.no_grad()
    def _images(self, x: Tensor) -> Tensor:
        return x if self.decode is None else self.decode(x.float())

    def _bytes(self, x: Tensor) -> Tensor:
        if self.decode is None:
            return to_uint8(x)
        return torch.cat([to_uint8(self._images(part)) for part in x.split(_DECODED)])

    def distance(self, student: Student, steps: int, seed: int = _SEED) -> FrechetEstimate:
        """The distance at a number of steps; the same noise and conditions for every student."""
        return estimate(self.moments(student, steps, seed), self.reference)

    def moments(self, student: Student, steps: int, seed: int = _SEED) -> GroupedMoments:
        """Of the features of a student's samples."""
        assert self.extractor is not None
        moments = GroupedMoments(self.dim)
        places = self.data.spread(self.samples, moments.groups, seed)
        sampler = student.sampler(steps)
        for index in torch.arange(self.samples).split(self.batch_size):
            conditions: dict[str, Any] = {}
            if self.data.names:
                conditions = self.data.rows(places[index], self.device)[1]
            x = sampler(shape=(len(index), *self.data.shape), seed=seed, index=index, **conditions)
            moments.update(self.extractor(self._bytes(x)), index)
        return moments

    def drawn(self, student: Student, steps: int, count: int, seed: int = _SEED) -> Tensor:
        """The first samples at a number of steps, latents where the student makes those."""
        conditions: dict[str, Any] = self.data.conditions(torch.arange(count), self.device, seed)
        return student.sampler(steps)(shape=(count, *self.data.shape), seed=seed, **conditions)

    def pictures(self, student: Student, file: Path, count: int = 10) -> None:
        """A grid of samples: a row for each number of steps, the same noise in each column."""
        if not _is_image(self.image_shape):
            return
        from torchvision.utils import make_grid, save_image

        rows = [self._images(self.drawn(student, k, count)).cpu() for k in student.steps]
        file.parent.mkdir(parents=True, exist_ok=True)
        scale = max(1, 64 // self.image_shape[-1])
        images = torch.cat(rows).clamp(-1, 1).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
        save_image(make_grid(images / 2 + 0.5, nrow=count, padding=2), file)


def _is_image(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] in (1, 3)


class Best:
    """The best weights so far: those with the least value."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.value: float | None = None
        self.sha256: str | None = None
        self.step: int | None = None
        self.average: str | None = None

    def offer(self, value: float, step: int, average: str, net: nn.Module) -> bool:
        """Keep these weights when they are better."""
        if self.value is not None and not value < self.value:
            return False
        from safetensors.torch import save

        from ..plan import write_atomically

        self.value, self.step, self.average = value, step, average
        content = save(weights(net))
        self.sha256 = hashlib.sha256(content).hexdigest()
        write_atomically(self.file, content)
        return True

    def load(self) -> dict[str, Tensor] | None:
        """The weights; None where the file is not the one that was written."""
        from safetensors.torch import load

        if self.sha256 is None or not self.file.is_file():
            return None
        content = self.file.read_bytes()
        return load(content) if hashlib.sha256(content).hexdigest() == self.sha256 else None

    def forget(self) -> None:
        """Choose anew from here on."""
        self.value = self.sha256 = self.step = self.average = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {k: getattr(self, k) for k in ("value", "sha256", "step", "average")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        for key, value in state.items():
            setattr(self, key, value)


def weights(net: nn.Module) -> dict[str, Tensor]:
    """A network's own tensors for safetensors: contiguous, on the CPU, none shared."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in own_state(net).items()}
