"""The trained models: data split, network, training script, and the quality of the shipped weights."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import fastsample.zoo as zoo
from fastsample.process import VP
from fastsample.zoo.data import digits
from fastsample.zoo.features import (
    NAME,
    NUM_FEATURES,
    features,
    logits,
    register_with_torch_fidelity,
    to_unit_range,
)
from fastsample.zoo.train_digits import CLASSIFIER_CONFIG, UNET_CONFIG, main
from fastsample.zoo.training import (
    denoising_loss,
    train_classifier,
    train_unet,
)
from fastsample.zoo.unet import UNet, timestep_embedding
from fastsample.zoo.weights import FOLDER, load_weights


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of features ``[N, d]`` (Heusel et al. 2017)."""
    mean_a, mean_b, cov_a, cov_b = a.mean(dim=0), b.mean(dim=0), torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


@functools.cache
def samples() -> tuple[Tensor, Tensor]:
    """600 samples of the shipped UNet, by Heun's method on the ODE in sigma / alpha, and their labels."""
    denoiser, labels = zoo.load("digits"), torch.arange(600) % 10
    process = denoiser.process
    t = 999 * (1 - torch.linspace(0, 1, 26, dtype=torch.float64)) ** 1.5
    alpha, rho = process.alpha(t), process.rho(t)
    noise = torch.randn(600, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def slope(i: int, y: Tensor) -> Tensor:
        return (y - denoiser(alpha[i].float() * y, t[i], labels=labels)) / rho[i].float()

    y = noise / alpha[0].float()
    for i in range(25):
        h, first = (rho[i + 1] - rho[i]).float(), slope(i, y)
        y = y + h / 2 * (first + slope(i + 1, y + h * first))
    return denoiser(alpha[-1].float() * y, t[-1], labels=labels), labels


# -- data ----------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_complete() -> None:
    (train, train_labels), (held, held_labels), (everything, labels) = (
        digits("train"),
        digits("heldout"),
        digits("all"),
    )
    assert (len(train), len(held), len(everything)) == (1201, 596, 1797)
    assert train.dtype == torch.float32
    assert train.shape[1:] == (1, 8, 8)
    assert (float(train.min()), float(train.max())) == (-1.0, 1.0)
    rows = {tuple(x.flatten().tolist()) for x in everything}
    assert rows == {tuple(x.flatten().tolist()) for x in torch.cat([train, held])}
    assert not {tuple(x.flatten().tolist()) for x in train} & {tuple(x.flatten().tolist()) for x in held}
    assert torch.equal(train_labels.bincount() + held_labels.bincount(), labels.bincount())
    assert bool((held_labels.bincount() * 3 - labels.bincount()).abs().le(2).all())
    assert len(held) >= 24 * NUM_FEATURES
    with pytest.raises(ValueError, match="split"):
        digits("test")  # type: ignore[arg-type]


# -- the network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "channels", "options"),
    [
        (8, 1, {"patch": 2}),
        (28, 1, {"multipliers": (1, 2, 2), "attention": (7, 14), "blocks": 2}),
        (32, 3, {"multipliers": (1, 2, 3), "attention": (4,), "patch": 2, "num_classes": None}),
    ],
)
def test_unet_shapes_and_gradients(size: int, channels: int, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    net = UNet(size, channels, channels=16, **options)  # type: ignore[arg-type]
    for p in net.parameters():  # away from the zero initialisation, which hides everything
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(2, channels, size, size)
    out = net(x, torch.tensor([3.5, 900.0]))
    assert out.shape == x.shape
    out.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


def test_unet_conditions_act_and_rows_are_independent() -> None:
    net = zoo.load("digits").net
    x, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500.0)
    labels = torch.tensor([1, 2, 3, 10])
    out = net(x, t, labels)
    torch.testing.assert_close(out[3:], net(x, t)[3:])  # no labels: the null class
    assert (out[:3] - net(x, t)[:3]).abs().amax(dim=(1, 2, 3)).min() > 1e-2
    torch.testing.assert_close(out[1:2], net(x[1:2], t.expand(1), labels[1:2]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net(x, t + 0.5, labels), out, rtol=0.1, atol=0.05)  # continuous in time
    assert not torch.equal(net(x, t + 0.5, labels), out)


def test_unet_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="image_size=10"):
        UNet(10, 1, multipliers=(1, 2, 2))
    with pytest.raises(ValueError, match="attention"):
        UNet(8, 1, attention=(5,))
    with pytest.raises(ValueError, match="shape"):
        UNet(8, 1, channels=8)(torch.zeros(1, 1, 16, 16), torch.zeros(1))
    with pytest.raises(ValueError, match="without classes"):
        UNet(8, 1, channels=8, num_classes=None)(
            torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1).long()
        )


