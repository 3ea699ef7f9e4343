"""Training data: anything that gives samples and their conditions, in an order that is a function of the seed."""

from __future__ import annotations

import copy
import functools
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..denoiser import Denoiser, select
from ..errors import unknown
from ..noise import normal, philox

NAMES = ("digits", "fashion-mnist", "cifar10")
IN_MEMORY = 1 << 30
_HASHED = 64
_SPREAD = 0xFFFFFFFE  # noise stream of what a measurement's conditions are drawn by
_READ_TWICE = 16
_RHO = 0.5  # where the teacher is asked about the samples' range: much is left to denoise, and much to see
_AT_ONCE = 8

Item = tuple[Tensor, dict[str, Tensor]]


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

    A dataset of less than 1 GiB is read into memory once, unless its items are random (augmented): the first ones
    are read twice with different seeds to find out. Random items are read anew in each pass, with the generators
    of torch, ``random`` and numpy seeded by (seed, index). An attribute ``random`` of the dataset says whether they
    are: with True nothing is kept in memory, with False nothing is tried.

    Args:
        x: (N, ...), a tensor or an array, all in memory; or a map-style dataset whose items are ``x``,
            ``(x, label)`` or ``{"x": x, NAME: condition}`` of tensors, arrays and numbers, all of one shape.
        conditions: by name, (N, ...) each; for samples in memory.
        name: what the data are called.

    Raises:
        ValueError: empty, or something other than that; the message names it.
    """

    def __init__(
        self,
        x: Tensor | np.ndarray | Dataset[Any],
        conditions: Mapping[str, Any] | None = None,
        name: str = "data",
    ) -> None:
        self.name = name
        self.x: Tensor | None = None
        self.dataset: Any = None
        self._conditions: dict[str, Tensor] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}  # of the first item
        if isinstance(x, (Tensor, np.ndarray)) or (conditions and _is_list(x)):
            self.x = _tensor(x, f"{name}: x")
            self._conditions = {k: _tensor(v, f"{name}: {k}") for k, v in (conditions or {}).items()}
        elif conditions:
            raise ValueError(
                f"{name}: {', '.join(conditions)} beside a {type(x).__name__}; put the conditions into the dataset's "
                "items, as (x, label) or {'x': x, NAME: condition}, or give x as one tensor"
            )
        elif isinstance(x, Mapping) or not (hasattr(x, "__getitem__") and hasattr(x, "__len__")):
            raise ValueError(
                f"{name}: x is a {type(x).__name__}; give a tensor, an array, or a dataset with [i] and len()"
            )
        else:
            self.dataset = x
        if len(self) < 1:
            raise ValueError(f"{name} is empty; at least one sample is needed")
        for key, value in self._conditions.items():
            if value.ndim == 0 or len(value) != len(self):
                count = f"{len(value)} values" if value.ndim else "one value"
                raise ValueError(f"{name}: {key} has {count} for {len(self)} samples; give one a sample")
        first, others = self._at(0)
        if not first.is_floating_point():
            raise ValueError(
                f"{name}: samples are {first.dtype}; give floating-point samples in [-1, 1] (x / 127.5 - 1)"
            )
        self.shape = tuple(first.shape)
        self._shapes = _shapes(first, others)
        size = sum(v.numel() * v.element_size() for v in (first, *others.values()))
        if self.x is None and len(self) * size <= IN_MEMORY and not self._is_random():
            self.x, self._conditions = _stacked([self._at(i) for i in range(len(self))])
            self.dataset = None

    def __len__(self) -> int:
        return len(self.dataset if self.x is None else self.x)

    def near(self, device: torch.device) -> Data:
        """The same data on a device, where they are in memory and less than 1 GiB: no batch is copied to it."""
        held = [] if self.x is None else [self.x, *self._conditions.values()]
        if not held or sum(v.numel() * v.element_size() for v in held) > IN_MEMORY:
            return self
        other = copy.copy(self)
        other.x, other._conditions = _on(device, held[0], self._conditions)
        return other

    def _is_random(self) -> bool:
        said = getattr(self.dataset, "random", None)
        if isinstance(said, bool):
            return said
        pairs = ((self._read(k % len(self), seed) for seed in (2 * k, 2 * k + 1)) for k in range(_READ_TWICE))
        return not all(_equal(*pair) for pair in pairs)

    def _read(self, i: int, seed: int) -> Item:
        """The dataset's item ``i``, whose own randomness is a function of the seed."""
        with _seeded(seed):
            item = self.dataset[i]
        x, conditions = _item(item, f"{self.name}: item {i}")
        found = _shapes(x, conditions)
        known = self._shapes or found
        if found.keys() != known.keys():
            raise ValueError(
                f"{self.name}: item {i} has {', '.join(found)}, item 0 has {', '.join(known)}; give all the same"
            )
        for key, shape in found.items():
            if shape != known[key]:
                raise ValueError(
                    f"{self.name}: {key} of item {i} has shape {shape}, of item 0 {known[key]}; "
                    f"{'resize or crop' if key == 'x' else 'pad or cut'} all to one shape"
                )
        return x, conditions

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the conditions."""
        return tuple(key for key in self._shapes if key != "x")

    @property
    def classes(self) -> int | None:
        """The number of classes, where there are labels in memory: one more than the largest."""
        labels = self._conditions.get("labels")
        if labels is None or labels.is_floating_point() or labels.ndim != 1:
            return None
        return int(labels.max()) + 1

    @property
    def extremes(self) -> dict[str, tuple[int, int]]:
        """By name of the conditions in memory that are whole numbers: the samples with the smallest and the largest."""
        whole = {k: v.long() for k, v in self._conditions.items() if v.ndim == 1 and _whole(v)}
        return {k: (int(v.argmin()), int(v.argmax())) for k, v in whole.items()}

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

    def _at(self, i: int) -> Item:
        if self.x is None:
            return self._read(i, i)
        return self.x[i].cpu(), {k: v[i].cpu() for k, v in self._conditions.items()}

    def rows(self, which: Sequence[int] | Tensor, device: torch.device) -> Item:
        """Samples and conditions by their place in the data, in no other order."""
        if self.x is None:
            x, conditions = _stacked([self._at(int(i)) for i in which])
        else:
            place = torch.as_tensor(which, device=self.x.device)
            x, conditions = self.x[place], {k: v[place] for k, v in self._conditions.items()}
        return _on(device, x, conditions)

    def take(self, index: Tensor, device: torch.device, seed: int = 0) -> Item:
        """Samples and conditions of the global sample indices (B,)."""
        if self.x is None:
            seeded = _Seeded(self, seed)
            x, conditions = _stacked([seeded[i] for i in index.tolist()])
        else:
            which = shuffled(index, len(self), seed).to(self.x.device, non_blocking=True)
            x, conditions = self.x[which], {k: v[which] for k, v in self._conditions.items()}
        return _on(device, x, conditions)

    def conditions(self, index: Tensor, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """The conditions of the global sample indices (B,)."""
        return self.take(index, device, seed)[1]

    def spread(self, count: int, groups: int, seed: int) -> Tensor:
        """Places in the data (count,) whose conditions a measurement of ``count`` samples is made with.

        The samples of each group (those of one index modulo ``groups``) lie evenly over the data, in the order of
        their labels where these are in memory, from a start of the group's own. So the classes have their shares, and
        groups are independent, which the jackknife's correction of the bias needs: parts of one permutation of the
        data are not, since what one of them has the others lack.
        """
        index = torch.arange(count)
        group, position = index % groups, index // groups
        size = torch.bincount(group, minlength=groups)[group]
        start = philox(seed, torch.zeros_like(group), _SPREAD, group)[0].double() * 2.0**-32
        place = ((position + start) / size * len(self)).long().clamp(max=len(self) - 1)
        labels = self._conditions.get("labels")
        if labels is None or labels.ndim != 1:
            return place
        return labels.argsort(stable=True).cpu()[place]

    def batches(
        self, indices: Sequence[Tensor], device: torch.device, seed: int = 0, workers: int = 0
    ) -> Iterator[Item]:
        """Samples and conditions for each of a sequence of global sample indices (B,), read ahead."""
        if self.x is not None:
            for index in indices:
                yield self.take(index, device, seed)
            return
        loader = DataLoader(
            _Seeded(self, seed), batch_sampler=_Fixed(indices), num_workers=workers, collate_fn=_stacked
        )
        for x, conditions in loader:
            yield _on(device, x, conditions)

    def check_range(self, teacher: Denoiser, count: int = 64) -> None:
        """Ask the teacher whether samples without a negative value are of its own range, or were before [-1, 1].

        It denoises them as they are and mapped to [-1, 1], from the same noise. A teacher of such a range does
        worse when they are mapped. One of [-1, 1] leaves more noise than there was in what it does not know.

        Args:
            teacher: what the samples are for.
            count: of the samples.

        Raises:
            ValueError: the teacher leaves less than half as much noise when they are mapped.
        """
        from .prediction import state_dtype

        x, conditions = self.rows(range(min(count, len(self))), teacher.device)
        x = x.to(state_dtype(teacher.dtype))
        least, most = (float(v) for v in x.aminmax())
        if least < 0 or least == most:
            return
        own, other = (_noise_left(teacher, v, conditions) for v in (x, 2 * x / most - 1))
        if other < min(own, 1) / 2:  # a network that does not denoise (yet) has no range
            remedy = "x * 2 - 1" if 0.5 < most <= 1 else f"x * {2 / most:.4g} - 1"
            raise ValueError(
                f"data: values lie in [{least:.4g}, {most:.4g}], the teacher's elsewhere: its squared error in "
                f"denoising is {own:.3g} of the noise's as they are and {other:.3g} when they are mapped to [-1, 1]; "
                f"give {remedy}"
            )


def _noise_left(teacher: Denoiser, x: Tensor, conditions: Mapping[str, Tensor]) -> float:
    """The teacher's squared error in denoising samples, as a share of the noise; 1 is that of doing nothing."""
    from .prediction import noised, predict, time_of_rho

    process = teacher.process
    plain = teacher.replace(guidance=None)  # a guided prediction is no mean
    t = process.snap(time_of_rho(process, torch.full((len(x),), _RHO, dtype=torch.float64)))
    noise = normal(x.shape, 0, torch.arange(len(x), device=x.device), dtype=x.dtype)
    total = 0.0
    for first in range(0, len(x), _AT_ONCE):
        rows = slice(first, first + _AT_ONCE)
        with torch.no_grad():
            state = noised(process, x[rows], noise[rows], t[rows])
            x0 = predict(plain, state, t[rows], select(dict(conditions), rows, len(x)))
        total += float((x0 - x[rows]).double().square().sum())
    return total / x.numel() / float(process.rho(t[0])) ** 2


