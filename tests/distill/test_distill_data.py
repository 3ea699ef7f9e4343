"""Training data: what is read once and what anew, what is taken, and what is refused before training."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_distill import SHAPE, log_of, tiny_teacher
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import fastsample as fs
from fastsample import distill
from fastsample.distill.data import as_data
from fastsample.distill.evaluation import Evaluation
from fastsample.metrics.statistics import GROUPS
from fastsample.zoo.data import digits

CPU = torch.device("cpu")
N = 50

COINS: dict[str, Callable[[], bool]] = {
    "torch": lambda: bool(torch.rand(()) < 0.5),
    "random": lambda: random.random() < 0.5,
    "numpy": lambda: bool(np.random.rand() < 0.5),  # noqa: NPY002
    "none": lambda: False,
}


class Flipped(Dataset[Any]):
    """Digits flipped by a coin."""

    def __init__(self, coin: str = "none", n: int = N) -> None:
        self.x, self.y = digits("train")
        self.coin, self.n, self.reads = COINS[coin], n, 0

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        self.reads += 1
        return self.x[i].flip(-1) if self.coin() else self.x[i], int(self.y[i])


class Items(Dataset[Any]):
    """A list as a dataset."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


class Strict(nn.Module):
    """A network that must have its labels."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.net(x, t, labels)


# -- augmentation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, N])
@pytest.mark.parametrize("coin", ["torch", "random", "numpy"])
def test_random_items_are_read_in_each_pass(coin: str, n: int) -> None:
    """An augmented dataset is not frozen, and its augmentation is a function of (seed, index)."""
    data = distill.Data(Flipped(coin, n))
    assert data.x is None
    index = torch.arange(20 * n).reshape(20, n)
    passes = [x for x, _ in data.batches(list(index), CPU, 3)]
    assert len({float((x * torch.arange(8)).sum()) for x in passes}) > 1
    for again in (data.batches(list(index), CPU, 3, workers=2), (data.take(i, CPU, 3) for i in index)):
        assert all(torch.equal(x, y) for (x, _), y in zip(again, passes, strict=True))
    other = torch.cat([x for x, _ in data.batches(list(index), CPU, 4)])
    assert not torch.equal(other, torch.cat(passes))
    assert data.sha256 == distill.Data(Flipped(coin, n)).sha256


def test_reading_leaves_the_generators_as_they_were() -> None:
    for generator in (torch.manual_seed, random.seed, np.random.seed):
        generator(7)
    expected = torch.rand(()), random.random(), np.random.rand()  # noqa: NPY002
    for generator in (torch.manual_seed, random.seed, np.random.seed):
        generator(7)
    data = distill.Data(Flipped("numpy"))
    data.take(torch.arange(5), CPU)
    assert (torch.rand(()), random.random(), np.random.rand()) == expected  # noqa: NPY002


def test_other_items_are_kept_in_memory() -> None:
    dataset = Flipped()
    data = distill.Data(dataset)
    assert data.x is not None
    reads = dataset.reads
    data.take(torch.arange(100), CPU)
    assert dataset.reads == reads
    missing = torch.full((4, *SHAPE), torch.nan)  # which is not random
    assert distill.Data(Items(list(missing))).x is not None


def test_the_attribute_random_says_it() -> None:
    for coin, said, in_memory in (("none", True, False), ("torch", False, True), ("torch", 1, False)):
        dataset = Flipped(coin)
        dataset.random = said  # type: ignore[attr-defined]
        assert (distill.Data(dataset).x is not None) == in_memory


# -- what is taken -------------------------------------------------------------------------------------------


def test_data_in_memory_lie_on_the_device_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    data = as_data((torch.zeros(4, *SHAPE), torch.arange(4)))
    there = data.near(torch.device("meta"))
    x, conditions = there.take(torch.arange(2), torch.device("meta"))
    assert x.device.type == conditions["labels"].device.type == "meta"
    assert data.x is not None
    assert data.x.device.type == "cpu"
    monkeypatch.setattr("fastsample.distill.data.IN_MEMORY", 16)
    assert data.near(torch.device("meta")) is data


def test_arrays_lists_and_tensors_are_the_same_data() -> None:
    x, labels = (v[:6] for v in digits("train"))
    array, numbers = x.numpy(), labels.tolist()
    for given in (
        (x, labels),
        (x, numbers),
        [array, numbers],
        (array, labels.numpy()),
        {"x": array, "labels": numbers},
        {"x": list(x), "labels": labels},
        {"x": x, "labels": list(labels)},
        [(v, n) for v, n in zip(array, numbers, strict=True)],
        [{"x": v, "labels": n} for v, n in zip(array, labels.numpy(), strict=True)],
        [{"x": v.tolist(), "labels": n} for v, n in zip(x, numbers, strict=True)],
        [(np.flip(np.flip(v).copy()), n) for v, n in zip(array, numbers, strict=True)],  # negative strides
    ):
        data = as_data(given)
        assert data.sha256 == as_data((x, labels)).sha256
        assert data.take(torch.arange(3), CPU)[1]["labels"].dtype == torch.int64
    assert as_data(array).names == as_data([(x[0],), (x[1],)]).names == ()
    assert as_data(array.astype("float64")).take(torch.arange(2), CPU)[0].dtype == torch.float64
    assert as_data(x.half()).take(torch.arange(2), CPU)[0].dtype == torch.float16


def test_unusual_data_is_refused() -> None:
    x, labels = (v[:4] for v in digits("train"))
    prompts = ["a one", "a two", "a three", "a four"]
    larger = torch.zeros(1, 9, 9)
    for given, message in (
        ({"x": x, "prompt": prompts}, "prompt is text .*encode it to tensors first"),
        ((x, np.array(prompts)), "labels is text .*encode it"),
        ([{"x": v, "prompt": p} for v, p in zip(x, prompts, strict=True)], "item 0: prompt is text"),
        ({"x": x, "cond": {"text": labels}}, "cond is a dict; .* tensors by name, flat"),
        ([{"x": v, "cond": {"text": 0}} for v in x], "item 0: cond is a dict; .* flat"),
        ({"x": x, "labels": None}, "labels is a NoneType that makes no tensor"),
        ({"x": x, "labels": [[1], [2, 3], [4], [5]]}, "labels is a list that makes no tensor"),
        ({"x": x, "labels": 3}, "labels has one value for 4 samples"),
        ({"x": Items(list(x)), "labels": labels}, "put the conditions into the dataset's items"),
        ((Items(list(x)), labels), "put the conditions into the dataset's items"),
        ({"x": {"images": x}}, "x is a dict; give a tensor"),
        ({"x": 5}, "x is a int; give a tensor"),
        ({}, "data has nothing; the samples belong under 'x'"),
        (Items([]), "is empty"),
        (Subset(Flipped(), []), "is empty"),
        ([], "is empty"),
        ([x[0], larger, x[1]], r"x of item 1 has shape \(1, 9, 9\), of item 0 \(1, 8, 8\); resize or crop"),
        (
            [{"x": x[0], "c": x[0]}, {"x": x[1], "c": larger}],
            r"c of item 1 has shape \(1, 9, 9\).* pad or cut",
        ),
        ([(x[0], 1), (x[1],)], "item 1 has x, item 0 has x, labels"),
        ([{"image": x[0]}], "item 0 is a dict with image; items are x"),
        ([(x[0], 1, 2)], "item 0 is a tuple of Tensor, int, int; items are x"),
        ([("a.png", 1)], "item 0 is a tuple of str, int"),
        (np.zeros((4, 1, 8, 8), dtype=np.uint8), "floating-point samples"),
        (Items(list(x.byte())), "floating-point samples"),
    ):
        with pytest.raises(ValueError, match=message):
            as_data(given)


def test_items_of_another_shape_are_named_when_they_are_read() -> None:
    """Nobody knows before, where a dataset is not read into memory."""
    x = digits("train")[0]
    dataset = Items([*x[:3], torch.zeros(1, 9, 9)])
    dataset.random = True  # type: ignore[attr-defined]
    data = distill.Data(dataset)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"x of item 3 has shape \(1, 9, 9\)"):
            list(data.batches([torch.arange(4)], CPU, 0, workers))


# -- conditions that the teacher does not take -------------------------------------------------------------


def test_one_label_outside_the_table_is_refused() -> None:
    x, labels = digits("train")
    method = distill.Consistency(fs.zoo.load("digits"))
    for value, message in ((11, r"labels from 0 to 11\): index out of range"), (-1, "labels from -1 to 9")):
        wrong = labels.clone()
        wrong[700] = value
        with pytest.raises(ValueError, match=message) as caught:
            distill.Trainer(method, (x, wrong))
        assert "the values, shapes and types that the network takes" in str(caught.value)
        assert "name them" not in str(caught.value)
    distill.Trainer(method, (x, labels.to(torch.int16).long()))
    with pytest.raises(ValueError, match="name them as the network does"):
        distill.Trainer(method, {"x": x, "classes": labels})


def test_missing_conditions_are_refused() -> None:
    teacher = tiny_teacher()
    teacher = teacher.replace(net=Strict(teacher.net))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data=None: .*'labels'; give data=, whose conditions are used"):
        distill.Trainer(distill.Knowledge(teacher))
    with pytest.raises(
        ValueError, match=r"\(conditions: none\).*'labels'; conditions belong with the sampl"
    ) as e:
        distill.Trainer(distill.Knowledge(teacher), digits("train")[0])
    assert "name them" not in str(e.value)
    distill.Trainer(distill.Knowledge(tiny_teacher()))
    distill.Trainer(distill.Knowledge(teacher), "digits")


# -- the range -----------------------------------------------------------------------------------------------


def test_data_of_another_range_is_refused() -> None:
    x, labels = digits("train")
    teacher = fs.zoo.load("digits")
    method = distill.Consistency(teacher.guided(2.0, null={"labels": 10}))
    for scale, remedy in ((0.5, r"x \* 2 - 1"), (12.5, r"x \* 0.08 - 1"), (1.0, r"x \* 1 - 1")):
        given = (x + 1) * scale
        found = rf"values lie in \[0, {2 * scale:g}\].* is [\d.]+ of the noise.* and 0.1\d+ when .*; give {remedy}$"
        with pytest.raises(ValueError, match=found):
            distill.Trainer(method, (given, labels))
        with pytest.raises(ValueError, match=found):
            distill.Trainer(method, (given.double(), labels))
    distill.Trainer(method, (x, labels))
    for constant in (0.0, 0.7):
        distill.Trainer(method, (torch.full_like(x, constant), labels))


def test_a_teacher_of_that_range_is_not_refused() -> None:
    """One trained on [0, 1]; and one that knows nothing yet, whose training starts with these data."""
    x, labels = digits("train")
    shifted = _Shifted(fs.zoo.load("digits"))
    process = fs.EDM()
    teacher = fs.wrap(shifted, process, "x0", sample_shape=SHAPE)
    data = distill.Data((x + 1) / 2, {"labels": labels})
    data.check_range(teacher)
    distill.Trainer(distill.ICT(tiny_teacher()), data)


class _Shifted(nn.Module):
    """A denoiser of [-1, 1] where [0, 1] is meant: the noise is doubled with the samples."""

    def __init__(self, inner: fs.Denoiser) -> None:
        super().__init__()
        self.net, self.inner = inner.net, inner

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        rho = 2 * float(t[0])
        process = self.inner.process
        time = float(process.t_of_rho(rho))
        return self.inner(float(process.alpha(time)) * (2 * x - 1), time, labels=labels) / 2 + 0.5


# -- latents -------------------------------------------------------------------------------------------------


def to_images(z: Tensor) -> Tensor:
    """Images (B, 1, 8, 8) of latents (B, 4, 4, 4)."""
    assert not torch.is_grad_enabled()
    return nn.functional.pixel_shuffle(z, 2)


def to_latents(x: Tensor) -> Tensor:
    return nn.functional.pixel_unshuffle(x, 2)


class _Latent(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return to_latents(self.net(nn.functional.pixel_shuffle(z, 2), t, labels))


def test_latent_students_are_measured_by_their_images(tmp_path: Path) -> None:
    """Latents are the pixels in another order: distances and grids are those of the pixels themselves."""
    x, labels = digits("train")
    latents = (to_latents(x), labels)
    plain = tiny_teacher()
    process = fs.VP.linear()
    teacher = fs.wrap(_Latent(plain.net), process, "eps", sample_shape=(4, 4, 4), decode=to_images)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"samples of \(4, 4, 4\); fs.wrap\(..., decode=function\)"):
        Evaluation("fd-digits", 40, as_data(latents), CPU)
    with pytest.raises(ValueError, match=r"decoded samples of \(2, 8, 8\); metric=None"):
        Evaluation(
            "fd-digits", 40, as_data(latents), CPU, decode=lambda z: to_images(z).expand(-1, 2, -1, -1)
        )
    of_latents = Evaluation("fd-digits", 40, as_data(latents), CPU, decode=to_images)
    of_pixels = Evaluation("fd-digits", 40, as_data((x, labels)), CPU)
    torch.testing.assert_close(of_latents.reference.gaussian.mean, of_pixels.reference.gaussian.mean)

    method = distill.Shortcut(teacher)
    trainer = distill.Trainer(
        method,
        latents,
        steps=2,
        batch_size=8,
        metric="fd-digits",
        samples=40,
        final_samples=40,
        device="cpu",
    )
    student = trainer.fit(tmp_path)
    assert [row["steps"] for row in student.measured] == list(student.steps)
    assert any("fd-digits.ema0.99.1" in line for line in log_of(tmp_path))

    conditions: dict[str, Any] = trainer._data.rows(trainer._data.spread(40, GROUPS, 1), CPU)[1]
    drawn = student.sampler(1)(shape=(40, 4, 4, 4), seed=1, **conditions)
    again = distill.Data(to_images_anyhow(drawn))
    other = Evaluation("fd-digits", 40, again, CPU).reference.gaussian.mean
    torch.testing.assert_close(of_latents.moments(student, 1, seed=1).gaussian().mean, other)
    assert student.denoiser.decode is to_images
    assert trainer.fit(tmp_path).denoiser.decode is to_images, (
        "a finished training's student lost its decoder"
    )

    from torchvision.io import read_image

    assert read_image(str(tmp_path / "samples" / "00000002.png")).shape == (3, 3 * 66 + 2, 10 * 66 + 2)


def to_images_anyhow(z: Tensor) -> Tensor:
    with torch.no_grad():
        return to_images(z)


def test_a_teacher_without_room_is_no_fault_of_the_data() -> None:
    class Large(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    teacher = fs.wrap(Large(), fs.VP.linear(), "eps", sample_shape=(1, 8, 8))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        distill.Trainer(distill.Consistency(teacher), digits("train")[0], steps=2, device="cpu")


@pytest.mark.parametrize("count", [7, 40, 1000, 30_000])
def test_the_conditions_of_a_measurement_have_the_shares_of_the_data(count: int) -> None:
    """In every group of the jackknife, whatever its size; the groups are independent draws."""
    data = as_data("digits")
    labels = digits("train")[1]
    share = torch.bincount(labels, minlength=10).double() / len(labels)
    places = data.spread(count, GROUPS, seed=3)
    assert places.shape == (count,)
    assert 0 <= int(places.min()) <= int(places.max()) < len(data)
    for group in range(min(count, GROUPS)):
        own = labels[places[group::GROUPS]]
        found = torch.bincount(own, minlength=10).double()
        assert bool(((found - share * len(own)).abs() < 1 + 1e-9).all())
    assert torch.equal(places, data.spread(count, GROUPS, seed=3))
    assert not torch.equal(places, data.spread(count, GROUPS, seed=4))


def test_each_place_is_as_likely_as_another() -> None:
    data = distill.Data(torch.zeros(7, *SHAPE), {"labels": torch.tensor([1, 0, 2, 2, 2, 1, 2])})
    drawn = torch.cat([data.spread(40, GROUPS, seed) for seed in range(400)])
    share = torch.bincount(drawn, minlength=7).double() / len(drawn)
    torch.testing.assert_close(share, torch.full((7,), 1 / 7, dtype=torch.float64), rtol=0, atol=0.01)


class _Resampled:
    """A sampler of the data's own distribution: any training image of the label that is asked for, dimmed or not."""

    def __init__(self, brightness: float = 1.0) -> None:
        self.x, self.y = digits("train")
        self.x = (self.x + 1) * brightness - 1

    def sampler(self, steps: int) -> Any:
        def sample(shape: tuple[int, ...], seed: int, index: Tensor, labels: Tensor) -> Tensor:
            u = distill.Batch(index, SHAPE, seed=seed).uniform("which")
            order, first = self.y.argsort(stable=True), torch.bincount(self.y, minlength=10).cumsum(0)
            size = torch.bincount(self.y, minlength=10)[labels]
            return self.x[order[first[labels] - size + (u * size).long()]]

        return sample


def _distances(count: int, student: Any, seeds: range) -> tuple[Tensor, Tensor]:
    evaluation = Evaluation("fd-digits", count, as_data("digits"), CPU)
    found = [evaluation.distance(student, 1, seed) for seed in seeds]
    return torch.tensor([f.value for f in found]), torch.tensor([f.se for f in found])


@pytest.mark.parametrize("count", [200, 1000])
def test_the_distance_of_the_data_to_themselves_is_zero(count: int) -> None:
    """On average, and for any number of samples: the jackknife takes away all of the bias and no more."""
    values, _ = _distances(count, _Resampled(), range(40))
    assert abs(float(values.mean())) < 3 * float(values.std()) / len(values) ** 0.5


def test_the_standard_error_of_a_distance_is_its_spread() -> None:
    """And distances of few samples are those of many on average."""
    dimmed = _Resampled(0.85)
    values, stated = _distances(500, dimmed, range(40))
    many, error = _distances(20_000, dimmed, range(1))
    assert float(values.mean()) > 10 * float(error)
    spread = (float(values.var()) / len(values) + float(error) ** 2) ** 0.5
    assert abs(float(values.mean() - many)) < 3 * spread
    assert 0.75 < float(stated.square().mean().sqrt() / values.std()) < 1.33
