"""The Fashion-MNIST teacher, its extractor, and what is embedded in place of the images."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import fastsample as fs
from fastsample.bench.data import load_images
from fastsample.metrics import FeatureExtractor, GroupedMoments, to_uint8
from fastsample.process import Flow
from fastsample.zoo.data import FASHION_SHAPE as SHAPE
from fastsample.zoo.data import fashion_mnist
from fastsample.zoo.features import features, logits
from fastsample.zoo.train_fashion import UNET_CONFIG
from fastsample.zoo.training import denoising_loss, train_unet
from fastsample.zoo.weights import FOLDER

EXTRACTOR = "fd-fashion-mnist"


@functools.cache
def samples() -> tuple[Tensor, Tensor]:
    """400 samples of the shipped teacher and their labels."""
    labels = torch.arange(400) % 10
    sampler = fs.Sampler(fs.zoo.load("fashion-mnist"), steps=8, end="zero")
    return sampler(n=400, seed=0, labels=labels), labels


def needs_images(split: str = "heldout") -> tuple[Tensor, Tensor]:
    try:
        return fashion_mnist(split)  # type: ignore[arg-type]
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_samples_show_their_class() -> None:
    """Judged by a network that is right about 92 of 100 held-out images."""
    x, labels = samples()
    assert x.shape == (400, *SHAPE)
    accuracy = (logits(x, EXTRACTOR).argmax(dim=1) == labels).double().mean()
    assert accuracy > 0.8


def test_samples_are_nearer_to_the_data_than_disturbed_ones() -> None:
    x, _ = samples()
    reference = load_images("fashion-mnist:train", SHAPE).reference(FeatureExtractor(EXTRACTOR), FOLDER, 500)

    def distance(images: Tensor) -> float:
        moments = GroupedMoments(64)
        moments.update(features(to_uint8(images), name=EXTRACTOR), range(len(images)))
        return reference.distance(moments.gaussian())

    own = distance(x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert own < distance(x + 0.1 * noise) < distance(x + 0.2 * noise)
    assert own < distance(torch.nn.functional.avg_pool2d(x, 3, 1, 1))
    assert own < distance(x.flip(-1))


@pytest.mark.parametrize("split", [pytest.param("train", marks=pytest.mark.slow), "heldout"])
def test_the_embedded_moments_are_those_of_the_images(split: str) -> None:
    images = to_uint8(needs_images(split)[0])
    embedded = load_images(f"fashion-mnist:{split}", SHAPE)
    assert torch.equal(next(embedded.batches(100)), images[:100])
    f = features(images, name=EXTRACTOR)
    gaussian = embedded.reference(FeatureExtractor(EXTRACTOR), FOLDER, 500).gaussian
    assert gaussian.n == len(images) == embedded.n
    torch.testing.assert_close(gaussian.mean, f.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(gaussian.cov, torch.cov(f.T), rtol=0, atol=1e-4)


def test_without_the_images_their_lack_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("FASTSAMPLE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"download=True\) fetches it"):
        next(load_images("fashion-mnist:train", SHAPE).batches(10))
    with pytest.raises(ValueError, match="its images are"):
        load_images("fashion-mnist:train", (1, 8, 8))


def test_training_a_flow_in_16_bits_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = torch.randint(0, 2, (10, 1, 7, 7), generator=generator).float() * 2 - 1
    labels = torch.arange(200) % 10
    images = shapes[labels].repeat_interleave(4, -1).repeat_interleave(4, -2)
    config = UNET_CONFIG | {"channels": 16}
    net, losses = train_unet(
        images, labels, Flow(), config, prediction="flow", precision=torch.bfloat16, steps=120, batch_size=32
    )
    loss = denoising_loss(net, images, labels, Flow(), "flow", repeats=2)
    assert loss < 0.7 * losses[0]
    assert next(net.parameters()).dtype == torch.float32