class _Seeded(Dataset[Any]):
    """Items by global sample index, whose own randomness (augmentation) is a function of (seed, index)."""

    def __init__(self, data: Data, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, index: int) -> Item:
        which = int(shuffled(torch.tensor([index]), len(self.data), self.seed))
        return self.data._read(which, self.seed * 1_000_003 + index)


class _Fixed(Sampler[list[int]]):
    def __init__(self, indices: Sequence[Tensor]) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return (index.tolist() for index in self.indices)

    def __len__(self) -> int:
        return len(self.indices)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The generators that augmentation draws from, seeded; afterwards they are as they were."""
    own = seed % (1 << 63)
    python, numpy, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    # torch.manual_seed would seed the accelerator too, which is not restored
    torch.default_generator.manual_seed(own)
    random.seed(own)
    np.random.seed([own & 0xFFFFFFFF, own >> 32])  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(torchs)


def _on(device: torch.device, x: Tensor, conditions: Mapping[str, Tensor]) -> Item:
    ahead = device.type != "cpu"  # the host would read what has not arrived
    return x.to(device, non_blocking=ahead), {
        k: v.to(device, non_blocking=ahead) for k, v in conditions.items()
    }


def _stacked(items: Sequence[Item]) -> Item:
    return torch.stack([i[0] for i in items]), {k: torch.stack([i[1][k] for i in items]) for k in items[0][1]}


def _shapes(x: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {"x": tuple(x.shape), **{k: tuple(v.shape) for k, v in conditions.items()}}


def _equal(a: Item, b: Item) -> bool:
    """Whether two readings of one item are the same; what is not a number is."""
    pairs = [(a[0], b[0]), *((a[1][k], b[1][k]) for k in a[1])]
    return all(bool(((v == w) | ((v != v) & (w != w))).all()) for v, w in pairs)


def _whole(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _item(item: Any, what: str) -> Item:
    """A dataset's item as a sample and its conditions."""
    if isinstance(item, (Tensor, np.ndarray)):
        return _tensor(item, what), {}
    if isinstance(item, Mapping) and "x" in item:
        tensors = {str(k): _tensor(v, f"{what}: {k}") for k, v in item.items()}
        return tensors.pop("x"), tensors
    if isinstance(item, (tuple, list)) and 1 <= len(item) <= 2 and isinstance(item[0], (Tensor, np.ndarray)):
        labels = {"labels": _tensor(item[1], f"{what}: labels")} if len(item) == 2 else {}
        return _tensor(item[0], f"{what}: x"), labels
    kind = type(item).__name__
    if isinstance(item, Mapping):
        kind += f" with {', '.join(map(str, item)) or 'nothing'}"
    elif _is_list(item):
        kind += f" of {', '.join(type(v).__name__ for v in item) or 'nothing'}"
    raise ValueError(
        f"{what} is a {kind}; items are x, (x, label) or {{'x': x, 'labels': label}} with tensors in [-1, 1]"
    )


