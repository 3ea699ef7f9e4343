"""Each method against what its paper derives: exact solutions, closed forms, independently computed tables."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import fastsample as fs
from fastsample import distill
from fastsample.distill.batch import Batch
from fastsample.distill.dmd2 import matching_gradient
from fastsample.distill.pairs import Pairs
from fastsample.distill.prediction import consistency_function, noised, predict, time_of_fraction
from fastsample.distill.tangent import Tangent, one_sided
from fastsample.distill.teacher import ddim_step, teacher_step
from fastsample.prediction import coefficients
from fastsample.zoo.data import digits
from fastsample.zoo.mixture import MixtureNet, digits_mixture

PREDICTIONS = ("eps", "x0", "v", "flow", "score")
SHAPE = (1, 8, 8)
VP = fs.VP.linear()


def mixture_teacher(process: fs.Process = VP) -> fs.Denoiser:
    return fs.wrap(MixtureNet(digits_mixture(), process), process, "eps", sample_shape=SHAPE)


class Linear(nn.Module):
    """A small network of x and t in float64, with a weight that gradients can be taken of."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.1 * torch.randn(64, 64, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        flat = torch.tanh(x.flatten(1) @ self.weight.to(x.dtype) + torch.sin(t.to(x.dtype))[:, None])
        return flat.reshape(x.shape)


class TrueConsistency(nn.Module):
    """The mixture's consistency function, solved to 1e-9 in float64, as a v-prediction; plus theta times x."""

    def __init__(self, process: fs.Process) -> None:
        super().__init__()
        self.process = process
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def end(self, x: Tensor, t: float, to: float | None = None) -> Tensor:
        to = self.process.t_zero if to is None else to
        solved = digits_mixture().reference(x.detach(), self.process, t, to, tolerance=1e-9)
        return solved.x.reshape(x.shape)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for time in torch.unique(t).tolist():
            mine = t == time
            alpha, sigma = self.process.alpha(time), self.process.sigma(time)
            p, q = coefficients("v", alpha, sigma, "x0")
            out[mine] = (self.end(x[mine], time) - p * x[mine]) / q
        return out + self.theta * torch.tanh(x)


class ExactStep(distill.Consistency):
    def step(self, x: Tensor, t: Tensor, s: Tensor, batch: Batch) -> Tensor:
        net = self.nets["student"]
        assert isinstance(net, TrueConsistency)
        rows = zip(x, t.tolist(), s.tolist(), strict=True)
        return torch.cat([net.end(one[None], a, b) for one, a, b in rows])


def mixture_batch(n: int = 4, step: int = 0) -> Batch:
    x, _ = digits_mixture().sample(n, seed=3)
    return Batch.of(x.reshape(n, *SHAPE).double(), step)


def true_student(process: fs.Process = VP) -> fs.Denoiser:
    # float64 times, so that the network is told the very time that it is asked about
    return fs.wrap(TrueConsistency(process), process, "v", dtype=torch.float64, sample_shape=SHAPE)


@pytest.mark.parametrize("substeps", [1, 3])
@pytest.mark.parametrize(("metric", "elsewhere"), [("l2", 3e-3), ("pseudo_huber", 1e-2)])
def test_consistency_distillation_vanishes_at_the_truth(metric: str, elsewhere: float, substeps: int) -> None:
    """With an exact teacher step the true consistency function has zero loss and zero gradient."""
    method = ExactStep(
        mixture_teacher(),
        true_student(),
        intervals=4,
        substeps=substeps,
        jitter=False,
        target_decay=0.0,
        metric=metric,
    )
    loss = method.loss(mixture_batch()).mean()
    loss.backward()
    net = method.nets["student"]
    assert isinstance(net, TrueConsistency)
    assert net.theta.grad is not None
    scale = 0.00054 * 8  # of the pseudo-Huber: where it is not quadratic any more
    assert float(loss) < 1e-4 * scale
    assert abs(float(net.theta.grad)) < 1e-3
    with torch.no_grad():
        net.theta += 0.1
    assert float(method.loss(mixture_batch()).mean()) > elsewhere


@pytest.mark.parametrize("intervals", [3, 8, 24])
def test_without_jitter_students_sample_at_the_times_of_the_grid(intervals: int) -> None:
    method = distill.Consistency(mixture_teacher(), true_student(), intervals=intervals, jitter=False)
    known = set(method.times.tolist())
    for steps in range(1, min(8, intervals) + 1):
        times = method.known_times(steps)
        assert len(times) == steps + 1
        assert all(a > b for a, b in itertools.pairwise(times)), times
        assert set(times) <= known
        assert list(method.plan(steps).grid) == times
    assert method.known_times(1)[0] == pytest.approx(method.teacher.process.t_start)


@pytest.mark.parametrize("name", ["Consistency", "ICT", "ECT", "SCM"])
def test_noise_is_put_back_to_angles_that_the_exponent_spaces(name: str) -> None:
    for options, exponent in ({}, 1.5), ({"exponent": 0.7}, 0.7):
        method = getattr(distill, name)(mixture_teacher(), true_student(), **options)
        for steps in (1, 2, 4):
            phi = method.teacher.process.phi(method.plan(steps).grid)
            shares = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
            torch.testing.assert_close(phi, phi[0] * shares**exponent, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="exponent=0"):
        getattr(distill, name)(mixture_teacher(), true_student(), exponent=0)


