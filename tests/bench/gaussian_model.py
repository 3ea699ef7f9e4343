"""A model whose every solution is known, for tests of the harness: one Gaussian, with its exact eps."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastsample as fs

SHAPE = (1, 8, 8)


def register_extractor() -> None:
    """Make the extractor ``fd-blocks``, sixteen block means, known to torch-fidelity."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

    class Blocks(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("blocks",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "blocks"

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (nn.functional.adaptive_avg_pool2d(x.float().mean(1, keepdim=True), 4).flatten(1) / 64,)

    if "blocks" not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor("blocks", Blocks)


register_extractor()


class GaussianNet(nn.Module):
    """eps of x0 ~ N(mean, scale²): sigma (x - alpha mean) / (alpha² scale² + sigma²)."""

    def __init__(self, process: fs.Process, scale: float) -> None:
        super().__init__()
        self.process = process
        self.scale = scale
        ramp = torch.linspace(-0.5, 0.5, 8)
        self.register_buffer("mean", ramp[None, :, None] * ramp[None, None, :].sign())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (f(t[0].double()).to(x) for f in (self.process.alpha, self.process.sigma))
        return sigma * (x - alpha * self.mean) / (alpha**2 * self.scale**2 + sigma**2)

    def images(self, n: int, seed: int) -> Tensor:
        """True samples, ``[n, 1, 8, 8]``."""
        return self.mean + self.scale * torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


class KilledNet(GaussianNet):
    """Kills its own process, as the kernel would, at the given call."""

    calls = 0

    def __init__(self, process: fs.Process, scale: float, log: str, kill_at: int) -> None:
        super().__init__(process, scale)
        self.log, self.kill_at = log, kill_at

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        type(self).calls += 1
        time.sleep(float(os.environ.get("CALL_SECONDS", "0")))
        with open(self.log, "a") as file:
            file.write(f"{len(x)}\n")
        if self.calls == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x, t)


class NanNet(GaussianNet):
    """Returns NaN from the given call on (a class attribute: not part of the model's identity)."""

    fail_from = 0
    calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x, t) * (float("nan") if 0 < self.fail_from <= self.calls else 1.0)


def make_model(scale: float = 0.2) -> fs.Denoiser:
    """The model for ``model._target_``."""
    process = fs.VP.linear()
    return fs.wrap(GaussianNet(process, scale), process, prediction="eps", sample_shape=SHAPE)


def make_killed(log: str, kill_at: int = 0) -> fs.Denoiser:
    """The same, counting its calls in a file and killing itself."""
    process = fs.VP.linear()
    net = KilledNet(process, 0.2, log, 0)
    # what does not change the results is not part of the model's identity
    net.kill_at = int(os.environ.get("KILL_AT", kill_at))
    net.log = os.environ.get("CALL_LOG", log)
    return fs.wrap(net, process, prediction="eps", sample_shape=SHAPE)


def make_nan() -> fs.Denoiser:
    """The same, with a fault."""
    process = fs.VP.linear()
    return fs.wrap(NanNet(process, 0.2), process, prediction="eps", sample_shape=SHAPE)


def make_bright(scale: float = 0.5, shift: float = 0.5) -> fs.Denoiser:
    """Its samples are images times ``scale`` plus ``shift``: in another range than [-1, 1]."""
    process = fs.VP.linear()
    net = GaussianNet(process, 0.05 * scale)
    net.mean = net.mean * scale + shift  # type: ignore[has-type]
    return fs.wrap(net, process, prediction="eps", sample_shape=SHAPE)


def make_nonsense() -> int:
    """Not a model."""
    return 3


def write_images(folder: Path, n: int = 400, seed: int = 7) -> Path:
    """A folder of true samples."""
    from PIL import Image

    from fastsample.metrics import to_uint8

    folder.mkdir(parents=True, exist_ok=True)
    net = make_model().net
    for i, image in enumerate(to_uint8(net.images(n, seed))):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:04d}.png")
    return folder
