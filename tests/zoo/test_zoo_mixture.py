"""The analytic model: densities, moments, limits, predictions, labels, and the ODE's reference solution."""

from __future__ import annotations

import math

import pytest
import torch

from fastsample.process import EDM, VP, Flow, Process, TrigFlow
from fastsample.zoo.mixture import GaussianMixture, MixtureNet, digits_mixture


def small(k: int = 4, d: int = 3, seed: int = 0, classes: list[int] | None = None) -> GaussianMixture:
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(k, d, d, dtype=torch.float64, generator=g) * 0.5
    means = 2 * torch.randn(k, d, dtype=torch.float64, generator=g)
    weights = torch.rand(k, dtype=torch.float64, generator=g) + 0.2
    return GaussianMixture(
        means,
        root @ root.mT + 0.01 * torch.eye(d, dtype=torch.float64),
        weights,
        None if classes is None else torch.tensor(classes),
    )


def points(n: int, d: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 1.5


def test_log_prob_matches_torch_distributions() -> None:
    gm, x, alpha, sigma = small(), points(7, 3), 0.6, 0.5
    covs = alpha**2 * gm.covs + sigma**2 * torch.eye(3, dtype=torch.float64)
    parts = torch.distributions.MultivariateNormal(alpha * gm.means, covs)
    expected = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(gm.weights), parts
    ).log_prob(x)
    torch.testing.assert_close(gm.log_prob(x, alpha, sigma), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("labels", [None, 1])
@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.0), (0.9, 0.3), (1.0, 20.0), (0.0, 1.0)])
def test_score_is_the_gradient_of_log_prob(alpha: float, sigma: float, labels: int | None) -> None:
    gm, x = small(classes=[0, 1, 1, 2]), points(6, 3).requires_grad_()
    (expected,) = torch.autograd.grad(gm.log_prob(x, alpha, sigma, labels).sum(), x)
    torch.testing.assert_close(gm.score(x, alpha, sigma, labels), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.9, 0.3), (1.0, 0.01), (0.05, 1.0), (1.0, 80.0)])
def test_predictions_agree_with_each_other(alpha: float, sigma: float) -> None:
    gm, x = small(), points(6, 3)
    x0, eps = gm.x0(x, alpha, sigma), gm.eps(x, alpha, sigma)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(alpha * x0 + sigma * eps, x, **close)
    torch.testing.assert_close(gm.score(x, alpha, sigma), -eps / sigma, **close)
    torch.testing.assert_close(gm.v(x, alpha, sigma), alpha * eps - sigma * x0, **close)
    torch.testing.assert_close(gm.flow(x, alpha, sigma), eps - x0, **close)


def test_x0_is_the_posterior_mean_by_quadrature() -> None:
    gm = GaussianMixture(
        torch.tensor([[-1.0], [2.0]]), torch.tensor([[[0.3]], [[0.8]]]), torch.tensor([1.0, 3.0])
    )
    alpha, sigma, x = 0.7, 0.6, torch.tensor([[-0.4], [0.9]], dtype=torch.float64)
    grid = torch.linspace(-12, 14, 40001, dtype=torch.float64)[:, None]
    weight = (gm.log_prob(grid) - 0.5 * ((x[:, 0] - alpha * grid) / sigma).square().T).exp()  # [2, G]
    expected = weight @ grid / weight.sum(dim=1, keepdim=True)
    torch.testing.assert_close(gm.x0(x, alpha, sigma), expected, rtol=1e-9, atol=1e-9)


def test_limits() -> None:
    gm, x = small(), points(5, 3)
    torch.testing.assert_close(gm.x0(x, 0.5, 0.0), 2 * x)
    torch.testing.assert_close(gm.x0(x, 0.0, 1.0), gm.mean().expand(5, 3))
    torch.testing.assert_close(gm.x0(x, 0.0, 1.0, labels=2), gm.means[2].expand(5, 3))
    assert bool((gm.eps(x, 1.0, 0.0) == 0).all())
    torch.testing.assert_close(gm.eps(x, 0.0, 2.0), x / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [0.0, 1e-6, 1e-2, 80.0, 1e4])
def test_no_overflow_far_from_the_data(dtype: torch.dtype, sigma: float) -> None:
    gm = digits_mixture()
    x = (50 * torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))).to(dtype)
    for kind in ("x0", "eps", "score", "v", "flow", "log_prob"):
        assert bool(getattr(gm, kind)(x, 1.0, sigma).isfinite().all()), kind


