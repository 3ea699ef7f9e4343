"""Denoisers: what the network is told and given, what its output may be, guidance, conditions, errors."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tables import PROCESSES
from torch import Tensor

import fastsample as fs
from fastsample.denoiser import as_conditions, select

CPU = torch.device("cpu")


def spread(value: Tensor, x: Tensor) -> Tensor:
    return value.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def labelled(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return torch.tanh(x) * spread(1 + 0.1 * labels, x) + spread(t, x) / 1000


def x_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def output(denoiser: fs.Denoiser, x: Tensor, t: float = 500.0, rho: float = 1.0, **conditions: Any) -> Tensor:
    bound = denoiser.bind(x.shape[0], as_conditions(conditions, CPU, x.shape[0]), CPU)
    return bound(x, torch.full((x.shape[0],), t), rho)


# -- meaning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow", "score"])
def test_gives_the_clean_sample(prediction: str, process: fs.Process) -> None:
    x0, eps = x_of(2, 3, dtype=torch.float64), x_of(2, 3, dtype=torch.float64).flip(1)
    t = process.t_end + 0.6 * (process.t_start - process.t_end)
    alpha, sigma = process.alpha(t), process.sigma(t)
    exact = {
        "eps": eps,
        "x0": x0,
        "v": alpha * eps - sigma * x0,
        "flow": eps - x0,
        "score": -eps / sigma,
    }[prediction]
    denoiser = fs.wrap(lambda x, t: exact, process, prediction)
    torch.testing.assert_close(denoiser(alpha * x0 + sigma * eps, t), x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("time_input", "expected"),
    [
        ("t", lambda t, p: t),
        ("1000t", lambda t, p: 1000 * t),
        ("1-t", lambda t, p: 1 - t),
        ("sigma", lambda t, p: p.sigma(t) / p.alpha(t)),
        ("log_sigma", lambda t, p: (p.sigma(t) / p.alpha(t)).log()),
        ("c_noise", lambda t, p: (p.sigma(t) / p.alpha(t)).log() / 4),
        ("lam", lambda t, p: (p.alpha(t) / p.sigma(t)).log()),
        (lambda t, p: t**2 + p.t_start, lambda t, p: t**2 + p.t_start),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "edm", "flow"])
def test_what_the_network_is_told(time_input: Any, expected: Any, kind: str) -> None:
    process = PROCESSES[kind]()
    told: list[Tensor] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return x

    denoiser = fs.wrap(net, process, "v", time_input=time_input)
    sampler = fs.Sampler(denoiser, "ddim", 4, start=0.8 * process.t_start)
    sampler(shape=(3, 2), dtype=torch.float64)
    for got, t in zip(told, sampler.plan.times, strict=True):
        assert got.shape == (3,)
        assert got.dtype == torch.float64
        want = expected(torch.tensor(t, dtype=torch.float64), process)
        torch.testing.assert_close(got, want.expand(3), rtol=1e-12, atol=1e-12)


def test_a_network_with_a_table_gets_integers() -> None:
    table = torch.nn.Embedding(1000, 3)
    told: list[Tensor] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return table(t)

    denoiser = fs.wrap(net, fs.VP.linear(), quantize=True)
    plan = fs.Sampler(denoiser, "ddim", 7, grid="logsnr")
    plan(shape=(2, 3))
    assert [int(t[0]) for t in told] == list(plan.plan.times)
    assert all(t.dtype == torch.int64 for t in told)


def test_quantized_denoiser_moves_the_time_and_the_noise_level_together() -> None:
    told: list[float] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        told.append(float(t[0]))
        return torch.zeros_like(x)

    process = fs.VP.linear()
    denoiser = fs.wrap(net, process, quantize=[0, 250, 500, 750])
    x = x_of(1, 2, dtype=torch.float64)
    # eps = 0, so x0 = x / alpha at the level that the network was told
    torch.testing.assert_close(denoiser(x, 260.7), x / process.alpha(250.0))
    torch.testing.assert_close(denoiser(x, -1.0), x)
    assert told == [250, 0]


def test_low_precision_networks_keep_the_state_wide() -> None:
    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert x.dtype == torch.bfloat16
            assert t.dtype == torch.float32
            return self.weight * x

    denoiser = fs.wrap(Half(), fs.VP.linear())
    assert denoiser.dtype == torch.bfloat16
    assert fs.Sampler(denoiser, "ddim", 4)(shape=(2, 3)).dtype == torch.float32
    assert fs.Sampler(denoiser, "ddim", 4)(shape=(2, 3), dtype=torch.float64).dtype == torch.float64


def test_train_and_eval_are_left_alone() -> None:
    for training in (True, False):
        net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5)).train(training)
        fs.Sampler(fs.wrap(lambda x, t, net=net: net(x), fs.EDM()), "ddim", 3)(shape=(2, 3))
        fs.wrap(net, fs.EDM())
        assert all(module.training is training for module in net.modules())
        assert all(p.requires_grad for p in net.parameters())


# -- outputs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pack", [lambda out: SimpleNamespace(sample=out), lambda out: (out, 1), lambda out: [out]]
)
def test_outputs_of_other_libraries(pack: Any) -> None:
    x = x_of(2, 3)
    plain = output(fs.wrap(labelled, fs.VP.linear()), x, labels=torch.tensor([1, 2]))
    packed = fs.wrap(lambda x, t, labels: pack(labelled(x, t, labels)), fs.VP.linear())
    assert torch.equal(output(packed, x, labels=torch.tensor([1, 2])), plain)


def test_learned_variance_is_dropped() -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([torch.tanh(x), torch.full_like(x, 99.0)], dim=1)

    x = x_of(2, 3, 4, 4)
    denoiser = fs.wrap(net, fs.VP.linear(), learned_variance=True)
    assert torch.equal(output(denoiser, x), torch.tanh(x))
    plain = fs.Sampler(fs.wrap(lambda x, t: torch.tanh(x), fs.VP.linear()), "exp_adams", 5)
    torch.testing.assert_close(
        fs.Sampler(denoiser, "exp_adams", 5)(shape=(2, 3, 4, 4)), plain(shape=(2, 3, 4, 4))
    )
    with pytest.raises(ValueError, match=r"\(2, 6, 4, 4\).*learned_variance=True"):
        output(fs.wrap(net, fs.VP.linear()), x)


@pytest.mark.parametrize(
    ("net", "error", "message"),
    [
        (lambda x, t: x[:, :1], ValueError, r"returned shape \(2, 1, 4, 4\) for an input of \(2, 3, 4, 4\)"),
        (lambda x, t: x[0], ValueError, r"returned shape \(3, 4, 4\)"),
        (lambda x, t: None, TypeError, "returned NoneType; expected a tensor"),
        (lambda x, t: {"sample": x}, TypeError, "returned dict"),
    ],
)
def test_unusable_outputs(net: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        output(fs.wrap(net, fs.VP.linear()), x_of(2, 3, 4, 4))


# -- conditions -----------------------------------------------------------------------------------------


def test_conditions_of_any_nesting() -> None:
    seen: dict[str, Any] = {}

    def net(x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        seen.update(conditions)
        return x

    x = x_of(3, 2)
    output(
        fs.wrap(net, fs.VP.linear(), conditions={"common": 4, "text": "overridden"}),
        x,
        text={"tokens": [np.arange(6).reshape(3, 2), (torch.ones(3), None)], "name": "a"},
        labels=[1, 2, 3],
        weights=(0.5, 0.25, 1.0),
        size=[512, 512],
    )
    assert seen["common"] == 4
    assert torch.equal(seen["text"]["tokens"][0], torch.arange(6).reshape(3, 2))
    assert isinstance(seen["text"]["tokens"][1], tuple)
    assert seen["text"]["tokens"][1][1] is None
    assert torch.equal(seen["labels"], torch.tensor([1, 2, 3]))  # one for each sample
    assert seen["weights"] == (0.5, 0.25, 1.0)  # tuples are the caller's own
    assert seen["size"] == [512, 512]


def test_select_takes_what_belongs_to_the_samples() -> None:
    conditions = {
        "labels": torch.arange(5),
        "nested": [{"a": torch.arange(10).reshape(5, 2)}, (torch.arange(4),)],
        "prompts": ["a", "b", "c", "d", "e"],
        "scale": 2.0,
    }
    part = select(conditions, slice(1, 3), 5)
    assert part["labels"].tolist() == [1, 2]
    assert part["nested"][0]["a"].tolist() == [[2, 3], [4, 5]]
    assert part["nested"][1][0].tolist() == [0, 1, 2, 3]
    assert part["prompts"] == ["b", "c"]
    assert part["scale"] == 2.0


@pytest.mark.parametrize("kind", ["tensor", "numpy", "list"])
def test_labels_in_chunks(kind: str) -> None:
    labels = torch.arange(7) % 3
    given = {"tensor": labels, "numpy": labels.numpy(), "list": labels.tolist()}[kind]
    denoiser = fs.wrap(labelled, fs.VP.linear(), guidance=fs.Guidance(2.0, null={"labels": 10}))
    sampler = fs.Sampler(denoiser, "ddim", 3)
    whole = sampler(shape=(7, 2), labels=labels)
    assert torch.equal(sampler(shape=(7, 2), labels=given), whole)
    assert torch.equal(sampler(shape=(7, 2), labels=given, batch_size=2), whole)


# -- guidance -------------------------------------------------------------------------------------------


def guided(scale: float = 3.0, **settings: Any) -> fs.Denoiser:
    return fs.wrap(labelled, fs.VP.linear(), guidance=fs.Guidance(scale, null={"labels": 10}, **settings))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 2.0, 7.5])
def test_guidance_is_its_definition(scale: float, batched: bool) -> None:
    x, labels = x_of(3, 2, 4), torch.tensor([1, 5, 2])
    t = torch.full((3,), 500.0)
    cond, null = labelled(x, t, labels), labelled(x, t, torch.full((3,), 10))
    got = output(guided(scale, batched=batched), x, labels=labels)
    torch.testing.assert_close(got, null + scale * (cond - null), rtol=1e-5, atol=1e-5)


def test_scale_one_is_the_conditional_model_alone() -> None:
    x, labels = x_of(3, 2, 4), torch.tensor([1, 5, 2])
    bound = guided(1.0).bind(3, {"labels": labels}, CPU)
    t = torch.full((3,), 500.0)
    assert torch.equal(bound(x, t, 1.0), labelled(x, t, labels))
    assert (bound.evaluations, bound.rows_per_sample) == (1, 1)


@pytest.mark.parametrize("batched", [True, False])
def test_rows_are_counted_and_the_interval_is_respected(batched: bool) -> None:
    x, labels = x_of(3, 2, 4), torch.tensor([1, 5, 2])
    bound = guided(3.0, interval=(0.5, 2.0), batched=batched).bind(3, {"labels": labels}, CPU)
    t = torch.full((3,), 500.0)
    for rho, acts in ((0.4, False), (0.5, True), (1.0, True), (2.0, True), (2.1, False), (math.inf, False)):
        before = bound.rows_per_sample
        out = bound(x, t, rho)
        assert bound.rows_per_sample - before == 1 + acts
        assert torch.equal(out, labelled(x, t, labels)) is not acts
    assert bound.evaluations == 6


def test_rescale_pulls_the_standard_deviation_back() -> None:
    x, labels = x_of(3, 2, 4), torch.tensor([1, 5, 2])
    t = torch.full((3,), 500.0)
    cond = labelled(x, t, labels).flatten(1)
    plain = output(guided(6.0), x, labels=labels).flatten(1)
    full = output(guided(6.0, rescale=1.0), x, labels=labels).flatten(1)
    half = output(guided(6.0, rescale=0.5), x, labels=labels).flatten(1)
    torch.testing.assert_close(full.std(1), cond.std(1))
    torch.testing.assert_close(half, (plain + full) / 2)


@pytest.mark.parametrize(
    ("cond", "null"),
    [
        (torch.tensor([1, 2, 3]), 10),
        (torch.tensor([1, 2, 3]), torch.tensor(10)),
        (torch.tensor([1, 2, 3]), torch.tensor([10])),
        (torch.tensor([1, 2, 3]), torch.tensor([10, 10, 10])),
        (torch.tensor([1, 2, 3]), np.array([10, 10, 10])),
        (np.array([1, 2, 3]), 10),
        ([1, 2, 3], 10),
        (4, 10),
        (torch.tensor([4]), torch.tensor([10])),
    ],
    ids=str,
)
def test_two_calls_and_one_doubled_batch_are_equal(cond: Any, null: Any) -> None:
    x = x_of(3, 2, 4)
    results = [
        output(
            fs.wrap(labelled, fs.VP.linear(), guidance=fs.Guidance(3.0, null={"labels": null}, batched=b)),
            x,
            labels=cond,
        )
        for b in (True, False)
    ]
    assert torch.equal(*results)
    labels = torch.as_tensor(cond).expand(3)
    t = torch.full((3,), 500.0)
    low = labelled(x, t, torch.full((3,), 10))
    torch.testing.assert_close(results[0], low + 3 * (labelled(x, t, labels) - low))


def test_nested_conditions_under_guidance() -> None:
    def net(x: Tensor, t: Tensor, text: Any, shared: Tensor) -> Tensor:
        return x * spread(text["a"][0].mean(1) + text["b"], x) + shared.mean()

    x = x_of(3, 2, 4)
    cond = {"a": [torch.arange(6.0).reshape(3, 2)], "b": torch.tensor([1.0, 2.0, 3.0])}
    null = {"a": [torch.zeros(1, 2)], "b": 0.5}
    results = []
    for batched in (True, False):
        denoiser = fs.wrap(
            net, fs.VP.linear(), guidance=fs.Guidance(2.0, null={"text": null}, batched=batched)
        )
        results.append(output(denoiser, x, text=cond, shared=torch.ones(77)))
    assert torch.equal(*results)
    low, high = x * 0.5 + 1, x * spread(cond["a"][0].mean(1) + cond["b"], x) + 1
    torch.testing.assert_close(results[0], low + 2 * (high - low))


def test_one_prompt_for_all_samples() -> None:
    def net(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return x * spread(text.mean((1, 2)), x)

    x, prompt = x_of(4, 2), torch.full((1, 7, 5), 3.0)
    results = [
        output(
            fs.wrap(net, fs.EDM(), guidance=fs.Guidance(2.0, null={"text": torch.ones(1, 7, 5)}, batched=b)),
            x,
            text=prompt,
        )
        for b in (True, False)
    ]
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], x + 2 * (3 * x - x))


def test_guidance_with_a_network_that_overwrites_its_output() -> None:
    buffer = torch.empty(3, 2, 4)

    def static(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return buffer.copy_(labelled(x, t, labels))

    x, labels = x_of(3, 2, 4), torch.tensor([1, 5, 2])
    denoiser = fs.wrap(static, fs.VP.linear(), guidance=fs.Guidance(3.0, null={"labels": 10}, batched=False))
    torch.testing.assert_close(
        output(denoiser, x, labels=labels), output(guided(3.0, batched=False), x, labels=labels)
    )


def test_low_precision_outputs_are_combined_wide() -> None:
    def net(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return labelled(x, t, labels).bfloat16()

    x, labels = x_of(3, 2, 4), torch.tensor([1, 5, 2])
    t = torch.full((3,), 500.0)
    cond, null = (labelled(x, t, v).bfloat16().float() for v in (labels, torch.full((3,), 10)))
    for batched in (True, False):
        denoiser = fs.wrap(
            net, fs.VP.linear(), guidance=fs.Guidance(7.5, null={"labels": 10}, batched=batched)
        )
        got = output(denoiser, x, labels=labels)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, null + 7.5 * (cond - null), rtol=1e-5, atol=1e-5)


def test_step_sizes_are_doubled_too() -> None:
    def net(x: Tensor, t: Tensor, labels: Tensor, step: Tensor) -> Tensor:
        return labelled(x, t, labels) * spread(step, x)

    x, t, step = x_of(3, 2), torch.full((3,), 500.0), torch.tensor([0.5, 0.25, 1.0])
    results = [
        fs.wrap(net, fs.EDM(), guidance=fs.Guidance(2.0, null={"labels": 10}, batched=b)).bind(
            3, {"labels": torch.tensor([1, 2, 3])}, CPU
        )(x, t, 1.0, step)
        for b in (True, False)
    ]
    assert torch.equal(*results)


def test_guided_keeps_the_other_settings() -> None:
    denoiser = guided(2.0, interval=(0.1, 5.0), rescale=0.5)
    stronger = denoiser.guided(4.0)
    assert stronger.guidance == fs.Guidance(4.0, {"labels": 10}, (0.1, 5.0), 0.5)
    assert denoiser.guided(4.0, rescale=0.0).guidance == fs.Guidance(4.0, {"labels": 10}, (0.1, 5.0), 0.0)
    plain = fs.wrap(labelled, fs.VP.linear())
    assert plain.guided(2.0, null={"labels": 10}).guidance == fs.Guidance(2.0, {"labels": 10})
    assert denoiser.guidance == fs.Guidance(2.0, {"labels": 10}, (0.1, 5.0), 0.5)


# -- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fs.Guidance(2.0), r"guidance scale=2.0 needs null=\{\.\.\.\}"),
        (lambda: fs.Guidance(2.0, {"labels": 1}, interval=(2.0, 1.0)), r"interval=\(2.0, 1.0\)"),
        (lambda: fs.Guidance(2.0, {"labels": 1}, rescale=1.5), "rescale=1.5"),
        (lambda: fs.wrap(labelled, fs.EDM(), "epsilom"), "did you mean 'eps'"),
        (lambda: fs.wrap(labelled, fs.EDM(), time_input="sigmas"), "did you mean 'sigma'"),
        (lambda: fs.wrap(labelled, fs.EDM(), quantize=True), r"quantize=True needs.*quantize=\[\.\.\.\]"),
        (lambda: fs.wrap(labelled, fs.EDM(), quantize=[]), "levels is empty"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_types() -> None:
    with pytest.raises(TypeError, match="net=3 is not callable"):
        fs.wrap(3, fs.EDM())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"process='edm' must be a noise process such as fs\.VP\.linear"):
        fs.wrap(labelled, "edm")  # type: ignore[arg-type]


def test_null_without_a_condition() -> None:
    with pytest.raises(ValueError, match=r"null='labels' but the call has no condition.*pass labels="):
        output(guided(), x_of(3, 2))


def test_conditions_that_cannot_be_stacked() -> None:
    def net(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return x * text.mean()

    x, text = x_of(3, 2), torch.ones(3, 7)
    guidance = fs.Guidance(2.0, null={"text": torch.zeros(3, 5)})
    with pytest.raises(ValueError, match=r"cannot be stacked.*batched=False"):
        output(fs.wrap(net, fs.EDM(), guidance=guidance), x, text=text)
    separate = fs.Guidance(2.0, null={"text": torch.zeros(3, 5)}, batched=False)
    torch.testing.assert_close(output(fs.wrap(net, fs.EDM(), guidance=separate), x, text=text), 2 * x)


def test_time_input_of_the_wrong_shape() -> None:
    denoiser = fs.wrap(labelled, fs.EDM(), time_input=lambda t, p: t.sum())
    with pytest.raises(ValueError, match=r"time_input=.* gave \(\) for times of shape \(3,\)"):
        fs.Sampler(denoiser, "ddim", 3)(shape=(2, 3), labels=[1, 2])


def test_one_time_for_the_whole_batch() -> None:
    with pytest.raises(ValueError, match=r"t has shape \(2,\); give one number"):
        fs.wrap(labelled, fs.EDM())(x_of(2, 3), [1.0, 2.0], labels=[1, 2])