def test_timestep_embedding_is_the_papers() -> None:
    emb = timestep_embedding(torch.tensor([2.0], dtype=torch.float64), 4)
    expected = torch.tensor([[2.0, 2.0 / 100]], dtype=torch.float64)  # frequencies 10000^(-i/2)
    torch.testing.assert_close(emb, torch.cat([expected.cos(), expected.sin()], dim=1))


# -- training ------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_repeats() -> None:
    images, labels = digits("train")
    config = {**UNET_CONFIG, "channels": 16}
    runs = [
        train_unet(images, labels, VP.linear(), config, steps=60, batch_size=64, lr=5e-3, log_every=0)
        for _ in range(2)
    ]
    (net, losses), (again, _) = runs
    assert abs(losses[0] - 1) < 0.1  # the zero-initialised head predicts 0
    assert sum(losses[-10:]) / 10 < 0.75
    pairs = zip(net.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert denoising_loss(net, images[:200], labels[:200], VP.linear()) < 0.95


def test_classifier_training_learns_and_standardises_the_features() -> None:
    images, labels = digits("train")
    net = train_classifier(images, labels, {**CLASSIFIER_CONFIG, "channels": 8}, steps=120, batch_size=64)
    assert (net(images).argmax(dim=1) == labels).double().mean() > 0.8
    with torch.no_grad():
        f = net.features(images)
    torch.testing.assert_close(f.mean(dim=0), torch.zeros(NUM_FEATURES), atol=1e-4, rtol=0)
    torch.testing.assert_close(f.var(dim=0), torch.ones(NUM_FEATURES), atol=1e-2, rtol=0)


def test_training_command_writes_loadable_weights(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    main(
        ["--part", "unet", "--out", str(tmp_path), "--steps", "2", "--threads", str(torch.get_num_threads())]
    )
    tensors, config = load_weights("digits_unet", tmp_path)
    UNet(**config).load_state_dict(tensors)
    assert "eps loss on heldout" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="train_digits"):
        load_weights("digits_features", tmp_path)


# -- the shipped weights -------------------------------------------------------------------------------------


def test_weights_are_small() -> None:
    files = list(FOLDER.glob("*.safetensors"))
    networks = {f"{name}_{part}" for name in ("digits", "fashion") for part in ("unet", "features")}
    assert {f.stem for f in files} == networks | {"fashion_moments"}
    assert sum(f.stat().st_size for f in files) <= 16 * 2**20


def test_teacher_predicts_noise_on_unseen_images() -> None:
    denoiser = zoo.load("digits")
    images, labels = digits("heldout")
    conditional = denoising_loss(denoiser.net, images, labels, denoiser.process, repeats=2)  # type: ignore[arg-type]
    null = denoising_loss(denoiser.net, images, torch.full_like(labels, 10), denoiser.process, repeats=2)  # type: ignore[arg-type]
    assert conditional < 0.082
    assert null < 0.092
    assert conditional < null


def test_extractor_accuracy_on_unseen_images() -> None:
    images, labels = digits("heldout")
    assert (logits(images).argmax(dim=1) == labels).double().mean() >= 0.97


def test_teacher_samples_are_digits() -> None:
    x, labels = samples()
    assert (logits(x).argmax(dim=1) == labels).double().mean() > 0.97
    train, heldout, drawn = features(digits("train")[0]), features(digits("heldout")[0]), features(x)
    assert frechet(drawn, heldout) < 0.4
    assert frechet(train, heldout) < 0.1


def test_distance_grows_with_damage() -> None:
    train, (held, _) = features(digits("train")[0]), digits("heldout")
    noise = torch.randn(held.shape, generator=torch.Generator().manual_seed(0))
    distances = [frechet(features(held + s * noise), train) for s in (0.0, 0.1, 0.2, 0.4)]
    assert distances == sorted(distances)
    assert distances[-1] > 10 * distances[0]


# -- features ------------------------------------------------------------------------------------------------


def test_features_are_the_same_for_floats_and_bytes() -> None:
    images = digits("heldout")[0][:50]
    grey = ((images + 1) * 127.5).round().to(torch.uint8)
    f = features(images, batch_size=7)
    assert f.dtype == torch.float64
    assert f.shape == (50, NUM_FEATURES)
    for other in (grey, grey.expand(-1, 3, -1, -1)):
        torch.testing.assert_close(features(other), f, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "error"),
    [
        (torch.zeros(2, 1, 28, 28), ValueError),
        (torch.zeros(2, 3, 8, 8), ValueError),
        (torch.zeros(2, 2, 8, 8, dtype=torch.uint8), ValueError),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), TypeError),
    ],
)
def test_features_refuse_other_images(images: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="images"):
        to_unit_range(images)


