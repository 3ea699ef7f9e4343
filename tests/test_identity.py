"""What a model is known by: the same for every number of threads, another for every other model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsample as fs
from fastsample.identity import Probe, probe

LABELS = {"labels": torch.arange(3)}


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def known(denoiser: fs.Denoiser, conditions: Any = LABELS) -> Probe:
    return probe(denoiser, (3, *(denoiser.sample_shape or (1, 8, 8))), conditions)


def plain(factor: float) -> fs.Denoiser:
    """A network without weights."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        return factor * x / (1 + t.view(-1, 1, 1, 1) / 1000)

    return fs.wrap(net, fs.VP.linear(), prediction="eps")


def test_the_number_of_threads_does_not_count(threads: None) -> None:
    denoiser = fs.zoo.load("fashion-mnist")  # whose last bits depend on it
    probes = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        probes.append(known(denoiser))
    assert all(p.differs(probes[0]) is None for p in probes)
    off = [abs(a - b) for a, b in zip(sum(probes[1].outputs, ()), sum(probes[0].outputs, ()), strict=True)]
    assert max(off) < 1e-4  # far below the tolerance


def test_outputs_that_are_a_little_off_are_the_same(threads: None) -> None:
    assert known(plain(1.0), {}).differs(known(plain(1 + 1e-5), {})) is None
    why = known(plain(1.0), {}).differs(known(plain(1.01), {}))
    assert why is not None
    assert "off by 0.0" in why
    assert "over 0.001" in why


def test_other_weights_guidance_or_meaning_are_another_model() -> None:
    denoiser = fs.zoo.load("digits")
    one = known(denoiser)
    guided = known(denoiser.guided(2.0, null={"labels": 10}))
    assert guided.differs(one) is not None
    assert guided.differs(known(denoiser.guided(2.001, null={"labels": 10}))) is not None
    assert guided.differs(known(denoiser.guided(2.0, null={"labels": 10}, batched=False))) is None
    assert guided.differs(known(denoiser.guided(2.0, null={"labels": 3}))) is not None
    assert one.differs(known(denoiser.replace(prediction="x0"))) is not None
    assert one.differs(known(denoiser, {"labels": torch.arange(3) + 1})) is not None
    with torch.no_grad():
        next(iter(denoiser.net.parameters())).mul_(1 + 1e-5)  # type: ignore[attr-defined]
    assert "weights" in str(one.differs(known(denoiser)))


def test_precision_decides_how_near_is_the_same() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, padding=1))

    def model(dtype: torch.dtype) -> fs.Denoiser:
        return fs.wrap(lambda x, t: net(x.float()).to(x.dtype), fs.VP.linear(), prediction="eps", dtype=dtype)

    assert known(model(torch.float32), {}).tolerance == 1e-3
    assert known(model(torch.bfloat16), {}).tolerance == 2e-2
    assert known(model(torch.bfloat16), {}).differs(known(model(torch.float32), {})) is None


def test_written_and_read() -> None:
    one = known(plain(1.0), {})
    again = Probe.from_dict(json.loads(json.dumps(one.to_dict())))
    assert again == one
    assert again.digest == one.digest


def test_a_network_that_answers_differently_is_refused() -> None:
    noisy = fs.wrap(lambda x, t: x + torch.rand_like(x), fs.VP.linear(), prediction="eps")
    with pytest.raises(ValueError, match="differently each time"):
        known(noisy, {})
