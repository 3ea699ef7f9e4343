"""Training data: anything that gives samples and their conditions, in an order that is a function of the seed."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import unknown

NAMES = ("digits", "fashion-mnist", "cifar10")
IN_MEMORY = 1 << 30
_HASHED = 64


def shuffled(index: Tensor, n: int, seed: int) -> Tensor:
    """Which of ``n`` items the global sample indices (B,) take: a new permutation in each pass.

    Any part of the order can be had without what was before, so that a run resumes by its step alone.
    """
    epochs, place = index // n, index % n
    first, last = (int(e) for e in epochs.aminmax())
    if first == last:
        return _order(n, seed, first)[place]
    result = torch.empty_like(index)
    for epoch in torch.unique(epochs).tolist():
        mine = epochs == epoch
        result[mine] = _order(n, seed, epoch)[place[mine]]
    return result


@functools.lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    return torch.randperm(n, generator=generator)


class Data:
    """Samples in [-1, 1] (or latents) and their conditions.

    Args:
        x: (N, ...), all in memory; or a map-style dataset whose items are ``x``, ``(x, label)`` or
            ``{"x": x, NAME: condition}``.
        conditions: by name, (N, ...) each; for samples in memory.
        name: what the data are called.
    """

    def __init__(
        self,
        x: Tensor | Dataset[Any],
        conditions: Mapping[str, Tensor] | None = None,
        name: str = "data",
    ) -> None:
        self.name = name
        self.dataset = None if isinstance(x, Tensor) else x
        if isinstance(x, Tensor):
            self.x: Tensor | None = x
            self._conditions = dict(conditions or {})
        else:
            self.x, self._conditions = None, {}
            if len(self) * _first(x)[0].numel() * 4 <= IN_MEMORY and not getattr(x, "random", False):
                items = [_item(x[i]) for i in range(len(self))]  # type: ignore[index]
                self.x = torch.stack([i[0] for i in items])
                self._conditions = {k: torch.stack([i[1][k] for i in items]) for k in items[0][1]}
                self.dataset = None
        if len(self) < 1:
            raise ValueError(f"{name} is empty; at least one sample is needed")
        first = self.x[0] if self.x is not None else _first(self.dataset)[0]
        if not first.is_floating_point():
            raise ValueError(
                f"{name}: samples are {first.dtype}; give floating-point samples in [-1, 1] (x / 127.5 - 1)"
            )
        self.shape = tuple(first.shape)
        for key, value in self._conditions.items():
            if len(value) != len(self):
                raise ValueError(f"{name}: {key} has {len(value)} values for {len(self)} samples")

    def __len__(self) -> int:
        return len(self.dataset if self.x is None else self.x)  # type: ignore[arg-type]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the conditions."""
        return tuple(self._conditions if self.x is not None else _first(self.dataset)[1])

    @property
    def classes(self) -> int | None:
        """The number of classes, where there are labels in memory: one more than the largest."""
        labels = self._conditions.get("labels")
        if labels is None or labels.is_floating_point() or labels.ndim != 1:
            return None
        return int(labels.max()) + 1

    @property
    def sha256(self) -> str:
        """A hash of size, shape and some of the samples, evenly spaced."""
        digest = hashlib.sha256(repr((len(self), self.shape, self.names)).encode())
        for i in torch.linspace(0, len(self) - 1, min(_HASHED, len(self))).round().long().tolist():
            x, conditions = self._at(i)
            digest.update(x.contiguous().float().numpy().tobytes())
            for key in sorted(conditions):
                digest.update(conditions[key].double().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _at(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        if self.x is not None:
            return self.x[i].cpu(), {k: v[i].cpu() for k, v in self._conditions.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(i)
            return _item(self.dataset[i])  # type: ignore[index]

    def take(self, index: Tensor, device: torch.device, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """Samples and conditions of the global sample indices (B,)."""
        which = shuffled(index, len(self), seed)
        if self.x is None:
            items = [self._at(i) for i in which.tolist()]
            x = torch.stack([i[0] for i in items])
            conditions = {k: torch.stack([i[1][k] for i in items]) for k in items[0][1]}
        else:
            which = which.to(self.x.device)
            x, conditions = self.x[which], {k: v[which] for k, v in self._conditions.items()}
        return x.to(device, non_blocking=True), {
            k: v.to(device, non_blocking=True) for k, v in conditions.items()
        }

    def conditions(self, index: Tensor, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """The conditions of the global sample indices (B,)."""
        return self.take(index, device, seed)[1]

    def batches(
        self, indices: Sequence[Tensor], device: torch.device, seed: int = 0, workers: int = 0
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Samples and conditions for each of a sequence of global sample indices (B,), read ahead."""
        if self.x is not None:
            for index in indices:
                yield self.take(index, device, seed)
            return
        loader = DataLoader(
            _Seeded(self, seed), batch_sampler=_Fixed(indices), num_workers=workers, collate_fn=_stacked
        )
        for x, conditions in loader:
            yield (
                x.to(device, non_blocking=True),
                {k: v.to(device, non_blocking=True) for k, v in conditions.items()},
            )


class _Seeded(Dataset[Any]):
    """Items by global sample index, whose own randomness (augmentation) is a function of (seed, index)."""

    def __init__(self, data: Data, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, index: int) -> Any:
        which = int(shuffled(torch.tensor([index]), len(self.data), self.seed))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + index)
            return _item(self.data.dataset[which])  # type: ignore[index]


class _Fixed(Sampler[list[int]]):
    def __init__(self, indices: Sequence[Tensor]) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return (index.tolist() for index in self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def _stacked(items: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.stack([i[0] for i in items]), {k: torch.stack([i[1][k] for i in items]) for k in items[0][1]}


def _first(dataset: Any) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        return _item(dataset[0])


def _item(item: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A dataset's item as a sample and its conditions."""
    if isinstance(item, Tensor):
        return item, {}
    if isinstance(item, Mapping) and "x" in item:
        return item["x"], {k: torch.as_tensor(v) for k, v in item.items() if k != "x"}
    if isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], Tensor):
        return item[0], {"labels": torch.as_tensor(item[1])}
    if isinstance(item, (tuple, list)) and len(item) == 1:
        return item[0], {}
    raise ValueError(
        f"data: an item is a {type(item).__name__}; items are x, (x, label) or {{'x': x, 'labels': label}} with "
        "tensors in [-1, 1]"
    )


def as_data(data: Any) -> Data:
    """Data from a name, a folder of images, tensors, or a dataset.

    Args:
        data: "digits", "fashion-mnist", "cifar10" (the latter two where torchvision has them, under ``data/``),
            a folder of images (torchvision's ``ImageFolder`` where it has folders for classes), samples
            (N, ...), ``(samples, labels)``, ``{"x": samples, NAME: condition}`` or a map-style dataset.

    Raises:
        ValueError: none of these, or empty.
    """
    if isinstance(data, Data):
        return data
    if isinstance(data, Tensor):
        return Data(data)
    if isinstance(data, Mapping):
        if "x" not in data:
            raise ValueError(f"data has {', '.join(map(str, data))}; the samples belong under 'x'")
        return Data(data["x"], {k: v for k, v in data.items() if k != "x"})
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(d, Tensor) for d in data):
        return Data(data[0], {"labels": data[1]})
    if isinstance(data, (str, Path)):
        return _named(str(data))
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return Data(data, name=type(data).__name__)
    raise ValueError(
        f"data={data!r:.60}: give a name ({', '.join(NAMES)}), a folder, tensors, or a dataset with [i] and len()"
    )


def _named(name: str) -> Data:
    if name == "digits":
        from ..zoo.data import digits

        x, labels = digits("train")
        return Data(x, {"labels": labels}, name)
    if name in NAMES:
        return _torchvision(name)
    folder = Path(name)
    if not folder.is_dir():
        if "/" in name:
            raise ValueError(f"data={name}: no such folder")
        raise unknown("data", name, NAMES)
    from torchvision.datasets import ImageFolder

    if not any(f.is_dir() for f in folder.iterdir()):
        raise ValueError(
            f"data={name}: images belong in one folder for each class, as {name}/CLASS/IMAGE.png"
        )
    return Data(ImageFolder(name, transform=_normalised), name=name)


def _torchvision(name: str) -> Data:
    from ..zoo.data import torchvision_images

    try:
        x, labels = torchvision_images(name, "train")
    except FileNotFoundError as error:
        raise ValueError(f"data={error}") from error
    return Data(x, {"labels": labels}, name)


def _normalised(image: Any) -> Tensor:
    from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(image).float() / 127.5 - 1
