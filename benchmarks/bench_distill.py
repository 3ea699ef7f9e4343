"""What the trainer costs beside the networks: its updates against the bare passes that each method needs at least.

    pytest benchmarks/bench_distill.py -o addopts= --benchmark-enable -s

The bare loop is forward and backward alone, of the same networks on the same batch size: no optimiser, no averages,
no clipping, no data, no noise. Both are taken in turn, several times; the ratio is that of the medians of their CPU
time with one thread, which other work on the machine disturbs least.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastsample as fs
from fastsample import distill
from fastsample.zoo.unet import UNet

LIMIT = 1.10
ROUNDS, UPDATES = 6, 6
BATCHES = {
    "digits": 256,
    "larger": 48,
}  # the trainer's default, and what the larger network takes as long for
SETTINGS: dict[str, dict[str, Any]] = {
    "knowledge": {"pairs": 2048, "pair_steps": 1},
    "reflow": {"pairs": 2048, "pair_steps": 1},
}


def digits() -> tuple[fs.Denoiser, Any]:
    return fs.zoo.load("digits"), "digits"


def larger() -> tuple[fs.Denoiser, Any]:
    """A network for 28x28 images."""
    torch.manual_seed(0)
    net = UNet(28, 1, channels=32, multipliers=[1, 2], blocks=1)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(512, 1, 28, 28, generator=generator) * 2 - 1
    return fs.wrap(net, fs.VP.linear(), "eps", sample_shape=(1, 28, 28)), (x, torch.arange(512) % 10)


class Bare:
    """The passes of each method, on inputs that are there already."""

    def __init__(self, method: distill.Method, size: int) -> None:
        self.method = method
        self.x = torch.randn(size, *method.sample_shape)
        self.t, self.labels = torch.linspace(0, 999, size), torch.arange(size) % 10
        student = method.nets["student"]
        self.told = {"step": torch.full((size,), 0.5)} if hasattr(student, "adapter") else {}

    def net(self, role: str, share: float = 1.0, **given: Any) -> Tensor:
        n = round(share * len(self.x))
        net: Any = self.method.teacher.net if role == "teacher" else self.method.nets[role]
        told = {} if role == "teacher" else {k: v[:n] for k, v in self.told.items()}
        return net(given.pop("x", self.x)[:n], self.t[:n], labels=self.labels[:n], **told, **given)

    def frozen(self, *roles: str, share: float = 1.0) -> None:
        with torch.no_grad():
            for role in roles:
                self.net(role, share)

    def learn(self, role: str, loss: Tensor | None = None) -> None:
        (self.net(role).square().mean() if loss is None else loss).backward()
        self.method.nets[role].zero_grad(set_to_none=True)

    def derivative(self) -> None:
        tangent: Any = self.method._tangent  # type: ignore[attr-defined]
        if tangent.mode == "secant":
            self.frozen("student", "student")
            return
        names = list(self.told)

        def network(x: Tensor, t: Tensor, *told: Tensor) -> Tensor:
            net: Any = self.method.nets["student"]
            return net(x, t, labels=self.labels, **dict(zip(names, told, strict=True)))

        inputs = (self.x, self.t, *self.told.values())
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            torch.func.jvp(network, inputs, tuple(torch.ones_like(v) for v in inputs))

    # -- one update of each method ---------------------------------------------------------------------------

    def knowledge(self) -> None:
        self.learn("student")

    reflow = knowledge

    def consistency(self) -> None:
        passes = getattr(self.method, "order", 1) * self.method.substeps
        self.frozen(*["teacher"] * passes, "target")
        self.learn("student")

    lcm = consistency

    def ect(self) -> None:
        self.frozen("student")
        self.learn("student")

    ict = ect

    def scm(self) -> None:
        self._taught()
        self.derivative()
        self.learn("student")

    def _taught(self, share: float = 1.0) -> None:
        """The teacher's velocity, where it is not that of the data."""
        if self.method.from_teacher:  # type: ignore[attr-defined]
            self.frozen("teacher", share=share)

    meanflow = scm

    def shortcut(self) -> None:
        method: Any = self.method
        # the method draws for each sample, so that no two updates split alike
        level = (torch.rand(len(self.x)) * (math.log2(method.finest) + 1)).long()
        jumps = torch.rand(len(self.x)) < method.bootstrap
        share, smallest = (float(rows.float().mean()) for rows in (jumps, jumps & (level == level.max())))
        self._taught(1 - share)
        self.frozen(*["teacher" if method.from_teacher else "target"] * 4, share=smallest)  # two Heun steps
        self.frozen("target", "target", share=share - smallest)
        self.learn("student")

    def progressive(self) -> None:
        self.frozen("teacher", "teacher")
        self.learn("student")

    def _judged(self, *passes: Tensor) -> Tensor:
        """What the fake network makes of some states and, where there is a discriminator, what that says."""
        with self.method.judging() as logits:  # type: ignore[attr-defined]
            outs = [self.net("fake", x=x) for x in passes]
        return outs[0].square().mean() + sum(v.mean() for v in logits)

    def _fake(self) -> None:
        self.frozen("student")
        with self.method.training("fake"):
            self.learn("fake", self._judged(*[self.x] * (2 if self.method.gan else 1)))  # type: ignore[attr-defined]

    def sid(self) -> None:
        self._fake()
        with self.method.training("student"):
            x = self.net("student")
            self.learn("student", self.net("teacher", x=x).square().mean() + self._judged(x))

    def dmd2(self) -> None:
        ratio = self.method.ratio  # type: ignore[attr-defined]
        for _ in range(ratio):
            self._fake()
        with self.method.training("student"):
            x = self.net("student")
            self.frozen("teacher")
            self.learn("student", self._judged(x))