def test_float32_agrees_with_float64() -> None:
    gm = digits_mixture()
    data, _ = gm.sample(32, seed=3)
    for sigma in (0.01, 0.1, 1.0, 10.0):
        noise = torch.randn(data.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        x = (data + sigma * noise).float()
        assert gm.x0(x, 1.0, sigma).dtype == torch.float32
        difference = (gm.x0(x, 1.0, sigma) - gm.x0(x.double(), 1.0, sigma)).square().mean().sqrt()
        assert difference < 2e-5


def test_levels_per_sample_equal_scalar_levels() -> None:
    gm, x = small(), points(4, 3)
    alpha, sigma = torch.tensor([1.0, 0.8, 0.0, 0.5]), torch.tensor([0.0, 0.6, 1.0, 3.0])
    labels = torch.tensor([0, 4, 2, 3])
    for kind in ("x0", "eps", "v", "flow", "log_prob"):
        together = getattr(gm, kind)(x, alpha, sigma, labels)
        for i in range(4):
            one = getattr(gm, kind)(x[i : i + 1], float(alpha[i]), float(sigma[i]), int(labels[i]))
            torch.testing.assert_close(together[i : i + 1], one, rtol=1e-6, atol=1e-7)  # levels in float32


def test_labels_choose_components() -> None:
    gm, x = small(classes=[0, 1, 1, 2]), points(5, 3)
    part = GaussianMixture(gm.means[1:3], gm.covs[1:3], gm.weights[1:3])
    torch.testing.assert_close(gm.x0(x, 0.8, 0.6, labels=1), part.x0(x, 0.8, 0.6))
    torch.testing.assert_close(gm.mean(1), part.mean())
    torch.testing.assert_close(gm.cov(1), part.cov())
    torch.testing.assert_close(gm.x0(x, 0.8, 0.6, labels=3), gm.x0(x, 0.8, 0.6))
    one_hot = torch.tensor([0.0, 5.0, 0.0])
    torch.testing.assert_close(gm.x0(x, 0.8, 0.6, class_probs=one_hot), part.x0(x, 0.8, 0.6))
    prior = torch.tensor([float(gm.weights[0]), float(gm.weights[1:3].sum()), float(gm.weights[3])])
    assert torch.allclose(
        gm.log_prob(x, 0.8, 0.6, class_probs=prior.double()), gm.log_prob(x, 0.8, 0.6), atol=1e-6
    )


def test_moments_and_samples_agree() -> None:
    gm, n = small(classes=[0, 1, 1, 2]), 200_000
    for label in (None, 1):
        x, classes = gm.sample(n, seed=5, label=label)
        mean, cov = gm.mean(label), gm.cov(label)
        assert bool(((x.mean(dim=0) - mean).abs() < 5 * (cov.diagonal() / n).sqrt()).all())
        # relative to the variances; the fourth moments of these mixtures are at most a few times them squared
        scale = cov.diagonal().sqrt()
        assert bool((((torch.cov(x.T) - cov) / scale / scale[:, None]).abs() < 10 / math.sqrt(n)).all())
    assert set(classes.tolist()) == {1}
    assert torch.equal(gm.sample(5, seed=1)[0], gm.sample(5, seed=1)[0])


def test_digits_mixture_is_the_maximum_likelihood_fit() -> None:
    from fastsample.zoo.data import digits

    gm = digits_mixture()
    images, labels = digits("all")
    flat = images.reshape(len(images), -1).double()
    assert gm.sample_shape == (1, 8, 8)
    assert gm.num_classes == 10
    # weights, means and covariances together reproduce the data's mean and covariance
    torch.testing.assert_close(gm.mean(), flat.mean(dim=0))
    expected = torch.cov(flat.T, correction=0) + 1e-3 * torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close(gm.cov(), expected)
    posterior = gm.responsibilities(images.double(), 1.0, 0.1)
    assert (posterior.argmax(dim=1) == labels).double().mean() > 0.97


@pytest.mark.parametrize("process", [VP.linear(), EDM(), Flow(), TrigFlow()], ids=lambda p: type(p).__name__)
def test_reference_of_one_gaussian_is_closed_form(process: Process) -> None:
    d = 3
    g = torch.Generator().manual_seed(2)
    root = torch.randn(d, d, dtype=torch.float64, generator=g)
    gm = GaussianMixture(points(1, d), (root @ root.T + 0.01 * torch.eye(d))[None], torch.ones(1))
    a0, s0 = (float(f(process.t_start)) for f in (process.alpha, process.sigma))
    a1, s1 = (float(f(process.t_end)) for f in (process.alpha, process.sigma))
    x = s0 * points(8, d, seed=3)
    ratio = ((a1**2 * gm.eigenvalues + s1**2) / (a0**2 * gm.eigenvalues + s0**2)).sqrt()[0]
    basis = gm.eigenvectors[0]
    expected = a1 * gm.means + ((x - a0 * gm.means) @ basis * ratio) @ basis.T
    solved = gm.reference(x, process)
    assert (solved.x - expected).square().mean().sqrt() < 1e-9
    torch.testing.assert_close(solved.x0, gm.x0(expected, a1, s1), rtol=1e-7, atol=1e-8)


def test_reference_agrees_with_another_method() -> None:
    """Classical Runge-Kutta with fixed steps in log-SNR, extrapolated, in the eps form of the ODE."""
    gm, process = digits_mixture(), VP.linear()
    x = torch.randn(16, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 11
    solved = gm.reference(x, process, labels=labels)
    lam0, lam1 = float(process.lam(999)), float(process.lam(0))

    def slope(lam: float, y: torch.Tensor) -> torch.Tensor:  # y = x / alpha; dy/drho = eps, rho = exp(-lam)
        alpha = 1 / math.sqrt(1 + math.exp(-2 * lam))
        sigma = alpha * math.exp(-lam)
        return -math.exp(-lam) * gm.eps(alpha * y, alpha, sigma, labels)

    def integrate(steps: int) -> torch.Tensor:
        h, y = (lam1 - lam0) / steps, x / float(process.alpha(999))
        for i in range(steps):
            lam = lam0 + i * h
            k1 = slope(lam, y)
            k2 = slope(lam + h / 2, y + h / 2 * k1)
            k3 = slope(lam + h / 2, y + h / 2 * k2)
            k4 = slope(lam + h, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y * float(process.alpha(0))

    coarse, fine = integrate(400), integrate(800)
    extrapolated = fine + (fine - coarse) / 15
    assert (solved.x - extrapolated).square().mean().sqrt() < 1e-8
    assert solved.error < 1e-9


def test_reference_inverts_guides_and_reaches_zero_noise() -> None:
    gm, process = digits_mixture(), VP.linear()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    end = gm.reference(x, process)
    back = gm.reference(end.x, process, process.t_end, process.t_start)
    assert (back.x - x).abs().max() < 1e-7
    clean = gm.reference(x, process, t_end=process.t_zero)
    assert torch.equal(clean.x, clean.x0)
    assert (clean.x - end.x0).square().mean().sqrt() < 0.02
    labels = torch.tensor([0, 1, 2, 3])
    plain, guided = (gm.reference(x, process, labels=labels, guidance=g) for g in (1.0, 2.0))
    assert (plain.x - guided.x).square().mean().sqrt() > 1e-3
    with pytest.raises(ValueError, match="labels"):
        gm.reference(x, process, guidance=2.0)
    with pytest.raises(ValueError, match="tolerance"):
        gm.reference(x, process, tolerance=1e-14)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow", "score"])
@pytest.mark.parametrize("process", [VP.linear(), EDM(), Flow(), TrigFlow()], ids=lambda p: type(p).__name__)
def test_net_denoises_alike_in_every_prediction(process: Process, prediction: str) -> None:
    import fastsample.denoiser

    gm = small()
    denoiser = fastsample.denoiser.wrap(MixtureNet(gm, process, prediction), process, prediction=prediction)
    t = 0.4 * process.t_start + 0.6 * process.t_end
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    x = sigma * points(5, 3)
    torch.testing.assert_close(denoiser(x, t, labels=2), gm.x0(x, alpha, sigma, 2), rtol=1e-8, atol=1e-8)


def test_net_takes_float32_times_at_both_ends() -> None:
    for process in (VP.linear(), EDM(), Flow(), TrigFlow()):
        net = MixtureNet(small(), process, "v")
        for t in (process.t_start, process.t_zero):
            assert bool(net(points(2, 3), torch.full((2,), t, dtype=torch.float32)).isfinite().all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 4)}, "shape"),
        ({"x": torch.zeros(2, 3, dtype=torch.float16)}, "float16"),
        ({"alpha": -1.0}, "alpha"),
        ({"sigma": math.nan}, "sigma"),
        ({"sigma": torch.ones(3)}, "sigma"),
        ({"alpha": 0.0, "sigma": 0.0}, "both zero"),
        ({"labels": 5}, "labels"),
        ({"labels": torch.tensor([0.5, 1.0])}, "labels"),
        ({"labels": torch.tensor([0, 1, 2])}, "labels"),
        ({"class_probs": torch.ones(3)}, "class_probs"),
        ({"class_probs": torch.tensor([1.0, -1, 1, 1])}, "class_probs"),
        ({"class_probs": torch.ones(4), "labels": 1}, "not both"),
    ],
)
def test_bad_arguments(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"x": torch.zeros(2, 3), "alpha": 1.0, "sigma": 1.0, **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        small().x0(**arguments)  # type: ignore[arg-type]


def test_bad_mixtures() -> None:
    means, covs, weights = torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3), torch.ones(2)
    with pytest.raises(ValueError, match="covs"):
        GaussianMixture(means, covs[:, :2], weights)
    with pytest.raises(ValueError, match="semi-definite"):
        GaussianMixture(means, -covs, weights)
    with pytest.raises(ValueError, match="weights"):
        GaussianMixture(means, covs, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="classes"):
        GaussianMixture(means, covs, weights, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="sample_shape"):
        GaussianMixture(means, covs, weights, sample_shape=(2, 2))
    with pytest.raises(ValueError, match="ridge"):
        GaussianMixture.fit(torch.zeros(4, 3), torch.tensor([0, 0, 1, 1]), ridge=0.0)
    with pytest.raises(ValueError, match="empty"):
        GaussianMixture.fit(torch.zeros(2, 3), torch.tensor([0, 2]))