def _tensor(value: Any, what: str) -> Tensor:
    """Tensors, arrays, numbers and lists of them as a tensor.

    Raises:
        ValueError: none of these.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        raise ValueError(
            f"{what} is a {type(value).__name__}; samples and conditions are tensors by name, flat: "
            "{'x': x, 'labels': labels}"
        )
    if _is_text(value):
        raise ValueError(
            f"{what} is text ({value!r:.40}); encode it to tensors first, as the network takes them"
        )
    try:
        if _is_list(value) and value and all(isinstance(v, (Tensor, np.ndarray)) for v in value):
            return torch.stack([_tensor(v, what) for v in value])
        if isinstance(value, np.ndarray):
            value = np.asarray(value, order="C")  # torch takes no negative strides, which flips have
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{what} is a {type(value).__name__} that makes no tensor ({error}); give tensors, arrays or numbers"
        ) from error


def _is_list(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def _is_text(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "US" or (value.dtype == object and _is_text(value.ravel().tolist()))
    return isinstance(value, (str, bytes)) or (_is_list(value) and any(_is_text(v) for v in value[:1]))


def as_data(data: Any) -> Data:
    """Data from a name, a folder of images, tensors, or a dataset.

    Args:
        data: "digits", "fashion-mnist", "cifar10" (the latter two where torchvision has them, under ``data/``),
            a folder of images (torchvision's ``ImageFolder`` where it has folders for classes), samples
            (N, ...), ``(samples, labels)``, ``{"x": samples, NAME: condition}`` or a map-style dataset. Samples
            and conditions are tensors or arrays, labels may be a list.

    Raises:
        ValueError: none of these, or empty.
    """
    if isinstance(data, Data):
        return data
    if isinstance(data, (Tensor, np.ndarray)):
        return Data(data)
    if isinstance(data, Mapping):
        if "x" not in data:
            raise ValueError(
                f"data has {', '.join(map(str, data)) or 'nothing'}; the samples belong under 'x'"
            )
        return Data(data["x"], {k: v for k, v in data.items() if k != "x"})
    if _is_list(data) and len(data) == 2 and isinstance(data[0], (Tensor, np.ndarray, Dataset)):
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