def updates_of(trainer: distill.Trainer, folder: Path) -> list[float]:
    """CPU seconds of each update, data, averages and log included."""
    at: list[float] = []
    roles = type(trainer.method).roles

    def listening(step: int) -> tuple[str, ...]:
        if not at or step > len(at) - 1:
            at.append(time.process_time())
        return roles(trainer.method, step)

    trainer.method.roles = listening  # type: ignore[method-assign]
    trainer.fit(folder)
    return [b - a for a, b in pairwise(at)]


@pytest.mark.parametrize("make", [digits, larger], ids=["8x8", "28x28"])
@pytest.mark.parametrize("name", sorted(distill.METHODS))
def test_overhead(
    name: str, make: Callable[[], tuple[fs.Denoiser, Any]], benchmark: Any, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    teacher, data = make()
    size = BATCHES[make.__name__]
    kind = getattr(distill, distill.METHODS[name][1])
    method = kind(teacher, convert=0, **SETTINGS.get(name, {}))
    period = getattr(method, "ratio", 1)
    steps = UPDATES * period + 1
    bare = Bare(method, size)
    once = getattr(bare, name)
    once()
    spent, needed = [], []
    for i in range(ROUNDS):
        trainer = distill.Trainer(
            method,
            data,
            steps=steps,
            batch_size=size,
            device="cpu",
            evaluate_every=10 * steps,
            progress=False,
        )
        whole = updates_of(trainer, tmp_path / str(i))[period:]  # the first ones warm up
        spent += [sum(whole[k : k + period]) for k in range(0, len(whole) - period + 1, period)]
        for _ in range(UPDATES):
            began = time.process_time()
            once()
            needed.append(time.process_time() - began)
    ratio = statistics.median(spent) / statistics.median(needed)
    speed = period * size / statistics.median(spent)
    benchmark.extra_info |= {"trainer over bare": ratio, "images/s": speed}
    benchmark.pedantic(once, rounds=1)
    print(f"\n{name} {make.__name__}: {speed:.0f} images/s, trainer over bare {ratio:.3f}")
    assert ratio <= LIMIT