def test_torch_fidelity_computes_the_same_distance() -> None:
    import torch_fidelity

    assert NAME in register_with_torch_fidelity() == register_with_torch_fidelity()  # twice is once

    class Bytes(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __init__(self, images: Tensor) -> None:
            self.images = ((images + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, i: int) -> Tensor:
            return self.images[i]

    train, held = digits("train")[0], digits("heldout")[0]
    metrics = torch_fidelity.calculate_metrics(
        input1=Bytes(train),
        input2=Bytes(held),
        feature_extractor=NAME,
        fid=True,
        cuda=False,
        cache=False,
        verbose=False,
    )
    expected = frechet(features(train), features(held))
    assert metrics["frechet_inception_distance"] == pytest.approx(expected, rel=1e-3)


# -- the registry --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "digits-mixture"])
def test_load(name: str) -> None:
    assert name in zoo.names()
    denoiser = zoo.load(name)
    assert denoiser.sample_shape == (1, 8, 8)
    assert denoiser.prediction == "eps"
    assert denoiser.process == VP.linear()
    images, labels = digits("heldout")
    x, labels = images[:64], labels[:64]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    alpha, sigma = float(denoiser.process.alpha(300)), float(denoiser.process.sigma(300))
    x0 = denoiser(alpha * x + sigma * noise, 300, labels=labels)
    assert x0.dtype == torch.float32
    error = (x0 - x).square().mean()
    assert error < 0.2 * (sigma / alpha) ** 2  # the error of x_t / alpha, which knows nothing of digits
    wrong = denoiser(alpha * x + sigma * noise, 300, labels=(labels + 1) % 10)
    assert error < (wrong - x).square().mean()
    guided = denoiser.guided(2.0, null={"labels": 10})(alpha * x + sigma * noise, 300, labels=labels)
    assert (guided - x0).abs().max() > 1e-3


def test_load_unknown() -> None:
    with pytest.raises(ValueError, match="did you mean 'digits-mixture'"):
        zoo.load("digit-mixtures")


def test_importing_the_zoo_is_light() -> None:
    code = (
        "import sys\n"
        "import fastsample.zoo, fastsample.zoo.features, fastsample.zoo.mixture, fastsample.zoo.data\n"
        "fastsample.zoo.names()\n"
        "heavy = {'sklearn', 'torch_fidelity', 'scipy', 'matplotlib', 'diffusers', 'hydra', 'triton'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