def test_known_times_are_the_nearest_to_those_angles() -> None:
    method = distill.Consistency(mixture_teacher(), true_student(), intervals=24, jitter=False)
    phi = method.teacher.process.phi(method.times)
    for steps in (2, 4):
        for i, t in enumerate(method.known_times(steps)[1:-1], 1):
            wanted = float(phi[-1]) * (1 - i / steps) ** 1.5
            assert abs(float(method.teacher.process.phi(t)) - wanted) == float((phi - wanted).abs().min())
    # more steps than times were chosen for take the angles themselves
    many = method.teacher.process.phi(method.plan(9).grid)
    shares = torch.linspace(1, 0, 10, dtype=torch.float64)
    torch.testing.assert_close(many, many[0] * shares**1.5, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", [1, 2])
def test_substeps_bring_the_loss_to_it_at_the_teachers_order(order: int) -> None:
    """At the true function and fixed intervals the teacher's error is left: substeps^-order, squared by the loss."""
    errors, counts = [], [4, 8, 16]
    for substeps in counts:
        method = distill.Consistency(
            mixture_teacher(), true_student(), intervals=4, substeps=substeps, jitter=False, order=order
        )
        # of eight stratified samples the first two are in the last interval, whose step to zero noise is of order 1
        errors.append(float(method.loss(mixture_batch(8))[2:].mean().sqrt()))
    measured = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(measured + order) < 0.3, (measured, errors)


@pytest.mark.parametrize("jitter", [False, True])
def test_one_interval_is_regression_on_the_teachers_samples(jitter: bool) -> None:
    """With a single interval from pure noise the target is what the teacher's sampler makes in as many steps."""
    process = fs.Flow()
    teacher = fs.wrap(Linear(), process, "v", sample_shape=SHAPE, dtype=torch.float64)
    student = fs.wrap(Linear(1), process, "v", sample_shape=SHAPE, dtype=torch.float64)
    method = distill.Consistency(teacher, student, intervals=1, substeps=6, jitter=jitter)
    batch = mixture_batch(8)
    noisiest = torch.ones(8, dtype=torch.bool)
    if jitter:  # a third of the samples, by half an interval more than there is
        noisiest = batch.uniform("t", stratified=True) * 1.5 >= 1
    noise = batch.normal("eps")
    ends = fs.Sampler(teacher, "ddim", 6, grid=process.grid, end="zero")(noise=noise)
    jumps = fs.Sampler(method.denoiser(), plan=method.plan(1))(noise=noise)
    loss = method.loss(batch).detach()
    assert int(noisiest.sum()) >= 2
    torch.testing.assert_close(
        loss[noisiest], (jumps - ends).square().flatten(1).mean(dim=1)[noisiest], rtol=1e-9, atol=0
    )


def test_links_weigh_the_same_in_v_and_the_teachers_own_interval_less() -> None:
    """Beyond the first interval the squared error of v counts; within, that of the clean sample, continuously."""

    class Shifted(Linear):
        shift = 0.0

        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            return super().forward(x, t) + self.shift

    student = fs.wrap(Shifted(), VP, "v", sample_shape=SHAPE, dtype=torch.float64)
    method = distill.Consistency(mixture_teacher(), student, intervals=4, substeps=2)
    net: Any = method.nets["student"]
    batch = mixture_batch(16)
    losses = []
    for net.shift in (-0.1, 0.0, 0.1):
        losses.append(method.loss(batch).detach())
    place = (batch.uniform("t", stratified=True) * 4.5).clamp(max=4)
    size = torch.sin(VP.phi(method.at(place)))
    expected = 2 * (size / size.clamp(min=float(torch.sin(VP.phi(method.times[1]))))) ** 2
    assert torch.equal(expected[4:], torch.full((12,), 2.0, dtype=torch.float64))
    assert float(expected[0]) < 0.5
    torch.testing.assert_close(
        (losses[0] + losses[2] - 2 * losses[1]) / 0.1**2, expected, rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(("order", "slope"), [(1, 2), (2, 3)])
def test_discrete_loss_approaches_it_at_the_teachers_order(order: int, slope: int) -> None:
    """At the true function the error of one teacher step is left: h^(order + 1)."""
    truth, teacher = TrueConsistency(VP), mixture_teacher()
    x = mixture_batch(3).data
    t = VP.t_of_rho(1.0).expand(3)
    x_t = noised(VP, x, torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double(), t)
    ends = truth.end(x_t, float(t[0]))
    errors = []
    widths = [0.1, 0.05, 0.025]
    for h in widths:
        s = VP.t_of_lam(h).expand(3)  # lam = 0 at t
        before = teacher_step(teacher, x_t, t, s, {}, order)
        errors.append(float((truth.end(before, float(s[0])) - ends).norm()))
    measured = np.polyfit(np.log(widths), np.log(errors), 1)[0]
    assert abs(measured - slope) < 0.25, (measured, errors)


def test_data_driven_loss_approaches_it() -> None:
    """Pairs of the same noise differ by O(t - r), and their mean over the data by one order more."""
    truth, mixture = TrueConsistency(VP), digits_mixture()
    process = VP
    t = process.t_of_rho(1.0)
    generator = torch.Generator().manual_seed(1)
    x_t = noised(
        process,
        mixture_batch(1).data,
        torch.randn((1, *SHAPE), generator=generator, dtype=torch.float64),
        t.expand(1),
    )
    end = truth.end(x_t, float(t))
    # the posterior's mean and a few of its points, by the mixture's own moments
    mean = mixture.x0(x_t, float(process.alpha(t)), float(process.sigma(t)))
    bias, spread = [], []
    widths = [0.2, 0.1, 0.05]
    for h in widths:
        r = process.t_of_lam(h)
        ratio = float(process.sigma(r) / process.sigma(t))
        gap = float(process.alpha(r)) - ratio * float(process.alpha(t))
        moved = (
            ratio * x_t + gap * mean
        )  # x_r for the mean clean sample: f is smooth, so the first order is this
        bias.append(float((truth.end(moved, float(r)) - end).norm()))
        other = ratio * x_t + gap * (mean + 0.5)
        spread.append(float((truth.end(other, float(r)) - end).norm()))
    assert abs(np.polyfit(np.log(widths), np.log(bias), 1)[0] - 2) < 0.2, bias
    assert abs(np.polyfit(np.log(widths), np.log(spread), 1)[0] - 1) < 0.2, spread


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "process", [VP, fs.EDM(), fs.Flow(), fs.TrigFlow(), fs.VE()], ids=lambda p: f"{p!r:.10}"
)
def test_boundary_is_exact(process: fs.Process, prediction: str) -> None:
    """Where no noise is left the consistency function is the identity, whatever the network says."""
    denoiser = fs.wrap(Linear(), process, prediction)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.full((3,), process.t_zero, dtype=torch.float64)
    assert torch.equal(consistency_function(denoiser, x, t, {}), x)
    # and it is reached continuously: at the least trained noise the state dominates
    least = torch.full((3,), process.t_end, dtype=torch.float64)
    near = consistency_function(denoiser, x, least, {})
    reach = 0.6 if prediction == "x0" else 3 * float(process.rho(process.t_end))
    assert float((near - x / float(process.alpha(process.t_end))).abs().max()) < reach * 5


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("process", [VP, fs.EDM(), fs.Flow()], ids=lambda p: f"{p!r:.10}")
def test_training_and_sampling_are_one_function(process: fs.Process, prediction: str) -> None:
    """The plan's single jump is the consistency function that the loss trains."""
    if prediction in ("eps", "score") and not bool(process.alpha(process.t_start) > 0):
        pytest.skip("eps says nothing at zero signal")
    teacher = fs.wrap(Linear(), process, prediction, sample_shape=SHAPE)
    method = distill.Consistency(teacher, prediction=prediction)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.full((2,), process.t_start, dtype=torch.float64)
    state = float(process.sigma(process.t_start)) * x
    expected = consistency_function(method.denoiser(), state, t, {})
    got = fs.Sampler(method.denoiser(), plan=method.plan(1))(noise=x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# -- average velocities --------------------------------------------------------------------------------------


class GaussianVelocity(nn.Module):
    """The exact average velocity of a straight flow to N(0, c^2): z moves in proportion to its deviation."""

    def __init__(self, process: fs.Process, c: float = 0.5) -> None:
        super().__init__()
        self.process, self.c = process, c
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def deviation(self, tau: Tensor) -> Tensor:
        return torch.sqrt((1 - tau) ** 2 * self.c**2 + tau**2)

    def rate(self, tau: Tensor) -> Tensor:
        return (tau - (1 - tau) * self.c**2) / self.deviation(tau) ** 2

    def forward(self, x: Tensor, t: Tensor, step: Tensor | None = None) -> Tensor:
        alpha, sigma = self.process._at(t)[:2]
        tau = (sigma / (alpha + sigma)).to(x).reshape(-1, 1, 1, 1)
        z = x / (alpha + sigma).to(x).reshape(-1, 1, 1, 1)
        d = torch.zeros_like(tau) if step is None else step.to(x).reshape(-1, 1, 1, 1)
        safe = torch.where(d > 0, d, 1.0)
        average = z * (1 - self.deviation(tau - safe) / self.deviation(tau)) / safe
        flow = torch.where(d > 0, average, z * self.rate(tau)) + self.theta * z
        # the network's own convention: v of the process
        p, q = coefficients("v", alpha, sigma, "flow")
        return (flow - p.to(x).reshape(-1, 1, 1, 1) * x) / q.to(x).reshape(-1, 1, 1, 1)


def gaussian(process: fs.Process) -> fs.Denoiser:
    return fs.wrap(GaussianVelocity(process), process, "v", dtype=torch.float64, sample_shape=SHAPE)


STRAIGHT = [fs.Flow(), fs.TrigFlow(), fs.EDM(sigma_max=20.0), VP]


@pytest.mark.parametrize("process", STRAIGHT, ids=lambda p: f"{p!r:.10}")
def test_shortcut_self_consistency_on_a_linear_ode(process: fs.Process) -> None:
    """Two steps of the exact average velocity are one of twice the size (eq. 4), on any process."""
    method = distill.Shortcut(gaussian(process), finest=1024)
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tau = method.tau_max * torch.tensor([1.0, 0.75, 0.5, 0.5, 0.25], dtype=torch.float64)
    size = method.tau_max * torch.tensor([1.0, 0.5, 0.5, 0.25, 0.125], dtype=torch.float64)
    t = time_of_fraction(process, tau)
    twice = method.two_steps("student", x, tau, size / 2, {})
    once = method.velocity("student", x, t, size, {})
    # steps that end at zero noise pass no time below the least trained one; the rest are exact
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["Shortcut", "MeanFlow", "DMD2"])
def test_new_layers_do_not_depend_on_what_was_drawn_before(name: str) -> None:
    first = getattr(distill, name)(fs.zoo.load("digits"))
    torch.rand(3)
    second = getattr(distill, name)(fs.zoo.load("digits"))
    for role, net in first.nets.items():
        for key, value in net.state_dict().items():
            assert torch.equal(value, second.nets[role].state_dict()[key]), (role, key)


@pytest.mark.parametrize("process", STRAIGHT, ids=lambda p: f"{p!r:.10}")
@pytest.mark.parametrize("from_teacher", [True, False])
def test_the_smallest_step_of_shortcuts_is_taught(process: fs.Process, from_teacher: bool) -> None:
    """Two Heun steps of exact velocities, the teacher's or its own: the average velocity, to second order."""
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for finest in (8, 16, 32):
        method = distill.Shortcut(gaussian(process), finest=finest, from_teacher=from_teacher)
        wrong = method.nets["target"] if from_teacher else method.teacher.net
        assert isinstance(wrong, GaussianVelocity)
        with torch.no_grad():
            wrong.theta += 0.3  # which is not asked
        tau = method.tau_max * torch.tensor([1.0, 0.75, 0.5], dtype=torch.float64)
        size = torch.full_like(tau, method.tau_max / finest)
        exact = method.velocity("student", x, time_of_fraction(process, tau), size, {})
        errors.append(float((method.taught(x, tau, size / 2, {}) - exact).abs().max()))
    assert errors[0] < 0.03
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3


@pytest.mark.parametrize("options", [{"from_teacher": True}, {"bootstrap": 1 - 1e-9}], ids=str)
def test_shortcuts_loss_vanishes_at_the_truth(options: dict[str, Any]) -> None:
    """All that is no data's velocity, as the Heun steps get smaller; not where the network is wrong."""
    x = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    methods = [distill.Shortcut(gaussian(fs.Flow()), finest=finest, **options) for finest in (16, 64, 256)]
    losses = [float(method.loss(Batch.of(x)).detach().max()) for method in methods]
    assert losses[1] < losses[0] / 16  # the last step, to zero noise, is of first order: squared, 16
    assert losses[2] < losses[1] / 16
    with torch.no_grad():
        methods[2].nets["student"].theta += 0.3  # type: ignore[operator]
    assert float(methods[2].loss(Batch.of(x)).detach().min()) > 1e-3


def test_shortcuts_steps_are_dyadic() -> None:
    method = distill.Shortcut(gaussian(fs.Flow()), finest=4)
    seen: list[Tensor] = []
    velocity = method.velocity
    method.velocity = lambda role, x, t, step, c: seen.append(step) or velocity(role, x, t, step, c)  # type: ignore[func-returns-value,method-assign]
    x = torch.randn(256, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    method.loss(Batch.of(x))
    told = {round(float(v) / method.tau_max, 6) for step in seen[:2] for v in step}
    assert told == {0.25, 0.5}  # half steps by the target; a quarter's own halves are Heun's
    assert {round(float(v) / method.tau_max, 6) for v in seen[2]} == {0.0, 0.25, 0.5, 1.0}


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_shortcut_sampling_is_exact_for_exact_velocities(steps: int) -> None:
    """Any number of steps ends at the same point: that of the ODE."""
    for process in STRAIGHT:
        method = distill.Shortcut(gaussian(process), finest=8)
        z = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        net = method.nets["student"]
        assert isinstance(net, GaussianVelocity)
        start = torch.tensor(method.tau_max, dtype=torch.float64)
        expected = z * method.tau_max / net.deviation(start) * net.c
        got = fs.Sampler(method.denoiser(), plan=method.plan(steps))(noise=z)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("full", [0.0, 1.0])
@pytest.mark.parametrize("jvp", ["forward", "secant"])
@pytest.mark.parametrize("process", STRAIGHT, ids=lambda p: f"{p!r:.10}")
def test_meanflow_identity(process: fs.Process, jvp: str, full: float) -> None:
    """At the exact average velocity the target is the velocity itself; elsewhere it is not."""
    options = {"from_teacher": True, "different": 1.0, "full": full, "width": 1e-4}
    method = distill.MeanFlow(gaussian(process), jvp=jvp, **options)
    x = 0.5 * torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = method.loss(Batch.of(x, 0))
    assert float(loss.max()) < 1e-4, loss  # weight * square: 1 where the error is large
    net = method.nets["student"]
    assert isinstance(net, GaussianVelocity)
    with torch.no_grad():
        net.theta += 0.3
    assert float(method.loss(Batch.of(x, 0)).min()) > 0.5


def assert_right_on_average(method: distill.Method, scale: float = 1.0) -> None:
    """The gradient of the mean loss over data N(0, c^2) vanishes at theta = 0, and leads there from both sides."""
    net: Any = method.nets["student"]
    x = net.c * torch.randn(20_000, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = []
    for theta in (-0.1, 0.0, 0.1):
        with torch.no_grad():
            net.theta.fill_(theta)
        net.theta.grad = None
        (scale * method.loss(Batch.of(x)).mean()).backward()
        gradients.append(float(net.theta.grad))
    below, at, above = gradients
    assert below < 0 < above
    assert abs(at) < 0.03 * (above - below), gradients


@pytest.mark.parametrize("name", ["MeanFlow", "Shortcut"])
def test_velocities_of_data_are_right_on_average(name: str) -> None:
    """Each sample's loss is not zero at the exact velocities, but the mean over the data has its minimum there."""
    options: dict[str, Any] = {"power": 0.0, "jvp": "forward"} if name == "MeanFlow" else {"finest": 64}
    method = getattr(distill, name)(gaussian(fs.Flow()), **options)
    assert_right_on_average(method)


# -- progressive ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [VP, fs.Flow(), fs.EDM()], ids=lambda p: f"{p!r:.10}")
def test_progressive_target_is_two_ddim_steps(process: fs.Process) -> None:
    """One DDIM step with the target arrives where two steps of the teacher's sampler do."""
    teacher = fs.wrap(Linear(), process, "v", dtype=torch.float64, sample_shape=SHAPE)
    method = distill.Progressive(teacher, first=4, total=10)
    times = fs.grids.make("angle", process, 8, end="zero")
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in (0, 2, 6):
        three = times[i : i + 3]
        plan = fs.solvers.build("ddim", process, grid=three, prediction="v")
        expected = fs.Sampler(teacher, plan=plan)(x=x)
        t, middle, s = (v.expand(2) for v in three)
        target = method.target(teacher, x, t, middle, s, {})
        torch.testing.assert_close(ddim_step(process, x, target, t, s), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weighting", ["step", "snr"])
@pytest.mark.parametrize("process", [VP, fs.Flow(), fs.EDM()], ids=lambda p: f"{p!r:.10}")
def test_progressive_weighs_what_steps_arrive_at(process: fs.Process, weighting: str) -> None:
    """The loss is the squared error of the next state, in units of its scale; by "snr" it is the paper's."""
    teacher = fs.wrap(Linear(), process, "v", dtype=torch.float64, sample_shape=SHAPE)
    batch = Batch.of(torch.randn(16, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    method = distill.Progressive(teacher, first=4, total=10, weighting=weighting)
    with torch.no_grad():
        for p in method.nets["student"].parameters():
            p.add_(0.1)
    seen: list[tuple[Tensor, ...]] = []
    target = method.target

    def watched(previous: Any, x: Tensor, t: Tensor, middle: Tensor, s: Tensor, given: Any) -> Tensor:
        seen.append((x, t, s, target(previous, x, t, middle, s, given)))
        return seen[-1][-1]

    method.target = watched  # type: ignore[method-assign, assignment]
    loss = method.loss(batch)
    ((x, t, s, wanted),) = seen
    got = method.predict("student", x, t, batch)
    if weighting == "step":
        scale = torch.sqrt(process.alpha(s) ** 2 + process.sigma(s) ** 2).reshape(-1, 1, 1, 1)
        ours, theirs = (ddim_step(process, x, x0, t, s) / scale for x0 in (got, wanted))
        expected = (ours - theirs).square().mean(dim=(1, 2, 3))
    else:
        snr = (process.alpha(t) / process.sigma(t)) ** 2
        expected = snr.clamp(min=1) * (got - wanted).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


def test_progressive_halves_in_stages() -> None:
    method = distill.Progressive(fs.zoo.load("digits"), first=8, convert=0, total=60)
    assert method.stages == [8, 4, 2, 1]
    assert method.steps == (1,)
    assert distill.Progressive(fs.zoo.load("digits"), last=4).steps == (4,)
    # two and one steps are trained twice as long
    assert [method.stage(s) for s in (0, 9, 10, 19, 20, 39, 40, 59)] == [0, 0, 1, 1, 2, 2, 3, 3]
    with torch.no_grad():
        next(iter(method.nets["student"].parameters())).add_(1.0)
    first = lambda role: next(iter(method.nets[role].parameters()))  # noqa: E731
    method.after_update(8)
    assert not torch.equal(first("previous"), first("student"))
    method.after_update(9)
    assert torch.equal(first("previous"), first("student"))


def test_progressive_anneals_each_stage_by_itself() -> None:
    method = distill.Progressive(fs.zoo.load("digits"), first=4, convert=20, total=80)
    elapsed = [method.elapsed(s, 80) for s in (0, 10, 19, 20, 26, 31, 32, 44, 56, 79)]
    assert elapsed == pytest.approx([0, 0.5, 0.95, 0, 0.5, 11 / 12, 0, 0.5, 0, 23 / 24])


def test_meanflow_times() -> None:
    """Uniform ones reach the ends, where one step of sampling begins; the paper's hardly do."""
    batch = Batch.of(torch.zeros(4000, *SHAPE, dtype=torch.float64))
    u, paper = (
        distill.MeanFlow(gaussian(fs.Flow()), times=times).time(batch, "t")
        for times in ("uniform", "logit_normal")
    )
    assert float((u > 0.95).double().mean()) == pytest.approx(0.05, abs=0.01)
    z = torch.logit(paper)
    assert (float(z.mean()), float(z.std())) == pytest.approx((-0.4, 1.0), abs=0.05)
    with pytest.raises(ValueError, match="did you mean 'uniform'"):
        distill.MeanFlow(gaussian(fs.Flow()), times="unifrom")


@pytest.mark.parametrize(("different", "full"), [(0.5, 0.1), (0.8, 0.5), (0.5, 0.0), (0.0, 1.0)])
def test_meanflow_draws_whole_intervals(different: float, full: float) -> None:
    """Of the samples with r != t, a share has r = 0, as one step of sampling has."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Watched(distill.MeanFlow):
        def velocity(self, role: str, x: Any, t: Any, step: Any, conditions: Any) -> torch.Tensor:
            seen.append((t, step))
            return super().velocity(role, x, t, step, conditions)

    method = Watched(gaussian(fs.Flow()), different=different, full=full, jvp="forward")
    method.loss(Batch.of(torch.zeros(4000, *SHAPE, dtype=torch.float64)))
    tau, size = seen[-1]  # a flow's time is its fraction
    moved = size > 1e-9
    assert float(moved.double().mean()) == pytest.approx(different, abs=0.03)
    whole = ((size - tau).abs() < 1e-9).double().mean()
    assert float(whole) == pytest.approx(different * full, abs=0.03)
    if full == 0:
        assert not whole


# -- score distillation --------------------------------------------------------------------------------------


class GaussianDenoiser(nn.Module):
    """The exact x0 of N(0, c^2), elementwise; c is not trained."""

    def __init__(self, process: fs.Process, c: float) -> None:
        super().__init__()
        self.process, self.c = process, c
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (v.to(x).reshape(-1, 1) for v in self.process._at(t.double())[:2])
        return alpha * self.c**2 / (alpha**2 * self.c**2 + sigma**2) * x + 0 * self.unused


class Scale(nn.Module):
    """The generator theta z."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.theta * x


@pytest.fixture
def scores() -> tuple[Callable[..., Any], float, float, float]:
    """A method on Gaussians: teacher N(0, c^2), generator and fake N(0, theta^2), one noise level."""
    process, c, theta, rho = fs.EDM(), 0.5, 0.8, 0.7

    def make(kind: type, **settings: Any) -> Any:
        wrap = lambda net: fs.wrap(net, process, "x0", dtype=torch.float64, sample_shape=(1,))  # noqa: E731
        method = kind(wrap(GaussianDenoiser(process, c)), wrap(Scale(theta)), init_rho=2.5, **settings)
        method.nets["fake"] = GaussianDenoiser(process, theta)
        return method

    return make, c, theta, rho


N = 400_000


def generated(method: Any, theta: float, rho: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(N, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    # exact moments: what is left of chance is fourth order
    z, eps = z / z.square().mean().sqrt(), eps / eps.square().mean().sqrt()
    eps = eps - z * (z * eps).mean()
    x0 = method.nets["student"](z, None)
    return z, x0, x0 + rho * eps, torch.full((N,), rho, dtype=torch.float64)


def test_dmd_gradient_on_gaussians(scores: Any) -> None:
    """The matching gradient is that of KL(q_t || p_t), which Gaussians have in closed form."""
    make, c, theta, rho = scores
    method = make(distill.DMD2, gan=0.0)
    z, x0, x_t, t = generated(method, theta, rho)
    batch = Batch.of(torch.zeros(N, 1, dtype=torch.float64))
    real = predict(method.teacher, x_t, t, {})
    weight = (x0 - real).detach().abs()[:, 0]
    (method.generator_loss(batch, x0, x_t, t) * weight).mean().backward()
    # KL = (v_q / v_p - 1 - log(v_q / v_p)) / 2 with v = theta^2 + rho^2, c^2 + rho^2; f = x + rho^2 score
    v_q, v_p = theta**2 + rho**2, c**2 + rho**2
    kl = theta * (1 / v_p - 1 / v_q)
    assert float(method.nets["student"].theta.grad) == pytest.approx(rho**2 * kl, rel=2e-2)
    gradient = matching_gradient(x0, real, predict(method.denoiser("fake"), x_t, t, {}))
    assert float((gradient.detach()[:, 0] * weight * z[:, 0]).mean()) == pytest.approx(rho**2 * kl, rel=2e-2)


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_sid_gradient_on_gaussians(scores: Any, alpha: float) -> None:
    """The score identity loss is a polynomial of theta for Gaussians (gradients go through both inputs)."""
    make, c, theta, rho = scores
    method = make(distill.SiD, alpha=alpha, gan=0.0)
    _, x0, x_t, t = generated(method, theta, rho)
    batch = Batch.of(torch.zeros(N, 1, dtype=torch.float64))
    weight = (x0 - predict(method.teacher, x_t, t, {})).detach().abs()[:, 0]
    (method.generator_loss(batch, x0, x_t, t) * weight).mean().backward()
    k_p, k_q = (s**2 / (s**2 + rho**2) for s in (c, theta))
    a = k_p - k_q
    # E[a x_t (k_p x_t - x_g - alpha a x_t)] = a ((k_p - alpha a)(theta^2 + rho^2) - theta^2)
    expected = a * ((k_p - alpha * a) * 2 * theta - 2 * theta)
    assert float(method.nets["student"].theta.grad) == pytest.approx(expected, rel=2e-2)


def test_a_generator_that_has_the_data_stays(scores: Any) -> None:
    """Equal scores: no gradient from either method."""
    make, c, _, rho = scores
    for kind, settings in ((distill.DMD2, {"gan": 0.0}), (distill.SiD, {"gan": 0.0})):
        method = make(kind, **settings)
        with torch.no_grad():
            method.nets["student"].theta.fill_(c)
        method.nets["fake"] = GaussianDenoiser(fs.EDM(), c)
        _, x0, x_t, t = generated(method, c, rho)
        method.generator_loss(Batch.of(torch.zeros(N, 1, dtype=torch.float64)), x0, x_t, t).mean().backward()
        assert abs(float(method.nets["student"].theta.grad)) < 1e-12


@pytest.mark.parametrize("kind", [distill.DMD2, distill.SiD])
def test_the_discriminator_reads_the_one_pass_of_each_state(kind: Any) -> None:
    """No state passes twice, the logits are those of a pass of its own, and both sides learn from them."""
    x, labels = digits("train")
    batch = Batch.of(x[:8], labels=labels[:8])
    method = kind(fs.zoo.load("digits"), gan=0.5)
    fake: Any = method.nets["fake"]
    passed: list[Tensor] = []
    fake.net.register_forward_hook(lambda module, args, out: passed.append(args[0].detach()))
    with torch.no_grad():
        fake.head[-1].weight.normal_(std=0.1)
    losses = {}
    for role, count in (("student", 1), ("fake", 2)):
        with method.training(role):
            losses[role] = method.objective(batch, role)
        assert len(passed) == count
        passed.clear()
        losses[role].mean().backward(inputs=[p for p in method.nets[role].parameters() if p.requires_grad])
    assert all(float(p.grad.abs().sum()) > 0 for p in fake.head.parameters())

    # without the discriminator the generator's loss is less by its term, read in a pass of its own
    with method.training("student"), torch.no_grad():
        x0, t = method.generate(batch, "z"), method.time(batch, "t")
        x_t = noised(method.teacher.process, x0, batch.normal("eps"), t)
        plain = method.generator_loss(batch, x0, x_t, t)
        with method.judging() as logits:
            predict(method.denoiser("fake"), x_t, t, batch.conditions)
    expected = plain + 0.5 * torch.nn.functional.softplus(-logits[0])
    torch.testing.assert_close(losses["student"].detach(), expected)


# -- derivatives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [VP, fs.EDM(), fs.Flow()], ids=lambda p: f"{p!r:.10}")
@pytest.mark.parametrize("space", ["v", "flow"])
def test_tangents_are_derivatives(process: fs.Process, space: str) -> None:
    """Forward mode through network, time input and coefficients, against differences of the whole in float64."""
    net = fs.zoo.load("digits").net
    assert isinstance(net, nn.Module)
    net = copy.deepcopy(net).double()
    denoiser = fs.wrap(net, process, "v", time_input="c_noise", sample_shape=SHAPE)
    generator = torch.Generator().manual_seed(0)
    x, dx = (torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    t = process.t_of_rho(torch.tensor([0.3, 1.0, 2.0]))
    dt = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64) * (t / 10)
    tangent = Tangent("forward")(denoiser, space, x, t, dx, dt, {})
    h = 1e-6
    with torch.no_grad():
        ahead, behind = (predict(denoiser, x + s * h * dx, t + s * h * dt, {}, space) for s in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-6)
    difference = Tangent("difference")(denoiser, space, x, t, dx, dt, {})
    torch.testing.assert_close(difference, tangent, rtol=1e-4, atol=1e-5)


def test_differences_are_taken_in_full_precision() -> None:
    seen = []

    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.allow_tf32)
            return x * t.reshape(-1, 1, 1, 1)

    denoiser = fs.wrap(Net(), fs.TrigFlow(), "v", sample_shape=SHAPE)
    x, t = torch.ones(2, *SHAPE), torch.ones(2, dtype=torch.float64)
    before = torch.backends.cudnn.allow_tf32
    Tangent("difference")(denoiser, "v", x, t, x, t, {})
    assert seen == [False, False, before]


class _Silent(torch.autograd.Function):
    """An operator whose forward rule gives zeros, as that of ``torch.library.custom_op`` does."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:
        return torch.zeros_like(dx)


class _Loud(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.tanh(x)


@pytest.mark.parametrize(("operator", "why"), [(_Silent, "disagrees"), (_Loud, "fails")])
def test_broken_forward_mode_is_replaced_aloud(
    operator: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return operator.apply(x) * torch.cos(t).reshape(-1, 1, 1, 1)

    denoiser = fs.wrap(Net(), fs.TrigFlow(), "v", sample_shape=SHAPE)
    x, dx = torch.randn(2, 2, *SHAPE, generator=torch.Generator().manual_seed(0))
    t, dt = torch.tensor([[0.5, 1.0], [1.0, 1.0]], dtype=torch.float64)
    tangent = Tangent("auto")
    got = tangent(denoiser, "v", x, t, dx, dt, {})
    assert tangent.mode == "difference"
    assert why in caplog.text
    cos, sin = (f(t).float().reshape(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
    expected = (1 - torch.tanh(x) ** 2) * dx * cos - torch.tanh(x) * sin
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


class _Paced(nn.Module):
    """The digits network behind a time that goes by more slowly, as that of a slow embedding."""

    def __init__(self, pace: float) -> None:
        super().__init__()
        net = fs.zoo.load("digits").net
        assert isinstance(net, nn.Module)
        self.net, self.pace = copy.deepcopy(net), pace

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.net(x, 500 + self.pace * (t - 500), labels)


@pytest.mark.parametrize("kind", [distill.SCM, distill.MeanFlow])
@pytest.mark.parametrize(("pace", "mode"), [(1.0, "secant"), (0.01, "forward")])
def test_networks_that_are_rough_in_time_use_secants_aloud(
    kind: Any, pace: float, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A derivative that an embedding of a thousand whole times makes is no derivative of the trajectory."""
    teacher = fs.wrap(_Paced(pace), fs.zoo.load("digits").process, "eps", sample_shape=(1, 8, 8))
    method = kind(teacher, convert=0, total=10)
    x, labels = digits("train")
    method.loss(Batch.of(x[:64], labels=labels[:64]))
    assert method._tangent.mode == mode
    assert ("rough in time" in caplog.text) == (mode == "secant")


@pytest.mark.parametrize("process", STRAIGHT, ids=lambda p: f"{p!r:.10}")
def test_secants_converge_to_the_derivative(process: fs.Process) -> None:
    """At second order in their width, for both methods that take them."""
    x = 0.5 * torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kind in (distill.SCM, distill.MeanFlow):
        losses = []
        for jvp, width in (("forward", 0.05), ("secant", 0.02), ("secant", 0.01)):
            method = (
                kind(gaussian(process), convert=0, warmup=0, jvp=jvp, width=width)
                if kind is distill.SCM
                else kind(gaussian(process), jvp=jvp, width=width, different=1.0)
            )
            with torch.no_grad():
                method.nets["student"].theta += 0.3
            losses.append(method.loss(Batch.of(x, 0)))
        exact, wide, narrow = losses
        errors = [float((loss - exact).abs().max()) for loss in (wide, narrow)]
        assert errors[0] > 1e-9
        assert errors[1] < 0.4 * errors[0]


def test_one_sided_differences() -> None:
    """Exact for parabolas; for lines where both points are one; nothing where they are the point itself."""
    f = lambda s: 3 - 2 * s + 5 * s**2  # noqa: E731
    s = torch.tensor([0.3, 0.3, 0.3, 0.3], dtype=torch.float64)
    near = torch.tensor([0.1, 0.02, 0.1, 0.0], dtype=torch.float64)
    far = torch.tensor([0.2, 0.5, 0.1, 0.0], dtype=torch.float64)
    weights = one_sided(near, far)
    found = sum((w * f(s - d) for w, d in zip(weights, (0.0, near, far), strict=True)), torch.zeros(()))
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 0.5, 0.0], dtype=torch.float64))


class TrueGaussian(nn.Module):
    """N(0, c^2) in TrigFlow's coordinates: f = c z / m(phi), m^2 = c^2 cos^2 + sin^2; F = (cos z - f) / sin."""

    c = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        cos, sin = (f(t).to(x).reshape(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
        m = torch.sqrt(self.c**2 * cos**2 + sin**2)
        return (cos * x - self.c * x / m) / sin + self.theta * x


class GaussianDirection(nn.Module):
    """The velocity dz/dphi = z m'/m of the same."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        cos, sin = (f(t).to(x).reshape(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
        return (1 - 0.25) * cos * sin / (0.25 * cos**2 + sin**2) * x


def scm_on_gaussians(**options: Any) -> distill.SCM:
    teacher, student = (
        fs.wrap(net, fs.TrigFlow(), "v", dtype=torch.float64, sample_shape=SHAPE)
        for net in (GaussianDirection(), TrueGaussian())
    )
    return distill.SCM(teacher, student, **options)


def test_scm_tangent_vanishes_at_the_truth() -> None:
    """df/dphi of the true consistency function along the trajectory is zero: g is, too, once warmed up."""
    x = 0.5 * torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    warmed = scm_on_gaussians(from_teacher=True, warmup=0)
    assert float(warmed.loss(Batch.of(x)).max()) < 1e-12
    cold = scm_on_gaussians(from_teacher=True, warmup=100)
    assert float(cold.loss(Batch.of(x)).min()) > 1e-6


@pytest.mark.parametrize("jvp", ["forward", "secant"])
def test_scm_of_data_is_right_on_average(jvp: str) -> None:
    """Without the normalisation the mean over the data vanishes at the truth, no single sample's tangent."""
    method = scm_on_gaussians(warmup=0, c=1e6, jvp=jvp, width=0.01)
    assert_right_on_average(method, 1e6)


# -- tables --------------------------------------------------------------------------------------------------


def test_ict_tables() -> None:
    """The discretisation curriculum of the paper's 400,000 updates, and its lognormal noise levels."""
    teacher = fs.wrap(Linear(), fs.EDM(), "x0", sample_shape=SHAPE)
    method = distill.ICT(teacher, p_mean=-1.1, total=400_000)
    doubled = [method.intervals(s) for s in (0, 49_999, 50_000, 100_000, 150_000, 349_999, 350_000, 399_999)]
    assert doubled == [10, 10, 20, 40, 80, 640, 1280, 1280]
    levels = method.levels(17)
    assert float(levels[0]) == pytest.approx(0.002)
    assert float(levels[-1]) == pytest.approx(80.0)
    assert float(levels[-2]) == pytest.approx(57.586, rel=1e-4)  # EDM's 18 steps (Karras et al. 2022)
    cdf = scipy.stats.lognorm(s=2.0, scale=math.exp(-1.1)).cdf(levels.numpy())
    np.testing.assert_allclose(
        method.probabilities(levels).numpy(), np.diff(cdf) / (cdf[-1] - cdf[0]), rtol=1e-6
    )


def test_ect_schedule() -> None:
    """r of eq. 16, by numbers worked out by hand."""
    method = distill.ECT(fs.wrap(Linear(), fs.EDM(), "x0", sample_shape=SHAPE), total=8)
    t = torch.tensor([1.0, 80.0], dtype=torch.float64)
    assert method.lower(t, 0).tolist() == pytest.approx([0.0, 40.0])  # n(1) = 3.1515: clipped; n(80) = 1
    assert method.lower(t, 3).tolist() == pytest.approx([0.803029, 75.0], rel=1e-5)
    assert method.lower(t, 7).tolist() == pytest.approx([0.987689, 79.6875], rel=1e-5)


def test_settings_are_refused_early() -> None:
    teacher = fs.zoo.load("digits")
    for kind, settings, message in (
        (distill.Consistency, {"metric": "l3"}, "metric='l3'"),
        (distill.Consistency, {"intervals": 0}, "intervals=0"),
        (distill.Shortcut, {"finest": 100}, "finest=100"),
        (distill.Progressive, {"first": 6}, "first=6"),
        (distill.Progressive, {"weighting": "step_"}, "weighting='step_'.*step"),
        (distill.SiD, {"init_rho": 1e4}, "init_rho=10000"),
        (distill.DMD2, {"at": "nowhere"}, "at='nowhere'"),
        (distill.Shortcut, {"at": "nowhere"}, "at='nowhere'"),
        (distill.SCM, {"jvp": "backward"}, "jvp='backward'"),
        (distill.SCM, {"width": 0.0}, "width=0.0"),
        (distill.MeanFlow, {"width": 0.6}, "width=0.6"),
        (distill.Knowledge, {"pairs": 0}, "pairs=0"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(teacher, **settings)
    with pytest.raises(TypeError, match="wrap the network first"):
        distill.Consistency(teacher.net)
    with pytest.raises(TypeError, match="give student="):
        distill.Consistency(mixture_teacher())
    with pytest.raises(ValueError, match="wrap the student's network with the teacher's process"):
        distill.Consistency(teacher, fs.wrap(Linear(), fs.Flow(), "v"))
    with pytest.raises(ValueError, match=r"jvp='forward': .*whole times only.*use jvp='secant'"):
        distill.SCM(fs.wrap(Linear(), VP, "v", quantize=True, sample_shape=SHAPE), jvp="forward")


@pytest.mark.parametrize("kind", [distill.SCM, distill.MeanFlow])
def test_networks_that_know_whole_times_take_secants(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(1000, 1)

        def forward(self, x: Tensor, t: Tensor, step: Tensor | None = None) -> Tensor:
            return x * self.table(t)[:, :, None, None]

    method = kind(
        fs.wrap(Table(), VP, "v", quantize=True, sample_shape=SHAPE),
        **({"warmup": 0} if kind is distill.SCM else {}),
    )
    loss = method.loss(Batch.of(torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))))
    assert method._tangent.mode == "secant"
    assert "whole times only; derivatives are secants" in caplog.text
    assert bool(torch.isfinite(loss).all())


@pytest.mark.parametrize("levels", [1000, 50, 20])
@pytest.mark.parametrize("name", ["shortcut", "meanflow", "reflow", "scm", "ect"])
def test_states_are_noised_to_times_that_the_network_knows(name: str, levels: int) -> None:
    """Else the network is told another noise level than its input has: seen by comparing the two in every call."""
    process = fs.VP.linear()
    every = 1000 // levels

    class Told(nn.Module):
        """Says what its input's noise level is, for clean samples of zero."""

        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.tensor(1.0))
            self.off: list[float] = []

        def forward(self, x: Tensor, t: Tensor, step: Tensor | None = None) -> Tensor:
            sigma = x.detach().flatten(1).square().mean(1).sqrt().double()
            expected = process.sigma(t.double())
            # clean states are asked at the least noise, and the answer is dropped
            off = torch.where(sigma > 1e-3, sigma / expected - 1, 0.0)
            self.off.append(float(off.abs().max()))
            return self.theta * x / expected.to(x).reshape(-1, 1, 1, 1)  # the noise, exactly

    known = torch.arange(0, 1000, every, dtype=torch.float64) + every - 1
    teacher = fs.wrap(Told(), process, "eps", quantize=known, sample_shape=(1, 64, 64))
    kind = getattr(distill, distill.METHODS[name][1])
    options: dict[str, Any] = {"prediction": "eps", "convert": 0, "total": 10}
    options |= {"jvp": "secant"} if name in ("scm", "meanflow") else {}
    method = kind(teacher, **options)
    x = torch.zeros(16, 1, 64, 64)
    batch = Batch.of(x)
    if name == "reflow":
        method.made = Pairs(x, {}, 0)
    with torch.no_grad():
        method.loss(batch)
    off = [v for net in (*method.nets.values(), teacher.net) for v in net.off]  # type: ignore[union-attr]
    assert off
    assert max(off) < 0.06  # that of 4,096 pixels' own scatter, five standard deviations


@pytest.mark.parametrize("name", sorted(distill.METHODS))
def test_every_method_trains_in_a_bare_loop(name: str, tmp_path: Any) -> None:
    """Loss, gradient and update without the trainer; then samples at each of its numbers of steps."""
    teacher = fs.zoo.load("digits")
    x, labels = digits("train")
    kind = getattr(distill, distill.METHODS[name][1])
    method = kind(
        teacher, convert=0, **({"pairs": 64, "pair_steps": 2} if name in ("knowledge", "reflow") else {})
    )
    method.begin(4)
    method.prepare((x, labels), tmp_path)
    before = [p.detach().clone() for p in method.nets["student"].parameters()]
    optimizers = {r: torch.optim.Adam(method.nets[r].parameters(), lr=1e-3) for r in method.trained}
    for step in range(2):
        batch = Batch.of(x[:16], step, labels=labels[:16])
        for role in method.roles(step):
            with method.training(role):
                loss = method.loss(batch, role)
                assert loss.shape == (16,)
                assert bool(torch.isfinite(loss).all())
                optimizers[role].zero_grad()
                loss.mean().backward()
                optimizers[role].step()
        method.after_update(step)
    after = list(method.nets["student"].parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in teacher.net.parameters())  # type: ignore[attr-defined]
    for steps in method.steps:
        sampler = fs.Sampler(method.denoiser(), plan=method.plan(steps))
        assert sampler(n=2, seed=0, labels=[1, 2]).shape == (2, *SHAPE)
        assert sampler.plan.nfe == steps


@pytest.mark.parametrize("process", [VP, fs.EDM(), fs.Flow(), fs.TrigFlow()], ids=lambda p: f"{p!r:.10}")
@pytest.mark.parametrize("name", sorted(distill.METHODS))
def test_any_process_and_prediction(name: str, process: fs.Process, tmp_path: Any) -> None:
    """The same method on other processes and prediction types: finite losses, and plans that fit."""
    from fastsample.zoo.unet import UNet

    torch.manual_seed(0)
    net = UNet(8, 2, channels=8, multipliers=[1], patch=2, num_classes=None)
    prediction = "x0" if isinstance(process, fs.EDM) else "v"
    teacher = fs.wrap(net, process, prediction, time_input="c_noise", sample_shape=(2, 8, 8))
    if not isinstance(process, fs.EDM):  # c_noise is infinite at zero signal
        teacher = teacher.replace(time_input="t")
    kind = getattr(distill, distill.METHODS[name][1])
    method = kind(teacher, **({"pairs": 16, "pair_steps": 2} if name in ("knowledge", "reflow") else {}))
    method.begin(4)
    x = torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    method.prepare(x, tmp_path)
    for role in method.roles(0):
        with method.training(role):
            loss = method.loss(Batch.of(x), role)
            assert bool(torch.isfinite(loss).all()), (role, loss)
            loss.mean().backward()
            grads = [p.grad for p in method.nets[role].parameters() if p.grad is not None]
            assert grads
            assert all(bool(torch.isfinite(g).all()) for g in grads)
    assert fs.Sampler(method.denoiser(), plan=method.plan(method.steps[0]))(n=2, seed=0).shape == (2, 2, 8, 8)


class _Dropped(nn.Module):
    """A smooth network with dropout."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.theta, self.dropout = nn.Parameter(torch.tensor(0.7)), nn.Dropout(p)

    def forward(self, x: Tensor, t: Tensor, step: Tensor | None = None) -> Tensor:
        told = t.to(x).reshape(-1, 1, 1, 1) + (0.0 if step is None else step.to(x).reshape(-1, 1, 1, 1))
        return self.dropout(torch.tanh(self.theta * x * torch.cos(told)))


@pytest.mark.parametrize("kind", [distill.SCM, distill.MeanFlow])
def test_dropout_draws_one_mask_for_all_passes_of_a_tangent(kind: Any) -> None:
    """A difference of two masks is no derivative: all ways to take it agree as they do without dropout."""
    x = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0))
    losses = {}
    for jvp in ("forward", "difference", "secant"):
        teacher = fs.wrap(_Dropped(0.3), fs.Flow(), "flow", sample_shape=SHAPE)
        settings = {"convert": 0, "warmup": 0} if kind is distill.SCM else {"different": 1.0}
        method = kind(teacher, jvp=jvp, width=0.005, **settings)
        torch.manual_seed(3)
        losses[jvp] = method.loss(Batch.of(x)).detach()
    torch.testing.assert_close(losses["difference"], losses["forward"], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(losses["secant"], losses["forward"], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("process", [VP, fs.EDM(), fs.Flow()], ids=lambda p: f"{p!r:.10}")
def test_the_teachers_steps_are_of_second_order_down_to_little_noise(process: fs.Process) -> None:
    """Where the clean sample is nearly known and the velocity is what an error is of."""
    teacher = gaussian(process)
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = []
    for n in (2, 4, 8, 256):
        t = process.t_of_rho(torch.linspace(0.8, 0.02, n + 1, dtype=torch.float64))
        state = x * float(torch.sqrt(process.alpha(t[0]) ** 2 + process.sigma(t[0]) ** 2))
        for a, b in itertools.pairwise(t):
            state = teacher_step(teacher, state, a.expand(4), b.expand(4), {})
        ends.append(state)
    errors = [float((e - ends[-1]).norm() / ends[-1].norm()) for e in ends[:-1]]
    assert errors[0] < 0.05
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3
